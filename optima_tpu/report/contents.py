"""The declared contents of report.json and results.json: every entry that a page or a summary reads."""

from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

from optima_tpu.runtime.records import Block, Count, Positive, Record, Share


class _Method(TypedDict):
    name: str


class _Target(TypedDict):
    weigh_by_loss: NotRequired[Share]


class _Calibration(TypedDict):
    source: str
    windows: Count
    length: Count
    written: NotRequired[Count]


class _Source(TypedDict):
    source: NotRequired[str | None]


class _Configuration(TypedDict):
    """The settings that are read on their own. ``config.parse.recorded_run`` checks all of them."""

    model: str
    pattern: str
    selector: _Method
    solver: _Method | None
    calibration: _Calibration
    evaluation: NotRequired[_Source | None]
    layers: NotRequired[str | None]
    target: NotRequired[_Target]
    allocation: NotRequired[dict[str, Any] | None]
    tuning: NotRequired[dict[str, Any] | None]
    accept: NotRequired[dict[str, Any] | None]
    distill: NotRequired[dict[str, Any] | None]
    recover: NotRequired[dict[str, Any] | None]


class Environment(Record, frozen=True):
    """Versions, devices and mesh of a command. A package that is not installed, as in a checkout, has no version."""

    python: str
    system: str
    packages: dict[str, str | None]
    platform: str
    device: str
    devices: Count
    processes: Count
    mesh: dict[str, Count]


class _Model(TypedDict):
    origin: NotRequired[str]
    fingerprint: NotRequired[str]
    architecture: NotRequired[str | None]
    blocks: NotRequired[Count]
    weights: NotRequired[Count]


class _Text(TypedDict):
    how: NotRequired[str]
    unigram_perplexity: NotRequired[Positive]


class _Scored(TypedDict):
    how: str
    tokens: NotRequired[Count]
    digest: NotRequired[str]
    unigram_perplexity: NotRequired[Positive]


class _Perplexity(TypedDict):
    dense: Positive
    pruned: Positive


class _Token(TypedDict):
    before: str
    token: str
    after: str
    dense: Share
    pruned: Share


class _Changes(TypedDict):
    """See ``token_changes``."""

    tokens: Count
    mean: float
    median: float
    edges: list[float]
    shares: list[Share]
    rise_share: float | None
    mean_stderr: NotRequired[float | None]
    worst: list[_Token]


Parts = Annotated[tuple[str, ...], msgspec.Meta(min_length=3, max_length=3)]
"""A continuation: the part that both models wrote, the first token that differs (empty if none does), and the rest."""


class Continuation(Record, frozen=True):
    """What both models write after a prompt."""

    prompt: str
    dense: Parts
    pruned: Parts


class Continuations(Record, frozen=True):
    """The contents of continuations.json.

    Attributes:
      texts: one for each prompt.
      reason: a sentence that says why there are none; empty if there are.
    """

    texts: tuple[Continuation, ...] = ()
    reason: str = ""


class Check(Record, frozen=True):
    """What a check on held-out windows measured.

    Attributes:
      step: after how many steps of Adam.
      held_out: mean loss of a held-out token, in nats.
      training: mean loss of a token of the steps since the check before; None before the first step.
      perplexity: on the held-out windows; None where the loss is of hidden states.
    """

    step: Count
    held_out: float
    training: float | None = None
    perplexity: float | None = None


class _Trained(Record, frozen=True):
    """What became of weights that were trained.

    Attributes:
      checks: in order, the first one before the first step.
      kept: the step whose state is the result; 0 where the weights stay as they were pruned.
    """

    checks: Annotated[tuple[Check, ...], msgspec.Meta(min_length=1)]
    kept: Count

    def __post_init__(self) -> None:
        if all(check.step != self.kept for check in self.checks):
            raise ValueError(f"expected a check of the kept step {self.kept}, got none")

    @property
    def before(self) -> float:
        """The held-out loss of the weights as they were pruned."""
        return self.checks[0].held_out

    @property
    def after(self) -> float:
        """The held-out loss of the result."""
        return next(check.held_out for check in self.checks if check.step == self.kept)


class Span(_Trained, frozen=True):
    """What became of blocks that were trained together, toward the dense model's hidden states.

    Attributes:
      first, last: the blocks, both included.
    """

    first: Block
    last: Block

    @property
    def blocks(self) -> str:
        """The blocks in words: "3", "3 to 5"."""
        return str(self.first) if self.first == self.last else f"{self.first} to {self.last}"


class Outcome(_Trained, frozen=True):
    """The contents of distillation.json: what became of a distillation.

    Attributes:
      tokens: how many tokens the steps read.
      perplexity_before: of the model as it was pruned, on the evaluation text; None until it is measured.
      seconds: that steps and checks took, also those before the run was stopped.
      spans: where blocks were trained span by span. The checks are then two, before and after all of them.
    """

    tokens: Count
    perplexity_before: Positive | None = None
    seconds: float = 0.0
    spans: tuple[Span, ...] = ()


class _Neurons(TypedDict):
    left: Annotated[list[Count], msgspec.Meta(min_length=1)]
    total: Count


class _Sizes(TypedDict):
    dense: NotRequired[Count]
    transformers: NotRequired[Count | None]
    left: NotRequired[dict[str, Count]]


class Facts(TypedDict):
    """What a model card reads of report.json."""

    recipe: NotRequired[str]
    calibration: NotRequired[_Text]
    perplexity: NotRequired[_Perplexity]
    evaluation: NotRequired[_Scored]
    distillation: NotRequired[Outcome | None]


class Report(TypedDict):
    """What is read of report.json, see ``file.write_report``. The blocks are read by ``records.blocks_from_json``."""

    manifest: NotRequired[dict[str, Any]]
    configuration: _Configuration
    environment: dict[str, Any]
    model: _Model
    calibration: _Text
    evaluation: _Scored
    perplexity: _Perplexity
    sparsity: Share
    weights: Count
    pruned: Count
    blocks: list[dict[str, Any]]
    seconds: dict[str, float]
    recipe: NotRequired[str]
    weighed_layers: NotRequired[list[str]]
    memory: NotRequired[dict[str, Count | None] | None]
    neurons: NotRequired[_Neurons | None]
    sizes: NotRequired[_Sizes | None]
    tokens: NotRequired[_Changes | None]
    continuations: NotRequired[Continuations | None]
    distillation: NotRequired[Outcome | None]
    files: NotRequired[dict[str, str]]


class CellRecord(TypedDict):
    """What is read of each entry of a sweep's results.json, see ``pipeline.sweep.tables.CellResult``."""

    perplexity: Positive | None


class FinishedCell(TypedDict):
    """What is read of an entry with a perplexity."""

    mask: str
    update: str
    pattern: str
    windows: Count
    perplexity: Positive
    dense: Positive
    report: str
