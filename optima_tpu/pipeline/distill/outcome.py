"""The outcome of a training, and the trained blocks, in a run directory."""

from pathlib import Path

from optima_tpu.report.contents import Outcome
from optima_tpu.runtime.checksums import damage
from optima_tpu.runtime.files import remove
from optima_tpu.runtime.kept import KeptRecord
from optima_tpu.runtime.processes import first_only, from_first

FOLDER = "distillation"
DISTILLED = "distilled"
REMEDY = "the pruned blocks are intact; make room and repeat the command"
_KEPT = KeptRecord("distillation.json", Outcome, REMEDY)


def keep_outcome(directory: Path, outcome: Outcome) -> None:
    """Records the outcome of a training in the run directory.

    Removes the states from which a stopped training would have gone on, and the trained blocks if the model stays as it was
    pruned.
    """
    _KEPT.write(directory, outcome)

    def clear() -> None:
        remove(directory / FOLDER)
        if not outcome.kept:
            remove(directory / DISTILLED)  # the model stays as it was pruned

    first_only(clear)


def read_outcome(directory: Path, used: bool = False) -> Outcome | None:
    """Reads the outcome of a run's training.

    None if the training is not done, or its blocks are damaged.

    Args:
      used: whether the checkpoint refers to the blocks, and was compared with its checksums; then they are not read again.
    """

    record = _KEPT.read(directory)
    if record is None:
        return None
    trained = record.kept and not used
    return None if trained and from_first(lambda: any(damage(entry) for entry in _entries(directory))) else record


def trained_block(directory: Path, index: int) -> Path:
    """The Orbax checkpoint of a trained block, in place of the journal's."""
    return directory / DISTILLED / f"block_{index:04d}"


def _entries(directory: Path) -> list[Path]:
    return sorted((directory / DISTILLED).glob("block_*"))
