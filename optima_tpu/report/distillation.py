"""Summary line and page section on the training of the pruned model."""

from collections.abc import Mapping, Sequence
from typing import Any

from optima_tpu.report.numbers import duration, number, percent
from optima_tpu.report.runs import Run
from optima_tpu.report.view import NONE, Section, Table


def distilled_line(report: Mapping[str, Any]) -> str:
    """One line on what the training changed; empty if there was none."""
    found = report.get("distillation")
    if not found:
        return ""
    loss = _loss(report)
    before, after = number(found["held_out_before"]), number(found["held_out_after"])
    if not found["kept"]:
        return (
            f"refused: no step lowered the {loss} on held-out text, {before} nats; the model keeps its weights from before. Try a "
            "smaller learning rate, or more text"
        )
    gain = 1 - found["held_out_after"] / found["held_out_before"]
    took = f" in {duration(found['seconds'])}" if found.get("seconds") else ""
    return (
        f"{loss} on held-out text {before} -> {after} nats ({percent(gain)} less); perplexity "
        f"{number(found['perplexity_before'], 4)} before, {number(report['perplexity']['pruned'], 4)} after; trained on "
        f"{found['tokens']:,} tokens{took}"
    )


def _loss(report: Mapping[str, Any]) -> str:
    """What training minimised."""
    name = (report["configuration"].get("distill") or {}).get("name")
    return "cross-entropy" if name == "cross_entropy" else "divergence from the dense model"


def distillation(runs: Sequence[Run]) -> list[Section]:
    """Section on the runs that were distilled; empty if none was."""
    tables = [
        Table(
            run.label if len(runs) > 1 else "Checks",
            ["step", "on the text it is trained on, nats", "held out, nats", "perplexity, held out", ""],
            [
                [
                    str(check["step"]),
                    NONE if check["training"] is None else number(check["training"], 4),
                    number(check["held_out"], 4),
                    NONE if check.get("perplexity") is None else number(check["perplexity"], 4),
                    "kept" if check["step"] == found["kept"] else "",
                ]
                for check in found["checks"]
            ],
            note=distilled_line(run.report),
        )
        for run in runs
        if (found := run.report.get("distillation"))
    ]
    losses = " or the ".join(dict.fromkeys(_loss(run.report) for run in runs if run.report.get("distillation")))
    text = (
        f"After it was pruned, the whole model was trained with fixed masks, to lower the {losses}. This is training, not one-shot "
        "pruning. The step with the least loss on held-out windows was kept. Layer errors on this page were measured before."
    )
    return [Section("distillation", "Training after pruning", [text], tables=tables)] if tables else []
