"""Iterates over the task results in evaluation.json, for the terminal and for the page."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Score(NamedTuple):
    """One metric of one task.

    Attributes:
      task: name of the task.
      metric: "acc", or with the harness's filter "exact_match,strict".
      documents: number of documents.
      value: value for the model.
      error: standard error of ``value``; None if the harness gives none.
      against: value for the second model; None without a second model.
      against_error: standard error of ``against``; None if the harness gives none.
    """

    task: str
    metric: str
    documents: int
    value: float
    error: float | None
    against: float | None
    against_error: float | None


def scores(tasks: Mapping[str, Mapping[str, Any]]) -> Iterator[Score]:
    """Yields every metric with a value of every task in the entry "tasks"."""
    for task, found in tasks.items():
        other = found.get("against") or {}
        for metric, value in found.items():
            if metric in ("documents", "against") or "_stderr" in metric or value is None:
                continue
            name, comma, rest = metric.partition(",")
            error = f"{name}_stderr{comma}{rest}"
            yield Score(task, metric, found["documents"], value, found.get(error), other.get(metric), other.get(error))


def how_asked(evaluation: Mapping[str, Any]) -> str:
    """How the tasks were run, from the evaluation's settings: "zero-shot, as a chat, the first 200 documents of each"."""
    settings = evaluation.get("configuration") or {}
    fewshot, limit = settings.get("fewshot"), settings.get("limit")
    if fewshot is None:
        examples = "each with its own number of examples"
    else:  # a task whose own number of examples is 0 keeps 0
        examples = f"{fewshot}-shot where a task allows it" if fewshot else "zero-shot"
    examples += ", as a chat" if settings.get("apply_chat_template") else ""
    return examples + (f", the first {limit:,} documents of each" if limit else "")
