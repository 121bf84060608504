"""Accumulates the Hessians of a block's layers from its activations."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from optima_tpu.errors import UserError
from optima_tpu.method.statistics import Groups, TokenStatistics
from optima_tpu.models.activations import Batch, HiddenStates
from optima_tpu.models.decoder import Decoder, forward
from optima_tpu.models.experts import expert_of
from optima_tpu.pipeline.grams import halved, whole
from optima_tpu.pipeline.sums import Capture, SumsProgram, add_batch, statistics_of, sums_of
from optima_tpu.runtime.mesh import DATA
from optima_tpu.runtime.processes import fetch

Put = Callable[[np.ndarray, Array], None]


class Stream(NamedTuple):
    """A stream of hidden states, and the block that it passes through.

    Attributes:
      parameters: the block's parameters by name: as pruned so far, or dense.
      hidden: the hidden states that enter the block.
      known: inputs of layers for the same windows, by layer name, from an earlier pass. This pass does not compute them.
      kept: where this pass puts the inputs of layers, by the layer's name.
    """

    parameters: Mapping[str, Array]
    hidden: HiddenStates
    known: Mapping[str, HiddenStates] = {}
    kept: Mapping[str, HiddenStates] = {}

    @property
    def inputs(self) -> Mapping[str, HiddenStates]:
        """The inputs that are known behind this pass."""
        return {**self.known, **self.kept}

    def part(self, first: int, last: int) -> "Stream":
        """Windows ``first`` to ``last - 1``, without a copy."""
        known, kept = ({name: every.part(first, last) for name, every in inputs.items()} for inputs in (self.known, self.kept))
        return Stream(self.parameters, self.hidden.part(first, last), known, kept)


def accumulate(decoder: Decoder, index: int, capture: Capture, streams: Sequence[Stream]) -> tuple[TokenStatistics, ...]:
    """The statistics of each group's input, and the drift a target needs.

    HiddenStates are multiplied in the model's dtype and accumulated in float32: each device sums over its own tokens, then one
    ``psum`` sums over the data axis. The two streams are subtracted in the model's dtype, in which the difference of two close
    numbers is exact. A token that either model does not send to an expert has no drift in this expert: the outputs cannot be
    compared.

    With ``borrow`` the Hessian of an expert's ``Family.shared`` layers is ``(n_e H_e + k H_all) / n`` with ``k = borrow d_in``,
    where ``n_e`` of the ``n`` tokens are sent to the expert, and ``H_e`` and ``H_all`` are the means over its own and over all
    tokens.

    Args:
      index: the block's number, for messages.
      streams: the pruned stream and, for a target with a dense stream, the dense one, both of the same windows. ``advance``
        replaces the hidden states of the dense one by those that leave the block.

    Raises:
      UserError: an input holds a NaN or an infinity; names the layer.
    """
    hidden, decoder = streams[0].hidden, decoder.at(index)
    adding = SumsProgram.of(decoder, capture)
    sums = jax.tree.map(_zeros, sums_of(decoder, adding, capture.energy))
    weights = {name: streams[-1].parameters[name + ".weight"] for name in adding.multiplied(decoder, capture.energy)}
    programs = pass_programs(decoder, capture, [stream.kept for stream in streams])
    with contextlib.ExitStack() as stack:
        passes = [_StreamPass.open(stack, decoder, index, *each) for each in zip(programs, streams)]
        for batches in zip(*(each.batches() for each in passes)):
            # Waits, or nothing would keep the inputs of many batches from being on the devices; no name keeps those of the last
            # one.
            inputs = [each.through(*batch) for each, batch in zip(passes, batches)]
            sums = add_batch(adding, sums, jax.block_until_ready(inputs), weights, batches[0][0].valid)
            del inputs
    count = np.float32(len(hidden) * hidden.length)
    totals = tuple(count if total is None else total for total in sums.weights)
    # Two programs: in a single one, XLA would divide a Hessian differently, in its last bit, if there is a drift beside it.
    divided = list(_divide(tuple(entry.hessian for entry in sums.statistics), totals))
    hessians = []
    for mean in sums.means:
        hessian = divided.pop(0)  # so that one Hessian at a time is there twice
        if halved(decoder.mesh) and hessian.ndim == 2:  # those of experts are whole
            hessian = whole(hessian)
        hessians.append(hessian if mean is None else _lent(hessian, mean, capture.borrow * len(mean) / count / count))
    drifts = _divide(tuple(entry.drift for entry in sums.statistics), totals)
    tokens = [entry.tokens for entry in sums.statistics]
    by_names = dict(_by_group(decoder, capture, adding, list(map(TokenStatistics, hessians, tokens, drifts))))
    statistics = tuple(by_names[names] for names in capture.groups)
    _refuse_infinite(decoder, index, capture.groups, [entry.hessian for entry in statistics])
    if drifts := {names: entry.drift for names, entry in zip(capture.groups, statistics) if entry.drift is not None}:
        products = [
            (names, each)
            for names, drift in drifts.items()
            for each in (drift.outputs if drift.cross is None else (drift.cross,))
        ]
        _refuse_infinite(decoder, index, tuple(names for names, _ in products), [each for _, each in products])
    return statistics


def _by_group(
    decoder: Decoder, capture: Capture, adding: "SumsProgram", statistics: list[TokenStatistics]
) -> Iterator[tuple[tuple[str, ...], TokenStatistics]]:
    """Yields the names and the statistics of each group of alike groups."""
    for groups, places, entry in zip(adding.groups, adding.residuals, statistics):
        if expert_of(groups[0][0]) is None:
            yield groups[0], entry
        else:
            one = statistics_of(decoder, groups[0], places, capture.energy)
            yield from zip(groups, _members(entry, jax.tree.map(lambda struct: struct.sharding, one)))


def repeat(decoder: Decoder, index: int, capture: Capture, stream: Stream, dense: bool = False) -> None:
    """Passes one stream through a block again, as :func:`accumulate` did.

    The pass writes the kept inputs and, if the capture advances the dense stream, its output. It runs the same program and
    gives the same bits. The parameters may be of the whole pruned block: what a pass keeps depends on no layer that is pruned
    after it.

    Args:
      dense: whether the stream is the dense one.
    """
    decoder = decoder.at(index)
    program = pass_programs(decoder, capture, [stream.kept] * capture.target.streams)[dense]
    if program.output or stream.kept:
        pass_stream(decoder, index, program, stream)


def pass_stream(decoder: Decoder, index: int, program: "PassProgram", stream: Stream) -> None:
    """Passes a stream through a block; writes its output and kept inputs."""
    with contextlib.ExitStack() as stack:
        once = _StreamPass.open(stack, decoder.at(index), index, program, stream)
        for batch in once.batches():
            once.through(*batch)


class _StreamPass(NamedTuple):
    """One stream of a pass, whose batches go through the block one by one.

    Attributes:
      state: the block's parameters.
      positions: from :meth:`Decoder.positions`.
      behind: puts away what leaves the block, if the program returns it.
      kept: puts away the inputs that the stream keeps, by the layer's name.
    """

    decoder: Decoder
    stream: Stream
    program: "PassProgram"
    state: Any
    positions: Any
    behind: Put | None
    kept: Mapping[str, Put]

    @classmethod
    def open(
        cls, stack: contextlib.ExitStack, decoder: Decoder, index: int, program: "PassProgram", stream: Stream
    ) -> "_StreamPass":
        """Opens the pass. All outputs are written when the stack closes."""
        kept = {name: stack.enter_context(every.put_behind()) for name, every in stream.kept.items()}
        behind = stack.enter_context(stream.hidden.put_behind()) if program.output else None
        positions = decoder.positions(index, stream.hidden.length)
        return cls(decoder, stream, program, decoder.state(stream.parameters), positions, behind, kept)

    def batches(self) -> Iterator[tuple[Batch, Mapping[str, Array]]]:
        """The batches, each with the inputs that are known for it."""
        size = self.decoder.batch
        return zip(self.stream.hidden.batches(size), self.decoder.known(self.stream.known, size))

    def through(self, batch: Batch, known: Mapping[str, Array]) -> Mapping[str, Any]:
        """Passes a batch through the block and returns the named inputs."""
        output, inputs = pass_batch(self.program, self.state, batch.hidden, self.positions, known)
        if self.behind is not None:
            self.behind(batch.rows, output)
        for name, put in self.kept.items():
            put(batch.rows, inputs[name])
        return inputs


@dataclasses.dataclass(frozen=True)
class PassProgram:
    """The static part of :func:`pass_batch`: the program of one stream.

    Attributes:
      graph: the graph of the block.
      names: the inputs of layers, and the parts of the residual stream, that are returned.
      output: whether the hidden states that leave the block are returned.
    """

    graph: Any
    mesh: Mesh
    names: tuple[str, ...]
    output: bool = False


def pass_programs(decoder: Decoder, capture: Capture, kept: Sequence[Iterable[str]]) -> tuple[PassProgram, ...]:
    """The program of each stream that passes through the block for a capture.

    Args:
      kept: for each stream, the layers whose inputs are kept.
    """
    adding, last = SumsProgram.of(decoder, capture), capture.target.streams - 1
    around = [places for places in adding.residuals if places is not None]
    read = [groups[0][0] for groups in adding.groups] + [name for places in around for name in places.before if name is not None]
    weighing = [places.after for places in around if places.after is not None]
    programs = []
    for index, names in zip(range(last + 1), kept):
        dense = index == last  # tokens are weighed by the dense model's stream alone
        returned = tuple(dict.fromkeys((*read, *(weighing if dense else ()), *names)))
        programs.append(PassProgram(decoder.graph, decoder.mesh, returned, capture.advance and dense))
    return tuple(programs)


@functools.partial(jax.jit, static_argnums=0)
def pass_batch(
    program: PassProgram, state: Any, hidden: Array, positions: Any, known: Mapping[str, Array]
) -> tuple[Any, dict[str, Any]]:
    """Passes a batch through a block.

    A program passes one stream and adds no sums: what a run computes again after a stop then has the same bits.

    Args:
      state: the block's parameters.
      hidden: [batch, length, d_model].
      known: as for :func:`forward`.

    Returns:
      The hidden states that leave the block, or None, and the inputs ``program.names``.
    """
    output, layer_inputs = forward(program.graph, state, hidden, positions, known)
    # Every process puts away whole windows, and Gram matrices read whole rows: the model axis holds copies.
    sharding = jax.NamedSharding(program.mesh, P(DATA))
    inputs = {name: jax.lax.with_sharding_constraint(layer_inputs[name], sharding) for name in program.names}
    return jax.lax.with_sharding_constraint(output, sharding) if program.output else None, inputs


def _zeros(struct: Array) -> Array:
    return jnp.zeros(struct.shape, struct.dtype, device=struct.sharding)


def _refuse_infinite(decoder: Decoder, index: int, groups: Groups, matrices: Sequence[Array]) -> None:
    """Raises UserError if the trace of a group's products is not finite."""
    for names, trace in zip(groups, fetch([jnp.trace(matrix) for matrix in matrices])):
        if not np.isfinite(trace):
            raise UserError(f"the input of {decoder.prefix(index)}{names[0]} holds NaN or infinite values: {decoder.overflowed}")


@functools.partial(jax.jit, donate_argnums=0)
def _lent(hessians: Array, products: Array, share: float) -> Array:
    """Adds a share of all tokens' products to every expert's Hessian."""
    return hessians + share * products


@functools.partial(jax.jit, static_argnums=1)
def _members(statistics: TokenStatistics, shardings: TokenStatistics) -> tuple[TokenStatistics, ...]:
    """The statistics of each expert, split along the arrays' first axis.

    Args:
      shardings: of the statistics of one expert.
    """

    def member(index: int) -> TokenStatistics:
        return jax.tree.map(lambda array, at: jax.lax.with_sharding_constraint(array[index], at), statistics, shardings)

    return tuple(map(member, range(len(statistics.tokens))))


@functools.partial(jax.jit, donate_argnums=0)
def _divide(sums: tuple[Any, ...], totals: tuple[Array | np.float32, ...]) -> tuple[Any, ...]:
    """Divides each tree of arrays by its own number."""
    return tuple(jax.tree.map(lambda array, total=total: array / total, tree) for tree, total in zip(sums, totals))
