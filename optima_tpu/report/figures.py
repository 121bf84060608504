"""Draws the figures with matplotlib. ``report.curves`` provides the numbers.

Figures are created without pyplot, so there is no global state and no display is needed.
"""

import io
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
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from optima_tpu.report.curves import MADE_BY, Curve, FigureData
from optima_tpu.report.plots import MARKERS, SERIES, log_ticks
from optima_tpu.report.view import without_folders
from optima_tpu.runtime.files import write_bytes, writing

_COLOURS, _MARKERS = SERIES, tuple(MARKERS)
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
      line, entry: sizes of a line in a panel and in the legend.
      share: use the same axes in all panels.
    """

    columns: int
    panel: tuple[float, float]
    across: str
    line: Look
    entry: Look
    share: bool = False


def layer_errors(data: FigureData) -> Figure:
    """A figure with a panel for each layer name and a line for each run.

    Held-out text is dashed. All panels have the same axes.
    """
    sizes = {"markersize": 2.5, "linewidth": 1.2}
    figure, panels = _figure(data, _Layout(4, (2.8, 2.2), "block", sizes, {"markersize": 4}, share=True))
    for axes in panels:
        axes.axhline(1, color=_GREY, linewidth=0.8, zorder=1)
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    values = [value for curves in data.panels.values() for curve in curves for value in curve.y]
    largest = np.nanmax(values)
    # Use a logarithmic axis if an error more than doubles, as it may on held-out text.
    if largest > 2 and np.nanmin(values) > 0:
        _logarithmic(panels[0], values)
    else:
        panels[0].set_ylim(0, 1.05 * max(1, largest))
    return figure


def windows(data: FigureData) -> Figure:
    """A figure with a panel for each pattern and a line for each method.

    Error bars show the deviation over seeds. The colour of a line shows the mask, its style the update.
    """
    sizes = {"markersize": 4.5, "linewidth": 1.4}
    figure, panels = _figure(data, _Layout(2, (4.8, 3.2), "calibration windows", sizes, sizes))
    for axes, curves in zip(panels, data.panels.values()):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted({count for curve in curves for count in curve.x})))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        means = [mean for curve in curves for mean in curve.y]
        # Use a logarithmic axis if one method is so much worse that the other lines would overlap.
        if max(means) > 2.5 * min(means):
            _logarithmic(axes, means)
    return figure


def _look(curve: Curve) -> Look:
    """The look of a curve: a colour, a line style and a marker.

    Each colour has its own marker, which shifts when the colours repeat. A curve with a ``style`` has the marker of that style.
    """
    count, colour = len(_COLOURS), curve.colour
    if curve.held_out:
        return {"color": _COLOURS[colour % count], "linestyle": _HELD_OUT, "linewidth": 1, "label": f"{curve.label}, held-out"}
    style = (curve.style or 0) % len(_STYLES)
    marker = (colour + colour // count) % len(_MARKERS) if curve.style is None else style
    return {"color": _COLOURS[colour % count], "linestyle": _STYLES[style], "marker": _MARKERS[marker], "label": curve.label}


def _entries(data: FigureData, sizes: Look) -> list[Line2D]:
    """The legend: a line for each label, and for held-out text if drawn."""
    curves = [curve for own in data.panels.values() for curve in own]
    looks = {curve.label: _look(curve) for curve in curves if not curve.held_out}
    entries = [Line2D([], [], **look, **sizes) for look in looks.values()]
    if any(curve.held_out for curve in curves):
        entries += [
            Line2D([], [], color=_GREY, label="calibration text"),
            Line2D([], [], color=_GREY, linestyle=_HELD_OUT, label="held-out text"),
        ]
    return entries


def _plot(axes: Axes, curve: Curve, sizes: Look) -> None:
    look = sizes | _look(curve)
    if curve.deviations:
        bars = None if np.isnan(curve.deviations).all() else curve.deviations
        axes.errorbar(curve.x, curve.y, yerr=bars, capsize=2.5, elinewidth=1, **look)
    else:
        axes.plot(curve.x, curve.y, **look)


def write(figure: Figure, path: Path) -> None:
    """Writes a figure in the format of the file's suffix.

    The same figure gives the same bytes.

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


def _figure(data: FigureData, layout: _Layout) -> tuple[Figure, Sequence[Axes]]:
    """A figure with the panels, their lines, and the legend below them.

    The title of the figure and the labels of the legend are wrapped to the figure's width.
    """
    titles, entries = list(data.panels), _entries(data, layout.entry)
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
        for curve in data.panels[titles[index]]:
            _plot(axes, curve, layout.line)
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
    """Sets a logarithmic axis with ticks such as 20, 50 and 100, not 10^2."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(log_ticks(np.nanmin(values), np.nanmax(values)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
