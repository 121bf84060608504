"""Distillation of a pruned model: steps of Adam, checks on held-out windows, and a state from which a stopped run goes on."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import jax.numpy as jnp
import numpy as np
from jax import Array

from optima_tpu.errors import UserError
from optima_tpu.method.distillation import KL
from optima_tpu.models.activations import Activations
from optima_tpu.models.checkpoints.orbax import load_group, read_metadata, save_tree
from optima_tpu.models.decoder import Decoder, Head
from optima_tpu.models.family import Positions
from optima_tpu.pipeline.distill.blocks import Block, Trainer, Tree, head_gradient, head_loss
from optima_tpu.pipeline.journal import Journal
from optima_tpu.report import contents
from optima_tpu.runtime.checksums import damage, keep, write_sums
from optima_tpu.runtime.files import begin, commit, remove, staged, writing
from optima_tpu.runtime.processes import fetch, first_only, from_first
from optima_tpu.runtime.records import check_record, known_record
from optima_tpu.runtime.signals import uninterrupted

FOLDER = "distillation"
OUTCOME, _DISTILLED = "distillation.json", "distilled"
_REMEDY = "the pruned blocks are intact; make room and repeat the command"


class Check(NamedTuple):
    """What a check on held-out windows measured.

    Attributes:
      step: after how many steps of Adam.
      held_out: mean divergence of a held-out token, in nats.
      training: mean divergence of a token of the steps since the check before; None before the first step.
    """

    step: int
    held_out: float
    training: float | None = None


class _Checks(TypedDict):
    """The metadata of the state at a check."""

    checks: list[contents.Check]


class Outcome(NamedTuple):
    """What became of a distillation.

    Attributes:
      checks: in order, the first one before the first step.
      kept: the step whose state is the result; 0 where the model stays as it was pruned.
      tokens: how many tokens the steps read.
      perplexity_before: of the model as it was pruned, on the evaluation text; None until it is measured.
    """

    checks: tuple[Check, ...]
    kept: int
    tokens: int
    perplexity_before: float | None = None

    @property
    def before(self) -> float:
        """The held-out divergence of the model as it was pruned."""
        return self.checks[0].held_out

    @property
    def after(self) -> float:
        """The held-out divergence of the result."""
        return next(check.held_out for check in self.checks if check.step == self.kept)

    def to_json(self) -> dict[str, Any]:
        """What ``distillation.json`` and the report have."""
        return {
            "checks": [check._asdict() for check in self.checks],
            "kept": self.kept,
            "tokens": self.tokens,
            "perplexity_before": self.perplexity_before,
            "held_out_before": self.before,
            "held_out_after": self.after,
        }

    @classmethod
    def from_json(cls, record: contents.Outcome) -> "Outcome":
        """From :meth:`to_json`."""
        checks = tuple(Check(**check) for check in record["checks"])
        return cls(checks, record["kept"], record["tokens"], record["perplexity_before"])


class Windows(NamedTuple):
    """Token windows of a distillation.

    Attributes:
      training: [windows, length] int32.
      held_out: [windows, length] int32, from the same text, which no weight is fitted to.
    """

    training: np.ndarray
    held_out: np.ndarray


class Stream(NamedTuple):
    """Windows on their way through both models: the embeddings, and what leaves the last block of the dense model."""

    embedded: Activations
    dense: Activations


@dataclasses.dataclass
class _Model:
    """The model while it is trained."""

    trainer: Trainer
    blocks: list[Block]
    head: Head
    positions: Sequence[Positions]

    def divergence(self, stream: Stream) -> float:
        """The mean divergence of a token, in nats."""
        total, size = 0.0, self.trainer.decoder.batch
        for pruned, dense in zip(stream.embedded.batches(size), stream.dense.batches(size)):
            hidden = pruned.hidden
            for block, positions in zip(self.blocks, self.positions):
                hidden = self.trainer.forward(block.masters, block.fixed, hidden, positions)
            total += float(np.sum(fetch(head_loss(self.head, dense.hidden, hidden, pruned.valid)), dtype=np.float64))
        return total / _predictions(stream.embedded)

    def step(self, stream: Stream, rate: float) -> float:
        """One step of Adam on some windows; the mean divergence of a token before it.

        Gradients add up over batches that fit the devices, so the batch of Adam is as large as the method says on any mesh.
        """
        trainer, count = self.trainer, _predictions(stream.embedded)
        gradients = [trainer.zeros() for _ in self.blocks]
        scale, total = jnp.float32(1 / count), 0.0
        for pruned, dense in zip(stream.embedded.batches(trainer.decoder.batch), stream.dense.batches(trainer.decoder.batch)):
            inputs = [pruned.hidden]
            for block, positions in zip(self.blocks, self.positions):
                inputs.append(trainer.forward(block.masters, block.fixed, inputs[-1], positions))
            sums, cotangent = head_gradient(self.head, dense.hidden, inputs.pop(), pruned.valid, scale)
            for index in reversed(range(len(self.blocks))):
                block = self.blocks[index]
                gradients[index], cotangent = trainer.backward(
                    block.masters, block.fixed, inputs.pop(), self.positions[index], cotangent, gradients[index]
                )
            total += float(np.sum(fetch(sums), dtype=np.float64))
        for index, gradient in enumerate(gradients):
            self.blocks[index] = trainer.update(self.blocks[index], gradient, jnp.float32(rate))
        return total / count


def distill(
    dense: Decoder, journal: Journal, method: KL, windows: Windows, advance: Callable[[], None], note: Callable[[str], None]
) -> Outcome:
    """Trains the pruned blocks of a run, and leaves them in RUN/distilled. Every process calls it, and then :func:`keep_outcome`.

    A run that was stopped goes on behind the last check, and ends with the same bits.

    Args:
      dense: the dense model.
      journal: the finished blocks.
      method: what is trained, and how.
      windows: the text.
      advance: called after every block of the dense model, every step and every check.
      note: called with a line after every check.

    Raises:
      UserError: the disk is full; a divergence is not finite.
    """
    pruned = dataclasses.replace(dense, tensors=journal.tensors())
    trainer, states = Trainer(pruned, method), _States(journal.directory / FOLDER)
    training, held_out = _streams(dense, windows, advance)
    length = windows.training.shape[1]
    blocks = []
    for index, parameters in enumerate(pruned.blocks(range(dense.config.blocks))):
        masks = journal.masks(index)
        blocks.append(trainer.open(parameters, {name.removeprefix(dense.prefix(index)): keep for name, keep in masks.items()}))
    positions = [dense.positions(index, length) for index in range(dense.config.blocks)]
    model = _Model(trainer, blocks, dense.head(), positions)
    checks, losses = states.last(model), []
    if not checks:
        checks = [Check(0, _finite(model.divergence(held_out), 0))]
        note(f"held-out divergence {checks[0].held_out:.4f} nats before the first step")
    advance()
    for step in range(checks[-1].step, method.steps):
        first = step * method.batch % max(method.batch, len(windows.training) // method.batch * method.batch)
        last = min(first + method.batch, len(windows.training))
        part = Stream(training.embedded.part(first, last), training.dense.part(first, last))
        losses.append(_finite(model.step(part, method.rate(step)), step))
        advance()
        if step + 1 in method.check_steps():
            check = Check(step + 1, _finite(model.divergence(held_out), step + 1), float(np.mean(losses)))
            better = check.held_out < min(earlier.held_out for earlier in checks)
            checks, losses = [*checks, check], []
            note(
                f"step {check.step} of {method.steps}: divergence {check.training:.4f} nats on the text it is trained on, "
                f"{check.held_out:.4f} held out"
            )
            states.save(model, checks, better)
            advance()
    best = min(checks, key=lambda check: check.held_out)
    outcome = Outcome(tuple(checks), best.step, method.steps * min(method.batch, len(windows.training)) * length)
    if best.step:
        states.restore_best(model)
        _write_blocks(model, journal)
    return outcome


def keep_outcome(directory: Path, outcome: Outcome) -> None:
    """Makes the end of a distillation known to the run, and removes what a stopped one would have gone on from."""

    def write() -> None:
        with writing(directory / OUTCOME, _REMEDY):
            keep(directory, {OUTCOME: json.dumps(outcome.to_json()).encode()})
        remove(directory / FOLDER)

    first_only(write)


def read_outcome(directory: Path, used: bool = False) -> Outcome | None:
    """What became of the distillation of a run; None if it is not done, or its blocks are damaged.

    Args:
      used: the checkpoint has the blocks, so that they are not read again.
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

    def weights(self, index: int) -> dict[str, np.ndarray]:
        """The weights of a block by HF name."""
        return load_group(self.entry(index), "weights", read_metadata(self.entry(index)).metadata["weights"])

    def scales(self, index: int) -> dict[str, np.ndarray]:
        """None: training moves weights off their integers."""
        return {}

    def masks(self, index: int) -> dict[str, np.ndarray]:
        """The masks of a block by the HF name of the weight, which are those of the journal."""
        return self._journal.masks(index)

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


def _write_blocks(model: _Model, journal: Journal) -> None:
    """Writes the trained blocks in the checkpoint's dtypes, each with its masks."""
    decoder = model.trainer.decoder
    first_only(lambda: (journal.directory / _DISTILLED).mkdir(exist_ok=True))
    for index, block in enumerate(model.blocks):
        prefix, path = decoder.prefix(index), _entry(journal.directory, index)
        weights = {prefix + name: array.astype(model.trainer.dtype(name)) for name, array in block.masters.items()}
        weights |= {prefix + name: array for name, array in block.fixed.items()}
        _save(path, {"weights": weights, "masks": {prefix + name: keep for name, keep in block.keep.items()}}, {})


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


class _States:
    """What a stopped distillation goes on from: the state at the last check, and the masters of the best one.

    RUN/distillation/step_00008   masters and moments of every block, and the checks so far
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, model: _Model, checks: Sequence[Check], better: bool) -> None:
        """Saves the state of a check. The one before is removed, but for the best."""
        step = checks[-1].step
        best = step if better else min(checks, key=lambda check: check.held_out).step
        tree: dict[str, Any] = {"masters": {}, "first": {}, "second": {}, "count": {}}
        for index, block in enumerate(model.blocks):
            count, first, second = _moments(block)
            for group, arrays in (("masters", block.masters), ("first", first), ("second", second)):
                tree[group] |= {f"{index}.{name}": array for name, array in arrays.items()}
            tree["count"][str(index)] = count
        first_only(lambda: self.folder.mkdir(exist_ok=True))
        _save(self.path(step), tree, {"checks": [check._asdict() for check in checks]})

        def forget() -> None:
            for old in self.folder.iterdir():
                if old not in (self.path(step), self.path(best)):
                    remove(old)

        first_only(forget)

    def path(self, step: int) -> Path:
        """Where the state of a step is."""
        return self.folder / f"step_{step:05d}"

    def last(self, model: _Model) -> list[Check]:
        """Brings the model to the last check that was saved, and returns the checks up to it; none where none was saved."""

        def read() -> list[contents.Check]:
            saved = sorted(self.folder.glob("step_?????")) if self.folder.is_dir() else []
            whole = [path for path in saved if not damage(path)]
            checks = self._checks(whole[-1]) if whole else []
            best = min(checks, key=lambda check: check["held_out"])["step"] if checks else 0
            # Without the best state there is nothing to return to: begin again.
            return checks if not best or self.path(best) in whole else []

        checks = [Check(**check) for check in from_first(read)]
        if checks:
            self._restore(model, checks[-1].step, ("masters", "first", "second", "count"))
        return checks

    def restore_best(self, model: _Model) -> None:
        """Brings the masters to those of the best check."""
        checks = from_first(lambda: self._checks(sorted(self.folder.glob("step_?????"))[-1]))
        self._restore(model, min(checks, key=lambda check: check["held_out"])["step"], ("masters",))

    def _checks(self, path: Path) -> list[contents.Check]:
        return check_record(read_metadata(path).custom_metadata, _Checks, path)["checks"]

    def _restore(self, model: _Model, step: int, groups: Sequence[str]) -> None:
        path = self.path(step)
        metadata, trainer = read_metadata(path).metadata, model.trainer
        for index, block in enumerate(model.blocks):
            found: dict[str, Tree] = {}
            for group in groups:
                wanted = {name: leaf for name, leaf in metadata[group].items() if name.partition(".")[0] == str(index)}
                read = load_group(path, group, wanted)
                if group == "count":
                    found[group] = {"": jnp.asarray(read[str(index)])}
                else:
                    found[group] = {
                        name.partition(".")[2]: trainer.place(name.partition(".")[2], array) for name, array in read.items()
                    }
            if "count" in groups:
                block = block._replace(
                    moments=block.moments._replace(count=found["count"][""], mu=found["first"], nu=found["second"])
                )
            model.blocks[index] = block._replace(masters=found["masters"])


def _moments(block: Block) -> tuple[Array, Tree, Tree]:
    """The count and the two moments of Adam."""
    state: Any = block.moments
    return state.count, state.mu, state.nu


def _streams(dense: Decoder, windows: Windows, advance: Callable[[], None]) -> tuple[Stream, Stream]:
    """Both sets of windows, embedded, and behind the last block of the dense model."""
    sets = [dense.embed(tokens) for tokens in windows]
    finals = [embedded.copy() for embedded in sets]
    for index, parameters in enumerate(dense.blocks(range(dense.config.blocks))):
        for final in finals:
            dense.apply(index, parameters, final)
        advance()
    training, held_out = map(Stream, sets, finals)
    return training, held_out


def _predictions(hidden: Activations) -> int:
    return len(hidden) * (hidden.values.shape[1] - 1)


def _finite(value: float, step: int) -> float:
    if not np.isfinite(value):
        raise UserError(
            f"the divergence from the dense model is {value} after {step} steps of distillation; try a smaller "
            "--distill.learning_rate, or --dtype float32"
        )
    return value


def refuse_large(trainer: Trainer, budget: float) -> None:
    """Raises UserError where the devices cannot hold the model while it is trained."""
    needed = trainer.bytes_on_device()
    if needed > budget:
        raise UserError(
            f"distillation holds weights, gradients and two moments of all blocks in float32, {needed / 2**30:.1f} GiB on each "
            f"device of {budget / 2**30:.1f} GiB: take more devices, --distill.train norms, or --distill null"
        )
