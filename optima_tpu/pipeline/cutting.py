"""Chooses what a model loses before the walk, and makes the smaller model."""

import dataclasses
import itertools
from pathlib import Path
from typing import NamedTuple

from msgspec import structs

from optima_tpu.config.run_config import RunConfig
from optima_tpu.evaluate.perplexity import text_steps
from optima_tpu.models.checkpoints.fewer_blocks import kept_blocks
from optima_tpu.models.checkpoints.fewer_experts import expert_cut
from optima_tpu.models.checkpoints.orbax import CheckpointTensors
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.model import Model, without_blocks
from optima_tpu.pipeline.cut_blocks import TRIED, choices, expected_passes
from optima_tpu.pipeline.experts import ExpertRemoval, done_blocks, keep_block, without_those
from optima_tpu.pipeline.journal import Journal
from optima_tpu.pipeline.keeping import KeptResult, Stage, StageWork
from optima_tpu.pipeline.layer_groups import groups_of_blocks
from optima_tpu.pipeline.memory_plan import kept_of_mixture
from optima_tpu.pipeline.opened import Opened
from optima_tpu.pipeline.walk import Walk, WholeDense
from optima_tpu.report.contents import BlockExperts, ExpertsLeft, LeftOut
from optima_tpu.report.numbers import number, percent
from optima_tpu.report.pace import Step
from optima_tpu.runtime.device_memory import device_budget
from optima_tpu.runtime.kept import KeptRecord

_KEPT = KeptRecord("left_out.json", LeftOut)


def read_left_out(directory: Path) -> LeftOut:
    """What a run has left out so far. Every process calls it."""
    return _KEPT.read(directory) or LeftOut()


def take_left_out(directory: Path, taken: LeftOut) -> None:
    """Saves what another run chose, without the errors of its experts.

    The experts' solved weights come with the pruned blocks.
    """
    if taken.experts:
        blocks = tuple(BlockExperts(block.stay) for block in taken.experts.blocks)
        taken = structs.replace(taken, experts=ExpertsLeft(taken.experts.total, blocks))
    if taken != LeftOut():
        _KEPT.write(directory, taken)


def kept_by(opened: Opened) -> tuple[int, ...]:
    """The indices of the dense model's blocks that a run keeps.

    Until the run has chosen all blocks to leave out, its last blocks stand for the missing choices.
    """
    blocks, chosen = range(opened.model.decoder.config.blocks), read_left_out(opened.directory).blocks
    others = (index for index in reversed(blocks) if index not in chosen)
    return kept_blocks(len(blocks), (*chosen, *itertools.islice(others, opened.config.cut.blocks - len(chosen))))


def pruned_model(opened: Opened) -> Model:
    """The dense model without the blocks and experts a run leaves out."""
    kept = kept_by(opened)
    model = without_blocks(opened.model, [index for index in range(opened.model.decoder.config.blocks) if index not in kept])
    if not opened.config.cut.experts:
        return model
    chosen = done_blocks(opened.directory, read_left_out(opened.directory).experts)
    return without_those(opened.directory, model, expert_cut(opened.config.cut.experts, model.pretrained.config), chosen)


class PrunedModel(NamedTuple):
    """The model in RUN/checkpoint.

    Attributes:
      checkpoint: its tensors, and the report of every block.
    """

    decoder: Decoder
    checkpoint: CheckpointTensors


def smaller_walk(opened: Opened, walk: Walk) -> Walk:
    """A walk over all blocks, on the blocks that are not left out.

    Blocks before the first gap stay as they are, up to the first block that loses weights.
    """
    decoder, kept = pruned_model(opened).decoder, kept_by(opened)
    groups = groups_of_blocks(decoder) if opened.config.cut.experts else tuple(walk.groups[index] for index in kept)
    same = _same_as_dense(opened)
    groups = ((),) * same + groups[same:]
    return dataclasses.replace(walk, decoder=decoder, groups=groups, whole=WholeDense(walk.decoder, kept))


def _same_as_dense(opened: Opened) -> int:
    """How many blocks, from the first, are the same as in the dense model.

    A re-fit has nothing to make up for in these blocks. 0 until the blocks that leave are chosen.
    """
    cut, chosen = opened.config.cut, read_left_out(opened.directory).blocks
    if not cut.blocks or cut.experts or opened.config.recipe.quantize or len(chosen) < cut.blocks:
        return 0
    decoder, recipe = opened.model.decoder, opened.config.recipe

    def loses(index: int, name: str) -> bool:
        pattern = recipe.pattern_of(decoder.prefix(index) + name, name)
        return pattern is not None and pattern.prunes(decoder.at(index).block_shapes[f"{name}.weight"])

    losing = (index for index in range(min(chosen)) if any(loses(index, name) for name in decoder.at(index).linears))
    return next(losing, min(chosen))


def _cut_steps(opened: Opened) -> list[Step]:
    """The work of each choice of a block to leave out.

    The unit is the work of the dense model's pass over the text, which runs the same programs.
    """
    decoder, chosen = opened.model.decoder, read_left_out(opened.directory).blocks
    text, blocks = text_steps(decoder, opened.held_out, both=False), decoder.config.blocks
    head = sum(step.work for step in text if step.like)  # it stands in for nothing, and a block for it
    block = (sum(step.work for step in text) - head) / blocks
    passes = expected_passes(blocks, opened.config.cut.blocks, len(chosen))
    return [Step("choosing a block to leave out", each * block + (1 + TRIED) * head, text[0].kind) for each in passes]


def _all_left_out(opened: Opened) -> LeftOut | None:
    chosen = read_left_out(opened.directory)
    return chosen if len(chosen.blocks) == opened.config.cut.blocks else None


def _cut(work: StageWork, journal: Journal) -> LeftOut:
    opened, progress = work.opened, work.progress
    before = chosen = read_left_out(opened.directory)
    missing = opened.config.cut.blocks - len(before.blocks)
    for chosen in itertools.islice(choices(opened.model, opened.held_out, before), missing):
        _KEPT.write(opened.directory, chosen)
        progress.advance()
        divergence = f"the predictions diverge by {number(chosen.divergences[-1])} nats on held-out windows"
        progress.note(", ".join(filter(None, (f"block {chosen.blocks[-1]} is left out: {divergence}", progress.left()))))
    return chosen


CUTTING = Stage("leaving out blocks", _cut, KeptResult(_all_left_out), _cut_steps)


def _removal_steps(opened: Opened) -> list[Step]:
    done = done_blocks(opened.directory, read_left_out(opened.directory).experts)
    return [Step("removing the experts of a block")] * (opened.model.decoder.config.blocks - len(done))


def _all_removed(opened: Opened) -> LeftOut | None:
    return None if _removal_steps(opened) else read_left_out(opened.directory)


def _remove(work: StageWork, journal: Journal) -> LeftOut:
    opened, progress, directory = work.opened, work.progress, work.opened.directory
    choice, decoder = opened.config.cut, opened.model.decoder
    cut, chosen = expert_cut(choice.experts, opened.model.pretrained.config), read_left_out(directory)
    done = done_blocks(directory, chosen.experts)
    tokens = opened.texts.calibration.ids[: opened.config.calibration.fitted]
    kept = kept_of_mixture(decoder, cut.names.down, tokens.shape, device_budget(opened.config.device_memory))
    removal = ExpertRemoval(opened.model, cut, choice.expert_score, choice.refit, kept > 0)
    for block in removal.blocks(tokens, done, directory):
        done += (keep_block(directory, len(done), decoder.prefix(len(done)), block),)
        chosen = structs.replace(chosen, experts=ExpertsLeft(cut.total, done))
        _KEPT.write(directory, chosen)
        progress.advance()
        if block.error_before is not None and block.error_after is not None:
            progress.note(
                f"block {len(done) - 1} keeps {cut.kept} of {cut.total} experts; the error of their output falls from "
                f"{percent(block.error_before)} to {percent(block.error_after)}"
            )
    return chosen


REMOVING = Stage("removing experts", _remove, KeptResult(_all_removed), _removal_steps)


def cutting(config: RunConfig) -> list[Stage[[Journal], LeftOut]]:
    """The stages that choose what the model loses."""
    return [stage for wanted, stage in ((config.cut.blocks, CUTTING), (config.cut.experts, REMOVING)) if wanted]
