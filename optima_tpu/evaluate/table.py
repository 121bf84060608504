"""Prints the results of an evaluation to the terminal."""

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from optima_tpu.evaluate.tasks import PAPER
from optima_tpu.report.evaluation import Distance, EvaluationRecord, TaskScore
from optima_tpu.report.numbers import interval, number
from optima_tpu.report.progress import plain_table, say, show
from optima_tpu.report.summary import labelled


def print_evaluation(console: Console, record: EvaluationRecord, files: Mapping[str, str], strange: Iterable[str] = ()) -> None:
    """Prints perplexities, distances, warnings, tasks, average and files."""
    console.print()
    lines = []
    for source, score in record.perplexity.items():
        dense, apart = score.against, record.distance.get(source)
        beside = f", against {number(dense, 4)} ({_times(score.perplexity / dense, apart)})" if dense else ""
        lines.append(f"perplexity  {number(score.perplexity, 4)}{beside}, on {score.how}")
    for source, apart in record.distance.items():
        kl = number(apart.kl, 4) + _error(apart.kl_stderr)
        agreement = number(apart.agreement, 4) + _error(apart.agreement_stderr)
        last = apart.hidden_errors[-1]
        lines.append(
            f"distance    KL divergence {kl} nats, the same most likely token at {agreement} of {apart.tokens:,} "
            f"positions, relative error of the last hidden state {'not finite' if last is None else number(last)}, on {source}"
        )
    lines += labelled("unusual", list(strange))
    if lines:
        say(console, "\n".join(lines))
    if record.tasks:
        show(console, task_table(record.scores, record.against is not None))
    if record.average is not None:
        console.print(f"average     {number(record.average, 4)}, the mean accuracy over {', '.join(PAPER)}", highlight=False)
    width = max(map(len, files)) + 2
    say(console, "\n".join(["", *(f"{what:<{width}}{path}" for what, path in files.items())]))


def task_table(scores: Sequence[TaskScore], compared: bool) -> Table:
    """A table with a row for each metric of each task, and standard errors."""
    rows = []
    for score in scores:
        row = [score.task, score.metric, f"{score.documents:,}", number(score.value, 4) + _error(score.error)]
        if score.against is not None:
            change = score.value - score.against
            row += [number(score.against, 4) + _error(score.against_error), ("-" if change < 0 else "+") + number(abs(change))]
        elif compared:
            row += ["-", "-"]
        rows.append(row)
    return plain_table(("task", "metric", "docs", "value", *(("against", "change") if compared else ())), rows, names=2)


def _times(ratio: float, apart: Distance | None) -> str:
    """Formats a ratio: "2.80 times, 2.61 to 3.00 with two standard errors"."""
    ends = interval(ratio, apart.log_ratio_stderr if apart else None)
    spread = f", {' to '.join(map(number, ends))} with two standard errors over its windows" if ends else ""
    return f"{number(ratio)} times{spread}"


def _error(value: float | None) -> str:
    return "" if value is None else f" ± {number(value, 2)}"
