"""Summary line and page section on the training of the pruned model."""

from collections.abc import Sequence

from optima_tpu.report.contents import Outcome, Report
from optima_tpu.report.numbers import duration, number, percent
from optima_tpu.report.runs import FinishedRun
from optima_tpu.report.view import NONE, Section, Table


def distilled_line(report: Report) -> str:
    """One line on what the training changed; empty if there was none."""
    outcome = report.distillation
    if outcome is None:
        return ""
    loss, before, after = _loss(report), number(outcome.before), number(outcome.after)
    if not outcome.kept:
        return (
            f"refused: none of {outcome.amount} lowered the {loss} on held-out text, {before} nats; the model keeps its weights "
            "from before. Try a smaller learning rate, or more text"
        )
    gain = percent(1 - outcome.after / outcome.before)
    took = f"it took {duration(outcome.seconds)}"
    return f"{loss} on held-out text {before} -> {after} nats ({gain} less); {outcome.amount}; {took}"


def _loss(report: Report) -> str:
    """What training minimised."""
    method = report.settings.distill
    return "cross-entropy" if method and method.name == "cross_entropy" else "divergence from the dense model"


def distillation(runs: Sequence[FinishedRun]) -> list[Section]:
    """Section on the runs that were distilled; empty if none was."""
    trained = [(run.label, run.report, outcome) for run in runs if (outcome := run.report.distillation)]
    tables = [_checks(label, report, outcome) for label, report, outcome in trained]
    texts = dict.fromkeys(_text(report) for _, report, _ in trained)
    return [Section("distillation", "Training after pruning", list(texts), tables=tables)] if tables else []


def _text(report: Report) -> str:
    what = f"the whole model was trained with fixed masks, to lower the {_loss(report)}"
    shown = ", ".join(f"{what} {number(each, 4)}" for what, each in report.perplexities.items())
    return (
        f"After it was pruned, {what}. This is training, not one-shot pruning. The step with the least loss on held-out windows "
        f"was kept. Perplexity: {shown}. Layer errors on this page "
        "were measured before."
    )


def _checks(label: str, report: Report, outcome: Outcome) -> Table:
    """The checks of a training as a table.

    A page of one run has a tile with the outcome. For several runs (``label``) the note of the table has the outcome.
    """
    return Table(
        label or "Checks",
        ["step", "on the text it is trained on, nats", "held out, nats", "perplexity, held out", ""],
        [
            [
                str(check.step),
                NONE if check.training is None else number(check.training, 4),
                number(check.held_out, 4),
                NONE if check.perplexity is None else number(check.perplexity, 4),
                "kept" if check.step == outcome.kept else "",
            ]
            for check in outcome.checks
        ],
        note=distilled_line(report) if label else "",
    )
