"""The contents of evaluation.json."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from optima_tpu.errors import plural
from optima_tpu.report.contents import Environment
from optima_tpu.runtime.records import Count, Record, Share, Undeclared, within


class Distance(Record, frozen=True):
    """The distance between two models on the same windows.

    ``p`` is the dense model's distribution of the next token and ``q`` the pruned model's. Means are over the predictions that
    perplexity scores: every position of a window except the last. Standard errors treat window means as independent, because
    the positions of one window depend on each other; they are None if there is only one window.

    Attributes:
      kl: mean of ``KL(p || q) = sum_v p(v) log(p(v) / q(v))`` in nats, computed in float32. It is 0 for identical models; values
        below about 1e-6 are rounding.
      kl_stderr: standard error of ``kl``.
      agreement: share of positions at which both models give the highest probability to the same token.
      agreement_stderr: standard error of ``agreement``.
      tokens: number of predictions.
      hidden_errors: for every block ``||H_pruned - H_dense||_F^2 / ||H_dense||_F^2``, with ``H`` the residual stream after the
        block at all positions of all windows; None if it is not finite. It includes the errors of earlier blocks. A model without
        some blocks has only the error of the last block. In many models a few tokens have a much larger norm than the others;
        these tokens then dominate the value.
      kls: ``kl`` for every block, with ``p`` and ``q`` computed by the model's final norm and head from the residual stream
        after that block (the logit lens, nostalgebraist 2020); None if not requested. Only the last entry compares predictions.
        The head was trained on the last stream only: it reads early streams badly and misses changes that only later blocks use.
      agreements: ``agreement`` for every block, computed in the same way; None if not requested.
      log_ratio_stderr: standard error of the logarithm of the ratio of both perplexities, which is the mean rise of a token's
        loss; None too where an earlier version measured the distance.
    """

    kl: float
    kl_stderr: float | None
    agreement: Share
    agreement_stderr: float | None
    tokens: Count
    hidden_errors: tuple[float | None, ...]
    kls: tuple[float | None, ...] | None
    agreements: tuple[Share, ...] | None
    log_ratio_stderr: float | None = None


class TextScore(Record, frozen=True):
    """The perplexity of a model on a text.

    Attributes:
      against: the perplexity of the model that it is compared with; None without such a model.
      how: the text and its windows, in words.
      unigram_perplexity: what the frequencies of the text's tokens give.
    """

    perplexity: float
    against: float | None
    tokens: Count
    how: str
    unigram_perplexity: float


class TextResult(Record, frozen=True):
    """The measurements on a text; no distance without a second model."""

    perplexity: TextScore
    distance: Distance | None


class TaskScore(NamedTuple):
    """One metric of one task.

    Attributes:
      metric: "acc", or with the harness's filter "exact_match,strict".
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


Metrics = dict[str, float | None]
"""Name of a metric, or of its standard error, -> its value; None for what the harness does not compute."""


class TaskResult(Record, frozen=True):
    """The metrics of a task.

    Attributes:
      metrics: the metrics of the model.
      against: the metrics of the model that it is compared with; empty without such a model.
    """

    documents: Count
    metrics: Metrics
    against: Metrics

    def scores(self, task: str) -> Iterator[TaskScore]:
        """Every metric with a value."""
        for metric, value in self.metrics.items():
            if "_stderr" not in metric and value is not None:
                name, comma, rest = metric.partition(",")
                error, other = f"{name}_stderr{comma}{rest}", self.against
                errors = self.metrics.get(error), other.get(error)
                yield TaskScore(task, metric, self.documents, value, errors[0], other.get(metric), errors[1])


class Identity(Record, frozen=True):
    """A model whatever its path: its fingerprint, and its run's manifest."""

    fingerprint: str
    manifest: Mapping[str, Any] | None


class Identities(Record, frozen=True):
    """The evaluated model, and the one that it is compared with."""

    model: Identity
    against: Identity | None


class TaskSettings(Undeclared, frozen=True):
    """The settings of an evaluation that say how tasks were asked."""

    fewshot: Count | None
    limit: Count | None
    apply_chat_template: bool


class EvaluationRecord(Record, frozen=True):
    """The contents of evaluation.json.

    Attributes:
      model: the evaluated model, as it was typed.
      against: the model that it is compared with; None without one.
      evaluated: both models, whatever their paths.
      average: the mean accuracy over the paper's six tasks; None if one was not asked.
    """

    model: str
    against: str | None
    evaluated: Identities
    configuration: Mapping[str, Any]
    environment: Environment
    perplexity: dict[str, TextScore]
    distance: dict[str, Distance]
    tasks: dict[str, TaskResult]
    average: float | None

    def __post_init__(self) -> None:
        within("configuration", self.configuration, TaskSettings)

    @property
    def asked(self) -> str:
        """How the tasks were asked: examples, chat template, documents."""
        settings = within("configuration", self.configuration, TaskSettings)
        if settings.fewshot is None:
            examples = "each with its own number of examples"
        else:  # a task whose own number of examples is 0 keeps 0
            examples = f"{settings.fewshot}-shot where a task allows it" if settings.fewshot else "zero-shot"
        examples += ", as a chat" if settings.apply_chat_template else ""
        return examples + (f", the first {plural(settings.limit, 'document')} of each" if settings.limit else "")

    @property
    def scores(self) -> list[TaskScore]:
        """Every metric with a value, of every task."""
        return [score for task, result in self.tasks.items() for score in result.scores(task)]
