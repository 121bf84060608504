"""Trains a pruned model, with checks on held-out text and saved states."""

import dataclasses
import math
import time
from collections.abc import Callable

import numpy as np

from optima_tpu.errors import UserError, plural
from optima_tpu.method.distillation import Distillation, rate_of_descent
from optima_tpu.pipeline.distill.blocks import Trainer, Tree
from optima_tpu.pipeline.distill.model import TrainedBlocks
from optima_tpu.pipeline.distill.outcome import FOLDER
from optima_tpu.pipeline.distill.states import State, States, write_blocks
from optima_tpu.pipeline.distill.windows import READING, Feed, Inputs, TrainingStream
from optima_tpu.report.contents import Check, Outcome
from optima_tpu.report.numbers import number
from optima_tpu.report.pace import Step
from optima_tpu.report.progress import Progress
from optima_tpu.runtime.processes import from_first
from optima_tpu.runtime.signals import Stopped

SHARE = 20
"""A state is saved when this many times the seconds of a save have passed since the last one."""
CHECK = "check"
TRAINING_STEP = "training step"
"""The kind of a step of Adam, which the progress counts as the lines of the training do."""
TRIAL = "learning rate"
"""The kind of a step in which a learning rate is tried."""
_QUIET = 10.0
"""Seconds without a line after which a step prints one."""


def training_steps(method: Distillation, blocks: int, dense_blocks: int | None = None) -> list[Step]:
    """The steps of :func:`distill`, each of which ends with ``advance``.

    They are the steps of a training that was not stopped.

    Args:
      dense_blocks: of the dense model; None if it has as many.
    """
    checks = method.check_steps()
    one = [Step(CHECK), *[Step(TRIAL)] * method.trials]
    for step in range(1, method.steps + 1):
        one += [Step(TRAINING_STEP), *[Step(CHECK)] * (step in checks)]
    return [*[Step(READING)] * ((dense_blocks or blocks) * method.reads_dense), *one]


def distill(inputs: Inputs, progress: Progress) -> Outcome:
    """Trains the pruned blocks of a run, and writes them to RUN/distilled.

    Every process calls it, and then :func:`keep_outcome`. A run that was stopped goes on behind the last saved state, and ends
    with the same bits. A state is saved so often that saving takes a twentieth of the time, and when SIGTERM or Ctrl-C comes.
    The weights of the best check wait in the memory of the hosts, and are in every state that is saved after that check.

    Args:
      progress: advanced after every block of the dense model, every step and every check. Prints a line after every check, and
        at most one every ten seconds after a step.

    Raises:
      UserError: the disk is full; a loss is not finite.
    """
    method, journal, length = inputs.trainer.method, inputs.journal, inputs.training.shape[1]
    model = TrainedBlocks.open(inputs.trainer, journal, inputs.dense.head(), length)
    training = Training(model, States(journal.directory / FOLDER), progress, method.learning_rate)
    training.resume()
    feed = Feed(inputs, progress)
    if method.reads_dense:
        progress.note("the dense model reads the text first")
    held_out = feed.begin(training.step)
    best = training.run(held_out, feed.step)
    if training.best:
        write_blocks(model, training.best, journal)
    tokens, rate = method.tokens(length), training.learning_rate
    return Outcome(tuple(training.checks), best.step, tokens, seconds=training.seconds, learning_rate=rate)


@dataclasses.dataclass
class Training:
    """A training between two steps.

    Attributes:
      model: after ``step`` steps.
      states: the saved states.
      progress: counts checks and steps.
      learning_rate: the peak; None until it is found.
      losses: of the steps since the last check.
      best: the weights of the best check, from ``TrainedBlocks.rounded``; None where the model as it was pruned is best.
      seconds: that all steps and checks took.
      saved: the step of the last saved state.
      saved_at: the time of the last save, by ``time.monotonic()``; at first the start.
      saving: the seconds that the last save took; at first a guess.
      told_at: when a line was last printed.
    """

    model: TrainedBlocks
    states: "States"
    progress: Progress
    learning_rate: float | None
    step: int = 0
    checks: list[Check] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    best: list[Tree] | None = None
    seconds: float = 0.0
    saved: int = 0
    saved_at: float = dataclasses.field(default_factory=time.monotonic)
    saving: float = 3.0
    told_at: float = -math.inf

    @property
    def due(self) -> bool:
        """Whether the next thing to do is a check."""
        return self.step > self.checks[-1].step and self.step in self.model.trainer.method.check_steps()

    def resume(self) -> None:
        """Goes on from the last saved state, if there is one."""
        if state := self.states.last(self.model):
            self.step = self.saved = state.step
            self.learning_rate = state.learning_rate or self.learning_rate
            self.checks, self.losses = list(state.checks), list(state.losses)
            self.seconds, self.best = state.seconds, self.states.best(self.model, state)
            done = {CHECK: len(self.checks), TRIAL: self.model.trainer.method.trials, TRAINING_STEP: self.step}
            self.progress.skip(kind for kind, count in done.items() for _ in range(count))
            self.progress.note(f"resuming  {self.step} of {plural(self.model.trainer.method.steps, 'step')} done")

    def run(self, held_out: TrainingStream, windows: Callable[[int], TrainingStream]) -> Check:
        """Takes the remaining steps and checks; returns the best check.

        Args:
          windows: gives a step its windows.
        """
        try:
            if not self.checks:
                self.check(held_out)
                self.progress.advance()
            if self.learning_rate is None:
                self.learning_rate = self.search(held_out, windows(0))
            while self.due or self.step < self.model.trainer.method.steps:
                if self.due:
                    self.check(held_out)
                else:
                    self.take(windows(self.step))
                self.progress.advance()
                if not self.due:  # a state of this step would lack its check
                    self._save_in_time()
        except Stopped:
            self.save()
            if self.step:
                self.progress.note(f"saved  {self.step} of {plural(self.model.trainer.method.steps, 'step')}")
            raise
        return min(self.checks, key=lambda check: check.held_out)

    def search(self, held_out: TrainingStream, stream: TrainingStream) -> float:
        """The learning rate whose step lowers the held-out loss most.

        See :func:`rate_of_descent`. Each trial takes the first step of the training from the model as it was pruned. The search
        leaves the model in this state, too.
        """
        start, tried = time.monotonic(), list[float]()

        def loss(rate: float) -> float:
            self.progress.begin(TRIAL, f"trying a learning rate of {rate:.2g}")
            tried.append(rate)
            self.model.step(stream, rate)
            measured, _ = self.model.measure(held_out)
            self.model.restart()
            self.progress.advance()
            return measured if np.isfinite(measured) else math.inf

        best = rate_of_descent(loss, self.checks[0].held_out)
        self.progress.skip([TRIAL] * (self.model.trainer.method.trials - len(tried)))
        self.seconds += time.monotonic() - start
        self.progress.note(f"learning rate {best:.2g}: by {plural(len(tried), 'trial')} of one step, the best on held-out text")
        return best

    def take(self, stream: TrainingStream) -> None:
        """One step of Adam."""
        assert self.learning_rate is not None, "the rate is found before the first step"
        start, rate = time.monotonic(), self.model.trainer.method.rate(self.learning_rate, self.step)
        self.losses.append(finite(self.model.step(stream, rate), self.step))
        self.step += 1
        self.seconds += time.monotonic() - start
        if not self.due and time.monotonic() - self.told_at > _QUIET:
            self._tell(f"{_nats(self.losses[-1])} on the windows of this step")

    def check(self, held_out: TrainingStream) -> None:
        """Measures the held-out windows; keeps the model if it is the best."""
        self.progress.begin(CHECK, "measuring the held-out text")
        start = time.monotonic()
        loss, perplexity = self.model.measure(held_out)
        measured = Check(self.step, finite(loss, self.step), float(np.mean(self.losses)) if self.step else None, perplexity)
        if self.step and measured.held_out < min(check.held_out for check in self.checks):
            self.best = None  # so that no host needs room for two
            self.best = self.model.rounded()
        self.checks, self.losses = [*self.checks, measured], []
        self.seconds += time.monotonic() - start
        line = f"held-out {self.model.trainer.method.words} {_nats(measured.held_out)}, perplexity {number(perplexity, 4)}"
        if measured.training is None:
            return self.progress.note(f"{line} before the first step")
        self._tell(f"{line}; {_nats(measured.training)} on the text of the steps before it")
        self.saved = -1  # a state of this step may lack the check

    def _tell(self, words: str) -> None:
        """Prints how far the training is, and the time left."""
        self.told_at, left = time.monotonic(), self.progress.left()
        self.progress.note(f"step {self.step} of {self.model.trainer.method.steps}: {words}{left and f', {left}'}")

    def _save_in_time(self) -> None:
        """Saves the state once much more time than saving takes has passed."""
        # Behind the last step the result is written, which takes less time than a state.
        left = self.model.trainer.method.steps - self.step
        if left and from_first(lambda: time.monotonic() - self.saved_at > SHARE * self.saving):
            self.save()

    def save(self) -> None:
        """Saves the state if it is not saved yet; removes the state before."""
        if self.step > self.saved:
            about = State(self.step, tuple(self.checks), tuple(self.losses), self.seconds, self.learning_rate)
            start = time.monotonic()
            self.states.save(self.model, self.best, about)
            self.saved, self.saved_at = self.step, time.monotonic()
            self.saving = self.saved_at - start


def _nats(loss: float) -> str:
    return f"{number(loss, 4)} nats"


def finite(value: float, step: int) -> float:
    """A loss after a step. Raises UserError where it is not finite."""
    if not np.isfinite(value):
        raise UserError(
            f"the loss is {value} after {plural(step, 'step')} of training; try a smaller --distill.learning_rate, or --dtype "
            "float32"
        )
    return value


def refuse_large(trainer: Trainer, *otherwise: str) -> None:
    """Raises UserError if the devices cannot hold the training.

    Also raises UserError if the model has nothing that ``distill.train`` names.

    Args:
      otherwise: what else may be typed.
    """
    blocks, train = trainer.decoder.config.blocks, trainer.method.train
    if not any(trainer.at(index).factors for index in range(blocks)):
        raise UserError(
            f"expected a model with {train} where distill.train is {train}, got one without: take --distill.train all"
        )
    if (needed := trainer.bytes_on_device()) > trainer.budget:
        ways = ["take more devices", *["--distill.train norms"] * (train in ("all", "weights")), *otherwise]
        instead = " or ".join(filter(None, [", ".join(ways[:-1]), ways[-1]]))
        gradients = " gradients," if trainer.accumulates else ""
        raise UserError(
            f"training holds weights,{gradients} two moments and masks of all blocks, {needed / 2**30:.1f} GiB on each "
            f"device of {trainer.budget / 2**30:.1f} GiB: {instead}"
        )
