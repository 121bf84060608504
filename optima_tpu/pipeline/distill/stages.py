"""The stages of a run that train its pruned model."""

import dataclasses

from msgspec import structs

from optima_tpu.models.checkpoints.source import layered
from optima_tpu.pipeline.cutting import kept_by, pruned_model
from optima_tpu.pipeline.distill.blocks import Trainer
from optima_tpu.pipeline.distill.outcome import keep_outcome, read_outcome
from optima_tpu.pipeline.distill.train import TRAINING_STEP, distill, training_steps
from optima_tpu.pipeline.distill.windows import Inputs
from optima_tpu.pipeline.journal import Journal
from optima_tpu.pipeline.keeping import KeptResult, Stage, StageWork
from optima_tpu.pipeline.opened import Opened
from optima_tpu.pipeline.perplexities import measured, perplexity_steps
from optima_tpu.report.contents import Outcome
from optima_tpu.report.pace import Step
from optima_tpu.runtime.device_memory import device_budget


def _training_steps(opened: Opened) -> list[Step]:
    method = opened.config.distill
    assert method is not None, "a run without training has no such stage"
    return training_steps(method, len(kept_by(opened)), opened.model.decoder.config.blocks)


def _train(work: StageWork, journal: Journal) -> Outcome:
    opened = work.opened
    method, training = opened.config.distill, opened.texts.distillation
    assert method is not None and training is not None, "a run without training has no such stage"
    pruned = dataclasses.replace(pruned_model(opened).decoder, tensors=journal.tensors())
    trainer = Trainer(pruned, method, device_budget(opened.config.device_memory))
    return distill(Inputs(opened.model.decoder, trainer, journal, training, opened.held_out), work.progress)


def _read(opened: Opened) -> Outcome | None:
    return read_outcome(opened.directory, used=opened.checkpointed)


def _keep(opened: Opened, outcome: Outcome) -> None:
    keep_outcome(opened.directory, outcome)


def _read_compared(opened: Opened) -> Outcome | None:
    outcome = _read(opened)
    return None if outcome is None or outcome.perplexity_before is None else outcome


TRAINING = Stage("training", _train, KeptResult(_read, _keep), _training_steps, counted=TRAINING_STEP)


def _compare(work: StageWork, journal: Journal, outcome: Outcome) -> Outcome:
    dense = pruned_model(work.opened).decoder
    untrained = dataclasses.replace(dense, tensors=layered(journal.tensors(), dense.tensors))
    return structs.replace(outcome, perplexity_before=measured(work, untrained).perplexity)


UNTRAINED = Stage(
    "perplexity without the training",
    _compare,
    KeptResult(_read_compared, _keep),
    lambda opened: perplexity_steps(opened, pruned_model(opened).decoder),
)
"""Its result is the outcome of the training with the perplexity of the model as it was pruned."""
