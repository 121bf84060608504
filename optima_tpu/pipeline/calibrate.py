"""Hessians of a block's linear layers from the activations that run through it."""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
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
from optima_tpu.models.activations import Activations
from optima_tpu.models.decoder import Decoder, forward
from optima_tpu.models.layers import project
from optima_tpu.runtime.mesh import DATA, MODEL, struct_on
from optima_tpu.runtime.processes import fetch


def linear_groups(decoder: Decoder) -> Groups:
    """The block's linear layers, grouped by the array that they read, in the order of the forward pass.

    Found by tracing: layers that share an input sow the same tracer.
    """
    found: list[Groups] = []  # the one trace leaves its groups here

    def trace(state, x, positions):
        inputs = forward(decoder.graph, state, x, positions)[1]
        groups: dict[int, list[str]] = {}
        for name in decoder.linears:
            groups.setdefault(id(inputs[name]), []).append(name)
        found.append(tuple(map(tuple, groups.values())))
        return x

    state = decoder.state({name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in decoder.block_shapes.items()})
    hidden = jax.ShapeDtypeStruct((1, 2, decoder.config.d_model), jnp.float32)
    jax.eval_shape(trace, state, hidden, decoder.config.positions(0, 2))
    return found[0]


def stages(groups: Groups) -> tuple[Groups, ...]:
    """The groups in parts that follow each other in the forward pass; layers of all experts that are alike make one part."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for names in groups:
        found.setdefault(kind_name(names[0]), []).append(names)
    return tuple(map(tuple, found.values()))


class Stream(NamedTuple):
    """One of the two streams of hidden states on its way through a block.

    Attributes:
      parameters: of the block, by name: as pruned so far, or dense.
      hidden: what enters the block.
    """

    parameters: Mapping[str, Array]
    hidden: Activations


@dataclasses.dataclass(frozen=True)
class Capture:
    """What a pass of some tokens through a block is to find.

    Attributes:
      groups: from :func:`linear_groups`, or some of them.
      target: whether there is a drift from the dense model, whether it is aimed at in the residual stream, and whether tokens are
        weighed: where all layers of a group add to one residual stream, by one over the mean square of the dense model's stream
        behind them.
      energy: whether the mean squares of the outputs' drift are wanted too.
      advance: whether the dense stream is taken through the block, which spares it a :meth:`Decoder.apply`.
    """

    groups: Groups
    target: Target = SelfTarget()
    energy: bool = False
    advance: bool = False


def accumulate(decoder: Decoder, index: int, capture: Capture, streams: Sequence[Stream]) -> tuple[TokenStatistics, ...]:
    """The statistics of each group's input, and its drift where the target needs it.

    Products of activations in the model's dtype, accumulated in float32: on each device over its own tokens, then by one ``psum``
    over the data axis. Differences of both streams are in the model's dtype, where those of close numbers are exact. A token that
    either model does not send to an expert has no drift there: its output is not comparable.

    Args:
      index: the block's number, for messages.
      streams: the pruned one, and for a target with a dense stream the dense one, of the same samples; with ``advance`` that one
        is afterwards what leaves the block.

    Raises:
      UserError: an input holds a NaN or an infinity; names the layer.
    """
    hidden, moving = streams[0].hidden, streams[-1].hidden
    length, states = hidden.values.shape[1], [decoder.state(stream.parameters) for stream in streams]
    positions, step = decoder.positions(index, length), CaptureStep.of(decoder, capture)
    sums = jax.tree.map(_zeros, sums_of(decoder, step, capture.energy))
    wanted = capture.groups if capture.energy else ()
    weights = {name: streams[-1].parameters[name + ".weight"] for names in wanted for name in names}
    with moving.put_behind() if capture.advance else contextlib.nullcontext() as put:
        for batches in zip(*(stream.hidden.batches(decoder.batch) for stream in streams)):
            inputs = tuple(BlockInput(state, batch.hidden) for state, batch in zip(states, batches))
            sums, output = add_batch(step, sums, inputs, weights, BatchTokens(batches[0].valid, positions))
            if output is not None and put is not None:
                put(batches[-1].rows, output)
    count = np.float32(len(hidden) * length)
    totals = tuple(count if total is None else total for total in sums.weights)
    # Two programs: in one, XLA divides a Hessian otherwise where there is a drift beside it, in its last bit.
    hessians = _divide(tuple(found.hessian for found in sums.statistics), totals)
    drifts = _divide(tuple(found.drift for found in sums.statistics), totals)
    tokens = [found.tokens for found in sums.statistics]
    statistics = tuple(map(TokenStatistics, hessians, tokens, drifts))
    _refuse_infinite(decoder, index, capture.groups, [found.hessian for found in statistics])
    if crosses := [found.drift.cross for found in statistics if found.drift is not None]:
        _refuse_infinite(decoder, index, capture.groups, crosses)
    return statistics


class ResidualNames(NamedTuple):
    """Where the residual stream of a group of layers is sown.

    Attributes:
      before: for every layer of the group the stream that its output is added to, None where there is none; empty where the
        stream's drift was not asked for.
      after: the stream behind all of them where the tokens are weighed by it, else None.
    """

    before: tuple[str | None, ...]
    after: str | None


def residual_names(decoder: Decoder, groups: Groups, target: Target) -> tuple[ResidualNames | None, ...]:
    """What :func:`add_batch` reads of the residual stream, for each group; None where there is no drift."""
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
class CaptureStep:
    """The static part of :func:`add_batch`.

    Attributes:
      graph: of the block.
      groups: whose inputs are wanted.
      residuals: what is read of the residual stream, for each group; None where there is no drift.
      advance: whether the output of the last stream is wanted.
    """

    graph: Any
    mesh: Mesh
    groups: Groups
    residuals: tuple[ResidualNames | None, ...]
    advance: bool = False

    @classmethod
    def of(cls, decoder: Decoder, capture: Capture) -> "CaptureStep":
        """The step of a capture."""
        residuals = residual_names(decoder, capture.groups, capture.target)
        return cls(decoder.graph, decoder.mesh, capture.groups, residuals, capture.advance)


class Sums(NamedTuple):
    """What is accumulated, for each group.

    Attributes:
      statistics: not yet divided by the number of tokens.
      weights: the sum of the tokens' weights, float32; None where they are not weighed.
    """

    statistics: tuple[TokenStatistics, ...]
    weights: tuple[Array | None, ...]


class BlockInput(NamedTuple):
    """What one stream gives to a step: the state of the block, and a batch of hidden states."""

    state: Any
    hidden: Array


class BatchTokens(NamedTuple):
    """What is known of the samples of a batch: ``Batch.valid``, and the positions of their tokens."""

    valid: Array
    positions: Any


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def add_batch(
    step: CaptureStep, sums: Sums, streams: tuple[BlockInput, ...], weights: Mapping[str, Array], tokens: BatchTokens
) -> tuple[Sums, Array | None]:
    """One step of :func:`accumulate`: the new sums, and with ``advance`` what leaves the dense block, else None.

    Args:
      sums: donated.
      streams: as those of :func:`accumulate`.
      weights: dense ones, by name, of the layers whose drift has an energy.
    """
    passed = [forward(step.graph, stream.state, stream.hidden, tokens.positions) for stream in streams]
    inputs = [found for _, found in passed]
    statistics, totals = [], []
    for names, places, before, total in zip(step.groups, step.residuals, *sums):
        seen = _seen(names[0], places, inputs, tokens.valid)
        totals.append(total if total is None or seen.scale is None else total + jnp.sum(jnp.square(seen.scale)))
        hessian = before.hessian + _gram(seen.x, step.mesh)
        count = before.tokens + jnp.sum(seen.routed, dtype=jnp.int32)
        drift = None if before.drift is None else _add_drift(step.mesh, before.drift, names, seen, weights)
        statistics.append(TokenStatistics(hessian, count, drift))
    output = jax.lax.with_sharding_constraint(passed[-1][0], jax.NamedSharding(step.mesh, P(DATA))) if step.advance else None
    return Sums(tuple(statistics), tuple(totals)), output


class _Seen(NamedTuple):
    """The inputs of a group in one batch, zero for tokens that have none; with a second stream also what it differs by.

    Attributes:
      x: [batch, length, d_in] in the model's dtype.
      routed: [batch, length] bool, tokens whose input is not zero.
      difference: as ``x``, ``X_d - X``.
      lost: of each layer of the group, the drift of the residual stream that its output is added to, or None.
      scale: [batch, length] float32, by which the tokens were weighed.
    """

    x: Array
    routed: Array
    difference: Array | None = None
    lost: tuple[Array | None, ...] = ()
    scale: Array | None = None


def _seen(name: str, places: ResidualNames | None, inputs: Sequence[Mapping[str, Array]], valid: Array) -> _Seen:
    mask = valid[:, None, None].astype(inputs[0][name].dtype)
    if places is None:
        x = inputs[0][name] * mask
        return _Seen(x, jnp.any(x != 0, axis=-1))
    pruned, dense = inputs
    x, other = (stream[name] * mask for stream in inputs)
    routed, there = (jnp.any(array != 0, axis=-1) for array in (x, other))
    both = (routed & there)[..., None]
    lost = [None if before is None else jnp.where(both, dense[before] - pruned[before], 0) for before in places.before]
    difference = jnp.where(both, other - x, 0)
    if places.after is None:
        return _Seen(x, routed, difference, tuple(lost))
    scale, dtype = jnp.where(valid[:, None], inverse_norm(dense[places.after]), 0), x.dtype

    def weighed(array: Array) -> Array:
        # To the model's dtype again: a rounding like that of the activations themselves, and the same on both sides of H.
        return (array * scale[..., None]).astype(dtype)

    x, difference = weighed(x), weighed(difference)
    return _Seen(x, routed, difference, tuple(None if array is None else weighed(array) for array in lost), scale)


def _add_drift(mesh: Mesh, drift: Drift, names: tuple[str, ...], seen: _Seen, weights: Mapping[str, Array]) -> Drift:
    difference = seen.difference
    assert difference is not None, "where there is a drift there are two streams"
    energy = (
        before + jnp.sum(jnp.square(project(difference, weights[name], jnp.float32)), axis=(0, 1))
        for name, before in zip(names, drift.energy)
    )
    residual = (
        None if lost is None or before is None else before + _gram(seen.x, mesh, lost)
        for lost, before in zip(seen.lost, drift.residual, strict=True)
    )
    return Drift(
        drift.cross + _gram(seen.x, mesh, difference),
        tuple(jax.lax.with_sharding_constraint(rows, jax.NamedSharding(mesh, P())) for rows in energy),
        tuple(residual),
    )


def inverse_norm(stream: Array) -> Array:
    """One over the root mean square of every token, [batch, length] float32; 0 for a token that is 0."""
    square = jnp.mean(jnp.square(stream.astype(jnp.float32)), axis=-1)
    return jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


def sums_of(decoder: Decoder, step: CaptureStep, energy: bool = False) -> Sums:
    """The shapes of :class:`Sums` and their places on the mesh, as :func:`struct_on` gives them."""
    statistics = tuple(statistics_of(decoder, names, places, energy) for names, places in zip(step.groups, step.residuals))
    weight = struct_on(step.mesh, (), jnp.float32, P())
    return Sums(statistics, tuple(weight if places and places.after else None for places in step.residuals))


def statistics_of(
    decoder: Decoder, names: tuple[str, ...], places: ResidualNames | None, energy: bool = False
) -> TokenStatistics:
    """The shapes of a group's statistics and their places on the mesh, as :func:`struct_on` gives them.

    Args:
      names: of the group's layers.
      places: what is read of the residual stream; None where there is no drift.
      energy: whether the drift has the mean squares of the outputs.
    """
    outputs, inputs = zip(*(decoder.block_shapes[name + ".weight"] for name in names))

    def columns(rows: int) -> Array:
        return struct_on(decoder.mesh, (rows, inputs[0]), jnp.float32, P(None, MODEL))

    drift = None
    if places is not None:
        drift = Drift(
            columns(inputs[0]),
            tuple(struct_on(decoder.mesh, (rows,), jnp.float32, P()) for rows in outputs if energy),
            tuple(None if before is None else columns(rows) for rows, before in zip(outputs, places.before)),
        )
    return TokenStatistics(columns(inputs[0]), struct_on(decoder.mesh, (), jnp.int32, P()), drift)


def _zeros(struct: Array) -> Array:
    return jnp.zeros(struct.shape, struct.dtype, device=struct.sharding)


def _refuse_infinite(decoder: Decoder, index: int, groups: Groups, matrices: Sequence[Array]) -> None:
    """Raises UserError where the input of a group was not finite, which the diagonal of its products shows."""
    for names, trace in zip(groups, fetch([jnp.trace(matrix) for matrix in matrices])):
        if not np.isfinite(trace):
            raise UserError(
                f"the input of {decoder.prefix(index)}{names[0]} holds NaN or infinite values: the model overflows "
                "in its dtype or its weights are damaged; try --dtype float32"
            )


@functools.partial(jax.jit, donate_argnums=0)
def _divide(sums: tuple[Any, ...], totals: tuple[Array | np.float32, ...]) -> tuple[Any, ...]:
    """Each of several trees of arrays, divided by a number of its own."""
    return tuple(jax.tree.map(lambda array, total=total: array / total, tree) for tree, total in zip(sums, totals))


def _columns(mesh: Mesh, size: int) -> P:
    return P(None, MODEL) if size % mesh.shape[MODEL] == 0 else P()


def _gram(x: Array, mesh: Mesh, left: Array | None = None) -> Array:
    """``X'X`` [d, d], or ``L'X`` [e, d] with ``left`` [batch, length, e], of x [batch, length, d] in float32.

    Each device of the model axis computes its own columns of the result; where the axis does not divide d, all of them.
    """
    size = x.shape[-1]
    spec = _columns(mesh, size)
    width = size // mesh.shape[MODEL] if spec != P() else size

    def local(part: Array, *left: Array) -> Array:
        rows = part.reshape(-1, size)
        first = jax.lax.axis_index(MODEL) * width if width < size else 0
        mine = jax.lax.dynamic_slice_in_dim(rows, first, width, axis=1)
        # bfloat16 products are exact in float32; float32 ones need the precision.
        product = jax.lax.dot_general(
            left[0].reshape(-1, left[0].shape[-1]) if left else rows,
            mine,
            (((0,), (0,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        return jax.lax.psum(product, DATA)

    arrays = (x,) if left is None else (x, left)
    return jax.shard_map(local, mesh=mesh, in_specs=P(DATA), out_specs=spec, check_vma=False)(*arrays)
