"""The declared contents of report.json, evaluation.json and results.json: every entry that a page or a summary reads."""

from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

from optima_tpu.runtime.records import Block, Count, Positive, Share


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


class _Environment(TypedDict):
    device: NotRequired[str]
    devices: NotRequired[Count]
    mesh: NotRequired[dict[str, Count]]
    packages: NotRequired[dict[str, str | None]]
    processes: NotRequired[Count]
    python: NotRequired[str]
    system: NotRequired[str]


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


Parts = Annotated[list[str], msgspec.Meta(min_length=3, max_length=3)]


class Continuation(TypedDict):
    """A prompt, and for each model the part that both wrote, the first token that differs, and the rest."""

    prompt: str
    dense: Parts
    pruned: Parts


class Continuations(TypedDict):
    """The contents of continuations.json: either texts, or the reason why there are none."""

    texts: NotRequired[list[Continuation]]
    reason: NotRequired[str]


class CheckRecord(TypedDict):
    """A check of a distillation, see ``pipeline.distill.outcome.Check``."""

    step: Count
    held_out: float
    training: float | None
    perplexity: NotRequired[float | None]


class SpanRecord(TypedDict):
    """What became of blocks that were trained together, see ``pipeline.distill.outcome.Span``."""

    first: Block
    last: Block
    checks: Annotated[list[CheckRecord], msgspec.Meta(min_length=1)]
    kept: Count


class OutcomeRecord(TypedDict):
    """The contents of distillation.json, see ``pipeline.distill.outcome.Outcome``."""

    checks: Annotated[list[CheckRecord], msgspec.Meta(min_length=1)]
    kept: Count
    tokens: Count
    seconds: NotRequired[float]
    perplexity_before: float | None
    held_out_before: float
    held_out_after: float
    spans: NotRequired[list[SpanRecord]]


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
    distillation: NotRequired[OutcomeRecord | None]


class Report(TypedDict):
    """What is read of report.json, see ``file.write_report``. The blocks are read by ``records.blocks_from_json``."""

    manifest: NotRequired[dict[str, Any]]
    configuration: _Configuration
    environment: _Environment
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
    distillation: NotRequired[OutcomeRecord | None]
    files: NotRequired[dict[str, str]]


class _Distance(TypedDict):
    """See ``distance.Distance``."""

    kl: float | None
    kl_stderr: float | None
    agreement: float
    agreement_stderr: float | None
    tokens: Count
    hidden_errors: NotRequired[list[float | None] | None]
    kls: NotRequired[list[float | None] | None]
    agreements: NotRequired[list[float] | None]


class _Asked(TypedDict):
    fewshot: NotRequired[Count | None]
    limit: NotRequired[Count | None]


class Task(TypedDict):
    """What a task has beside its metrics, which are numbers."""

    documents: Count
    against: dict[str, float | None] | None


class _Measured(TypedDict):
    perplexity: float
    tokens: Count
    how: str
    against: float | None


class _Identity(TypedDict):
    fingerprint: NotRequired[str]
    manifest: NotRequired[dict[str, Any] | None]


class _Identities(TypedDict):
    model: _Identity
    against: NotRequired[_Identity]


class EvaluationRecord(TypedDict):
    """What is read of evaluation.json, see ``evaluate.run``."""

    model: NotRequired[str | None]
    against: NotRequired[str | None]
    evaluated: NotRequired[_Identities | None]
    configuration: NotRequired[_Asked | None]
    perplexity: NotRequired[dict[str, _Measured] | None]
    distance: NotRequired[dict[str, _Distance] | None]
    tasks: NotRequired[dict[str, dict[str, Any]] | None]
    average: NotRequired[float | None]


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
