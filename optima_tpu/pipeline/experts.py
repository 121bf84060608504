"""Removes experts of mixtures before the walk: chooses those that stay, and solves their weights toward the whole mixture."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from optima_tpu.method.experts import PRICE_STEPS, ExpertScore, ExpertStatistics, kept_experts, price_rows, prices, refit
from optima_tpu.models.activations import Batch, HiddenStates
from optima_tpu.models.checkpoints.fewer_experts import ExpertCut
from optima_tpu.models.checkpoints.orbax import OrbaxTensors, save_tree
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.family import ExpertNames
from optima_tpu.models.model import Model, without_experts
from optima_tpu.pipeline.calibrate import PassProgram, pass_batch
from optima_tpu.pipeline.grams import Sent, add_outputs, mixed_gram, mixed_moments, mixed_output
from optima_tpu.report.contents import BlockExperts, ExpertsLeft
from optima_tpu.runtime.checksums import damage
from optima_tpu.runtime.files import complete
from optima_tpu.runtime.kept import keeping
from optima_tpu.runtime.processes import fetch, from_first

EXPERTS = "experts"
"""The folder in a run directory that has the solved weights of each block."""


def done_blocks(directory: Path, left: ExpertsLeft | None) -> tuple[BlockExperts, ...]:
    """The first blocks of a run that have lost their experts, as far as their solved weights are there. Every process calls it."""

    def there(index: int, block: BlockExperts) -> bool:
        return block.error_after is None or (complete(_entry(directory, index)) and not damage(_entry(directory, index)))

    blocks = left.blocks if left else ()
    count: int = from_first(lambda: len(list(itertools.takewhile(lambda each: there(*each), enumerate(blocks)))))
    return blocks[:count]


def keep_block(directory: Path, index: int, prefix: str, block: "CutBlock") -> BlockExperts:
    """Writes the solved weights of a block, and returns what is recorded of it. Every process calls it.

    Raises:
      UserError: the disk is full or not writable.
    """
    if block.down:
        with keeping(_entry(directory, index), "the blocks before it are intact; make room and repeat the command") as partial:
            save_tree(partial, {"weights": {prefix + name: array for name, array in block.down.items()}}, {})
    return BlockExperts(block.stay, block.error_before, block.error_after)


def _entry(directory: Path, index: int) -> Path:
    return directory / EXPERTS / f"block_{index:04d}"


def mixed_blocks(decoder: Decoder, cut: ExpertCut) -> list[bool]:
    """Whether each block has a mixture."""
    first = _part(cut.names.down, 0) + ".weight"
    return [first in decoder.at(index).block_shapes for index in range(decoder.config.blocks)]


def without_those(directory: Path, model: Model, cut: ExpertCut, blocks: Sequence[BlockExperts]) -> Model:
    """The model of a run without the experts that it removes. In the blocks behind ``blocks`` the first experts stand for those that stay."""
    mixed = mixed_blocks(model.decoder, cut)
    kept = [block.stay for block in blocks] + [range(cut.kept) if each else () for each in mixed[len(blocks) :]]
    entries = [_entry(directory, index) for index, block in enumerate(blocks) if block.error_after is not None]
    return without_experts(model, cut, kept, OrbaxTensors(entries) if entries else None)


class CutBlock(NamedTuple):
    """A block that has lost experts.

    Attributes:
      stay: the experts that stay, ascending; empty for a block without a mixture.
      down: their solved weights, by name inside the block; empty where the dense weights stay.
      error_before, error_after: ``|y - yhat|^2 / |y|^2`` of the mixture's output on the calibration text, with the dense weights and with
        the solved ones; None where none were solved.
    """

    stay: tuple[int, ...]
    down: Mapping[str, Array] = {}
    error_before: float | None = None
    error_after: float | None = None


@dataclasses.dataclass(frozen=True)
class ExpertRemoval:
    """What is done to every block.

    Attributes:
      model: the dense one.
      cut: how many experts stay.
      score: the experts with the highest scores stay.
      steps: of the refit; 0 leaves the dense weights.
    """

    model: Model
    cut: ExpertCut
    score: ExpertScore
    steps: int = 0

    def blocks(self, tokens: np.ndarray, begun: Sequence[BlockExperts] = (), directory: Path = Path()) -> Iterator[CutBlock]:
        """Every block from ``len(begun)`` on, without the experts that have the lowest scores.

        A block is scored, and solved, for what enters it behind the blocks before it, which have lost their experts.

        Args:
          tokens: [windows, length] int32, the calibration text.
          begun: the first blocks, from an earlier start of the run in ``directory``.
        """
        decoder, first = self.model.decoder, len(begun)
        fewer, mixed = without_those(directory, self.model, self.cut, begun).decoder, mixed_blocks(decoder, self.cut)
        hidden, others = decoder.embed(tokens), range(first, decoder.config.blocks)
        for index, parameters in zip(range(first), fewer.blocks(range(first))):
            fewer.apply(index, parameters, hidden)
        for index, parameters in zip(others, decoder.blocks(others)):
            if mixed[index]:
                block = self._cut(index, fewer, parameters, hidden)
                parameters = _with_only(parameters, self.cut.names, block.stay) | dict(block.down)
                yield block
            else:
                yield CutBlock(())
            fewer.apply(index, parameters, hidden)

    def _cut(self, index: int, fewer: Decoder, parameters: Mapping[str, Array], hidden: HiddenStates) -> CutBlock:
        names, batch = self.cut.names, self.model.decoder.batch
        whole = _MixedBlock.of(self.model.decoder, index, names, parameters, hidden.length)
        statistics = whole.statistics(hidden, batch)
        if self.score.priced:
            rows = price_rows(*whole.down.shape[:2])
            statistics = statistics._replace(prices=whole.prices(hidden, batch, rows, PRICE_STEPS))
        scores = fetch(self.score(statistics))
        stay = tuple(kept_experts(scores, self.cut.kept, self.cut.groups).tolist())
        if not self.steps:
            return CutBlock(stay)
        left = _MixedBlock.of(fewer, index, names, _with_only(parameters, names, stay), hidden.length)
        sums = (refit_sums(whole.mesh, whole.mixture(each), left.mixture(each)) for each in hidden.batches(batch))
        pull, gram, before, energy = _mean(sums, len(hidden) * hidden.length)
        found = refit(pull, gram, before, functools.partial(left.product, hidden, batch), self.steps)
        new = left.down + found.change
        down = {}
        for number in range(len(stay)):
            name = _part(names.down, number) + ".weight"
            old = parameters[name]
            down[name] = jax.device_put(new[number].astype(old.dtype), old.sharding)
        first, last = fetch(tuple(jnp.sum(errors) / energy for errors in (found.before, found.after)))
        return CutBlock(stay, down, float(first), float(last))


def mixture_program(decoder: Decoder, names: ExpertNames) -> PassProgram:
    """The pass through a block that returns what the experts' down reads, and the shares."""
    return PassProgram(decoder.graph, decoder.mesh, (_part(names.down, 0), names.shares))


class Mixed(NamedTuple):
    """What a mixture computes in a batch: its input, and down of all experts in float32."""

    sent: Sent
    down: Array
    bias: Array | None


class _MixedBlock(NamedTuple):
    """A block with a mixture, on the mesh.

    Attributes:
      down: of all experts, [experts, d_out, d_in] float32.
      bias: [experts, d_out]; None for none.
    """

    mesh: Mesh
    program: PassProgram
    state: Any
    positions: Any
    down: Array
    bias: Array | None

    @classmethod
    def of(cls, decoder: Decoder, index: int, names: ExpertNames, parameters: Mapping[str, Array], length: int) -> "_MixedBlock":
        decoder = decoder.at(index)
        down, bias = (_stacked(parameters, f"{names.down}.{ending}") for ending in ("weight", "bias"))
        assert down is not None, "the block has a mixture"
        state, positions = decoder.state(parameters), decoder.positions(index, length)
        return cls(decoder.mesh, mixture_program(decoder, names), state, positions, down.astype(jnp.float32), bias)

    def mixture(self, batch: Batch) -> Mixed:
        """The mixture at work on a batch of hidden states that enter the block."""
        found = pass_batch(self.program, self.state, batch.hidden, self.positions, {})[1]
        read, shares = (found[name] for name in self.program.names)
        return Mixed(Sent(read, shares, batch.valid), self.down, self.bias)

    def statistics(self, hidden: HiddenStates, size: int) -> ExpertStatistics:
        """Sums over the outputs of the experts."""
        zeros = jnp.zeros(len(self.down))
        sums = ExpertStatistics(zeros.astype(jnp.int32), zeros, zeros, zeros)
        for batch in hidden.batches(size):
            sums = jax.block_until_ready(add_statistics(self.mesh, sums, self.mixture(batch)))
        return sums

    def product(self, hidden: HiddenStates, size: int, weights: Array) -> Array:
        """``1/n sum_t g_e(t) o_t h_e(t)'`` of every expert, for the output ``o`` of the mixture with other weights of down."""
        parts = (refit_product(self.mesh, self.mixture(batch).sent, weights) for batch in hidden.batches(size))
        return _mean(parts, len(hidden) * hidden.length)

    def prices(self, hidden: HiddenStates, size: int, rows: int, steps: int) -> Array:
        """What :func:`~optima_tpu.method.experts.prices` finds. The biases of down do not count."""
        grams = (refit_gram(self.mesh, self.mixture(batch).sent) for batch in hidden.batches(size))
        gram = _mean(grams, len(hidden) * hidden.length)
        return prices(self.down, gram, functools.partial(self.product, hidden, size), rows, steps)


def _with_only(parameters: Mapping[str, Array], names: ExpertNames, stay: Sequence[int]) -> dict[str, Array]:
    """The parameters of a block without the other experts."""
    rows = {name: parameters[name][jnp.array(stay)] for name in names.router if name in parameters}
    others = {name: array for name, array in parameters.items() if not name.startswith(names.each)} | rows
    numbered = [(name, *name.removeprefix(names.each).split(".", 1)) for name in parameters.keys() - others.keys()]
    new = {old: number for number, old in enumerate(stay)}
    return others | {f"{names.each}{new[int(old)]}.{rest}": parameters[name] for name, old, rest in numbered if int(old) in new}


@functools.partial(jax.jit, static_argnums=0)
def add_statistics(mesh: Mesh, sums: ExpertStatistics, mixed: Mixed) -> ExpertStatistics:
    return add_outputs(mesh, sums, *mixed)


@functools.partial(jax.jit, static_argnums=0)
def refit_sums(mesh: Mesh, whole: Mixed, left: Mixed) -> tuple[Array, Array, Array, Array]:
    """Of a batch what :func:`~optima_tpu.method.experts.refit` takes, not divided by the tokens, and ``|y|^2``."""
    with jax.default_matmul_precision("highest"):
        target = mixed_output(mesh, *whole)
        error = target - mixed_output(mesh, *left)
        sums = mixed_moments(mesh, left.sent, error), mixed_gram(mesh, left.sent)
        return *sums, jnp.sum(error**2, axis=0), jnp.sum(target**2)


@functools.partial(jax.jit, static_argnums=0)
def refit_gram(mesh: Mesh, sent: Sent) -> Array:
    with jax.default_matmul_precision("highest"):
        return mixed_gram(mesh, sent)


@functools.partial(jax.jit, static_argnums=0)
def refit_product(mesh: Mesh, sent: Sent, direction: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        return mixed_moments(mesh, sent, mixed_output(mesh, sent, direction))


def _mean(parts: Iterator[Any], count: int) -> Any:
    """The sum of the parts of all batches, divided by the tokens.

    Waits for each part: otherwise the parts of many batches would be on the devices at once, and so many programs that exchange data
    would be queued that the threads of a CPU's simulated devices wait for each other without end.
    """
    total = jax.block_until_ready(next(parts))
    for part in parts:
        total = jax.block_until_ready(jax.tree.map(jnp.add, total, part))
    return jax.tree.map(lambda array: array / count, total)


def _stacked(parameters: Mapping[str, Array], name: str) -> Array | None:
    """A parameter of all experts, [experts, ...], by its name with ``*`` for the number of the expert; None if they have none."""
    numbers = itertools.takewhile(lambda number: _part(name, number) in parameters, itertools.count())
    found = [parameters[_part(name, number)] for number in numbers]
    return jnp.stack(found) if found else None


def _part(name: str, number: int) -> str:
    """The name of a layer or parameter of one expert."""
    return name.replace("*", str(number))
