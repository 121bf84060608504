"""What became of a training, and the trained blocks, in the run directory."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from optima_tpu.pipeline.journal import Journal
from optima_tpu.report import contents
from optima_tpu.runtime.checksums import damage
from optima_tpu.runtime.files import remove
from optima_tpu.runtime.kept import KeptRecord
from optima_tpu.runtime.processes import first_only, from_first

FOLDER = "distillation"
OUTCOME, DISTILLED = "distillation.json", "distilled"
REMEDY = "the pruned blocks are intact; make room and repeat the command"
_KEPT = KeptRecord(OUTCOME, contents.OutcomeRecord, REMEDY)


class Check(NamedTuple):
    """What a check on held-out windows measured.

    Attributes:
      step: after how many steps of Adam.
      held_out: mean loss of a held-out token, in nats.
      training: mean loss of a token of the steps since the check before; None before the first step.
      perplexity: on the held-out windows; None in records of earlier versions.
    """

    step: int
    held_out: float
    training: float | None = None
    perplexity: float | None = None

    @classmethod
    def from_json(cls, record: contents.CheckRecord) -> "Check":
        """From ``_asdict()``. Other names are not read: a damaged file may have them."""
        return cls(record["step"], record["held_out"], record["training"], record.get("perplexity"))

    def to_json(self) -> contents.CheckRecord:
        """What the record of the training and the report have."""
        return {"step": self.step, "held_out": self.held_out, "training": self.training, "perplexity": self.perplexity}


class Span(NamedTuple):
    """What became of blocks that were trained together, toward the dense model's hidden states.

    Attributes:
      first, last: the blocks, both included.
      checks: as of :class:`Outcome`, of the hidden error behind the last block.
      kept: the step whose state is the result; 0 where the blocks keep their weights.
    """

    first: int
    last: int
    checks: tuple[Check, ...]
    kept: int

    @classmethod
    def from_json(cls, record: contents.SpanRecord) -> "Span":
        """From :meth:`to_json`."""
        return cls(**record | {"checks": tuple(map(Check.from_json, record["checks"]))})  # type: ignore[arg-type]

    def to_json(self) -> contents.SpanRecord:
        """What the metadata of the blocks and the report have."""
        return {"first": self.first, "last": self.last, "checks": [check.to_json() for check in self.checks], "kept": self.kept}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a distillation.

    Attributes:
      checks: in order, the first one before the first step.
      kept: the step whose state is the result; 0 where the model stays as it was pruned.
      tokens: how many tokens the steps read.
      perplexity_before: of the model as it was pruned, on the evaluation text; None until it is measured.
      seconds: that steps and checks took, also those before the run was stopped.
      spans: where blocks were trained span by span. The checks are then two, before and after all of them.
    """

    checks: tuple[Check, ...]
    kept: int
    tokens: int
    perplexity_before: float | None = None
    seconds: float = dataclasses.field(default=0.0, compare=False)
    spans: tuple[Span, ...] = ()

    @property
    def before(self) -> float:
        """The held-out loss of the model as it was pruned."""
        return self.checks[0].held_out

    @property
    def after(self) -> float:
        """The held-out loss of the result."""
        return next(check.held_out for check in self.checks if check.step == self.kept)

    def to_json(self) -> contents.OutcomeRecord:
        """What ``distillation.json`` and the report have."""
        return {
            "checks": [check.to_json() for check in self.checks],
            "kept": self.kept,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "perplexity_before": self.perplexity_before,
            "held_out_before": self.before,
            "held_out_after": self.after,
            "spans": [span.to_json() for span in self.spans],
        }

    @classmethod
    def from_json(cls, record: contents.OutcomeRecord) -> "Outcome":
        """From :meth:`to_json`."""
        checks = tuple(map(Check.from_json, record["checks"]))
        spans = tuple(map(Span.from_json, record.get("spans", ())))
        return cls(checks, record["kept"], record["tokens"], record["perplexity_before"], record.get("seconds", 0.0), spans)


def keep_outcome(directory: Path, outcome: Outcome) -> None:
    """Makes the end of a distillation known to the run, and removes what a stopped one would have gone on from."""

    _KEPT.write(directory, outcome.to_json())

    def clear() -> None:
        remove(directory / FOLDER)
        if not outcome.kept:
            remove(directory / DISTILLED)  # the model stays as it was pruned

    first_only(clear)


def read_outcome(directory: Path, used: bool = False) -> Outcome | None:
    """What became of the distillation of a run; None if it is not done, or its blocks are damaged.

    Args:
      used: the checkpoint refers to the blocks, and was compared with its checksums; they are not read again.
    """

    record = _KEPT.read(directory)
    if record is None:
        return None
    trained = record["kept"] and not used
    if trained and from_first(lambda: any(damage(entry) for entry in _entries(directory))):
        return None
    return Outcome.from_json(record)


class Distilled:
    """The blocks of a run behind its distillation, in the place of the journal's.

    Attributes:
      directory: of the run.
      finished: the blocks.
    """

    def __init__(self, journal: Journal):
        self._journal = journal
        self.directory, self.finished = journal.directory, journal.finished

    def report(self, index: int) -> dict[str, Any]:
        """The report of a block, from its pruning."""
        return self._journal.report(index)

    def entry(self, index: int) -> Path:
        """The Orbax checkpoint of a block."""
        return _entry(self.directory, index)


def _entry(directory: Path, index: int) -> Path:
    return directory / DISTILLED / f"block_{index:04d}"


def _entries(directory: Path) -> list[Path]:
    return sorted((directory / DISTILLED).glob("block_*"))
