"""The Orbax checkpoints of a training: its states, and trained blocks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax import Array

from optima_tpu.models.checkpoints.orbax import load_group, read_custom, read_metadata, save_tree
from optima_tpu.pipeline.distill.blocks import TrainedBlock, Trainer, Tree
from optima_tpu.pipeline.distill.model import TrainedBlocks, on_host
from optima_tpu.pipeline.distill.outcome import REMEDY, trained_block
from optima_tpu.pipeline.journal import Journal
from optima_tpu.report.contents import Check
from optima_tpu.runtime.checksums import damage
from optima_tpu.runtime.files import remove
from optima_tpu.runtime.kept import keeping
from optima_tpu.runtime.processes import first_only, from_first
from optima_tpu.runtime.records import Count, Positive, Record, json_values
from optima_tpu.runtime.signals import uninterrupted


class State(Record, frozen=True):
    """The metadata of a saved state.

    Attributes:
      checks: up to this step.
      losses: of the steps since the last check.
      seconds: that these steps and checks took.
      learning_rate: the peak, as the settings say or as it was found; None in a state of version 0.2.0.
    """

    step: Count
    checks: tuple[Check, ...]
    losses: tuple[float, ...]
    seconds: float
    learning_rate: Positive | None = None


def write_blocks(model: TrainedBlocks, moved: Sequence[Tree], journal: Journal) -> None:
    """Writes the blocks with their masks, and with the weights ``moved``."""
    for index, (trainer, block, own) in enumerate(zip(model.trainers, model.blocks, moved)):
        prefix, path = trainer.decoder.prefix(index), trained_block(journal.directory, index)
        weights = {prefix + name: array for name, array in (own | block.fixed).items()}
        # A block holds the masks of what moves: of all matrices, or where norms alone move of none. Then the journal has them.
        masks = {prefix + name: keep for name, keep in block.keep.items()} or {
            name: trainer.place(name.removeprefix(prefix), keep) for name, keep in journal.masks(index).items()
        }
        _save(path, {"weights": weights, "masks": masks}, {})


def _save(path: Path, tree: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Writes an Orbax checkpoint with its checksums, in one step."""
    with uninterrupted(), keeping(path, REMEDY) as partial:
        save_tree(partial, {name: group for name, group in tree.items() if group}, metadata)


class States:
    """The saved state from which a stopped training goes on.

    RUN/distillation/step_0000008 holds masters and moments, the weights of the best check before, and the checks so far.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, model: TrainedBlocks, best: Sequence[Tree] | None, about: State) -> None:
        """Saves the state of a step. The one before is removed."""
        step = about.step
        tree: dict[str, Any] = {"masters": {}, "first": {}, "second": {}, "count": {}}
        if best and _best(about) != step:  # otherwise the masters are the best
            tree["best"] = {f"{index}.{name}": array for index, block in enumerate(best) for name, array in block.items()}
        for index, block in enumerate(model.blocks):
            count, first, second = _moments(block)
            for group, arrays in (("masters", block.masters), ("first", first), ("second", second)):
                tree[group] |= {f"{index}.{name}": array for name, array in arrays.items()}
            tree["count"][str(index)] = count
        _save(self.path(step), tree, json_values(about))

        def forget() -> None:
            for old in self.folder.iterdir():
                if old != self.path(step):
                    remove(old)

        first_only(forget)

    def path(self, step: int) -> Path:
        """The path of the state of a step."""
        return self.folder / f"step_{step:07d}"

    def last(self, model: TrainedBlocks) -> State | None:
        """Loads the last saved state into the model.

        Returns the metadata of the state; None if no undamaged state was saved.
        """

        def read() -> State | None:
            saved = sorted(self.folder.glob("step_???????")) if self.folder.is_dir() else []
            undamaged = [path for path in saved if not damage(path)]
            return read_custom(undamaged[-1], State) if undamaged else None

        if state := from_first(read):
            path = self.path(state.step)
            groups = read_metadata(path).metadata
            for index, (trainer, block) in enumerate(zip(model.trainers, model.blocks)):
                masters, first, second = (
                    _of_block(path, groups, name, trainer, index) for name in ("masters", "first", "second")
                )
                count = load_group(path, "count", {str(index): groups["count"][str(index)]})[str(index)]
                moments = block.moments._replace(count=jnp.asarray(count), mu=first, nu=second)
                model.blocks[index] = block._replace(masters=masters, moments=moments)
        return state

    def best(self, model: TrainedBlocks, about: State) -> list[Tree] | None:
        """The best check's weights; ``model`` is in the state of ``about``."""
        if _best(about) in (0, about.step):
            return model.rounded() if _best(about) else None
        path = self.path(about.step)
        groups = read_metadata(path).metadata
        return [on_host(_of_block(path, groups, "best", trainer, index)) for index, trainer in enumerate(model.trainers)]


def _of_block(path: Path, groups: Mapping[str, Any], group: str, trainer: Trainer, index: int) -> Tree:
    """A block's arrays in one group of a saved state, on the devices."""
    # Where routers alone are trained, blocks without a mixture have nothing that moves.
    wanted = {name: leaf for name, leaf in groups.get(group, {}).items() if name.partition(".")[0] == str(index)}
    read = {name.partition(".")[2]: array for name, array in load_group(path, group, wanted).items()}
    return {name: trainer.place(name, array) for name, array in read.items()}


def _best(about: State) -> int:
    """The step of the best check; 0 if no step improved the pruned model."""
    return min(about.checks, key=lambda check: check.held_out).step


def _moments(block: TrainedBlock) -> tuple[Array, Tree, Tree]:
    """The count and the two moments of Adam."""
    state: Any = block.moments
    return state.count, state.mu, state.nu
