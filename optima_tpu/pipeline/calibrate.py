"""Hessians of a block's linear layers from the activations that run through it."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from optima_tpu.errors import UserError
from optima_tpu.method.layer_rules import kind_name
from optima_tpu.method.statistics import Drift, Groups, Statistics
from optima_tpu.method.targets import DenseTarget
from optima_tpu.models.activations import Activations
from optima_tpu.models.decoder import Decoder, forward
from optima_tpu.models.layers import project
from optima_tpu.runtime.mesh import DATA, MODEL
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


def accumulate_hessians(
    decoder: Decoder, index: int, parameters: Mapping[str, Array], hidden: Activations, groups: Groups
) -> tuple[Statistics, ...]:
    """The :class:`Statistics` of each group's input.

    Products of activations in the model's dtype, accumulated in float32: on each device over its own tokens, then by one
    ``psum`` over the data axis.

    Args:
      index: the block's number, for messages.
      parameters: the block's parameters, by name.
      hidden: what enters the block.
      groups: from :func:`linear_groups`.

    Raises:
      UserError: an input holds a NaN or an infinity; names the layer.
    """
    state, length = decoder.state(parameters), hidden.values.shape[1]
    positions, sums = decoder.positions(index, length), _empty(decoder, groups)
    for batch in hidden.batches(decoder.batch):
        sums = add_batch(decoder.graph, decoder.mesh, groups, sums, state, batch.hidden, batch.valid, positions)
    statistics = _divide(sums, (np.float32(len(hidden) * length),) * len(sums))
    _refuse_infinite(decoder, index, groups, [found.hessian for found in statistics])
    return statistics


def accumulate_drift(
    decoder: Decoder,
    index: int,
    parameters: Mapping[str, Array],
    hidden: Activations,
    dense_parameters: Mapping[str, Array],
    dense: Activations,
    groups: Groups,
    target: DenseTarget,
    energy: bool = False,
    advance: bool = False,
) -> tuple[tuple[Statistics, ...], tuple[Drift, ...]]:
    """The :class:`Statistics` of each group's input, as :func:`accumulate_hessians`, and its :class:`Drift`.

    Differences are in the model's dtype, where those of close numbers are exact. A token that either model does not send to an
    expert has no drift there: its output is not comparable.

    Args:
      parameters: the block's, as pruned so far.
      hidden: what enters it behind the pruned blocks.
      dense_parameters: the block's in the dense model.
      dense: what enters it there, of the same samples; with ``advance`` afterwards what leaves it.
      target: whether it aims at the drift of the residual stream, and whether it weighs tokens: where all layers of a group add
        to one residual stream, by one over the mean square of the dense model's stream behind them.
      energy: whether the mean squares of the outputs' drift are wanted too.
      advance: whether this pass takes ``dense`` through the block too, which spares it a :meth:`Decoder.apply`.

    Raises:
      UserError: as :func:`accumulate_hessians`.
    """
    states, length = (decoder.state(parameters), decoder.state(dense_parameters)), hidden.values.shape[1]
    positions, wanted = decoder.positions(index, length), groups if energy else ((),) * len(groups)
    weights = {name: dense_parameters[name + ".weight"] for names in wanted for name in names}
    everywhere = jax.NamedSharding(decoder.mesh, P())
    places = residual_names(decoder, groups, target)
    drifts = []
    for (cross, _), names, (before, _) in zip(_empty(decoder, groups), wanted, places):
        energies = tuple(jnp.zeros(weights[name].shape[0], device=everywhere) for name in names)
        products = (place and jnp.zeros((decoder.config.d_model, len(cross)), device=cross.sharding) for place in before)
        drifts.append(Drift(cross, energies, tuple(products)))
    totals = tuple(after and jnp.zeros((), device=everywhere) for _, after in places)
    sums = _empty(decoder, groups), tuple(drifts), totals
    with dense.put_behind() as put:
        for batch, other in zip(hidden.batches(decoder.batch), dense.batches(decoder.batch)):
            sums, output = add_drift(
                decoder.graph,
                decoder.mesh,
                groups,
                places,
                advance,
                sums,
                states,
                (batch.hidden, other.hidden),
                weights,
                batch.valid,
                positions,
            )
            if advance:
                put(other.rows, output)
    tokens = np.float32(len(hidden) * length)
    totals = tuple(tokens if total is None else total for total in sums[2])
    statistics, drifts = _divide(sums[0], totals), _divide_drift(sums[1], totals)
    _refuse_infinite(decoder, index, groups, [found.hessian for found in statistics])
    _refuse_infinite(decoder, index, groups, [found.cross for found in drifts])
    return statistics, drifts


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def add_batch(graph, mesh: Mesh, groups: Groups, sums, state, hidden, valid, positions):
    """One step of :func:`accumulate_hessians`: ``sums`` (donated) and what a ``Batch`` of hidden states adds to them."""
    inputs = forward(graph, state, hidden, positions)[1]
    kept = (inputs[names[0]] * valid[:, None, None].astype(hidden.dtype) for names in groups)
    return tuple(
        Statistics(total.hessian + _gram(x, mesh), total.tokens + jnp.sum(jnp.any(x != 0, axis=-1), dtype=jnp.int32))
        for x, total in zip(kept, sums)
    )


class ResidualNames(NamedTuple):
    """Where the residual stream of a group of layers is sown.

    Attributes:
      before: for every layer of the group the stream that its output is added to, None where there is none; empty where the
        stream's drift was not asked for.
      after: the stream behind all of them where the tokens are weighed by it, else None.
    """

    before: tuple[str | None, ...]
    after: str | None


def residual_names(decoder: Decoder, groups: Groups, target: DenseTarget) -> tuple[ResidualNames, ...]:
    """What :func:`add_drift` reads of the residual stream, for each group."""
    found = []
    for names in groups:
        around = [decoder.family.residuals.get(name) for name in names]
        same = target.weigh_tokens and around[0] is not None and len(set(around)) == 1
        found.append(
            ResidualNames(
                tuple(place and place.before for place in around) if target.gamma else (), around[0].after if same else None
            )
        )
    return tuple(found)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnums=5)
def add_drift(
    graph,
    mesh: Mesh,
    groups: Groups,
    residuals: tuple[ResidualNames, ...],
    advance: bool,
    sums,
    states,
    hidden,
    weights,
    valid,
    positions,
):
    """One step of :func:`accumulate_drift`: the new ``sums``, and with ``advance`` what leaves the dense block, else None.

    Args:
      residuals: from :func:`residual_names`.
      sums: (Statistics, Drift, and the tokens' weights or None) of each group, donated.
      states, hidden: of the pruned and of the dense stream.
      weights: dense ones, by name, of the layers whose drift has an energy.
    """
    (_, pruned), (output, dense) = (forward(graph, state, x, positions) for state, x in zip(states, hidden))
    streams = pruned, dense
    statistics, drifts, totals = [], [], []
    for names, places, total, drift, weight in zip(groups, residuals, *sums):
        x, other = (inputs[names[0]] * valid[:, None, None].astype(hidden[0].dtype) for inputs in streams)
        seen, there = (jnp.any(array != 0, axis=-1) for array in (x, other))
        both = (seen & there)[..., None]
        lost = [before and jnp.where(both, dense[before] - pruned[before], 0) for before in places.before]
        difference = jnp.where(both, other - x, 0)
        if places.after:
            scale = jnp.where(valid[:, None], inverse_norm(dense[places.after]), 0)
            weight = weight + jnp.sum(jnp.square(scale))
            # To the model's dtype again: a rounding like that of the activations themselves, and the same on both sides of H.
            x, difference, *lost = (
                (array * scale[..., None]).astype(x.dtype) if array is not None else None for array in (x, difference, *lost)
            )
        totals.append(weight)
        statistics.append(Statistics(total.hessian + _gram(x, mesh), total.tokens + jnp.sum(seen, dtype=jnp.int32)))
        energy = (
            before + jnp.sum(jnp.square(project(difference, weights[name], jnp.float32)), axis=(0, 1))
            for name, before in zip(names, drift.energy)
        )
        residual = (
            None if found is None else before + _gram(x, mesh, found) for found, before in zip(lost, drift.residual, strict=True)
        )
        drifts.append(
            Drift(
                drift.cross + _gram(x, mesh, difference),
                tuple(jax.lax.with_sharding_constraint(rows, jax.NamedSharding(mesh, P())) for rows in energy),
                tuple(residual),
            )
        )
    output = jax.lax.with_sharding_constraint(output, jax.NamedSharding(mesh, P(DATA))) if advance else None
    return (tuple(statistics), tuple(drifts), tuple(totals)), output


def inverse_norm(stream: Array) -> Array:
    """One over the root mean square of every token, [batch, length] float32; 0 for a token that is 0."""
    square = jnp.mean(jnp.square(stream.astype(jnp.float32)), axis=-1)
    return jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


def _empty(decoder: Decoder, groups: Groups) -> tuple[Statistics, ...]:
    """No tokens yet."""
    sizes = tuple(decoder.block_shapes[names[0] + ".weight"][1] for names in groups)
    everywhere = jax.NamedSharding(decoder.mesh, P())
    return tuple(
        Statistics(
            jnp.zeros((size, size), jnp.float32, device=jax.NamedSharding(decoder.mesh, _columns(decoder.mesh, size))),
            jnp.zeros((), jnp.int32, device=everywhere),
        )
        for size in sizes
    )


def _refuse_infinite(decoder: Decoder, index: int, groups: Groups, matrices: Sequence[Array]) -> None:
    """Raises UserError where the input of a group was not finite, which the diagonal of its products shows."""
    for names, trace in zip(groups, fetch([jnp.trace(matrix) for matrix in matrices])):
        if not np.isfinite(trace):
            raise UserError(
                f"the input of {decoder.prefix(index)}{names[0]} holds NaN or infinite values: the model overflows "
                "in its dtype or its weights are damaged; try --dtype float32"
            )


@functools.partial(jax.jit, donate_argnums=0)
def _divide(sums, totals):
    return tuple(found._replace(hessian=found.hessian / total) for found, total in zip(sums, totals))


@functools.partial(jax.jit, donate_argnums=0)
def _divide_drift(drifts, totals):
    return tuple(jax.tree.map(lambda array: array / total, drift) for drift, total in zip(drifts, totals))


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
