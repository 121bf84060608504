"""What tasks gave, by evaluation.json: one number at a time, for the terminal and for the page."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Score(NamedTuple):
    """One metric of one task.

    Attributes:
      task: its name.
      metric: "acc", or with the harness's filter "exact_match,strict".
      documents: how many there were.
      value: of the model.
      error: the standard error; None where the harness gives none.
      against: of the other model; None without one.
      against_error: likewise.
    """

    task: str
    metric: str
    documents: int
    value: float
    error: float | None
    against: float | None
    against_error: float | None


def scores(tasks: Mapping[str, Mapping[str, Any]]) -> Iterator[Score]:
    """Every metric of every task in the entry "tasks" that has a value."""
    for task, found in tasks.items():
        other = found.get("against") or {}
        for metric, value in found.items():
            if metric in ("documents", "against") or "_stderr" in metric or value is None:
                continue
            name, comma, rest = metric.partition(",")
            error = f"{name}_stderr{comma}{rest}"
            yield Score(task, metric, found["documents"], value, found.get(error), other.get(metric), other.get(error))


def how_asked(evaluation: Mapping[str, Any]) -> str:
    """How the tasks were put to the model, by the evaluation's settings: "zero-shot, the first 200 documents of each"."""
    settings = evaluation.get("configuration") or {}
    fewshot, limit = settings.get("fewshot"), settings.get("limit")
    if fewshot is None:
        examples = "each with its own number of examples"
    else:  # a task that says 0 keeps it, whatever is asked for
        examples = f"{fewshot}-shot where a task allows it" if fewshot else "zero-shot"
    return examples + (f", the first {limit:,} documents of each" if limit else "")
