"""What the person at the terminal sees at the end of a run."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from optima_tpu.report.file import files_in
from optima_tpu.report.numbers import number, percent, plural
from optima_tpu.report.records import BlockReport
from optima_tpu.report.summary import all_layers, by_kind, exchanged, gap_meaning, held_out_caveat, short_names, sparsity, unusual

_NAMED = 4
"""So many layers are named for each kind of trouble; report.json has them all."""

TROUBLE = {
    "few_tokens": ("reached by fewer calibration tokens than they have inputs", "token"),
    "dead_inputs": ("dead inputs, without signal in the calibration text", "input"),
    "rows_not_converged": ("rows not converged", "row"),
    "rows_refused": ("rows refused, which keep the selector's weights", "row"),
    "layers_refused": ("layers refused, which keep the selector's weights", "row"),
}
"""The kinds of ``summary.unusual`` in words, and what is counted."""


def print_summary(console: Console, report: Mapping[str, Any], directory: Path) -> None:
    """Prints the table of layers, what the pruning cost, what was unusual and where the files are.

    Args:
      report: as report.json has it.
      directory: where the run is now.
    """
    blocks = [BlockReport.from_json(block) for block in report["blocks"]]
    configuration, perplexity, memory = report["configuration"], report["perplexity"], report.get("memory", {})
    solver, files = configuration["solver"] and configuration["solver"]["name"], files_in(directory, report.get("files", {}))
    layers = all_layers(blocks)
    console.print(layer_table(blocks, solver), highlight=False)
    lines = [
        "Errors: the change of a layer's output on the calibration text, in percent of the output's energy, mean over blocks."
    ]
    if any(layer.held_out_after is not None for layer in layers):
        caveat = held_out_caveat(configuration)
        lines[0] += f" Held out: on calibration text that no weight was fitted to{caveat and f'; it {caveat}'}."
    if any(layer.dense_after is not None for layer in layers):
        lines.append(
            "Against dense: how far a layer's output on that text is from the dense model's, with what the layers "
            "before have lost."
        )
    if weighed := report.get("weighed_layers"):
        names = " and ".join(short_names(weighed).values())
        lines.append(f"{names}: tokens weighed by one over the mean square of the residual stream.")
    if solver:
        lines.append(f"Gap: {gap_meaning([solver])}.")
    dense, pruned = perplexity["dense"], perplexity["pruned"]
    weights = sum(math.prod(layer.shape) for layer in layers)
    ratio = number(pruned / dense)
    lines += [
        "",
        f"perplexity  dense {number(dense, 4)}, pruned {number(pruned, 4)} ({ratio} times), on {report['evaluation']['how']}",
        f"sparsity    {percent(sparsity(layers))} of the {weights:,} weights in {len(layers)} matrices",
    ]
    if (share := exchanged(layers)) is not None:
        lines += [f"masks       {percent(share)} of the weights that stay came in by exchange for others of their row"]
    device = f", {number(memory['device_peak'] / 2**30)} GiB on a device" if memory.get("device_peak") else ""
    if memory.get("host_peak"):
        lines += [f"memory      {number(memory['host_peak'] / 2**30)} GiB on the host{device} at the peak"]
    lines += unusual_lines(blocks)
    width = max(map(len, files), default=0) + 2
    lines += ["", *(f"{what:<{width}}{path}" for what, path in files.items())]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def layer_table(blocks: Sequence[BlockReport], solver: str | None) -> Table:
    """One row for each kind of layer. Without a solver, only what the selector did."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("layer", no_wrap=True, vertical="bottom")
    kinds = by_kind(blocks)
    unseen, dense = (any(getattr(kind, name) is not None for kind in kinds) for name in ("held_out", "dense_after"))
    headings = ["error\nbefore", "error\nafter"] if solver else ["error"]
    headings += ["held\nout"] if unseen else []
    headings += ["against\ndense"] if dense else []
    headings += ["sparsity"]
    headings += ["largest\ngap", "median\nsteps", "not con-\nverged", "rows\nrefused"] if solver else []
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    short = short_names([kind.name for kind in kinds])
    for kind in kinds:
        values = [percent(kind.error_before)]
        if solver:
            values += [percent(kind.error_after)]
        if unseen:
            values += ["-" if kind.held_out is None else percent(kind.held_out)]
        if dense:
            values += ["-" if kind.dense_after is None else percent(kind.dense_after)]
        values += [percent(kind.sparsity)]
        if solver:
            values += [
                percent(kind.gap_max),
                f"{kind.steps_median:.0f}",
                f"{kind.rows_not_converged:,}",
                f"{kind.rows_refused:,}",
            ]
        table.add_row(short[kind.name], *values)
    return table


def unusual_lines(blocks: Sequence[BlockReport]) -> list[str]:
    """What was unusual, one line for each kind, by the names of the layers with most of it."""
    lines = []
    for kind, layers in unusual(blocks).items():
        if layers:
            words, noun = TROUBLE[kind]
            worst = sorted(layers, key=layers.__getitem__, reverse=kind != "few_tokens")
            named = [f"{name} ({plural(layers[name], noun)})" for name in worst[:_NAMED]]
            more = [f"{len(worst) - _NAMED} more in the report"] if len(worst) > _NAMED else []
            lines.append(f"unusual     {words}: {', '.join(named + more)}")
    return lines or ["unusual     nothing"]
