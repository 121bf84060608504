"""The windows of a training, on their way through both models."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from optima_tpu.method.distillation import Distillation
from optima_tpu.models.activations import Activations
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline.distill.blocks import Trainer
from optima_tpu.pipeline.journal import Journal
from optima_tpu.report.progress import Progress

READING = "dense model reads the text"
"""The kind of the steps in which a block of the dense model reads all windows."""

AT_ONCE = 1 << 32
"""Bytes of hidden states, on all hosts together, of the training windows that wait for their steps."""


class Inputs(NamedTuple):
    """What a training begins with.

    Attributes:
      trainer: of the pruned model's blocks, which its decoder reads.
      journal: these blocks, with their masks.
      training: [windows, length] int32.
      held_out: [windows, length] int32, from the same text, which no weight is fitted to.
    """

    dense: Decoder
    trainer: Trainer
    journal: Journal
    training: np.ndarray
    held_out: np.ndarray


class TrainingStream(NamedTuple):
    """Windows on their way through both models.

    Attributes:
      tokens: [windows, length] int32, of which ``part`` leaves out none.
      entering: what enters the first trained block.
      dense: what leaves the last of these blocks in the dense model; something of this shape where the loss does not read it.
    """

    tokens: np.ndarray
    entering: Activations
    dense: Activations

    def part(self, first: int, last: int) -> "TrainingStream":
        """Windows ``first`` to ``last - 1``, without a copy."""
        return self._replace(entering=self.entering.part(first, last), dense=self.dense.part(first, last))


class TrainingParts(NamedTuple):
    """How training reads its windows.

    Attributes:
      steps: steps of a pass over the windows.
      at_once: steps whose windows pass through the dense model together, and wait.
    """

    batch: int
    steps: int
    at_once: int

    @classmethod
    def of(cls, method: Distillation, windows: int, state: int) -> "TrainingParts":
        """How a training reads ``windows``.

        Args:
          state: bytes of a window's hidden states, of which two wait: before the first block, and behind the last.
        """
        batch, steps = min(method.batch, windows), max(1, windows // method.batch)
        return cls(batch, steps, min(steps, max(1, AT_ONCE // (2 * batch * state))))


class Feed:
    """Gives each step its windows, after the dense model has read them.

    The dense model reads a part of the windows at a time. The parts are the same wherever a run begins again, so that a window
    has the same hidden states in every start.

    Args:
      progress: advanced after every block of the dense model, for the first part of the windows. Says when it reads another
        part.
    """

    def __init__(self, inputs: Inputs, progress: Progress):
        self._inputs, self._progress, dense, training = inputs, progress, inputs.dense, inputs.training
        state = training[0].size * dense.config.d_model * dense.tensors.dtype(dense.tensor_names()[0]).itemsize
        self._batch, self._steps, self._at_once = TrainingParts.of(inputs.trainer.method, len(training), state)
        self._part_number = -1

    def begin(self, step: int) -> TrainingStream:
        """Gets the windows of a step ready, and returns the held-out ones."""
        self._part_number, training = self._place(step)
        self._part, held_out_stream = _streams(self._inputs, (training, self._inputs.held_out), self._progress)
        return held_out_stream

    def step(self, step: int) -> TrainingStream:
        """The windows of a step."""
        number, training = self._place(step)
        if number != self._part_number:
            # Not a step of the progress: how many parts there are depends on the width of the model.
            if self._inputs.trainer.method.reads_dense:
                self._progress.note("the dense model reads the next part of the text")
            self._part_number, (self._part,) = number, _streams(self._inputs, (training,))
        first = (step % self._steps - number * self._at_once) * self._batch
        return self._part.part(first, first + self._batch)

    def _place(self, step: int) -> tuple[int, np.ndarray]:
        """The part that has the windows of a step: its number and windows."""
        number, size = step % self._steps // self._at_once, self._at_once * self._batch
        used = self._inputs.training[: self._steps * self._batch]
        return number, used[number * size : (number + 1) * size]


def _streams(inputs: Inputs, sets: Sequence[np.ndarray], progress: Progress | None = None) -> tuple[TrainingStream, ...]:
    """Embeds sets of windows, and passes them through the dense model.

    If the loss does not read the dense model, the windows are only embedded.

    Args:
      progress: advanced after every block of the dense model.
    """
    dense = inputs.dense
    embedded = [dense.embed(tokens) for tokens in sets]
    if not inputs.trainer.method.reads_dense:
        return tuple(map(TrainingStream, sets, embedded, embedded))
    finals = [hidden.copy() for hidden in embedded]
    for index, parameters in enumerate(dense.blocks(range(dense.config.blocks))):
        if progress:
            progress.begin(READING, "the dense model reads the text")
        for final in finals:
            dense.apply(index, parameters, final)
        if progress:
            progress.advance()
    return tuple(map(TrainingStream, sets, embedded, finals))
