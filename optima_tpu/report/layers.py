"""Page sections on layers: errors, sparsity, solver, unusual layers."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from optima_tpu.errors import plural
from optima_tpu.method.layer_rules import kind_name
from optima_tpu.report import plots
from optima_tpu.report.columns import EVERY, KINDS, ROWS, Layers, page_columns, steps
from optima_tpu.report.findings import FINDINGS, TRADED, finding_lines, unusual_count
from optima_tpu.report.layer_means import gap_meaning, held_out_caveat, named_kinds, quantized_line, short_names, sparsity
from optima_tpu.report.meaningless import meaningless_lines
from optima_tpu.report.numbers import percent
from optima_tpu.report.records import LayerReport
from optima_tpu.report.runs import FinishedRun
from optima_tpu.report.view import Key, Plots, Section, Table

_BEFORE, _AFTER = 6, 0  # grey, blue
_LISTED = 1000
"""Most layers that a table lists; report.json has all of them."""


def layer_errors(runs: Sequence[FinishedRun]) -> Section:
    """Section on layer errors: plots by block, tables by kind and layer."""
    several = len(runs) > 1
    panels = [plots.Panel(title, _error_lines(runs, kind), log=True) for kind, title in _kinds(runs).items()]
    zeros = sum(layer.error_after == 0 for run in runs for layer in run.report.layers)
    notes = ["All plots have the same logarithmic scale."]
    notes += [f"{zeros} errors of exactly 0 are not shown."] if zeros else []
    return Section(
        "layers",
        "Layer errors, " + ("after the update" if several else "before and after the update"),
        _error_paragraphs(runs),
        plots.drawn(panels, "errors", _error_legend(runs), share=True, note=" ".join(notes)),
        [_kind_table(run) for run in runs],
        [_layer_table(run) for run in runs],
    )


def _error_lines(runs: Sequence[FinishedRun], kind: str) -> list[plots.Line]:
    """A kind's errors by block; for several runs only after the update."""
    lines, several = [], len(runs) > 1
    for index, run in enumerate(runs):
        layers = [layer for layer in run.report.layers if kind_name(layer.name) == kind]
        before = {
            "before, calibration text": (_BEFORE, _fitted("error_before")),
            "before, held-out text": (_BEFORE, lambda layer: layer.held_out_before),
        }
        after = "after" if run.report.solver else "of the selector's weights"
        curves = (before if run.report.solver and not several else {}) | {
            f"{after}, calibration text": (index, _fitted("error_after")),
            f"{after}, held-out text": (index, lambda layer: layer.held_out_after),
        }
        for name, (series, value) in curves.items():
            blocks, values = _by_block(layers, value)
            if not np.isnan(values).all():
                lines.append(plots.Line(_line_label(run, name), blocks, values, series, dashed="held-out" in name))
    return lines


def _error_legend(runs: Sequence[FinishedRun]) -> list[Key]:
    update = [Key("before the update", _BEFORE), Key("after the update", _AFTER)]
    legend = plots.keys(runs) or update * bool(runs[0].report.solver)
    held_out = any(run.report.has_held_out for run in runs)
    return legend + ([Key("calibration text"), Key("held-out text", dashed=True)] if held_out else [])


def _error_paragraphs(runs: Sequence[FinishedRun]) -> list[str]:
    """What the errors are, and on what text, in paragraphs."""
    text = [
        "The error of a layer is the squared change of its output relative to the output’s energy, ‖XW′ − XV′‖² / ‖XW′‖², with "
        "the dense weights W, the pruned weights V, and the layer’s inputs X in the pruned model. Before: with the selector’s "
        "weights. After: with the solver’s weights. Lower is better. Held-out text is calibration text that no weight was fitted "
        "to."
    ]
    for run in runs:
        if caveat := held_out_caveat(run.report.settings):
            text.append(f"{f'The held-out text of {run.label}' if run.label else 'This text'} {caveat}.")
    if any(run.report.aims_at_dense for run in runs):
        text.append(
            "With a dense target, the solver minimises the distance to the dense model’s output instead of this error, so "
            "this error may rise. Against dense: ‖X_d W′ − XV′‖² / ‖X_d W′‖² on held-out text, with X_d the layer’s inputs in "
            "the dense model. The value for the dense weights W shows the error that the layers before have caused."
        )
    for run in runs:
        if errors := quantized_line(run.report.layers):
            text.append(
                f"{run.subject} quantises the weights after the update; the errors above are from before. Mean error: {errors}."
            )
    if any(run.report.weighed_layers for run in runs):
        text.append(
            "If the target weighs tokens, so do the errors of the layers that add to the residual stream: the weight of a token "
            "is the inverse mean square of the residual stream after the layer."
        )
    return text + [
        f"{run.subject} has no held-out text: its errors are measured on the text that the weights "
        "were fitted to, and are larger on other text."
        for run in runs
        if not run.report.has_held_out
    ]


def maps(runs: Sequence[FinishedRun]) -> Section:
    """Section with maps of every layer's sparsity and error."""
    several, elements = len(runs) > 1, []
    kinds = _kinds(runs)
    blocks = 1 + max((layer.block for run in runs for layer in run.report.layers), default=0)
    unseen = all(run.report.has_held_out for run in runs)

    def grid(run: FinishedRun, value: Callable[[LayerReport], float | None]) -> np.ndarray:
        cells = np.full((len(kinds), blocks), np.nan)
        for row, kind in enumerate(kinds):
            where, values = _by_block([layer for layer in run.report.layers if kind_name(layer.name) == kind], value)
            cells[row, where] = values
        return cells

    errors = [grid(run, (lambda layer: layer.held_out_after) if unseen else _fitted("error_after")) for run in runs]
    finite = np.concatenate([values[np.isfinite(values) & (values > 0)] for values in errors]) if kinds else np.array([])
    limits = (float(finite.min()), float(finite.max())) if finite.size else None
    for index, (run, error) in enumerate(zip(runs, errors) if kinds else ()):
        rows = list(kinds.values())
        share, final = (
            f"{what}{run.behind}" for what in ("Sparsity", f"Final error on {'held-out' if unseen else 'calibration'} text")
        )
        shares = grid(run, lambda layer: layer.sparsity)
        elements += [
            (share, plots.cells(share, shares, rows, f"map-{index}-sparsity", limits=(0.0, 1.0))),
            (final, plots.cells(final, error, rows, f"map-{index}-error", log=True, limits=limits)),
        ]
    text = []
    for run in runs:
        sparsities = [layer.sparsity for layer in run.report.layers] or [0.0]
        low, high = percent(min(sparsities)), percent(max(sparsities))
        if several and low == high:
            continue  # the comparison of runs shows it
        spread = "the same share in each matrix" if low == high else f"from {low} to {high} per matrix"
        text.append(
            f"{run.before}{percent(sparsity(run.report.layers))} of the weights of "
            f"{plural(len(run.report.layers), 'matrix')} are zero by the mask, {spread}."
        )
    note = "Blank: not pruned. For several layers of one kind in a block, such as experts, the map shows their mean."
    return Section(
        "maps", "Where the zeros and the errors are", text, [Plots(elements, wide=True, note=note)] if elements else []
    )


def solver(runs: Sequence[FinishedRun]) -> Section:
    """Section on the solver: iterations, gaps, rows that did not converge."""
    solved = [(index, run) for index, run in enumerate(runs) if run.report.solver]
    if not solved:
        return Section("solver", "Solver", ["No solver changed the weights: they are the selector’s own."])
    used = sorted({run.report.solver for run in runs if run.report.solver})
    text = [f"The gap is {gap_meaning(used)}."]
    if without := [run.label for run in runs if not run.report.solver]:
        text.append(f"No solver in {'; '.join(without)}.")
    curves = {
        ("Steps of a row", steps, False): (lambda layer: layer.steps_median, lambda layer: layer.steps_max),
        ("Gap of a row", percent, True): (lambda layer: layer.gap_median, lambda layer: layer.gap_max),
    }
    panels = []
    for (title, unit, log), (median, largest) in curves.items():
        lines = []
        for index, run in solved:
            lines += [
                plots.Line(_line_label(run, "median"), *_by_block(run.report.layers, median, statistics.median), index),
                plots.Line(_line_label(run, "largest"), *_by_block(run.report.layers, largest, max), index, dashed=True),
            ]
        panels.append(plots.Panel(title, lines, unit, log))
    legend = [Key(run.label, index) for index, run in solved if run.label]
    legend += [Key("median of a block"), Key("largest of a block", dashed=True)]
    note = "A refused row keeps the selector’s weights because of the run’s acceptance rule."
    tables = [
        _table(ROWS, run, run.label or f"Rows, by {run.report.solver}", named_kinds(run.report.layers).items(), note)
        for _, run in solved
    ]
    return Section("solver", "Solver", text, plots.drawn(panels, "solver", legend), tables)


def strange(runs: Sequence[FinishedRun]) -> Section:
    """Section on unusual layers, by name."""
    text, folded = [], []
    fine = [run for run in runs if not unusual_count(run.report.layers) and not meaningless_lines(run.report)]
    if fine:
        where = f" in {'; '.join(run.label for run in fine)}" if fine[0].label else ""
        unseen = not any(run.report.has_held_out for run in fine)
        kept = "" if unseen or not any(run.report.solver for run in fine) else ", and no matrix got worse on held-out text"
        clean = f"no dead inputs, no layer with too few tokens, all rows converged and were accepted{kept}"
        text.append(f"Nothing{where}: {clean if any(run.report.layers for run in fine) else 'no layer was pruned'}.")
    for run in runs:
        layers, every = run.report.layers, (*FINDINGS, TRADED)
        lines = meaningless_lines(run.report) + finding_lines(every, layers)
        text += [f"{run.before}{line}." if run.label else f"{line[0].upper()}{line[1:]}." for line in lines]
        rows = [[name, each.written(layers), each.show(amount)] for each in every for name, amount in each.of(layers).items()]
        if rows:
            head = ["layer", "finding", "amount"]
            folded.append(Table(f"Full list, by layer{run.behind}", head, rows[:_LISTED], words=True, note=_rest(len(rows))))
    return Section("unusual", "Anything unusual", text, folded=folded)


def _line_label(run: FinishedRun, name: str) -> str:
    return f"{run.label}, {name}" if run.label else name


def _kinds(runs: Sequence[FinishedRun]) -> dict[str, str]:
    """Maps every kind of layer in the runs to its short name."""
    return short_names(list(dict.fromkeys(kind_name(layer.name) for run in runs for layer in run.report.layers)))


def _fitted(name: str) -> Callable[[LayerReport], float | None]:
    """A getter of a calibration error; None for an expert without tokens."""
    return lambda layer: getattr(layer, name) if layer.tokens != 0 else None


def _by_block(
    layers: Sequence[LayerReport],
    value: Callable[[LayerReport], float | None],
    of: Callable[[Sequence[float]], float] = statistics.fmean,
) -> tuple[list[int], list[float]]:
    """Block indices, and each block's mean or other statistic of ``value``.

    Layers whose value is None are ignored. The result is NaN if no layer has a value or one value is not finite.
    """
    by_block: dict[int, list[float]] = {}
    for layer in layers:
        own, values = value(layer), by_block.setdefault(layer.block, [])
        if own is not None:
            values.append(own if math.isfinite(own) else math.nan)
    return sorted(by_block), [
        of(by_block[block]) if by_block[block] and not np.isnan(by_block[block]).any() else math.nan for block in sorted(by_block)
    ]


def _kind_table(run: FinishedRun) -> Table:
    layers = run.report.layers
    rows = named_kinds(layers) | ({"all": layers} if layers else {})
    table = _table(KINDS, run, run.label or "Mean over blocks", rows.items(), "" if rows else "No layer was pruned.")
    return table._replace(total=bool(rows))


def _layer_table(run: FinishedRun) -> Table:
    layers = run.report.layers
    if len(layers) > _LISTED:
        layers = sorted(layers, key=lambda layer: layer.error_after, reverse=True)
    rows = ((f"{layer.block} {layer.name}", [layer]) for layer in layers[:_LISTED])
    table = _table(EVERY, run, f"Every layer{run.behind}", rows)
    read = "Tokens: of the calibration text, those that the layer read; an expert reads those that are routed to it."
    return table._replace(note=" ".join(filter(None, (read * ("tokens" in table.head), _rest(len(layers), ", by error")))))


def _table(kind: str, run: FinishedRun, caption: str, rows: Iterable[tuple[str, Layers]], note: str = "") -> Table:
    """A table of rows that are layers."""
    columns = page_columns(kind, run.report.layers, run.report.solver)
    cells = [[name, *(column.cell(layers) for column in columns)] for name, layers in rows]
    first = "block and layer" if kind == EVERY else "layer"
    return Table(caption, [first, *(column.name for column in columns)], cells, note)


def _rest(count: int, order: str = "") -> str:
    return f"The first {_LISTED:,} of {count:,}{order}; report.json has all of them." if count > _LISTED else ""
