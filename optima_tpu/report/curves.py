"""Extracts the curves of a figure from reports, for ``report.figures``."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from optima_tpu.errors import UserError, plural
from optima_tpu.method.layer_rules import kind_name
from optima_tpu.report.averages import averages
from optima_tpu.report.contents import CellResult
from optima_tpu.report.layer_means import short_names
from optima_tpu.report.numbers import number
from optima_tpu.report.records import LayerReport
from optima_tpu.report.runs import names, read_report
from optima_tpu.runtime.checksums import read_intact

MADE_BY = "OPTIMA-TPU, optima_tpu.figures"
"""Stands in the metadata of every figure."""


def is_figure(data: bytes) -> bool:
    """Whether a file is a figure of this program."""
    return MADE_BY.encode() in data


class Curve(NamedTuple):
    """A line of a panel.

    Attributes:
      label: of its run or method, which the legend has once.
      x: blocks, or numbers of calibration windows, ascending.
      y: a value for each; NaN leaves a gap.
      colour, style: lines of one colour, or of one style and marker, belong together; both count from 0.
      held_out: whether the values are of held-out text.
      deviations: sample standard deviations of the values; NaN for a single one, empty where none are drawn.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    style: int | None = None
    held_out: bool = False
    deviations: Sequence[float] = ()


class FigureData(NamedTuple):
    """Data for a figure of the paper.

    Attributes:
      title: what all lines share.
      quantity: the quantity that the lines show.
      panels: the lines by the title of their panel.
      remarks: notes on data that the figure leaves out.
    """

    title: str
    quantity: str
    panels: Mapping[str, Sequence[Curve]]
    remarks: Sequence[str] = ()


def layer_errors(runs: Sequence[str | Path], against: Sequence[str | Path] = ()) -> FigureData:
    """``error_after / error_before`` of every layer, on the same inputs.

    Args:
      runs: run directories, or report.json files.
      against: empty; or runs to compare with, one for all or one for each. The ratio is then ``error_after`` of the run over
        ``error_after`` of the other run, each on its own inputs.

    Raises:
      UserError: a run is not finished or has no update, its files are damaged, or two runs cannot be compared.
    """
    paths, below = [str(run) for run in runs], [str(run) for run in against]
    if len(below) not in (0, 1, len(paths)):
        raise UserError(f"expected --against with one run, or one for each of the {len(paths)}, got {len(below)}")
    if len(set(paths)) < len(paths):
        raise UserError("expected each run once, got one of them twice: leave it out")
    reports = {run: read_report(run) for run in dict.fromkeys(paths + below)}
    title, named = names(reports)
    twins = [run for run in named if list(named.values()).count(named[run]) > 1]
    if twins:
        raise UserError(f"expected runs with different settings, got {' and '.join(twins)} with the same settings: leave one out")
    others: Sequence[str | None] = below * len(paths) if len(below) == 1 else below or [None] * len(paths)
    panels: dict[str, list[Curve]] = {}
    for index, (run, other) in enumerate(zip(paths, others, strict=True)):
        layers, label = reports[run].layers, named[run]
        if other is not None:
            label, errors = f"{label} / {named[other]}", _counterparts(run, layers, other, reports[other].layers)
        elif reports[run].solver is None:
            raise UserError(
                f"expected runs with a solver, got {run}, whose weights are the selector's own: there is no error ratio; choose "
                "runs with a solver, or give a run to compare with in --against"
            )
        else:
            errors = [(layer.error_before, layer.held_out_before) for layer in layers]
        for kind, (blocks, *ratios) in _ratios(layers, errors).items():
            curves = [Curve(label, blocks, values, index, held_out=unseen) for values, unseen in zip(ratios, (False, True))]
            panels.setdefault(kind, []).extend(
                curve for curve in curves if not (curve.held_out and all(map(math.isnan, curve.y)))
            )
    drawn = [(curve, value) for curves in panels.values() for curve in curves if not curve.held_out for value in curve.y]
    gaps = [curve.label for curve, value in sorted(drawn, key=lambda each: each[0].colour) if math.isnan(value)]
    if len(gaps) == len(drawn):
        raise UserError(f"expected layers with an error ratio, got only zero or not finite errors in {', '.join(paths)}")
    remarks = [
        f"{label}: left out {plural(gaps.count(label), 'layer')} whose errors are zero or not finite"
        for label in dict.fromkeys(gaps)
    ]
    quantity = "final layer error: run / other run" if below else "layer error: after the update / before"
    return FigureData(title, quantity, {short: panels[name] for name, short in short_names(list(panels)).items()}, remarks)


def windows(sweep: str | Path) -> FigureData:
    """Perplexity by number of calibration windows, for each mask and update.

    Args:
      sweep: directory of the sweep's tables, or its results.json. Cells that are not finished are left out and counted in
        ``remarks``.

    Raises:
      UserError: the file does not exist, no cell is finished, or all cells have the same number of windows.
    """
    path = Path(sweep).expanduser()
    if path.is_dir() and not (path / "results.json").exists():
        raise UserError(f"expected the directory of a sweep, got {sweep}, which has no results.json: check the path")
    path = path / "results.json" if path.is_dir() else path
    again, remedy = (
        "repeat the sweep's command, which writes the file again",
        "it is no results.json of a sweep, or it is damaged",
    )
    results = read_intact(path, list[CellResult], again, remedy)
    done = [result for result in results if result.state == "finished"]
    if not done:
        raise UserError(f"expected finished cells in {path}, got none yet; repeat the sweep's command")
    counts = sorted({result.windows for result in done})
    if len(counts) == 1:
        raise UserError(
            f"expected several numbers of calibration windows, got {counts[0]} in all finished cells of "
            f"{path}; give the sweep several, such as windows: [16, 64]"
        )
    points = averages(done)
    masks, updates = (list(dict.fromkeys(point[axis] for point in points)) for axis in ("mask", "update"))
    methods: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for point in points:
        methods.setdefault((point["pattern"], point["mask"], point["update"]), []).append(point)
    panels: dict[str, list[Curve]] = {}
    for (pattern, mask, update), own in methods.items():
        x, y, spreads = zip(*sorted((point["windows"], point["perplexity"], point["perplexity_spread"]) for point in own))
        deviations = [math.nan if spread is None else spread for spread in spreads]
        curve = Curve(f"{mask} + {update}", x, y, masks.index(mask), updates.index(update), deviations=deviations)
        panels.setdefault(f"pattern {pattern}", []).append(curve)
    seeds = sorted({point["seeds"] for point in points})
    counted = " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
    spread = f"\nmean and standard deviation over {counted} seeds" if seeds[-1] > 1 else ""
    left = len(results) - len(done)
    remarks = [f"left out {plural(left, 'cell')} of {len(results)} that are not finished"] if left else []
    return FigureData(_windows_title(path.parent, done) + spread, "perplexity", panels, remarks)


def _counterparts(run: str, layers: list[LayerReport], other: str, others: list[LayerReport]) -> list[tuple[float, float | None]]:
    """The other run's final errors of the same layers, in their order."""
    errors = {(layer.block, layer.name): (layer.error_after, layer.held_out_after) for layer in others}
    if {(layer.block, layer.name) for layer in layers} != errors.keys():
        raise UserError(f"expected runs that prune the same layers of one model, got {run} and {other}: choose another --against")
    return [errors[layer.block, layer.name] for layer in layers]


def _ratios(
    layers: Sequence[LayerReport], below: Sequence[tuple[float, float | None]]
) -> dict[str, tuple[list[int], list[float], list[float]]]:
    """Final errors divided by ``below``, by kind of layer and by block.

    Each kind has its blocks, their ratios on the calibration text, and their ratios on held-out text. If a block has several
    layers of a kind, such as experts, its values are the means of the layers' ratios.
    """
    points: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for layer, (calibration, held_out) in zip(layers, below, strict=True):
        points.setdefault(kind_name(layer.name), {}).setdefault(layer.block, []).append(
            (_ratio(layer.error_after, calibration), _ratio(layer.held_out_after, held_out))
        )

    def values(own: Mapping[int, list[tuple[float, float]]]) -> tuple[list[int], list[float], list[float]]:
        blocks = sorted(own)
        calibration, held_out = zip(*(map(_mean, zip(*own[block])) for block in blocks))
        return blocks, list(calibration), list(held_out)

    return {kind: values(own) for kind, own in points.items()}


def _mean(values: Sequence[float]) -> float:
    """The mean of the values that are not NaN; NaN if there are none."""
    numbers = [value for value in values if not math.isnan(value)]
    return statistics.fmean(numbers) if numbers else math.nan


def _ratio(above: float | None, below: float | None) -> float:
    """``above / below``; NaN unless both are finite and ``below`` > 0."""
    if above is None or below is None or not (math.isfinite(above) and 0 < below < math.inf):
        return math.nan
    return above / below


def _windows_title(directory: Path, done: Sequence[CellResult]) -> str:
    """Model and texts, from the report of the first finished cell."""
    assert done[0].report is not None, "a finished cell has one"
    report = read_report(str(directory / done[0].report))
    text = report.settings.calibration
    dense = " or ".join(dict.fromkeys(number(result.dense, 4) for result in done))
    return (
        f"{report.settings.model_name}, calibrated on {text.source} in windows of {text.length} tokens\n"
        f"perplexity on {report.evaluation.how}, dense {dense}"
    )
