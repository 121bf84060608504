"""Accumulates the Hessians of a block's linear layers from the activations that pass through the block."""

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
from optima_tpu.method.layer_rules import kind_name
from optima_tpu.method.statistics import Drift, Groups, TokenStatistics
from optima_tpu.method.targets import SelfTarget, Target
from optima_tpu.models.activations import Batch, HiddenStates
from optima_tpu.models.decoder import Decoder, forward
from optima_tpu.models.experts import expert_of
from optima_tpu.models.layers import project
from optima_tpu.pipeline.grams import add_gram, add_routed, gram, gram_of_tokens, halved, whole
from optima_tpu.runtime.mesh import DATA, MODEL, struct_on
from optima_tpu.runtime.processes import fetch


def groups_of_blocks(decoder: Decoder) -> tuple[Groups, ...]:
    """For every block of the model its :func:`linear_groups`."""
    found = {kind: linear_groups(decoder.at(kind)) for kind in decoder.config.kinds}
    return tuple(found[decoder.config.kind_of(index)] for index in range(decoder.config.blocks))


def linear_groups(decoder: Decoder) -> Groups:
    """The block's linear layers, grouped by the array that they read, in the order of the forward pass.

    Found by tracing: layers that share an input sow the same tracer. Of the input of all experts each expert reads its own part.
    """
    found: list[Groups] = []  # the single trace below appends its groups

    def trace(state, x, positions):
        inputs = forward(decoder.graph, state, x, positions)[1]
        groups: dict[tuple[int, int | None], list[str]] = {}
        for name in decoder.linears:
            groups.setdefault((id(jax.tree.leaves(inputs[name])[0]), expert_of(name)), []).append(name)
        found.append(tuple(map(tuple, groups.values())))
        return x

    state = decoder.state({name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in decoder.block_shapes.items()})
    hidden = jax.ShapeDtypeStruct((1, 2, decoder.config.d_model), jnp.float32)
    jax.eval_shape(trace, state, hidden, decoder.config.positions(decoder.config.kind, 2))
    return found[0]


def stages(groups: Groups) -> tuple[Groups, ...]:
    """Splits the groups into parts, in the order of the forward pass. The same layer of all experts makes one part."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for names in groups:
        found.setdefault(kind_name(names[0]), []).append(names)
    return tuple(map(tuple, found.values()))


def alike(groups: Groups) -> tuple[Groups, ...]:
    """The groups of experts that have the same layers, together; every other group by itself. In the order of the groups."""
    found: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for names in groups:
        found.setdefault(tuple(map(kind_name, names)), []).append(names)
    return tuple(map(tuple, found.values()))


Put = Callable[[np.ndarray, Array], None]


class Stream(NamedTuple):
    """One of the two streams of hidden states, and the block that it passes through.

    Attributes:
      parameters: the block's parameters by name: as pruned so far, or dense.
      hidden: the hidden states that enter the block.
      known: inputs of layers for the same windows, by the layer's name, from an earlier pass. What they depend on is not computed.
      kept: where this pass puts the inputs of layers, by the layer's name.
    """

    parameters: Mapping[str, Array]
    hidden: HiddenStates
    known: Mapping[str, HiddenStates] = {}
    kept: Mapping[str, HiddenStates] = {}

    @property
    def found(self) -> Mapping[str, HiddenStates]:
        """The inputs that are known behind this pass."""
        return {**self.known, **self.kept}

    def part(self, first: int, last: int) -> "Stream":
        """Windows ``first`` to ``last - 1``, without a copy."""
        known, kept = ({name: every.part(first, last) for name, every in inputs.items()} for inputs in (self.known, self.kept))
        return Stream(self.parameters, self.hidden.part(first, last), known, kept)


@dataclasses.dataclass(frozen=True)
class Capture:
    """What a pass of tokens through a block accumulates.

    Attributes:
      groups: all groups of :func:`linear_groups`, or some of them.
      target: decides whether the drift from the dense model is accumulated, whether the drift of the residual stream is too, and
        whether tokens are weighted. Tokens are weighted in a group whose layers all add to one residual stream, by one over the
        mean square of the dense model's stream after these layers.
      energy: whether the mean squares of the outputs' drift are accumulated too.
      advance: whether this pass also moves the dense stream through the block, which saves a :meth:`Decoder.apply`.
      borrow: how many tokens of the mean over all tokens count beside an expert's own, for each input of the layer; see
        :func:`accumulate`.
    """

    groups: Groups
    target: Target = SelfTarget()
    energy: bool = False
    advance: bool = False
    borrow: float = 0.0


def accumulate(decoder: Decoder, index: int, capture: Capture, streams: Sequence[Stream]) -> tuple[TokenStatistics, ...]:
    """The statistics of each group's input, and its drift where the target needs it.

    HiddenStates are multiplied in the model's dtype and accumulated in float32: each device sums over its own tokens, then one
    ``psum`` sums over the data axis. The two streams are subtracted in the model's dtype, in which the difference of two close
    numbers is exact. A token that either model does not send to an expert has no drift in this expert: the outputs cannot be
    compared.

    With ``borrow`` the Hessian of an expert's ``Family.shared`` layers is ``(n_e H_e + k H_all) / n`` with ``k = borrow d_in``, where
    ``n_e`` of the ``n`` tokens are sent to the expert, and ``H_e`` and ``H_all`` are the means over its own and over all tokens.

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
            # Waits, or nothing would keep the inputs of many batches from being on the devices; no name keeps those of the last one.
            inputs = [each.through(batch) for each, batch in zip(passes, batches)]
            sums = add_batch(adding, sums, jax.block_until_ready(inputs), weights, batches[0].batch.valid)
            del inputs
    count = np.float32(len(hidden) * hidden.length)
    totals = tuple(count if total is None else total for total in sums.weights)
    # Two programs: in a single one, XLA would divide a Hessian differently, in its last bit, if there is a drift beside it.
    divided = list(_divide(tuple(found.hessian for found in sums.statistics), totals))
    hessians = []
    for mean in sums.means:
        hessian = divided.pop(0)  # so that one Hessian at a time is there twice
        if halved(decoder.mesh) and hessian.ndim == 2:  # those of experts are whole
            hessian = whole(hessian)
        hessians.append(hessian if mean is None else _lent(hessian, mean, capture.borrow * len(mean) / count / count))
    drifts = _divide(tuple(found.drift for found in sums.statistics), totals)
    tokens = [found.tokens for found in sums.statistics]
    found = dict(_by_group(decoder, capture, adding, list(map(TokenStatistics, hessians, tokens, drifts))))
    statistics = tuple(found[names] for names in capture.groups)
    _refuse_infinite(decoder, index, capture.groups, [found.hessian for found in statistics])
    if drifts := {names: found.drift for names, found in zip(capture.groups, statistics) if found.drift is not None}:
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
    """The statistics of each group by its names, from those of groups that are alike."""
    for groups, places, found in zip(adding.groups, adding.residuals, statistics):
        if expert_of(groups[0][0]) is None:
            yield groups[0], found
        else:
            one = statistics_of(decoder, groups[0], places, capture.energy)
            yield from zip(groups, _members(found, jax.tree.map(lambda struct: struct.sharding, one)))


def repeat(decoder: Decoder, index: int, capture: Capture, stream: Stream, dense: bool = False) -> None:
    """Passes one stream through a block once more, for what :func:`accumulate` writes: by the same program, so to the same bits.

    The parameters may be those of the whole block as pruned: what a pass keeps depends on no layer that is pruned after it.

    Args:
      dense: whether the stream is the dense one.
    """
    decoder = decoder.at(index)
    program = pass_programs(decoder, capture, [stream.kept] * capture.target.streams)[dense]
    if program.output or stream.kept:
        pass_stream(decoder, index, program, stream)


def pass_stream(decoder: Decoder, index: int, program: "PassProgram", stream: Stream) -> None:
    """Passes a stream through a block, for what the program returns and the stream keeps."""
    with contextlib.ExitStack() as stack:
        once = _StreamPass.open(stack, decoder.at(index), index, program, stream)
        for batch in once.batches():
            once.through(batch)


class _Entering(NamedTuple):
    """A batch of a stream, and the inputs that are known for it."""

    batch: Batch
    known: Mapping[str, Array]


class _StreamPass(NamedTuple):
    """The part of one stream in a pass: its batches go through the block one by one.

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
        """What is put away is there when the stack is closed."""
        kept = {name: stack.enter_context(every.put_behind()) for name, every in stream.kept.items()}
        behind = stack.enter_context(stream.hidden.put_behind()) if program.output else None
        positions = decoder.positions(index, stream.hidden.length)
        return cls(decoder, stream, program, decoder.state(stream.parameters), positions, behind, kept)

    def batches(self) -> Iterator[_Entering]:
        size = self.decoder.batch
        return map(_Entering, self.stream.hidden.batches(size), self.decoder.known(self.stream.known, size))

    def through(self, entering: _Entering) -> Mapping[str, Any]:
        """Passes a batch through the block and returns the inputs that the program returns."""
        batch, known = entering
        output, inputs = pass_batch(self.program, self.state, batch.hidden, self.positions, known)
        if self.behind is not None:
            self.behind(batch.rows, output)
        for name, put in self.kept.items():
            put(batch.rows, inputs[name])
        return inputs


class ResidualNames(NamedTuple):
    """The names under which the residual stream around a group of layers is sown.

    Attributes:
      before: for every layer of the group, the stream that its output is added to, or None; empty if the drift of the residual
        stream is not accumulated.
      after: the stream after all layers of the group if the tokens are weighted by it, else None.
    """

    before: tuple[str | None, ...]
    after: str | None


def residual_names(decoder: Decoder, groups: Groups, target: Target) -> tuple[ResidualNames | None, ...]:
    """For each group, the parts of the residual stream that :func:`add_batch` reads; None without a drift."""
    if not target.dense_stream:
        return (None,) * len(groups)
    found = []
    for names in groups:
        around = [decoder.family.residuals.get(name) for name in names]
        before = tuple(None if place is None else place.before for place in around) if target.gamma else ()
        shared = around[0] if target.weigh_tokens and len(set(around)) == 1 else None
        found.append(ResidualNames(before, None if shared is None else shared.after))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class PassProgram:
    """The program that passes a batch of one stream through a block: the static part of :func:`pass_batch`.

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
    found = []
    for place, names in zip(range(last + 1), kept):
        dense = place == last  # tokens are weighed by the dense model's stream alone
        returned = tuple(dict.fromkeys((*read, *(weighing if dense else ()), *names)))
        found.append(PassProgram(decoder.graph, decoder.mesh, returned, capture.advance and dense))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class SumsProgram:
    """The program that adds a batch to the sums of a pass: the static part of :func:`add_batch`.

    Attributes:
      groups: the groups whose inputs are accumulated, those that are :func:`alike` together.
      residuals: from :func:`residual_names`, for each of these.
      borrows: for each of these, whether the products of all tokens are accumulated too.
    """

    mesh: Mesh
    groups: tuple[Groups, ...]
    residuals: tuple[ResidualNames | None, ...]
    borrows: tuple[bool, ...]

    @classmethod
    def of(cls, decoder: Decoder, capture: Capture) -> "SumsProgram":
        groups = alike(capture.groups)
        residuals = residual_names(decoder, tuple(names for names, *_ in groups), capture.target)
        borrows = tuple(capture.borrow > 0 and kind_name(names[0]) in decoder.family.shared for names, *_ in groups)
        return cls(decoder.mesh, groups, residuals, borrows)

    def multiplied(self, decoder: Decoder, energy: bool) -> tuple[str, ...]:
        """The layers whose dense weights :func:`add_batch` multiplies the drift with."""
        drifting = [groups for groups, places in zip(self.groups, self.residuals) if places is not None]
        return tuple(name for groups in drifting for names in groups if energy or few_outputs(decoder, names) for name in names)


class Sums(NamedTuple):
    """The accumulated sums, for each entry of ``SumsProgram.groups``.

    Attributes:
      statistics: not yet divided by the number of tokens. The arrays of experts have one more axis, the first, for the experts.
      weights: the sum of the tokens' weights, float32; None if tokens have no weights.
      means: the products of all tokens, [d_in, d_in] float32; None if nothing is borrowed.
    """

    statistics: tuple[TokenStatistics, ...]
    weights: tuple[Array | None, ...]
    means: tuple[Array | None, ...]


@functools.partial(jax.jit, static_argnums=0)
def pass_batch(
    program: PassProgram, state: Any, hidden: Array, positions: Any, known: Mapping[str, Array]
) -> tuple[Any, dict[str, Any]]:
    """Passes a batch through a block: the hidden states that leave it, or None, and the inputs ``program.names``.

    One program for one stream, apart from the sums: what a run computes again after it was stopped then has the same bits.

    Args:
      state: the block's parameters.
      hidden: [batch, length, d_model].
      known: as for :func:`forward`.
    """
    output, found = forward(program.graph, state, hidden, positions, known)
    # Every process puts away whole windows, and Gram matrices read whole rows: the model axis holds copies.
    whole = jax.NamedSharding(program.mesh, P(DATA))
    inputs = {name: jax.lax.with_sharding_constraint(found[name], whole) for name in program.names}
    return jax.lax.with_sharding_constraint(output, whole) if program.output else None, inputs


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def add_batch(
    program: SumsProgram, sums: Sums, inputs: Sequence[Mapping[str, Any]], weights: Mapping[str, Array], valid: Array
) -> Sums:
    """The new sums of :func:`accumulate`, with the tokens of one batch.

    Args:
      sums: donated.
      inputs: of each stream, from :func:`pass_batch`.
      weights: by name, the dense weights of the layers ``program.multiplied``.
      valid: [batch] bool, the windows that count (``Batch.valid``).
    """
    statistics, totals, means = [], [], []
    for groups, places, before, total, mean in zip(program.groups, program.residuals, *sums):
        names = groups[0]
        experts = tuple(number for name, *_ in groups if (number := expert_of(name)) is not None)
        if experts:
            read = [found[names[0]] for found in inputs[: 1 if places is None else 2]]
            matrices = tuple(jnp.stack([weights[name] for name in layers]) for layers in zip(*groups) if weights)
            statistics.append(add_routed(program.mesh, experts, before, read, valid, matrices))
            totals.append(total)
            means.append(None if mean is None else mean + gram_of_tokens(program.mesh, read[0], valid))
            continue
        means.append(None)
        seen = _seen(names[0], places, inputs, _scale(places, inputs, valid), valid)
        totals.append(total if total is None or seen.scale is None else total + jnp.sum(jnp.square(seen.scale)))
        hessian = add_gram(before.hessian, seen.x, program.mesh)
        count = before.tokens + jnp.sum(seen.routed, dtype=jnp.int32)
        drift = None if before.drift is None else _add_drift(program.mesh, before.drift, names, seen, weights)
        statistics.append(TokenStatistics(hessian, count, drift))
    return Sums(tuple(statistics), tuple(totals), tuple(means))


class _Seen(NamedTuple):
    """The inputs of a group in one batch, zero for tokens without an input; with a second stream also the difference.

    Attributes:
      x: [batch, length, d_in] in the model's dtype.
      routed: [batch, length] bool, tokens whose input is not zero.
      difference: as ``x``, ``X_d - X``.
      lost: for each layer of the group, the drift of the residual stream that its output is added to, or None.
      scale: [batch, length] float32, the factor of each token's input.
    """

    x: Array
    routed: Array
    difference: Array | None = None
    lost: tuple[Array | None, ...] = ()
    scale: Array | None = None


def _seen(
    name: str, places: ResidualNames | None, inputs: Sequence[Mapping[str, Array]], scale: Array | None, valid: Array
) -> _Seen:
    mask = valid[:, None, None].astype(inputs[0][name].dtype)

    def weighed(array: Array) -> Array:
        # Rounded to the model's dtype, as the activations themselves are. Both factors of H have the same rounding.
        return array if scale is None else (array.astype(scale.dtype) * scale[..., None]).astype(mask.dtype)

    if places is None:
        x = inputs[0][name] * mask
        return _Seen(weighed(x), jnp.any(x != 0, axis=-1), scale=scale)
    pruned, dense = inputs
    x, other = (stream[name] * mask for stream in inputs)
    routed, there = (jnp.any(array != 0, axis=-1) for array in (x, other))
    both = (routed & there)[..., None]
    lost = [None if before is None else jnp.where(both, dense[before] - pruned[before], 0) for before in places.before]
    difference = jnp.where(both, other - x, 0)
    return _Seen(
        weighed(x), routed, weighed(difference), tuple(None if array is None else weighed(array) for array in lost), scale
    )


def _scale(places: ResidualNames | None, inputs: Sequence[Mapping[str, Array]], valid: Array) -> Array | None:
    """The factor of each token's input, the root of its weight, [batch, length] float32; None if all tokens weigh alike."""
    if places is None or places.after is None:
        return None
    return jnp.where(valid[:, None], inverse_norm(inputs[-1][places.after]), 0)


def _add_drift(mesh: Mesh, drift: Drift, names: tuple[str, ...], seen: _Seen, weights: Mapping[str, Array]) -> Drift:
    difference = seen.difference
    assert difference is not None, "where there is a drift there are two streams"
    outputs = [project(difference, weights[name], jnp.float32) for name in names] if drift.energy or drift.outputs else []
    energy = (before + jnp.sum(jnp.square(moved), axis=(0, 1)) for moved, before in zip(outputs, drift.energy))
    residual = (
        None if lost is None or before is None else before + gram(seen.x, mesh, lost)
        for lost, before in zip(seen.lost, drift.residual, strict=True)
    )
    return Drift(
        None if drift.cross is None else drift.cross + gram(seen.x, mesh, difference),
        tuple(jax.lax.with_sharding_constraint(rows, jax.NamedSharding(mesh, P())) for rows in energy),
        tuple(residual),
        # Rounded to the model's dtype, as the drift of the residual stream is.
        tuple(before + gram(seen.x, mesh, moved.astype(seen.x.dtype)) for moved, before in zip(outputs, drift.outputs)),
    )


def inverse_norm(stream: Array) -> Array:
    """One over the root mean square of every token, [batch, length] float32; 0 for a token that is 0."""
    square = jnp.mean(jnp.square(stream.astype(jnp.float32)), axis=-1)
    return jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


def sums_of(decoder: Decoder, program: SumsProgram, energy: bool = False) -> Sums:
    """The shapes and shardings of :class:`Sums`, as :func:`struct_on` returns them."""

    def of(groups: Groups, places: ResidualNames | None) -> TokenStatistics:
        one = statistics_of(decoder, groups[0], places, energy)
        if expert_of(groups[0][0]) is None:
            return one
        return jax.tree.map(
            lambda struct: struct_on(program.mesh, (len(groups), *struct.shape), struct.dtype, P(None, *struct.sharding.spec)),
            one,
        )

    statistics = tuple(map(of, program.groups, program.residuals))
    weight = struct_on(program.mesh, (), jnp.float32, P())
    weights = tuple(weight if places and places.after else None for places in program.residuals)
    squares = (statistics_of(decoder, groups[0], None).hessian for groups in program.groups)
    return Sums(statistics, weights, tuple(square if borrows else None for square, borrows in zip(squares, program.borrows)))


def statistics_of(
    decoder: Decoder, names: tuple[str, ...], places: ResidualNames | None, energy: bool = False
) -> TokenStatistics:
    """The shapes and shardings of a group's statistics, as :func:`struct_on` returns them.

    Args:
      names: the group's layers.
      places: from :func:`residual_names`; None without a drift.
      energy: whether the drift includes the mean squares of the outputs.
    """
    outputs, inputs = zip(*(decoder.block_shapes[name + ".weight"] for name in names))

    def columns(rows: int) -> Array:
        return struct_on(decoder.mesh, (rows, inputs[0]), jnp.float32, P(None, MODEL))

    drift = None
    if places is not None:
        few = few_outputs(decoder, names)
        drift = Drift(
            None if few else columns(inputs[0]),
            tuple(struct_on(decoder.mesh, (rows,), jnp.float32, P()) for rows in outputs if energy),
            tuple(None if before is None else columns(rows) for rows, before in zip(outputs, places.before)),
            tuple(map(columns, outputs)) if few else (),
        )
    return TokenStatistics(columns(inputs[0]), struct_on(decoder.mesh, (), jnp.int32, P()), drift)


def few_outputs(decoder: Decoder, names: tuple[str, ...]) -> bool:
    """Whether the drift of a group's outputs takes fewer operations than that of its inputs: two products with few rows for one.

    So it does on an accelerator, where a layer has thousands of outputs. Where devices share the inputs of the layer, the first product
    is summed over the model axis, as in the layer's own forward pass.
    """
    shapes = [decoder.block_shapes[name + ".weight"] for name in names]
    return expert_of(names[0]) is None and 2 * sum(rows for rows, _ in shapes) < shapes[0][1]


def _zeros(struct: Array) -> Array:
    return jnp.zeros(struct.shape, struct.dtype, device=struct.sharding)


def _refuse_infinite(decoder: Decoder, index: int, groups: Groups, matrices: Sequence[Array]) -> None:
    """Raises UserError if the input of a group was not finite, which the diagonal of its products shows."""
    for names, trace in zip(groups, fetch([jnp.trace(matrix) for matrix in matrices])):
        if not np.isfinite(trace):
            raise UserError(f"the input of {decoder.prefix(index)}{names[0]} holds NaN or infinite values: {decoder.overflowed}")


@functools.partial(jax.jit, donate_argnums=0)
def _lent(hessians: Array, products: Array, share: float) -> Array:
    """Adds a share of the products of all tokens to the Hessian of every expert."""
    return hessians + share * products


@functools.partial(jax.jit, static_argnums=1)
def _members(statistics: TokenStatistics, shardings: TokenStatistics) -> tuple[TokenStatistics, ...]:
    """The statistics of each expert, from arrays that have them along their first axis.

    Args:
      shardings: those of the statistics of one.
    """

    def member(index: int) -> TokenStatistics:
        return jax.tree.map(lambda array, at: jax.lax.with_sharding_constraint(array[index], at), statistics, shardings)

    return tuple(map(member, range(len(statistics.tokens))))


@functools.partial(jax.jit, donate_argnums=0)
def _divide(sums: tuple[Any, ...], totals: tuple[Array | np.float32, ...]) -> tuple[Any, ...]:
    """Divides each tree of arrays by its own number."""
    return tuple(jax.tree.map(lambda array, total=total: array / total, tree) for tree, total in zip(sums, totals))
