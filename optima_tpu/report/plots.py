"""Draws the plots of the page as SVG elements.

``report.layers`` and ``report.results`` provide the numbers.

An element is part of an HTML page: it uses the page's font and its light or dark colours, has a title and a description for
screen readers, and unique ids. Figures are created without pyplot, so there is no global state.
"""

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from optima_tpu.report.numbers import number, percent
from optima_tpu.report.runs import FinishedRun
from optima_tpu.report.view import Key, Plots

SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#767676")
"""Okabe and Ito's colours, which people with colour blindness can distinguish; without yellow, which is too light."""

MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "X": "✖", "P": "✚"}
"""The marker of each colour in matplotlib, and a similar character for legends."""

_INK, _GRID = "#222222", "#dddddd"
_PAGE = {_INK: "var(--ink)", _GRID: "var(--line)"} | {colour: f"var(--series-{index})" for index, colour in enumerate(SERIES)}
"""Colours that the page may replace, with their CSS variables."""

_SHADES = matplotlib.colormaps["cividis"].resampled(32)


class Line(NamedTuple):
    """One line.

    Attributes:
      x: ascending positions.
      y: a value for each position; NaN leaves a gap.
      series: index of its colour and marker.
      dashed: draw a dashed line without markers.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    series: int
    dashed: bool = False


class Panel(NamedTuple):
    """Lines on the same axes.

    Attributes:
      unit: formats a value.
      log: use a logarithmic scale; values that are not positive are left out.
    """

    title: str
    lines: Sequence[Line]
    unit: Callable[[float], str] = percent
    log: bool = False


def keys(runs: Sequence[FinishedRun]) -> list[Key]:
    """A legend entry for each of several runs; none for a run alone."""
    return [Key(run.label, index) for index, run in enumerate(runs) if run.label]


def drawn(panels: Sequence[Panel], prefix: str, legend: Sequence[Key] = (), share: bool = False, note: str = "") -> list[Plots]:
    """The panels as one part of a page; an empty list without panels."""
    elements = list(zip([panel.title for panel in panels], lines(panels, prefix, share=share)))
    return [Plots(elements, legend, note=note)] if elements else []


def lines(panels: Sequence[Panel], prefix: str, share: bool = False) -> list[Markup]:
    """Draws an SVG element for each panel, with blocks on the x axis.

    Args:
      prefix: prefix of the ids in the elements.
      share: use the same vertical axis in all panels, so that heights are comparable.
    """
    shared = _limits(panels) if share else None
    limits = [shared or _limits([panel]) for panel in panels]
    # Use one left margin for all panels, so that their axes are aligned.
    left = max(map(_left, panels, limits), default=0.0)
    return [_panel(panel, f"{prefix}-{index}", own, left) for index, (panel, own) in enumerate(zip(panels, limits, strict=True))]


def cells(
    title: str, values: np.ndarray, rows: Sequence[str], prefix: str, log: bool = False, limits: tuple[float, float] | None = None
) -> Markup:
    """Draws a map of blocks and layers as an SVG element.

    A cell shows its value under the mouse pointer.

    Args:
      title: the quantity that the map shows.
      values: [rows, blocks] shares; NaN is left blank.
      rows: names of the rows.
      prefix: prefix of the ids in the element.
      log: use a logarithmic colour scale.
      limits: values of the darkest and the lightest shade; None takes them from ``values``.
    """
    blocks, finite = values.shape[1], values[np.isfinite(values) & (values > 0 if log else True)]
    low, high = limits or ((finite.min(), finite.max()) if finite.size else (0.1, 1.0))
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
    height, norm = 0.19 * len(rows), LogNorm(low, high) if log else Normalize(low, high)
    ticks = _bar_ticks(norm, height)
    labels = [_tick(value, percent) for value in ticks]
    with _style():
        figure, (axes, beside) = _figure(
            left=_room(rows),
            right=max(0.6, _room(labels)),
            bottom=0.42,
            top=0.06,
            widths=(max(1.5, 0.15 * blocks), 0.1),
            height=height,
        )
        mesh = axes.pcolormesh(np.ma.masked_invalid(values), cmap=_SHADES, norm=norm, edgecolors="none")
        mesh.set_gid("cells")
        axes.invert_yaxis()
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        step = max(1, math.ceil(blocks / 20))
        axes.set_xticks(np.arange(0, blocks, step) + 0.5, [str(block) for block in range(0, blocks, step)])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("block")
        bar = figure.colorbar(mesh, cax=beside)
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_locator(FixedLocator(ticks))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, percent)))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        cell_titles = [
            f"block {block}, {rows[row]}: {percent(value)}"
            for (row, block), value in np.ndenumerate(values)
            if math.isfinite(value)
        ]
        return _element(
            figure, prefix, title, f"{title}, by block and layer: {_range(values.ravel().tolist(), percent)}.", cell_titles
        )


_LINE = 0.16
"""Height in inches of a line of text: ticks that are nearer to each other have labels that collide."""


def _bar_ticks(norm: Normalize, height: float) -> list[float]:
    """The tick values of a colour bar of ``height`` inches.

    A linear bar has ticks at its ends and its middle, where labels have room. A logarithmic bar has as many round values as
    have room; if at most one has, the ends of the bar.
    """
    low, high = float(norm.vmin or 0), float(norm.vmax or 0)
    ends = [low, high, (low + high) / 2]
    if not isinstance(norm, LogNorm):
        return _apart(ends, norm, height)
    tens, others = (LogLocator(subs=subs, numticks=99).tick_values(low, high) for subs in ((1,), (1, 2, 5)))
    ticks = _apart([value for value in (*tens, *others) if low <= value <= high * (1 + 1e-9)], norm, height)
    return ticks if len(ticks) > 1 else _apart(ends[:2], norm, height)


def _apart(values: Iterable[float], norm: Normalize, height: float) -> list[float]:
    """The values, ascending, whose labels stay clear of labels before them."""
    kept: list[float] = []
    for value in values:
        if all(height * abs(norm(value) - norm(other)) >= _LINE for other in kept):
            kept.append(float(value))
    return sorted(kept)


def _style() -> AbstractContextManager[None]:
    """The matplotlib settings for the page."""
    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "font.size": 8,
            "text.parse_math": False,
            "text.color": _INK,
            "axes.edgecolor": _INK,
            "axes.labelcolor": _INK,
            "xtick.color": _INK,
            "ytick.color": _INK,
            "axes.linewidth": 0.6,
            "xtick.major.width": 0.6,
            "ytick.major.width": 0.6,
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.facecolor": "none",
        }
    )


def _left(panel: Panel, limits: tuple[float, float]) -> float:
    """Width in inches of the labels of the vertical axis."""
    axes = Figure().add_subplot()
    _scale(axes, panel, limits)
    low, high = axes.get_ylim()
    return max(0.56, _room(_tick(value, panel.unit) for value in axes.get_yticks() if low <= value <= high))


def _room(labels: Iterable[str]) -> float:
    """Inches for the longest tick label in a font that the page chooses."""
    return 0.12 + 0.075 * max(map(len, labels), default=0)


def _panel(panel: Panel, prefix: str, limits: tuple[float, float], left: float) -> Markup:
    with _style():
        figure, (axes,) = _figure(left=left, right=0.16, bottom=0.42, top=0.06, widths=(2.3,), height=1.5)
        for line in panel.lines:
            colour = SERIES[line.series % len(SERIES)]
            look: dict[str, Any] = (
                {"linestyle": (0, (3, 1.5)), "linewidth": 1.1}
                if line.dashed
                else {"linewidth": 1.3, "markersize": 2.4, "marker": list(MARKERS)[line.series % len(MARKERS)]}
            )
            y = np.asarray(line.y, float)
            axes.plot(line.x, np.where(y > 0, y, np.nan) if panel.log else y, color=colour, **look)
        _scale(axes, panel, limits)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.set_xlabel("block")
        axes.grid(axis="y", color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        ranges = "; ".join(f"{line.label}: {_range(line.y, panel.unit)}" for line in panel.lines)
        return _element(figure, prefix, panel.title, f"{panel.title}, by block. {ranges}.")


def _figure(
    left: float, right: float, bottom: float, top: float, widths: Sequence[float], height: float
) -> tuple[Figure, list[Axes]]:
    """A figure with axes side by side; all sizes are in inches.

    The gaps between axes are 0.08 inches. The layout is fixed instead of computed by matplotlib. So the axes of neighbouring
    plots are aligned, and drawing is three times as fast.
    """
    whole, tall = left + sum(widths) + 0.08 * (len(widths) - 1) + right, bottom + height + top
    figure, axes = Figure(figsize=(whole, tall)), []
    for width in widths:
        axes.append(figure.add_axes((left / whole, bottom / tall, width / whole, height / tall)))
        left += width + 0.08
    return figure, axes


def _limits(panels: Sequence[Panel]) -> tuple[float, float]:
    """The smallest and the largest value that can be drawn."""
    values = np.array([value for panel in panels for line in panel.lines for value in line.y], float)
    values = values[np.isfinite(values) & (values > 0 if any(panel.log for panel in panels) else True)]
    return (float(values.min()), float(values.max())) if values.size else (0.1, 1.0)


def _scale(axes: Axes, panel: Panel, limits: tuple[float, float]) -> None:
    low, high = limits
    if panel.log:
        axes.set_yscale("log")
        low, high = (low / 1.2, high * 1.2) if high < 3 * low else (low / 1.1, high * 1.1)
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(log_ticks(low, high))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(min(0.0, low), 1.05 * high if high > 0 else 1.0)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, panel.unit)))


def log_ticks(low: float, high: float) -> LogLocator:
    """Ticks at powers of ten for a wide range, closer for a narrow range."""
    wide = math.log10(high / low)
    return LogLocator(subs=(1,) if wide > 3 else (1, 2, 5) if wide > 0.8 else (1, 1.5, 2, 3, 4, 5, 6, 8), numticks=20)


def _tick(value: float, unit: Callable[[float], str]) -> str:
    """A value as ``unit`` writes it, without trailing zeros: "50%"."""
    return re.sub(r"\.(\d*?)0+(?!\d)", lambda match: "." + match[1] if match[1] else "", unit(float(value)))


def _range(values: Sequence[float], unit: Callable[[float], str]) -> str:
    """The range of the values in words."""
    finite = [float(value) for value in values if math.isfinite(value)]
    if not finite:
        return "no value"
    low, high = unit(min(finite)), unit(max(finite))
    gaps = "" if len(finite) == len(values) else f", {len(values) - len(finite)} missing"
    return (low if low == high else f"from {low} to {high}") + gaps


def _element(figure: Figure, prefix: str, title: str, description: str, cell_titles: Sequence[str] = ()) -> Markup:
    """The figure as an SVG element for an HTML page.

    ``cell_titles`` are the titles of the cells of a map, in order.
    """
    data = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": prefix}):
        figure.savefig(data, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(data.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name in list(element.attrib):
            value = element.attrib.pop(name)
            if name == "id" or name.endswith("href"):
                value = re.sub("^(#?)", rf"\g<1>{prefix}-", value)
            value = re.sub(r"url\(#", f"url(#{prefix}-", value)
            if name == "style":
                value = re.sub("#[0-9a-f]{6}", lambda colour: _PAGE.get(colour[0], colour[0]), value)
                value = re.sub(r"font: ([\d.]+)px [^;]+", r"font-size: \1px", value)  # the family is the page's
                value = re.sub(r"font-family: [^;]+;? ?", "", value)  # as newer versions of matplotlib write it
            element.set(name.rpartition("}")[2], value)
    for parent in (root, *root.findall("defs")):
        for unwanted in parent.findall("metadata") + parent.findall("style"):  # a style element would apply to the whole page
            parent.remove(unwanted)
    group = root.find(f".//g[@id='{prefix}-cells']")
    for cell, words in zip([] if group is None else [child for child in group if child.tag != "defs"], cell_titles):
        ElementTree.SubElement(cell, "title").text = words
    for index, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{prefix}-{tag}"})
        element.text = text
        root.insert(index, element)
    box = root.attrib["viewBox"]
    width, height = (number(1.4 * float(size), 4) for size in box.split()[2:])
    root.attrib = {
        "viewBox": box,
        "width": width,
        "height": height,
        "role": "img",
        "aria-labelledby": f"{prefix}-title {prefix}-desc",
    }
    return Markup(ElementTree.tostring(root, encoding="unicode"))
