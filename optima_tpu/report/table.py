"""Prints the summary at the end of a run to the terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from optima_tpu.report.columns import ROWS, Cell, mean_of, share_pruned
from optima_tpu.report.contents import Report
from optima_tpu.report.facts import facts
from optima_tpu.report.file import files_in
from optima_tpu.report.findings import FINDINGS, TRADED, finding_lines
from optima_tpu.report.meaningless import meaningless_lines
from optima_tpu.report.numbers import percent
from optima_tpu.report.published import result
from optima_tpu.report.records import LayerReport
from optima_tpu.report.summary import gap_meaning, held_out_caveat, layers_by_kind, measured, short_names
from optima_tpu.report.view import NONE


def print_summary(console: Console, report: Report, directory: Path) -> None:
    """Prints the table of layers, the change of perplexity, unusual layers, the files, and the result in a few sentences.

    A recovery solved no layer: in the place of the table and of unusual layers it names the model that it began from.
    """
    layers, settings = report.layers, report.settings
    # People open the page, report.html, which the command names when it is drawn.
    files = {"record" if what == "report" else what: path for what, path in files_in(directory, report.files).items()}
    strange, notes = meaningless_lines(report), list[str]()
    if settings.recover:
        where = "its own report has the layers, and what was unusual in them"
        lines = [
            f"from        {settings.recover.model}: {where if measured(layers) else 'nobody measured the errors of its layers'}"
        ]
    else:
        lines, notes = _layer_lines(console, report), finding_lines([TRADED], layers)
        strange += finding_lines(FINDINGS, layers)
    lines += ["", *(plain(fact.line) for fact in facts(report))]
    lines += labelled("unusual", strange or ["nothing"] * bool(layers)) + labelled("note", notes)
    width = max(map(len, files), default=0) + 2
    lines += ["", *(f"{what:<{width}}{path}" for what, path in files.items())]
    lines += ["", f"result      {plain(result(report))}"]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _layer_lines(console: Console, report: Report) -> list[str]:
    """Prints the table of layers. Returns lines that say what its numbers are."""
    layers, settings, solver = report.layers, report.settings, report.solver
    if not layers:
        return ["No layer was pruned."]
    lines = ["Nobody measured the errors of the layers."]
    if measured(layers):
        table = layer_table(layers, solver)
        # Numbers that were cut would look whole: where the table is wider than the console, its lines are longer.
        table.width = Measurement.get(console, console.options.update(max_width=1 << 10), table).maximum
        console.print(table, highlight=False, crop=False)
        lines = [
            "Errors: squared change of a layer's output on the calibration text, in percent of the output's energy; mean over "
            f"blocks{', as they were before the training' if report.distillation else ''}."
        ]
    if report.has_held_out:
        caveat = held_out_caveat(settings)
        lines[0] += f" Held out: the same on calibration text that no weight was fitted to{caveat and f'; this text {caveat}'}."
    if report.aims_at_dense:
        lines.append(
            "Against dense: squared distance of a layer's output from the dense model's output on that text; it includes the "
            "errors of the layers before."
        )
    if report.weighed_layers:
        names = " and ".join(short_names(report.weighed_layers).values())
        lines.append(f"{names}: tokens weighed by the inverse mean square of the residual stream.")
    if settings.solver:
        tolerance = settings.solver.tolerance
        stops = f". A row stops at {percent(tolerance)}, solver.tolerance" if isinstance(tolerance, float) else ""
        lines.append(f"Gap: {gap_meaning([settings.solver.name])}{stops}.")
    return lines


def layer_table(layers: Sequence[LayerReport], solver: str | None) -> Table:
    """A table with one row for each kind of layer. Without a solver it has no columns on the update."""
    update = solver is not None
    columns: dict[str, Cell] = {"error\nbefore" if update else "error": mean_of("error_before")}
    columns |= {"error\nafter": mean_of("error_after")} if update else {}
    columns |= {
        heading: mean_of(error)
        for heading, error in {"held\nout": "held_out_after", "against\ndense": "dense_after"}.items()
        if any(getattr(layer, error) is not None for layer in layers)
    }
    columns["sparsity"] = share_pruned
    columns |= {heading: ROWS[name] for heading, name in _OF_ROWS.items()} if update else {}
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("layer", no_wrap=True, vertical="bottom")
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    kinds = layers_by_kind(layers)
    for kind, short in short_names(list(kinds)).items():
        table.add_row(short, *(cell(kinds[kind]).replace(NONE, "-") for cell in columns.values()))
    return table


_OF_ROWS = {
    "largest\ngap": "largest gap",
    "median\nsteps": "median steps",
    "not con-\nverged": "not converged",
    "rows\nrefused": "refused",
}
"""Headings of :data:`ROWS` in two lines."""


def labelled(label: str, lines: Sequence[str]) -> list[str]:
    """Lines behind one label, which the first of them has."""
    return [f"{'' if number else label:<12}{line}" for number, line in enumerate(lines)]


def plain(text: str) -> str:
    """Converts text of the page for a terminal: removes backquotes, and replaces arrows and typographic apostrophes."""
    return text.replace("`", "").replace("’", "'").replace("→", "->")
