"""The results of a sweep as Markdown, CSV, JSON and a terminal table."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import structs

from optima_tpu.config.run_config import to_dict
from optima_tpu.config.written import on_preset
from optima_tpu.errors import UserError, plural
from optima_tpu.pipeline.opening_lines import short_text
from optima_tpu.pipeline.sweep.cells import Cell
from optima_tpu.pipeline.sweep.grid import CellGrid
from optima_tpu.report.averages import averages
from optima_tpu.report.contents import CellName, CellResult, Report
from optima_tpu.report.findings import FINDINGS, finding_lines
from optima_tpu.report.layer_means import mean
from optima_tpu.report.meaningless import meaningless_lines
from optima_tpu.report.numbers import number
from optima_tpu.report.published import published_range
from optima_tpu.report.summary import plain
from optima_tpu.report.view import Table
from optima_tpu.runtime.checksums import keep
from optima_tpu.runtime.records import encoded, json_values, known_record

REMEDY = "the cells are intact; make room, or choose another --output"
"""For the message where the tables cannot be written."""

_RESULTS = "results.json"
_FILES = ("table.md", "table.csv", "table.json", "results.csv", _RESULTS)


def missing(cell: CellName) -> CellResult:
    """The result of a cell that was not run yet."""
    return CellResult(*(getattr(cell, name) for name in CellName.__struct_fields__))


def failed(cell: Cell, reason: str) -> CellResult:
    """The result of a cell whose run failed."""
    return structs.replace(missing(cell), state="failed", reason=reason)


def finished(cell: Cell, report: Report, output: Path) -> CellResult:
    """The result of a finished cell."""
    layers = report.layers
    errors = {error: mean(layers, error) for error in ("error_before", "error_after", "held_out_before", "held_out_after")}
    return structs.replace(
        missing(cell),
        state="finished",
        perplexity=report.perplexity.pruned,
        dense=report.perplexity.dense,
        log_ratio_stderr=report.log_ratio_stderr,
        **{error: value if value is not None and math.isfinite(value) else None for error, value in errors.items()},
        seconds=sum(block.seconds for block in report.blocks),
        rows_not_converged=sum(layer.rows - layer.rows_converged for layer in layers),
        rows_refused=sum(layer.rows_refused for layer in layers),
        sparsity=report.sparsity,
        report=(cell.directory / "report.json").relative_to(output).as_posix(),
    )


def describe(reports: Sequence[Report]) -> dict[str, str]:
    """The model, texts, code and hardware behind the numbers, in words.

    If reports differ, lists all values.
    """

    def joined(words: Callable[[Report], str]) -> str:
        return "; ".join(dict.fromkeys(words(report) for report in reports))

    def hardware(report: Report) -> str:
        system = report.environment
        mesh = "x".join(map(str, system.mesh.values()))
        return f"{system.devices} x {system.device} ({system.platform}), mesh {mesh}, jax {system.packages['jax']}"

    if not reports:
        return {}
    return {
        "model": joined(lambda report: f"{report.model.origin}, {plural(report.model.blocks, 'block')}"),
        "calibration": joined(lambda report: report.calibration.how),
        "evaluation": joined(lambda report: f"{report.evaluation.how}, {report.evaluation.tokens:,} tokens"),
        "code": joined(lambda report: report.code),
        "hardware": joined(hardware),
    }


def settings(cells: Iterable[Cell]) -> dict[str, str]:
    """The settings of the cells of each mask and update, in words.

    The words name the nearest preset, what differs from it, and the damping.
    """
    phrases: dict[str, dict[str, None]] = {}
    for cell in cells:
        damping = (to_dict(cell.config)["solver"] or {}).get("damping")
        words = f"preset {on_preset(cell.config)}" + (f", solver.damping {damping:g}" if damping is not None else "")
        phrases.setdefault(f"{cell.mask} + {cell.update}", {})[words] = None
    return {methods: "; or ".join(each) for methods, each in phrases.items()}


def unusual(reports: Mapping[Cell, Report]) -> list[str]:
    """Findings about cells that need a look; see :func:`_each_once`."""

    def lines(cell: Cell, report: Report) -> list[str]:
        widest = max((layer.shape[1] for layer in report.layers), default=0)
        few = short_text(cell.config.calibration, widest, writes=False)
        return [*meaningless_lines(report), few, *finding_lines(FINDINGS, report.layers)]

    return _each_once(reports, lines)


def published(reports: Mapping[Cell, Report]) -> list[str]:
    """Published results next to the cells' own; see :func:`_each_once`."""
    return _each_once(reports, lambda cell, report: [plain(published_range(report))])


def _each_once(reports: Mapping[Cell, Report], lines: Callable[[Cell, Report], Iterable[str]]) -> list[str]:
    """Each sentence about cells once, after the names of its cells."""
    cells_by_line: dict[str, list[str]] = {}
    for cell, report in reports.items():
        for line in filter(None, lines(cell, report)):
            cells_by_line.setdefault(line, []).append(str(cell))
    return [
        f"{'all cells' if len(reports) == len(cells) > 1 else '; '.join(cells)}: {line}" for line, cells in cells_by_line.items()
    ]


def layout(grid: CellGrid, results: Sequence[CellResult]) -> Table:
    """The table of perplexities, with an entry for every cell.

    An entry of one seed has its standard error; an entry of several seeds is their mean with the sample standard deviation. The
    table has a row for each mask and update, the dense model's first, and a column for each pattern and number of windows. "-"
    means that nothing was run yet, or that the grid has no such cell.
    """
    counts = sorted({result.windows for result in results})
    columns = [
        (pattern, windows)
        for pattern in grid.patterns
        for windows in counts
        if any((result.pattern, result.windows) == (pattern, windows) for result in results)
    ]
    headings = [f"{pattern}, {plural(windows, 'window')}" if len(counts) > 1 else pattern for pattern, windows in columns]
    by_column = {column: [result for result in results if (result.pattern, result.windows) == column] for column in columns}
    rows = [("dense", "", *(_dense(by_column[column]) for column in columns))]
    for mask in grid.masks:
        for update in grid.updates:
            groups = [
                [result for result in by_column[column] if (result.mask, result.update) == (mask, update)] for column in columns
            ]
            if any(groups):
                rows.append((mask, update, *map(_entry, groups)))
    return Table(_caption(results), ("mask", "update", *headings), tuple(rows), names=2)


def _caption(results: Sequence[CellResult]) -> str:
    """What the numbers of the table are."""
    if len({result.seed for result in results}) > 1:
        spread = "; mean ± sample standard deviation over n seeds"
    elif any(result.log_ratio_stderr is not None for result in results):
        spread = "; ± one standard error against the dense model, over the windows of the evaluation text"
    else:
        spread = ""
    return f"Perplexity, lower is better{spread}."


def markdown(
    title: str, header: Mapping[str, str], table: Table, results: Sequence[CellResult], remarks: Sequence[str] = ()
) -> str:
    """The table and the origin of its numbers, as a page of Markdown.

    Args:
      remarks: from :func:`unusual`.
    """
    lines = [f"# {title}", ""]
    lines += [f"- {key}: {value}" for key, value in header.items()] + [""]
    done = sum(result.state == "finished" for result in results)
    seeds = sorted({result.seed for result in results})
    lines += [f"{table.caption} Seeds: {', '.join(map(str, seeds))}. {done} of {plural(len(results), 'cell')} finished.", ""]
    sides = ["---", "---", *["---:"] * (len(table.head) - 2)]
    for row in (table.head, sides, *table.rows):
        lines.append("| " + " | ".join(text.replace("|", r"\|") for text in row) + " |")
    for label, listed in (("Failed", failure_lines(results)), ("Unusual", remarks)):
        lines += ["", f"{label}:", "", *(f"- {line}" for line in listed)] if listed else []
    return "\n".join(lines) + "\n"


def failure_lines(results: Iterable[CellResult]) -> list[str]:
    """One line for each failed cell, with the reason."""
    return [f"{result}: {result.reason}" for result in results if result.state == "failed"]


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """One line for each record, one column for each key, which all have."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def write_tables(
    grid: CellGrid, results: Sequence[CellResult], header: Mapping[str, str], remarks: Sequence[str] = ()
) -> dict[str, Path]:
    """Writes the table and its results, each file in one step.

    The folder must exist. table.md is for reading, table.csv and table.json hold :func:`averages`, results.csv and results.json
    every :class:`CellResult`.
    """
    texts = {"table.md": markdown(grid.output.absolute().name, header, layout(grid, results), results, remarks)}
    for name, records in (("table", averages(results)), ("results", [json_values(result) for result in results])):
        texts |= {f"{name}.csv": csv_text(records), f"{name}.json": encoded(records, indent=2).decode()}
    keep(grid.output, {name: text.encode() for name, text in texts.items()}, REMEDY)
    return {name: grid.output / name for name in texts}


def refuse_loss(grid: CellGrid, force: bool = False) -> None:
    """Refuses to replace another grid's tables, or other files.

    Args:
      force: replace files with the names of the tables, even if they are no tables of a sweep.

    Raises:
      UserError: the directory has a table with finished cells that this grid does not have, or other files with the names of
        the tables.
    """
    theirs = [grid.output / name for name in _FILES if (grid.output / name).exists()]
    if theirs and not force and not (grid.output / "cells").is_dir() and not _results(grid.output / _RESULTS):
        raise UserError(
            f"expected --output with a new directory or that of a sweep, got {grid.output}, which holds another "
            f"{theirs[0].name}: choose another, or add --force to replace it"
        )
    cells = {str(cell) for cell in grid.cells}
    lost = [str(result) for result in _results(grid.output / _RESULTS) if result.state == "finished" and str(result) not in cells]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UserError(
            f"expected a sweep with all finished cells of {grid.output / _RESULTS}, got one without {lost[0]}{more}; "
            f"choose another --output, put them back into the file, or delete {_RESULTS} to go on without them "
            "(their runs stay)"
        )


def _results(path: Path) -> list[CellResult]:
    """The contents of results.json; empty if it is missing or damaged.

    The runs of its cells have all that the file says.
    """
    return known_record(path, list[CellResult]) or []


def _entry(group: Sequence[CellResult]) -> str:
    """One field of the table from the seeds of one cell."""
    values = [result.perplexity for result in group if result.perplexity is not None]
    failures = sum(result.state == "failed" for result in group)
    if not values:
        return "failed" if failures else "-"
    mean = number(statistics.fmean(values), 4)
    notes = [f"n={len(values)}"] if len(group) > 1 else []
    notes += [f"{failures} failed"] if failures else []
    errors = [result.log_ratio_stderr for result in group if result.log_ratio_stderr is not None]
    error = statistics.stdev(values) if len(values) > 1 else values[0] * errors[0] if errors and len(group) == 1 else None
    spread = f" ± {error:.{len(mean.partition('.')[2])}f}" if error is not None else ""
    return mean + spread + (f" ({', '.join(notes)})" if notes else "")


def _dense(results: Iterable[CellResult]) -> str:
    perplexities = dict.fromkeys(number(result.dense, 4) for result in results if result.dense is not None)
    return " or ".join(perplexities) or "-"
