"""Products of rows sorted into groups, each group with its own matrix.

``jax.lax.ragged_dot`` has the same meaning. But JAX 0.10 lowers it on CPUs and GPUs to a product of every row with every
group's matrix, zeros included, so that nothing is saved. Here a loop visits the groups in blocks of rows, as many as there are:
the cost is that of the rows, plus half a block for each group, on every platform.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from optima_tpu.models.layers import project
from optima_tpu.runtime.loops import usual_turns


class Stretches(NamedTuple):
    """Group g has the rows ``first[g]`` to ``first[g] + rows[g] - 1``.

    The groups are in ascending order and do not overlap.

    Attributes:
      first, rows: [groups] int32.
    """

    first: Array
    rows: Array


# Rows of a block, at least and at most. A block below the least is no faster; the more rows, the fewer times a matrix is read.
_LEAST, _MOST = 16, 256


class _Visits(NamedTuple):
    """The blocks of rows that a loop visits.

    Attributes:
      total: how many there are, int32 scalar.
      group, start, end: of each visit its group, its first row, and the first row behind the group, [visits] int32.
      size: rows of a block.
      usual: how many a plan counts: each row once, without the empty parts of blocks.
    """

    total: Array
    group: Array
    start: Array
    end: Array
    size: int
    usual: float


def _visits(stretches: Stretches, rows: int, share: float) -> _Visits:
    groups = len(stretches.rows)
    # Half of the mean group: a group's last block is half empty on average.
    size = max(_LEAST, min(_MOST, 1 << max(rows // (2 * groups), 1).bit_length() - 1))
    each = -(-stretches.rows // size)
    ends, visit = jnp.cumsum(each), jnp.arange(rows // size + groups)
    group = jnp.minimum(jnp.searchsorted(ends, visit, side="right"), groups - 1)
    first = stretches.first[group]
    return _Visits(
        ends[-1], group, first + (visit - (ends - each)[group]) * size, first + stretches.rows[group], size, share * rows / size
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_dot(x: Array, weights: Array, stretches: Stretches, dtype: DTypeLike, share: float = 1.0) -> Array:
    """``x_i W_g'`` for each row i of each group g, [rows, d_out] in ``dtype``.

    Accumulated in float32. Rows of no group are unspecified. The precision matters for float32 only.

    Args:
      x: [rows, d_in].
      weights: [groups, d_out, d_in].
      share: for plans, how many of the rows are in a group.
    """
    visits, weights = _visits(stretches, len(x), share), weights.astype(x.dtype)
    x = jnp.pad(x, ((0, visits.size), (0, 0)))  # the last block of the last group

    def visit(index: Array, y: Array) -> Array:
        start = visits.start[index]
        part = jax.lax.dynamic_slice_in_dim(x, start, visits.size)
        weight = jax.lax.dynamic_index_in_dim(weights, visits.group[index], keepdims=False)
        # What a block writes behind its group is overwritten by the next group.
        return jax.lax.dynamic_update_slice_in_dim(y, project(part, weight, dtype), start, 0)

    with usual_turns(visits.usual):
        y = jax.lax.fori_loop(0, visits.total, visit, jnp.zeros((len(x), weights.shape[1]), dtype))
    return y[: len(x) - visits.size]


def _forward(
    x: Array, weights: Array, stretches: Stretches, dtype: DTypeLike, share: float
) -> tuple[Array, tuple[Array, Array, Stretches]]:
    return grouped_dot(x, weights, stretches, dtype, share), (x, weights, stretches)


def _backward(
    dtype: DTypeLike, share: float, saved: tuple[Array, Array, Stretches], cotangent: Array
) -> tuple[Array, Array, None]:
    # The products of the backward pass have factors in x's dtype, as those of the forward pass.
    (x, weights, stretches), cotangent = saved, cotangent.astype(saved[0].dtype)
    towards_x = grouped_dot(cotangent, jnp.swapaxes(weights, 1, 2), stretches, x.dtype, share)
    return towards_x, grouped_outer(cotangent, x, stretches, share).astype(weights.dtype), None


grouped_dot.defvjp(_forward, _backward)


def grouped_outer(left: Array, right: Array, stretches: Stretches, share: float = 1.0) -> Array:
    """``L_g'R_g`` of the rows of group g, [groups, d_left, d_right] float32.

    Args:
      left: [rows, d_left].
      right: [rows, d_right].
      share: as for :func:`grouped_dot`.
    """
    visits = _visits(stretches, len(left), share)
    left, right = (jnp.pad(array, ((0, visits.size), (0, 0))) for array in (left, right))

    def visit(index: Array, total: Array) -> Array:
        start, group = visits.start[index], visits.group[index]
        in_group = start + jnp.arange(visits.size) < visits.end[index]
        rows, others = (jax.lax.dynamic_slice_in_dim(array, start, visits.size) for array in (left, right))
        # bfloat16 products are exact in float32; float32 ones need the precision.
        product = jax.lax.dot_general(
            jnp.where(in_group[:, None], rows, 0),
            others,
            (((0,), (0,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        before = jax.lax.dynamic_index_in_dim(total, group, 0)
        return jax.lax.dynamic_update_index_in_dim(total, before + product, group, 0)

    shape = (len(stretches.rows), left.shape[1], right.shape[1])
    with usual_turns(visits.usual):
        return jax.lax.fori_loop(0, visits.total, visit, jnp.zeros(shape, jnp.float32))
