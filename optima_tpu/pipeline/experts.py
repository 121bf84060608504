"""Chooses the experts that stay, and re-fits them to the whole mixture."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from optima_tpu.method.experts import PRICE_ROWS, PRICE_STEPS, ExpertScore, ExpertStatistics, Passes, kept_experts, prices, refit
from optima_tpu.models.activations import Batch, HiddenStates
from optima_tpu.models.checkpoints.fewer_experts import ExpertCut
from optima_tpu.models.checkpoints.orbax import OrbaxTensors, save_tree
from optima_tpu.models.decoder import Decoder, run_block
from optima_tpu.models.family import ExpertNames
from optima_tpu.models.model import Model, without_experts
from optima_tpu.pipeline.calibrate import PassProgram, Stream, pass_batch, pass_stream
from optima_tpu.pipeline.grams import Sent, mixed_gram, mixed_moments, mixed_output, mixed_statistics
from optima_tpu.report.contents import BlockExperts, ExpertsLeft
from optima_tpu.runtime.checksums import damage
from optima_tpu.runtime.files import complete
from optima_tpu.runtime.kept import keeping
from optima_tpu.runtime.mesh import on_cpu
from optima_tpu.runtime.processes import fetch, from_first

EXPERTS = "experts"
"""The folder in a run directory that has the solved weights of each block."""


def done_blocks(directory: Path, left: ExpertsLeft | None) -> tuple[BlockExperts, ...]:
    """The first blocks of a run that have lost their experts.

    They end before the first block whose solved weights are missing or damaged. Every process calls it.
    """

    def intact(index: int, block: BlockExperts) -> bool:
        return block.error_after is None or (complete(_entry(directory, index)) and not damage(_entry(directory, index)))

    blocks = left.blocks if left else ()
    count: int = from_first(lambda: len(list(itertools.takewhile(lambda each: intact(*each), enumerate(blocks)))))
    return blocks[:count]


def keep_block(directory: Path, index: int, prefix: str, block: "CutBlock") -> BlockExperts:
    """Writes the solved weights of a block and returns its record.

    Every process calls it.

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
    """The model of a run without the experts that it removes.

    In the blocks behind ``blocks`` the first experts stand for the experts that stay.
    """
    mixed = mixed_blocks(model.decoder, cut)
    kept = [block.stay for block in blocks] + [range(cut.kept) if each else () for each in mixed[len(blocks) :]]
    entries = [_entry(directory, index) for index, block in enumerate(blocks) if block.error_after is not None]
    return without_experts(model, cut, kept, OrbaxTensors(entries) if entries else None)


class CutBlock(NamedTuple):
    """A block that has lost experts.

    Attributes:
      stay: the experts that stay, ascending; empty for a block without a mixture.
      down: their solved weights, by name inside the block; empty where the dense weights stay.
      error_before, error_after: ``|y - yhat|^2 / |y|^2`` of the mixture's output on the calibration text, with the dense weights
        and with the solved ones; None where none were solved.
    """

    stay: tuple[int, ...]
    down: Mapping[str, Array] = {}
    error_before: float | None = None
    error_after: float | None = None


@dataclasses.dataclass(frozen=True)
class ExpertRemoval:
    """The removal of experts from every block.

    Attributes:
      model: the dense one.
      cut: how many experts stay.
      score: the experts with the highest scores stay.
      steps: of the refit; 0 leaves the dense weights.
      keep: whether what the experts of a block read stays on the devices. Otherwise each pass over the text computes it again.
    """

    model: Model
    cut: ExpertCut
    score: ExpertScore
    steps: int = 0
    keep: bool = True

    def blocks(self, tokens: np.ndarray, begun: Sequence[BlockExperts] = (), directory: Path = Path()) -> Iterator[CutBlock]:
        """Yields each block from ``len(begun)`` on, with its best experts.

        A block is scored and solved for the output of the blocks before it, which have lost their experts.

        Args:
          tokens: [windows, length] int32, the calibration text.
          begun: the first blocks, from an earlier start of the run in ``directory``.
        """
        decoder, first = self.model.decoder, len(begun)
        fewer, mixed = without_those(directory, self.model, self.cut, begun).decoder, mixed_blocks(decoder, self.cut)
        embedded, resident = decoder.embed(tokens), self.keep and not on_cpu(decoder.mesh)  # a CPU has the memory of the host
        hidden: HiddenStates = embedded.on_devices(decoder.batch) if resident else embedded
        del embedded
        others = range(first, decoder.config.blocks)
        for index, parameters in zip(range(first), fewer.blocks(range(first))):
            if mixed[index]:
                text = BlockText.before(fewer, index, parameters, hidden)
                left = ExpertBlock.of(fewer, index, self.cut.names, parameters, hidden.length)
                left.advance(text, functools.partial(left.sent, text))
            else:
                fewer.apply(index, parameters, hidden)
        for index, parameters in zip(others, decoder.blocks(others)):
            if mixed[index]:
                # Attention is that of the whole block. Its program is that of the block with fewer experts, as where a run goes
                # on.
                first_experts = _with_only(parameters, self.cut.names, range(self.cut.kept))
                yield self._cut(index, fewer, parameters, BlockText.before(fewer, index, first_experts, hidden))
            else:
                yield CutBlock(())
                fewer.apply(index, parameters, hidden)

    def _cut(self, index: int, fewer: Decoder, parameters: Mapping[str, Array], text: "BlockText") -> CutBlock:
        """Removes experts of a block and moves the text behind the block."""
        names, length = self.cut.names, text.hidden.length
        scores, targets = self._scored(ExpertBlock.of(self.model.decoder, index, names, parameters, length), text)
        stay = tuple(kept_experts(fetch(scores), self.cut.kept, self.cut.groups).tolist())
        parameters = _with_only(parameters, names, stay)
        left = ExpertBlock.of(fewer, index, names, parameters, length)
        sents = kept(functools.partial(left.sent, text), self.keep and self.steps > 0)
        block = self._solved(left, parameters, sents, targets, text.tokens) if self.steps else CutBlock(())
        left._replace(state=left.decoder.state(parameters | dict(block.down))).advance(text, sents)
        return block._replace(stay=stay)

    def _solved(
        self, left: "ExpertBlock", parameters: Mapping[str, Array], sents: "Batches[Sent]", targets: "Batches[Array]", tokens: int
    ) -> CutBlock:
        """What the refit makes of the experts that stay."""
        sums = (refit_sums(left.mesh, *each, left.down, left.bias) for each in zip(targets(), sents()))
        pull, gram, before, energy = _mean(sums, tokens)
        solution = refit(pull, gram, before, left.passes(sents, tokens), self.steps)
        down = {}
        for number in range(len(left.down)):
            name = _part(self.cut.names.down, number) + ".weight"
            old = parameters[name]
            down[name] = jax.device_put((old.astype(jnp.float32) + solution.change[number]).astype(old.dtype), old.sharding)
        first, last = fetch(tuple(jnp.sum(errors) / energy for errors in (solution.before, solution.after)))
        return CutBlock((), down, float(first), float(last))

    def _scored(self, block: "ExpertBlock", text: "BlockText") -> tuple[Array, "Batches[Array]"]:
        """The scores of a block's experts, and the mixture's outputs."""
        sents = kept(functools.partial(block.sent, text), self.keep and self.score.priced)
        outputs = kept(functools.partial(block.outputs, sents), self.keep and self.steps > 0)
        statistics = functools.reduce(add_statistics, (jax.block_until_ready(sums) for sums, _ in outputs()))
        if self.score.priced:
            statistics = statistics._replace(prices=block.prices(sents, text.tokens))
        return self.score(statistics), lambda: (output for _, output in outputs())


T = TypeVar("T")
Batches = Callable[[], Iterator[T]]
"""Gives something of each batch of the text, as often as it is called."""


def kept(batches: Batches[T], keep: bool) -> Batches[T]:
    """The batches, computed once if ``keep``, otherwise at each call."""
    if not keep:
        return batches
    computed = [jax.block_until_ready(each) for each in batches()]  # see _mean
    return lambda: iter(computed)


class BlockText(NamedTuple):
    """The calibration text in front of a block.

    Attributes:
      batch: windows that a step gives to one slice of the data axis.
      known: the output of attention, by the name of the layer that reads it.
    """

    batch: int
    hidden: HiddenStates
    known: Mapping[str, HiddenStates]

    @classmethod
    def before(cls, decoder: Decoder, index: int, parameters: Mapping[str, Array], hidden: HiddenStates) -> "BlockText":
        """The text with the output of the block's attention."""
        alike = decoder.at(index)
        attention = {alike.attended: hidden.room(alike.input_width(alike.attended))}
        pass_stream(decoder, index, attention_program(alike), Stream(parameters, hidden, kept=attention))
        return cls(decoder.batch, hidden, attention)

    @property
    def tokens(self) -> int:
        return len(self.hidden) * self.hidden.length

    def steps(self, decoder: Decoder) -> Iterator[tuple[Batch, dict[str, Array]]]:
        """The batches, and what is known of each."""
        return zip(self.hidden.batches(self.batch), decoder.known(self.known, self.batch))


def attention_program(decoder: Decoder) -> PassProgram:
    """The pass through a block that returns the output of its attention."""
    return PassProgram(decoder.graph, decoder.mesh, (decoder.attended,))


def mixture_program(decoder: Decoder, names: ExpertNames) -> PassProgram:
    """The pass that returns the input of the experts' down, and the shares."""
    return PassProgram(decoder.graph, decoder.mesh, (_part(names.down, 0), names.shares))


class ExpertBlock(NamedTuple):
    """A block with a mixture, on the mesh.

    Attributes:
      down: of all experts, [experts, d_out, d_in].
      bias: [experts, d_out]; None for none.
    """

    decoder: Decoder
    program: PassProgram
    state: Any
    positions: Any
    down: Array
    bias: Array | None

    @classmethod
    def of(cls, decoder: Decoder, index: int, names: ExpertNames, parameters: Mapping[str, Array], length: int) -> "ExpertBlock":
        decoder = decoder.at(index)
        down, bias = (_stacked(parameters, f"{names.down}.{ending}") for ending in ("weight", "bias"))
        assert down is not None, "the block has a mixture"
        state, positions = decoder.state(parameters), decoder.positions(index, length)
        return cls(decoder, mixture_program(decoder, names), state, positions, down, bias)

    @property
    def mesh(self) -> Mesh:
        return self.decoder.mesh

    def sent(self, text: BlockText) -> Iterator[Sent]:
        """What the experts read of each batch."""
        for batch, known in text.steps(self.decoder):
            inputs = pass_batch(self.program, self.state, batch.hidden, self.positions, known)[1]
            read, shares = (inputs[name] for name in self.program.names)
            yield jax.block_until_ready(Sent(read, shares, batch.valid))

    def advance(self, text: BlockText, sents: Batches[Sent]) -> None:
        """Moves the text behind the block."""
        down = self.program.names[0]
        with text.hidden.put_behind() as put:
            for (batch, known), sent in zip(text.steps(self.decoder), sents()):
                read = known | {down: sent.read.rows}
                put(batch.rows, run_block(self.program.graph, self.state, batch.hidden, self.positions, read))

    def outputs(self, sents: Batches[Sent]) -> Iterator[tuple[ExpertStatistics, Array]]:
        """Each batch's sums over expert outputs, and the mixture's output."""
        return (expert_outputs(self.mesh, sent, self.down, self.bias) for sent in sents())

    def passes(self, sents: Batches[Sent], tokens: int) -> Passes:
        """The passes that solve a system of all experts."""

        def over(program: Callable[[Mesh, Sent, Array], Array]) -> Callable[[Array], Array]:
            return lambda weights: _mean((program(self.mesh, sent, weights) for sent in sents()), tokens)

        return Passes(over(refit_product), over(refit_squares), self.down.dtype)

    def prices(self, sents: Batches[Sent], tokens: int, rows: int = PRICE_ROWS, steps: int = PRICE_STEPS) -> Array:
        """The prices of all experts. The biases of down do not count."""
        gram = _mean((refit_gram(self.mesh, sent) for sent in sents()), tokens)
        return prices(self.down, gram, self.passes(sents, tokens), rows, steps)


def _with_only(parameters: Mapping[str, Array], names: ExpertNames, stay: Sequence[int]) -> dict[str, Array]:
    """The parameters of a block without the other experts."""
    rows = {name: parameters[name][jnp.array(stay)] for name in names.router if name in parameters}
    others = {name: array for name, array in parameters.items() if not name.startswith(names.each)} | rows
    numbered = [(name, *name.removeprefix(names.each).split(".", 1)) for name in parameters.keys() - others.keys()]
    new = {old: number for number, old in enumerate(stay)}
    return others | {f"{names.each}{new[int(old)]}.{rest}": parameters[name] for name, old, rest in numbered if int(old) in new}


@jax.jit
def add_statistics(before: ExpertStatistics, added: ExpertStatistics) -> ExpertStatistics:
    return jax.tree.map(jnp.add, before, added)


@functools.partial(jax.jit, static_argnums=0)
def expert_outputs(mesh: Mesh, sent: Sent, down: Array, bias: Array | None) -> tuple[ExpertStatistics, Array]:
    with jax.default_matmul_precision("highest"):
        return mixed_statistics(mesh, sent, down, bias)


@functools.partial(jax.jit, static_argnums=0)
def refit_sums(mesh: Mesh, target: Array, sent: Sent, down: Array, bias: Array | None) -> tuple[Array, Array, Array, Array]:
    """A batch's sums for the refit, not divided by tokens, and ``|y|^2``."""
    with jax.default_matmul_precision("highest"):
        error = target - mixed_output(mesh, sent, down, bias)
        sums = mixed_moments(mesh, sent, error), mixed_gram(mesh, sent)
        return *sums, jnp.sum(error**2, axis=0), jnp.sum(target**2)


@functools.partial(jax.jit, static_argnums=0)
def refit_gram(mesh: Mesh, sent: Sent) -> Array:
    with jax.default_matmul_precision("highest"):
        return mixed_gram(mesh, sent)


@functools.partial(jax.jit, static_argnums=0)
def refit_product(mesh: Mesh, sent: Sent, direction: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        return mixed_moments(mesh, sent, mixed_output(mesh, sent, direction))


@functools.partial(jax.jit, static_argnums=0)
def refit_squares(mesh: Mesh, sent: Sent, direction: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        return jnp.sum(mixed_output(mesh, sent, direction) ** 2, axis=0)


def _mean(parts: Iterator[Any], count: int) -> Any:
    """The sum of the parts of all batches, divided by the tokens.

    Waits for each part: otherwise the parts of many batches would be on the devices at once, and so many programs that exchange
    data would be queued that the threads of a CPU's simulated devices wait for each other without end.
    """
    total = jax.block_until_ready(next(parts))
    for part in parts:
        total = jax.block_until_ready(jax.tree.map(jnp.add, total, part))
    return jax.tree.map(lambda array: array / count, total)


def _stacked(parameters: Mapping[str, Array], name: str) -> Array | None:
    """A parameter of all experts, [experts, ...]; None if they have none.

    Args:
      name: of the parameter, with ``*`` for the number of the expert.
    """
    numbers = itertools.takewhile(lambda number: _part(name, number) in parameters, itertools.count())
    arrays = [parameters[_part(name, number)] for number in numbers]
    return jnp.stack(arrays) if arrays else None


def _part(name: str, number: int) -> str:
    """The name of a layer or parameter of one expert."""
    return name.replace("*", str(number))
