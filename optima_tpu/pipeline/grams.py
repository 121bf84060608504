"""Sums products of layer inputs over the tokens of a batch on the mesh."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from optima_tpu.method.experts import ExpertStatistics
from optima_tpu.method.statistics import Drift, TokenStatistics
from optima_tpu.models.experts import Route, Routed
from optima_tpu.models.grouped import Stretches, grouped_dot, grouped_outer
from optima_tpu.runtime.mesh import DATA, MODEL

# The rows of a panel are a multiple of this.
_PANEL = 64


def add_gram(before: Array, x: Array, mesh: Mesh) -> Array:
    """``before + X'X`` [d, d] in float32, of x [batch, length, d].

    Where :func:`halved` is true, products below the diagonal are left out.
    """
    if not halved(mesh):
        return before + gram(x, mesh)
    size = x.shape[-1]

    def local(sums: Array, part: Array) -> Array:
        rows = part.reshape(-1, size)
        for first, last in panels(size):
            sums = sums.at[first:last, first:].add(_products(rows[:, first:last], rows[:, first:], mesh))
        return sums

    return jax.shard_map(local, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=P(), check_vma=False)(before, x)


def halved(mesh: Mesh | AbstractMesh) -> bool:
    """Whether :func:`add_gram` leaves out products below the diagonal.

    It does not where devices share the columns: their work would be unequal.
    """
    return mesh.shape[MODEL] == 1


@jax.jit
def whole(sums: Array) -> Array:
    """A symmetric matrix from what is on and above its diagonal."""
    # Not a choice between the matrix and its transpose: for 2,048, 4,096 or 8,192 rows XLA of jax 0.10 compiles that for minutes
    # on a CPU, and the program crashes.
    return jnp.triu(sums) + jnp.triu(sums, 1).T


def panels(size: int) -> list[tuple[int, int]]:
    """The row ranges of up to 4 panels of :func:`add_gram`.

    A panel multiplies its rows with the columns from its own first on. Four panels take 5/8 of the operations, and several
    devices sum up 5/8 of the products. More panels would save at most another eighth, and their products would be narrower:
    from 4,096 inputs on each panel has at least 1,024 rows, enough for an accelerator.
    """
    width = _PANEL * -(-size // (4 * _PANEL))
    return [(first, min(first + width, size)) for first in range(0, size, width)]


def gram(x: Array, mesh: Mesh, left: Array | None = None) -> Array:
    """``X'X`` [d, d], or ``L'X`` [e, d] with ``left``, in float32.

    Each device of the model axis computes its own columns of the result; if the axis does not divide d, all columns.

    Args:
      x: [batch, length, d].
      left: [batch, length, e].
    """
    size = x.shape[-1]

    def local(part: Array, *left: Array) -> Array:
        rows = part.reshape(-1, size)
        return _products(left[0].reshape(-1, left[0].shape[-1]) if left else rows, rows, mesh)

    arrays = (x,) if left is None else (x, left)
    return jax.shard_map(local, mesh=mesh, in_specs=P(DATA), out_specs=_columns(mesh, size), check_vma=False)(*arrays)


def add_routed(
    mesh: Mesh,
    experts: tuple[int, ...],
    before: TokenStatistics,
    streams: Sequence[Routed],
    valid: Array,
    weights: tuple[Array, ...],
) -> TokenStatistics:
    """Adds the tokens of a batch to the sums of one layer of several experts.

    Args:
      experts: their numbers, ascending.
      before: the sums, each array with a first axis for these experts.
      streams: the layer's input in the pruned stream and, if there is a drift, in the dense one.
      valid: [batch] bool, False for windows that do not count.
      weights: for each layer whose drift has an energy, its dense weights [experts, d_out, d_in].
    """
    size, model = streams[0].rows.shape[-1], mesh.shape[MODEL]
    share = len(experts) / streams[0].experts
    rows = tuple(P(None, MODEL) if weight.shape[1] % model == 0 else P() for weight in weights)
    matrix = P(None, *_columns(mesh, size))

    def local(valid: Array, weights: tuple[Array, ...], *streams: Routed) -> tuple[Any, ...]:
        routes = [Route.of(stream.chosen.reshape(-1, stream.chosen.shape[-1]), stream.experts) for stream in streams]
        route, chosen = routes[0], jnp.array(experts)
        own_stretches = Stretches(route.stretches.first[chosen], route.stretches.rows[chosen])
        counts = valid[route.token // streams[0].chosen.shape[1]]
        x = jnp.where(counts[:, None], streams[0].rows, 0)
        tokens = jnp.zeros(streams[0].experts, jnp.int32).at[route.expert].add(counts.astype(jnp.int32))[chosen]
        sums: tuple[Any, ...] = (grouped_outer(x, _own_columns(x, mesh), own_stretches, share), tokens)
        if before.drift is not None:
            theirs = streams[1].chosen.reshape(-1, streams[1].chosen.shape[-1])[route.token] == route.expert[:, None]
            other = streams[1].rows[routes[1].row[route.token, jnp.argmax(theirs, axis=1)]]
            both = counts & jnp.any(theirs, axis=1)
            difference = jnp.where(both[:, None], other - x, 0)
            energy = (jnp.square(grouped_dot(difference, weight, own_stretches, jnp.float32, share)) for weight in weights)
            ones = jnp.ones((len(x), 1), jnp.float32)
            sums += (
                grouped_outer(difference, _own_columns(x, mesh), own_stretches, share),
                tuple(grouped_outer(ones, squares, own_stretches, share)[:, 0] for squares in energy),
            )
        return jax.lax.psum(sums, DATA)

    hessian, tokens, *drift = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(DATA), rows, *(P(DATA) for _ in streams)),
        out_specs=(matrix, P()) if before.drift is None else (matrix, P(), matrix, rows),
        check_vma=False,
    )(valid, weights, *streams)
    added = TokenStatistics(before.hessian + hessian, before.tokens + tokens)
    if before.drift is None:
        return added
    cross, energy = drift
    replicated = jax.NamedSharding(mesh, P())
    energy = tuple(old + jax.lax.with_sharding_constraint(new, replicated) for old, new in zip(before.drift.energy, energy))
    # Experts add to no residual stream as they are: a share comes between.
    return added._replace(drift=Drift(before.drift.cross + cross, energy, before.drift.residual))


class Sent(NamedTuple):
    """What experts read in a batch, and the router's shares of the tokens.

    Attributes:
      read: the input of down.
      shares: [batch, length, experts_per_token].
      valid: [batch] bool, False for windows that do not count.
    """

    read: Routed
    shares: Array
    valid: Array

    def by_rows(self) -> tuple[Route, Array, Array]:
        """Inside a shard_map: route, rows, float32 shares (0 if not valid)."""
        route = Route.of(self.read.chosen.reshape(-1, self.read.chosen.shape[-1]), self.read.experts)
        shares = self.shares.reshape(-1, self.shares.shape[-1]).astype(jnp.float32)
        share = jnp.zeros(len(route.token)).at[route.row].set(shares)
        counts = self.valid[route.token // self.read.chosen.shape[1]]
        return route, self.read.rows, jnp.where(counts, share, 0)


def mixed_statistics(mesh: Mesh, sent: Sent, down: Array, bias: Array | None) -> tuple[ExpertStatistics, Array]:
    """A batch's sums over all experts' outputs, and :func:`mixed_output`.

    Args:
      down, bias: as for :func:`mixed_output`.
    """
    split = _outputs(mesh, down)

    def local(sent: Sent, down: Array, bias: Array | None) -> tuple[ExpertStatistics, Array]:
        route, _, share = sent.by_rows()
        outputs = _expert_outputs(route, sent.read.rows, down, bias)
        squares = jnp.sum(jnp.square(outputs), axis=1)
        squares = squares if split is None else jax.lax.psum(squares, split)
        counts = sent.valid[route.token // sent.read.chosen.shape[1]].astype(jnp.float32)
        norms = jnp.sqrt(squares)
        of_rows = jnp.stack([jnp.ones_like(norms), norms, squares, share * norms]) * counts
        tokens, *sums = jax.lax.psum(jnp.zeros((4, sent.read.experts)).at[:, route.expert].add(of_rows), DATA)
        return ExpertStatistics(tokens.astype(jnp.int32), *sums), _shared(route, outputs, share)

    specs = (P(DATA), P(None, split), P(None, split))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(), P(DATA, split)), check_vma=False)(sent, down, bias)


def mixed_output(mesh: Mesh, sent: Sent, down: Array, bias: Array | None = None) -> Array:
    """``sum_e g_e W_e h_e`` of every token, [tokens, d_out] float32.

    The result is 0 where the window does not count.

    Args:
      down: [experts, d_out, d_in], multiplied in the dtype of what the experts read.
      bias: [experts, d_out]; None for none.
    """
    split = _outputs(mesh, down)

    def local(sent: Sent, down: Array, bias: Array | None) -> Array:
        route, rows, share = sent.by_rows()
        return _shared(route, _expert_outputs(route, rows, down, bias), share)

    specs = (P(DATA), P(None, split), P(None, split))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(DATA, split), check_vma=False)(sent, down, bias)


def _expert_outputs(route: Route, rows: Array, down: Array, bias: Array | None) -> Array:
    outputs = grouped_dot(rows, down, route.stretches, jnp.float32)
    return outputs if bias is None else outputs + bias[route.expert].astype(jnp.float32)


def _shared(route: Route, outputs: Array, share: Array) -> Array:
    """The sum over the experts of each token."""
    return jnp.sum((outputs * share[:, None])[route.row], axis=1)


def mixed_moments(mesh: Mesh, sent: Sent, outputs: Array) -> Array:
    """``sum_t g_e(t) o_t h_e(t)'`` of every expert, in float32.

    The result is [experts, d_out, d_in]. This is the transpose of :func:`mixed_output`.

    Args:
      outputs: ``o``, [tokens, d_out] float32.
    """
    split = _outputs(mesh, outputs)

    def local(sent: Sent, outputs: Array) -> Array:
        route, rows, share = sent.by_rows()
        # Rounded to the model's dtype, as the rows are: a float32 product takes an accelerator six times as long.
        shared = (outputs[route.token] * share[:, None]).astype(rows.dtype)
        return jax.lax.psum(grouped_outer(shared, rows, route.stretches), DATA)

    specs = (P(DATA), P(DATA, split))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(None, split), check_vma=False)(sent, outputs)


def mixed_gram(mesh: Mesh, sent: Sent) -> Array:
    """``sum_t g_e(t)^2 h_e(t) h_e(t)'``, [experts, d_in, d_in] float32."""

    def local(sent: Sent) -> Array:
        route, rows, share = sent.by_rows()
        shared = (rows.astype(jnp.float32) * share[:, None]).astype(rows.dtype)
        return jax.lax.psum(grouped_outer(_own_columns(shared, mesh), shared, route.stretches), DATA)

    columns = _columns(mesh, sent.read.rows.shape[1])
    out = P(None, columns[1] if columns else None)
    return jax.shard_map(local, mesh=mesh, in_specs=P(DATA), out_specs=out, check_vma=False)(sent)


def _outputs(mesh: Mesh, array: Array) -> str | None:
    """The mesh axis that splits an array's second axis; None if it cannot."""
    return MODEL if array.shape[1] % mesh.shape[MODEL] == 0 else None


def gram_of_tokens(mesh: Mesh, stream: Routed, valid: Array) -> Array:
    """``X'X`` [d, d] in float32 of all tokens of a batch, once each.

    The result is sharded as from :func:`gram`.

    Args:
      stream: the input of experts.
      valid: [batch] bool, False for windows that do not count.
    """

    def local(stream: Routed, valid: Array) -> Array:
        route = Route.of(stream.chosen.reshape(-1, stream.chosen.shape[-1]), stream.experts)
        counts = jnp.repeat(valid, stream.chosen.shape[1])
        x = jnp.where(counts[:, None], stream.rows[route.row[:, 0]], 0)
        return _products(x, x, mesh)

    out = _columns(mesh, stream.rows.shape[-1])
    return jax.shard_map(local, mesh=mesh, in_specs=(P(DATA), P(DATA)), out_specs=out, check_vma=False)(stream, valid)


def _products(left: Array, rows: Array, mesh: Mesh) -> Array:
    """This device's columns of ``L'X``, over all slices of the data axis.

    L is [tokens, e], and X is [tokens, d]. Call it inside a shard_map.
    """
    # bfloat16 products are exact in float32; float32 ones need the precision.
    product = jax.lax.dot_general(
        left,
        _own_columns(rows, mesh),
        (((0,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return jax.lax.psum(product, DATA)


def _columns(mesh: Mesh, size: int) -> P:
    return P(None, MODEL) if size % mesh.shape[MODEL] == 0 else P()


def _own_columns(rows: Array, mesh: Mesh) -> Array:
    """A device's columns of [rows, d]; all if the axis does not divide d."""
    model, size = mesh.shape[MODEL], rows.shape[1]
    if model == 1 or size % model:
        return rows
    width = size // model
    return jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(MODEL) * width, width, axis=1)
