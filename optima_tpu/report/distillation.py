"""Summary line and page section on the distillation of the pruned model."""

from collections.abc import Mapping, Sequence
from typing import Any

from optima_tpu.report.numbers import number, percent
from optima_tpu.report.runs import Run
from optima_tpu.report.view import NONE, Section, Table


def distilled_line(report: Mapping[str, Any]) -> str:
    """One line on what the distillation changed; empty if there was none."""
    found = report.get("distillation")
    if not found:
        return ""
    before, after = number(found["held_out_before"]), number(found["held_out_after"])
    if not found["kept"]:
        return (
            f"refused: no step lowered the divergence from the dense model on held-out text, {before} nats; the model keeps its "
            "weights from before. Try a smaller --distill.learning_rate, or more --distill.windows"
        )
    gain = 1 - found["held_out_after"] / found["held_out_before"]
    return (
        f"divergence from the dense model on held-out text {before} -> {after} nats ({percent(gain)} less); perplexity "
        f"{number(found['perplexity_before'], 4)} before, {number(report['perplexity']['pruned'], 4)} after; trained on "
        f"{found['tokens']:,} tokens"
    )


def distillation(runs: Sequence[Run]) -> list[Section]:
    """Section on the runs that were distilled; empty if none was."""
    tables = [
        Table(
            run.label if len(runs) > 1 else "Checks",
            ["step", "on the text it is trained on, nats", "held out, nats", ""],
            [
                [
                    str(check["step"]),
                    NONE if check["training"] is None else number(check["training"], 4),
                    number(check["held_out"], 4),
                    "kept" if check["step"] == found["kept"] else "",
                ]
                for check in found["checks"]
            ],
            note=distilled_line(run.report),
        )
        for run in runs
        if (found := run.report.get("distillation"))
    ]
    text = (
        "After the last block was pruned, the whole model was trained toward the dense model’s distribution of the next token, "
        "with fixed masks. This is not one-shot pruning. The step with the least divergence on held-out windows was kept. The "
        "layer errors on this page were measured before the distillation."
    )
    return [Section("distillation", "Distillation", [text], tables=tables)] if tables else []
