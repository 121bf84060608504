"""Training of a pruned model: steps of Adam, checks on held-out windows, and a state from which a stopped run goes on."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import SingleDeviceSharding

from optima_tpu.errors import UserError
from optima_tpu.method.distillation import Distillation
from optima_tpu.models.activations import Activations
from optima_tpu.models.checkpoints.orbax import load_group, read_metadata, save_tree
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.family import Positions
from optima_tpu.pipeline.distill.blocks import Block, Goal, NextToken, Trainer, Tree
from optima_tpu.pipeline.journal import Journal
from optima_tpu.report import contents
from optima_tpu.report.numbers import duration
from optima_tpu.runtime.checksums import damage, keep, write_sums
from optima_tpu.runtime.files import begin, commit, remove, staged, writing
from optima_tpu.runtime.processes import fetch, first_only, from_first
from optima_tpu.runtime.records import Count, check_record, known_record
from optima_tpu.runtime.signals import Stopped, uninterrupted

FOLDER = "distillation"
OUTCOME, _DISTILLED = "distillation.json", "distilled"
AT_ONCE = 1 << 32
"""Bytes of hidden states, on all hosts together, of the training windows that wait for their steps."""
SHARE = 20
"""A state is saved when this many times as long as it takes has passed since the last."""
_HOST = "pinned_host"
"""The memory of a host, as jax names it."""
_QUIET = 10.0
"""Seconds without a line after which a step prints one."""
_REMEDY = "the pruned blocks are intact; make room and repeat the command"


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


class _State(TypedDict):
    """The metadata of a saved state.

    Attributes:
      step: after how many steps of Adam.
      checks: up to this step.
      losses: of the steps since the last check.
      seconds: that these steps and checks took.
    """

    step: Count
    checks: list[contents.Check]
    losses: list[float]
    seconds: float


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
    def from_json(cls, record: contents.Span) -> "Span":
        """From :meth:`to_json`."""
        return cls(**record | {"checks": tuple(Check(**check) for check in record["checks"])})  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """What the metadata of the blocks and the report have."""
        return self._asdict() | {"checks": [check._asdict() for check in self.checks]}


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

    def to_json(self) -> dict[str, Any]:
        """What ``distillation.json`` and the report have."""
        return {
            "checks": [check._asdict() for check in self.checks],
            "kept": self.kept,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "perplexity_before": self.perplexity_before,
            "held_out_before": self.before,
            "held_out_after": self.after,
            "spans": [span.to_json() for span in self.spans],
        }

    @classmethod
    def from_json(cls, record: contents.Outcome) -> "Outcome":
        """From :meth:`to_json`."""
        checks = tuple(Check(**check) for check in record["checks"])
        spans = tuple(map(Span.from_json, record.get("spans", ())))
        return cls(checks, record["kept"], record["tokens"], record["perplexity_before"], record.get("seconds", 0.0), spans)


class Windows(NamedTuple):
    """Token windows of a distillation.

    Attributes:
      training: [windows, length] int32.
      held_out: [windows, length] int32, from the same text, which no weight is fitted to.
    """

    training: np.ndarray
    held_out: np.ndarray


class Stream(NamedTuple):
    """Windows on their way through both models.

    Attributes:
      tokens: [windows, length] int32, of which ``part`` leaves out none.
      entering: what enters the first trained block.
      dense: what leaves the last of these blocks in the dense model; something of this shape where the loss does not read it.
    """

    tokens: np.ndarray
    entering: Activations
    dense: Activations

    def part(self, first: int, last: int) -> "Stream":
        """Windows ``first`` to ``last - 1``, without a copy."""
        return self._replace(entering=self.entering.part(first, last), dense=self.dense.part(first, last))


class Parts(NamedTuple):
    """How training reads its windows.

    Attributes:
      batch: windows of a step.
      steps: steps of a pass over the windows.
      at_once: steps whose windows pass through the dense model together, and wait.
    """

    batch: int
    steps: int
    at_once: int

    @classmethod
    def of(cls, method: Distillation, windows: int, state: int) -> "Parts":
        """Of ``windows`` whose hidden states take ``state`` bytes each, once before a block and once behind it."""
        batch, steps = min(method.batch, windows), max(1, windows // method.batch)
        # Every span reads what left the one before, of all windows.
        return cls(batch, steps, steps if method.by_spans else min(steps, max(1, AT_ONCE // (2 * batch * state))))


class _Feed:
    """Gives each step its windows, and passes them through the dense model before, a part of them at a time.

    The parts are the same wherever a run begins again, so that a window has the same hidden states in every start.

    Args:
      dense: the dense model.
      advance: called after every block of it, for the first part of the windows.
    """

    def __init__(self, dense: Decoder, method: Distillation, windows: Windows, advance: Callable[[], None]):
        self._dense, self._method, self._windows, self._advance = dense, method, windows, advance
        state = windows.training[0].size * dense.config.d_model * dense.tensors.dtype(dense.tensor_names()[0]).itemsize
        self._batch, self._steps, self._at_once = Parts.of(method, len(windows.training), state)
        self._held = -1

    def begin(self, step: int) -> Stream:
        """Gets the windows of a step ready, and returns the held-out ones."""
        held_out = self._windows.held_out
        self._held, training = self._place(step)
        self._part, found = _streams(self._dense, self._method, (training, held_out), self._advance)
        return found

    def step(self, step: int) -> Stream:
        """The windows of a step."""
        number, training = self._place(step)
        if number != self._held:
            # Not a step of the progress: how many parts there are depends on the width of the model.
            self._held, (self._part,) = number, _streams(self._dense, self._method, (training,), lambda: None)
        first = (step % self._steps - number * self._at_once) * self._batch
        return self._part.part(first, first + self._batch)

    def _place(self, step: int) -> tuple[int, np.ndarray]:
        """The part that the windows of a step are in: its number, and its windows."""
        number, size = step % self._steps // self._at_once, self._at_once * self._batch
        used = self._windows.training[: self._steps * self._batch]
        return number, used[number * size : (number + 1) * size]


@dataclasses.dataclass
class Model:
    """The blocks of a model that are trained together.

    Attributes:
      blocks: in order, from the first of ``span`` on.
      goal: what leaves the last of them is measured by.
      positions: the position data of every block.
    """

    trainer: Trainer
    span: range
    blocks: list[Block]
    goal: Goal
    positions: Sequence[Positions]

    @classmethod
    def open(cls, trainer: Trainer, journal: Journal, span: range, goal: Goal, length: int) -> "Model":
        """Blocks as they were pruned, for windows of ``length`` tokens."""
        blocks, decoder = [], trainer.decoder
        for index, parameters in zip(span, decoder.blocks(span)):
            keep = {name.removeprefix(decoder.prefix(index)): mask for name, mask in journal.masks(index).items()}
            blocks.append(trainer.at(index).open(parameters, keep))
        return cls(trainer, span, blocks, goal, [decoder.positions(index, length) for index in span])

    @property
    def trainers(self) -> list[Trainer]:
        """Of every block."""
        return [self.trainer.at(index) for index in self.span]

    def rounded(self) -> list[Tree]:
        """A copy in the memory of the hosts of what moves, in the checkpoint's dtype, of every block."""
        pairs = zip(self.trainers, self.blocks)
        return [
            _on_host({name: array.astype(trainer.dtype(name)) for name, array in block.masters.items()})
            for trainer, block in pairs
        ]

    def measure(self, stream: Stream) -> tuple[float, float | None]:
        """The mean loss of a token, and the perplexity where the goal reads the next token."""
        totals, batch = np.zeros(2), self.trainer.decoder.batch
        for pruned, dense in zip(stream.entering.batches(batch), stream.dense.batches(batch)):
            hidden = pruned.hidden
            for trainer, block, positions in zip(self.trainers, self.blocks, self.positions):
                hidden = trainer.forward(block.masters, block.fixed, hidden, positions)
            sums = fetch(self.goal.sums(dense.hidden, hidden, pruned.place(stream.tokens), pruned.valid))
            totals[: len(sums)] += [np.sum(each, dtype=np.float64) for each in sums]
        loss, nll = totals / self._terms(stream)
        return float(loss), float(np.exp(min(nll, 709.0))) if len(sums) > 1 else None

    def step(self, stream: Stream, rate: float) -> float:
        """One step of Adam on some windows; the mean loss of a token before it.

        Gradients add up over batches that fit the devices, so the batch of Adam is as large as the method says on any mesh. The
        last batch updates each block right behind its backward pass: if it is the only one, one gradient exists at a time.
        """
        batch, count, trainers = self.trainer.decoder.batch, self._terms(stream), self.trainers
        gradients = dict[int, Tree]()
        share, total = jnp.float32(1 / count), 0.0
        for pruned, dense in zip(stream.entering.batches(batch), stream.dense.batches(batch)):
            inputs = [pruned.hidden]
            for each, block, positions in zip(trainers, self.blocks, self.positions):
                inputs.append(each.forward(block.masters, block.fixed, inputs[-1], positions))
            tokens, there = pruned.place(stream.tokens), pruned.valid
            sums, cotangent = self.goal.gradient(dense.hidden, inputs.pop(), tokens, there)
            last = pruned.rows.max() >= stream.entering.last - 1
            for index in reversed(range(len(self.blocks))):
                each, block = trainers[index], self.blocks[index]
                gradients[index], cotangent = each.backward(
                    block.masters,
                    block.fixed,
                    inputs.pop(),
                    self.positions[index],
                    cotangent,
                    gradients.pop(index, None) or each.zeros(),
                )
                if last:
                    self.blocks[index] = each.update(block, gradients.pop(index), share, jnp.float32(rate))
            total += float(np.sum(fetch(sums), dtype=np.float64))
        return total / count

    def _terms(self, stream: Stream) -> int:
        return len(stream.entering) * self.goal.count(stream.tokens.shape[1])


def distill(
    dense: Decoder,
    journal: Journal,
    method: Distillation,
    windows: Windows,
    advance: Callable[[], None],
    note: Callable[[str], None],
) -> Outcome:
    """Trains the pruned blocks of a run, and leaves them in RUN/distilled. Every process calls it, and then :func:`keep_outcome`.

    A run that was stopped goes on behind the last state that was saved, and ends with the same bits. A state is saved so often that
    this takes a twentieth of the time, and when SIGTERM or Ctrl-C comes. The weights of the best check wait in the memory of the
    hosts, and are in a state that is saved behind it.

    Args:
      dense: the dense model.
      journal: the finished blocks.
      method: what is trained, and how.
      windows: the text.
      advance: called after every block of the dense model, every step and every check.
      note: called with a line after every check, and with one at most every ten seconds after a step.

    Raises:
      UserError: the disk is full; a loss is not finite.
    """
    pruned, span = dataclasses.replace(dense, tensors=journal.tensors()), range(dense.config.blocks)
    goal, length = NextToken(method, dense.head()), windows.training.shape[1]
    model = Model.open(Trainer(pruned, method), journal, span, goal, length)
    training = Training(model, States(journal.directory / FOLDER), note)
    training.resume()
    feed = _Feed(dense, method, windows, advance)
    if method.reads_dense:
        note("the dense model reads the text first")
    held_out = feed.begin(training.step)
    best = training.run(held_out, feed.step, advance)
    if training.best:
        write_blocks(model, training.best, journal)
    return Outcome(tuple(training.checks), best.step, tokens_read(method, windows), seconds=training.seconds)


def tokens_read(method: Distillation, windows: Windows) -> int:
    """How many tokens the steps read."""
    return method.steps * min(method.batch, len(windows.training)) * windows.training.shape[1]


@dataclasses.dataclass
class Training:
    """A training between two steps.

    Attributes:
      model: after ``step`` steps.
      states: where it is saved.
      note: called with a line after every check, and after steps.
      checks: so far.
      losses: of the steps since the last check.
      best: the weights of the best check, from ``Model.rounded``; None where the model as it was pruned is best.
      seconds: that all steps and checks took.
      saved: the step of the last saved state.
      saved_at: when, by ``time.monotonic()``; at first the start.
      saving: the seconds that this took; at first a guess.
      begun: the first step of this start, and when it began.
      told_at: when a line was last printed.
    """

    model: Model
    states: "States"
    note: Callable[[str], None]
    step: int = 0
    checks: list[Check] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    best: list[Tree] | None = None
    seconds: float = 0.0
    saved: int = 0
    saved_at: float = dataclasses.field(default_factory=time.monotonic)
    saving: float = 3.0
    begun: tuple[int, float] = (0, 0.0)
    told_at: float = -math.inf

    @property
    def due(self) -> bool:
        """Whether the next thing to do is a check."""
        return self.step > self.checks[-1].step and self.step in self.model.trainer.method.check_steps()

    def resume(self) -> None:
        """Goes on from the last saved state, if there is one."""
        if found := self.states.last(self.model):
            self.step = self.saved = found["step"]
            self.checks, self.losses = [Check(**check) for check in found["checks"]], found["losses"]
            self.seconds, self.best = found["seconds"], self.states.best(self.model, found)
            self.note(f"resuming  {self.step} of {self.model.trainer.method.steps} steps are done")

    def run(self, held_out: Stream, windows: Callable[[int], Stream], advance: Callable[[], None]) -> Check:
        """Takes the steps and checks that are left, and returns the best check.

        Args:
          windows: gives a step its windows.
          advance: called after the first check, every step and every other check.
        """
        try:
            if not self.checks:
                self.check(held_out)
            advance()
            self.begun = self.step, time.monotonic()
            while self.due or self.step < self.model.trainer.method.steps:
                if self.due:
                    self.check(held_out)
                else:
                    self.take(windows(self.step))
                advance()
        except Stopped:
            self.save()
            raise
        return min(self.checks, key=lambda check: check.held_out)

    def take(self, stream: Stream) -> None:
        """One step of Adam."""
        start, rate = time.monotonic(), self.model.trainer.method.rate(self.step)
        self.losses.append(finite(self.model.step(stream, rate), self.step))
        self.step += 1
        self.seconds += time.monotonic() - start
        if not self.due and time.monotonic() - self.told_at > _QUIET:
            self._tell(f"{self.model.goal.amount(self.losses[-1])} on the text it is trained on")
        if not self.due:
            self._save_in_time()

    def check(self, held_out: Stream) -> None:
        """Measures the model on the held-out windows, and keeps it if it is the best so far."""
        start, goal = time.monotonic(), self.model.goal
        loss, perplexity = self.model.measure(held_out)
        found = Check(self.step, finite(loss, self.step), float(np.mean(self.losses)) if self.step else None, perplexity)
        if self.step and found.held_out < min(check.held_out for check in self.checks):
            self.best = None  # so that no host needs room for two
            self.best = self.model.rounded()
        self.checks, self.losses = [*self.checks, found], []
        self.seconds += time.monotonic() - start
        told = f"held-out {goal.words} {goal.amount(found.held_out)}" + (f", perplexity {perplexity:.2f}" if perplexity else "")
        if found.training is None:
            return self.note(f"{told} before the first step")
        self._tell(f"{told}; {goal.amount(found.training)} on the text it is trained on")
        self.saved = -1  # a state of this step may lack the check
        self._save_in_time()

    def _tell(self, words: str) -> None:
        """Prints how far the training is, and the time left by the mean time of the steps and checks of this start."""
        steps, now, (first, start) = self.model.trainer.method.steps, time.monotonic(), self.begun
        self.told_at, done = now, self.step - first
        left = f", about {duration((now - start) / done * (steps - self.step))} left" if done and self.step < steps else ""
        self.note(f"step {self.step} of {steps}: {words}{left}")

    def _save_in_time(self) -> None:
        """Saves the state if the steps since the last one took much longer than saving."""
        # Behind the last step the result is written, which takes less time than a state.
        left = self.model.trainer.method.steps - self.step
        if left and from_first(lambda: time.monotonic() - self.saved_at > SHARE * self.saving):
            self.save()

    def save(self) -> None:
        """Saves the state, unless it is saved already. The state before is removed."""
        if self.step > self.saved:
            checks = [check._asdict() for check in self.checks]
            about = _State(step=self.step, checks=checks, losses=self.losses, seconds=self.seconds)  # type: ignore[typeddict-item]
            start = time.monotonic()
            self.states.save(self.model, self.best, about)
            self.saved, self.saved_at = self.step, time.monotonic()
            self.saving = self.saved_at - start


def keep_outcome(directory: Path, outcome: Outcome) -> None:
    """Makes the end of a distillation known to the run, and removes what a stopped one would have gone on from."""

    def write() -> None:
        with writing(directory / OUTCOME, _REMEDY):
            keep(directory, {OUTCOME: json.dumps(outcome.to_json()).encode()})
        remove(directory / FOLDER)
        if not outcome.kept:
            remove(directory / _DISTILLED)  # the model stays as it was pruned

    first_only(write)


def read_outcome(directory: Path, used: bool = False) -> Outcome | None:
    """What became of the distillation of a run; None if it is not done, or its blocks are damaged.

    Args:
      used: the checkpoint refers to the blocks, and was compared with its checksums; they are not read again.
    """

    def read() -> contents.Outcome | None:
        record = known_record(directory / OUTCOME, contents.Outcome)
        if record is None or (record["kept"] and not used and any(damage(entry) for entry in _entries(directory))):
            return None
        return record

    record = from_first(read)
    return None if record is None else Outcome.from_json(record)


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
    return directory / _DISTILLED / f"block_{index:04d}"


def _entries(directory: Path) -> list[Path]:
    return sorted((directory / _DISTILLED).glob("block_*"))


def write_blocks(
    model: Model, moved: Sequence[Tree], journal: Journal, metadata: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Writes blocks with their masks, of which the weights that move are ``moved``, in the checkpoint's dtypes."""
    first_only(lambda: (journal.directory / _DISTILLED).mkdir(exist_ok=True))
    for index, trainer, block, own in zip(model.span, model.trainers, model.blocks, moved):
        prefix, path = trainer.decoder.prefix(index), _entry(journal.directory, index)
        weights = {prefix + name: array for name, array in (own | block.fixed).items()}
        _save(path, {"weights": weights, "masks": {prefix + name: keep for name, keep in block.keep.items()}}, metadata)


def _save(path: Path, tree: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Writes an Orbax checkpoint with its checksums, in one step."""
    with uninterrupted(), writing(path, _REMEDY):

        def clear() -> None:
            begin(path)
            remove(path)

        first_only(clear)
        save_tree(staged(path), {name: group for name, group in tree.items() if group}, metadata)

        def finish() -> None:
            write_sums(staged(path))
            commit(staged(path), path)

        first_only(finish)


class States:
    """What a stopped distillation goes on from: masters and moments, the weights of the best check before, and the checks so far.

    RUN/distillation/step_0000008              of every block
    RUN/distillation/block_0002_step_0000008   of the blocks of the span that begins with this one

    Args:
      prefix: of the names, which differs for each span. Saving a state removes those of other spans.
    """

    def __init__(self, folder: Path, prefix: str = ""):
        self.folder, self._prefix = folder, prefix

    def save(self, model: Model, best: Sequence[Tree] | None, about: _State) -> None:
        """Saves the state of a step. The one before is removed."""
        step = about["step"]
        tree: dict[str, Any] = {"masters": {}, "first": {}, "second": {}, "count": {}}
        if best and _best(about) != step:  # otherwise the masters are the best
            tree["best"] = {f"{index}.{name}": array for index, block in enumerate(best) for name, array in block.items()}
        for index, block in enumerate(model.blocks):
            count, first, second = _moments(block)
            for group, arrays in (("masters", block.masters), ("first", first), ("second", second)):
                tree[group] |= {f"{index}.{name}": array for name, array in arrays.items()}
            tree["count"][str(index)] = count
        first_only(lambda: self.folder.mkdir(exist_ok=True))
        _save(self.path(step), tree, about)

        def forget() -> None:
            for old in self.folder.iterdir():
                if old != self.path(step):
                    remove(old)

        first_only(forget)

    def path(self, step: int) -> Path:
        """Where the state of a step is."""
        return self.folder / f"{self._prefix}step_{step:07d}"

    def last(self, model: Model) -> _State | None:
        """Brings the model to the last state that was saved, and returns what belongs to it; None where none was saved."""

        def read() -> _State | None:
            saved = sorted(self.folder.glob(f"{self._prefix}step_???????")) if self.folder.is_dir() else []
            whole = [path for path in saved if not damage(path)]
            return check_record(read_metadata(whole[-1]).custom_metadata, _State, whole[-1]) if whole else None

        if found := from_first(read):
            path = self.path(found["step"])
            groups = read_metadata(path).metadata
            for index, (trainer, block) in enumerate(zip(model.trainers, model.blocks)):
                masters, first, second = (
                    _of_block(path, groups, name, trainer, index) for name in ("masters", "first", "second")
                )
                count = load_group(path, "count", {str(index): groups["count"][str(index)]})[str(index)]
                moments = block.moments._replace(count=jnp.asarray(count), mu=first, nu=second)
                model.blocks[index] = block._replace(masters=masters, moments=moments)
        return found

    def best(self, model: Model, about: _State) -> list[Tree] | None:
        """The weights of the best check, from the last saved state, of which ``model`` has the rest; see ``Training``."""
        if _best(about) in (0, about["step"]):
            return model.rounded() if _best(about) else None
        path = self.path(about["step"])
        groups = read_metadata(path).metadata
        return [_on_host(_of_block(path, groups, "best", trainer, index)) for index, trainer in enumerate(model.trainers)]


def _of_block(path: Path, groups: Mapping[str, Any], group: str, trainer: Trainer, index: int) -> Tree:
    """The arrays of a block in one group of a saved state, split over the devices."""
    wanted = {name: leaf for name, leaf in groups[group].items() if name.partition(".")[0] == str(index)}
    read = {name.partition(".")[2]: array for name, array in load_group(path, group, wanted).items()}
    return {name: trainer.place(name, array) for name, array in read.items()}


def _on_host(arrays: Tree) -> Tree:
    """Copies in the memory of the hosts, which take none of the devices' and which no step of Adam overwrites."""

    def copy(array: Array) -> Array:
        # Shard by shard, which needs no program that all processes run.
        shards = array.addressable_shards
        moved = [jax.device_put(shard.data, SingleDeviceSharding(shard.device, memory_kind=_HOST)) for shard in shards]
        return jax.make_array_from_single_device_arrays(array.shape, array.sharding.with_memory_kind(_HOST), moved)

    return {name: copy(array) for name, array in arrays.items()}


def _best(about: _State) -> int:
    """The step of the best check; 0 where no step was better than the model as it was pruned."""
    return min(about["checks"], key=lambda check: check["held_out"])["step"]


def _moments(block: Block) -> tuple[Array, Tree, Tree]:
    """The count and the two moments of Adam."""
    state: Any = block.moments
    return state.count, state.mu, state.nu


def _streams(dense: Decoder, method: Distillation, sets: Sequence[np.ndarray], advance: Callable[[], None]) -> tuple[Stream, ...]:
    """Sets of windows, embedded, and behind the last block of the dense model if the loss reads it."""
    embedded = [dense.embed(tokens) for tokens in sets]
    if not method.reads_dense:
        return tuple(map(Stream, sets, embedded, embedded))
    finals = [hidden.copy() for hidden in embedded]
    for index, parameters in enumerate(dense.blocks(range(dense.config.blocks))):
        for final in finals:
            dense.apply(index, parameters, final)
        advance()
    return tuple(map(Stream, sets, embedded, finals))


def finite(value: float, step: int) -> float:
    """A loss after a step. Raises UserError where it is not finite."""
    if not np.isfinite(value):
        raise UserError(f"the loss is {value} after {step} steps of training; try a smaller learning rate, or --dtype float32")
    return value


def refuse_large(trainer: Trainer, budget: float, recovering: bool = False) -> None:
    """Raises UserError where the devices cannot hold what is trained together.

    Args:
      recovering: whether the settings are those of ``optima recover``.
    """
    needed, blocks, smaller = trainer.bytes_on_device(), trainer.decoder.config.blocks, trainer.method.smaller
    if needed > budget:
        together = len(trainer.method.spans(blocks)[0])
        ways = [*filter(None, [smaller]), "--distill.train norms", *([] if recovering else ["--distill null"])]
        instead = ", ".join([*ways[:-1], f"or {ways[-1]}"])
        if recovering:
            instead = instead.replace("distill.", "").replace("distill", "loss")
        which = "all blocks" if together == blocks else f"{together} block{'s' * (together > 1)} at a time"
        gradients = " gradients," if trainer.accumulates else ""
        raise UserError(
            f"training holds weights,{gradients} two moments and masks of {which}, {needed / 2**30:.1f} GiB on each "
            f"device of {budget / 2**30:.1f} GiB: take more devices, {instead}"
        )
