"""Prints the summary at the end of a run to the terminal."""

from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec import structs
from rich.console import Console

from optima_tpu.report.columns import terminal_columns
from optima_tpu.report.contents import Report
from optima_tpu.report.facts import facts
from optima_tpu.report.file import files_in
from optima_tpu.report.findings import FINDINGS, TRADED, finding_lines
from optima_tpu.report.layer_means import gap_meaning, held_out_caveat, measured, named_kinds, short_names
from optima_tpu.report.meaningless import meaningless_lines
from optima_tpu.report.numbers import percent
from optima_tpu.report.progress import plain_table, show
from optima_tpu.report.published import result
from optima_tpu.report.view import NONE


def print_summary(console: Console, report: Report, directory: Path, sentence: Callable[[Report], str] = result) -> None:
    """Prints the summary of a finished run, from layers to the result.

    The summary has the table of layers, the change of perplexity, unusual layers, the files, and the result in a few sentences.

    A recovery solved no layer: in the place of the table and of unusual layers it names the model that it began from. A run
    without its model, see :func:`without_model`, has no line about the model's size.

    Args:
      sentence: what the result is, in words.
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
    lines += [
        "",
        *(plain(fact.line) for fact in facts(report) if fact.name != "size" or files.keys() & {"checkpoint", "transformers"}),
    ]
    lines += labelled("unusual", strange or ["nothing"] * bool(layers)) + labelled("note", notes)
    width = max(map(len, files), default=0) + 2
    lines += ["", *(f"{what:<{width}}{path}" for what, path in files.items())]
    lines += ["", f"result      {plain(sentence(report))}"]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def without_model(report: Report) -> Report:
    """A report that names no file of the pruned model, which is removed."""
    return structs.replace(report, files={"report": report.files["report"]})


def _layer_lines(console: Console, report: Report) -> list[str]:
    """Prints the table of layers; returns lines that explain its numbers."""
    layers, settings, solver = report.layers, report.settings, report.solver
    if not layers:
        return ["No layer was pruned."]
    lines = ["Nobody measured the errors of the layers."]
    if measured(layers):
        columns, kinds = terminal_columns(layers, solver), named_kinds(layers)
        rows = [[name, *(plain(column.cell(own)) for column in columns.values())] for name, own in kinds.items()]
        show(console, plain_table(["layer", *columns], rows, gap=1))
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


def labelled(label: str, lines: Sequence[str]) -> list[str]:
    """Lines of which the first begins with the label."""
    return [f"{'' if number else label:<12}{line}" for number, line in enumerate(lines)]


def plain(text: str) -> str:
    """Makes text of the page plain: no backquotes, curly quotes or arrows."""
    return text.replace("`", "").replace("’", "'").replace("→", "->").replace(NONE, "-")
