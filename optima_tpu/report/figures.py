"""Draws the figures with matplotlib. ``report.curves`` provides the numbers.

Figures are created without pyplot, so there is no global state and no display is needed.
"""

import io
import itertools
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from optima_tpu.report.curves import MADE_BY, LayerErrors, WindowCounts
from optima_tpu.report.summary import short_names
from optima_tpu.report.view import without_folders
from optima_tpu.runtime.files import write_bytes, writing

# Okabe and Ito's colours, which people with colour blindness can distinguish; without yellow, which is too light.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
_MARKERS = ("o", "s", "^", "D", "v", "X", "P")
_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_HELD_OUT = (0, (3, 1.5))
_GREY = "#666666"

Look = dict[str, Any]
"""Keyword arguments for a line in matplotlib."""


class _Layout(NamedTuple):
    """How a figure arranges its panels.

    Attributes:
      columns: the most panels side by side.
      panel: width and height of a panel in inches.
      across: label of the horizontal axes.
      share: use the same axes in all panels.
    """

    columns: int
    panel: tuple[float, float]
    across: str
    share: bool = False


def layer_errors(data: LayerErrors) -> Figure:
    """A figure with one panel for each layer name and one line for each run; held-out text is dashed. All axes are the same."""
    names = list(dict.fromkeys(name for lines in data.lines.values() for name in lines))
    # Each colour has its own marker; when the colours repeat, the markers are shifted.
    count = len(_COLOURS)
    looks: dict[str, Look] = {
        label: {"color": _COLOURS[index % count], "marker": _MARKERS[(index + index // count) % len(_MARKERS)]}
        for index, label in enumerate(data.lines)
    }
    entries = [Line2D([], [], markersize=4, label=label, **look) for label, look in looks.items()]
    held_out = any(np.isfinite(line.held_out).any() for lines in data.lines.values() for line in lines.values())
    if held_out:
        entries += [
            Line2D([], [], color=_GREY, label="calibration text"),
            Line2D([], [], color=_GREY, linestyle=_HELD_OUT, label="held-out text"),
        ]
    titles = short_names(names)
    figure, panels = _figure(data, list(titles.values()), _Layout(4, (2.8, 2.2), "block", share=True), entries)
    for axes, name in zip(panels, titles):
        axes.axhline(1, color=_GREY, linewidth=0.8, zorder=1)
        for label, lines in data.lines.items():
            if name in lines:
                line = lines[name]
                axes.plot(line.blocks, line.calibration, markersize=2.5, linewidth=1.2, label=label, **looks[label])
                if np.isfinite(line.held_out).any():
                    axes.plot(
                        line.blocks,
                        line.held_out,
                        color=looks[label]["color"],
                        linestyle=_HELD_OUT,
                        linewidth=1,
                        label=f"{label}, held-out",
                    )
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    values = [value for lines in data.lines.values() for line in lines.values() for value in (*line.calibration, *line.held_out)]
    largest = np.nanmax(values)
    # Use a logarithmic axis if an error more than doubles, as it may on held-out text.
    if largest > 2 and np.nanmin(values) > 0:
        _logarithmic(panels[0], values)
    else:
        panels[0].set_ylim(0, 1.05 * max(1, largest))
    return figure


def windows(data: WindowCounts) -> Figure:
    """A figure with one panel for each pattern and one line for each method, with error bars over seeds.

    The colour of a line shows the mask, its style the update.
    """
    every = [line for lines in data.lines.values() for line in lines]
    colours = dict(zip(dict.fromkeys(line.mask for line in every), itertools.cycle(_COLOURS)))
    styles = dict(zip(dict.fromkeys(line.update for line in every), itertools.cycle(zip(_STYLES, _MARKERS))))
    looks: dict[tuple[str, str], Look] = {}
    for line in every:
        style, marker = styles[line.update]
        looks[line.mask, line.update] = {
            "color": colours[line.mask],
            "linestyle": style,
            "marker": marker,
            "markersize": 4.5,
            "linewidth": 1.4,
            "label": f"{line.mask} + {line.update}",
        }
    entries = [Line2D([], [], **look) for look in looks.values()]
    titles = [f"pattern {pattern}" for pattern in data.lines]
    figure, panels = _figure(data, titles, _Layout(2, (4.8, 3.2), "calibration windows"), entries)
    for axes, lines in zip(panels, data.lines.values()):
        for line in lines:
            bars = None if np.isnan(line.deviations).all() else line.deviations
            axes.errorbar(line.windows, line.means, yerr=bars, capsize=2.5, elinewidth=1, **looks[line.mask, line.update])
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted({count for line in lines for count in line.windows})))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        means = [mean for line in lines for mean in line.means]
        # Use a logarithmic axis if one method is so much worse that the other lines would overlap.
        if max(means) > 2.5 * min(means):
            _logarithmic(axes, means)
    return figure


def write(figure: Figure, path: Path) -> None:
    """Writes a figure in the format of the file's suffix. The same figure gives the same bytes.

    Raises:
      UserError: the disk is full, or the folder is not writable.
    """
    form = path.suffix.lower().removeprefix(".")
    about = {
        "png": {"Software": MADE_BY},
        "svg": {"Creator": MADE_BY, "Date": None},
        "pdf": {"Creator": MADE_BY, "CreationDate": None},
    }[form]
    data = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "optima_tpu"}):
        figure.savefig(data, format=form, dpi=160, metadata=about)
    with writing(path, "choose another --output"):
        write_bytes(path, data.getvalue())


def _figure(
    data: LayerErrors | WindowCounts, titles: Sequence[str], layout: _Layout, entries: Sequence[Line2D]
) -> tuple[Figure, Sequence[Axes]]:
    """A figure with a panel for each title and the legend below them.

    The title of the figure and the labels of the legend are wrapped to the figure's width.
    """
    count, columns = len(titles), min(layout.columns, len(titles))
    rows, width = math.ceil(count / columns), 0.8 + columns * layout.panel[0]
    # Widths in inches: a character of the title 0.09, a character of the legend 0.075, a legend line with its gaps 0.7.
    title = "\n".join(textwrap.fill(without_folders(line), int(width / 0.09)) for line in data.title.splitlines())
    for entry in entries:
        entry.set_label(textwrap.fill(str(entry.get_label()), int((width - 0.7) / 0.075)))
    labels = [str(entry.get_label()).splitlines() for entry in entries]
    widest = 0.7 + 0.075 * max(len(line) for label in labels for line in label)
    below = math.ceil(len(entries) / max(1, int(width / widest)))
    wrapped = sum(map(len, labels)) - len(labels)  # labels wrap only if the legend has one column
    height = 0.2 + 0.2 * len(title.splitlines()) + rows * layout.panel[1] + (below + wrapped) * 0.21
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = list(figure.subplots(rows, columns, sharex=layout.share, sharey=layout.share, squeeze=False).flat)
    for axes in grid[count:]:
        axes.remove()
    for index, axes in enumerate(grid[:count]):
        lowest = not layout.share or index + columns >= count  # the lowest panel of its column
        axes.set_title(titles[index], fontsize=10)
        axes.tick_params(labelsize=8, labelbottom=lowest)
        axes.set_xlabel(layout.across if lowest else "", fontsize=9)
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.supylabel(data.quantity, fontsize=10)
    # Distribute the entries evenly over the rows: 6 entries in two rows become 3 and 3, not 5 and 1.
    figure.legend(
        handles=entries,
        loc="outside lower center",
        ncols=math.ceil(len(entries) / below),
        fontsize=9,
        frameon=False,
        handlelength=3,
    )
    return figure, grid[:count]


def _logarithmic(axes: Axes, values: Sequence[float]) -> None:
    """Sets a logarithmic axis with ticks such as 20, 50 and 100, not 10^2; with more ticks if the values are close."""
    axes.set_yscale("log")
    wide = np.nanmax(values) > 10 * np.nanmin(values)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if wide else (1, 1.5, 2, 3, 4, 5, 6, 8)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
