"""Thanos: prunes a block of columns at a time (Ilin and Richtarik, 2025)."""

import dataclasses
from typing import Annotated, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from optima_tpu.method.linalg.features import matmul
from optima_tpu.method.linalg.scaling import live_features, rows_at_once
from optima_tpu.method.linalg.smallest import lowest
from optima_tpu.method.patterns import Pattern
from optima_tpu.method.problem import LayerProblem, Pruned
from optima_tpu.method.selectors.obs import InputSweep, inverse_factor
from optima_tpu.runtime.bounds import Bound
from optima_tpu.runtime.mesh import padded


@dataclasses.dataclass(frozen=True)
class Thanos(InputSweep):
    """Prunes block after block by Wanda's score, and moves the rest of a row.

    The score is ``|w_ij| * ||x_j||`` of the weights as moved so far. Let ``k`` be the number of weights that the pattern still
    has to prune. A block of columns ``[i, i + block)`` loses its weights that are among the ``k`` smallest of all columns from
    ``i`` on (of the matrix, or of each row). N:M compares inside its groups, which never cross a block boundary. With ``P`` the
    inverse of the damped Hessian over the columns from ``i`` on, a row that loses the set ``S`` moves by

        w[i:] -= w_S (P_SS)^-1 P[S, :]

    This is the cheapest change of the columns from ``i`` on that removes all of ``S`` at once. (SparseGPT removes one column at a
    time.) ``problem.pull`` is not read: the method aims at the layer's own outputs, ``g = W H``.

    Source: Ilin and Richtarik, arXiv 2504.05346. It differs from the published code (vectozavr/thanos ``lib/thanos.py``, and its
    copy paramathic/optima ``optima/thanos.py``) in three points:

    - N:M prunes every row, as the pattern says. The published code leaves one row dense. With outlier rows it leaves another
      tenth of the rows dense; this is its default, but not used in all of its authors' runs. paramathic/optima calls it so that
      2:4 removes whole columns.
    - Every block's inverse is read from one triangular factor, not computed anew. The update is the same.
    - Weights of dead inputs (``H_jj = 0``) score zero and are pruned first. If some of them stay, they keep their value; the
      published code sets them to zero, and so prunes more than asked.

    Attributes:
      block: columns pruned together, 256 in OPTIMA's runs and by default in the published code, 512 in the runs of its authors;
        N:M rounds it up to whole groups.
      damping: ridge on the Hessian, as a share of the mean of its diagonal.
    """

    hessians: ClassVar[int] = 5
    block: Annotated[int, Bound(1, hint="256 is usual")] = 256
    damping: Annotated[float, Bound(above=0, hint="the published value is 0.01")] = 0.01

    def sweep(self, problem: LayerProblem, pattern: Pattern) -> Pruned:
        rows, columns = problem.weight.shape
        size = min(self.block, columns)
        if pattern.span:
            size = padded(size, pattern.span)
        factor = inverse_factor(problem.hessian, self.damping)
        norms = jnp.sqrt(jnp.where(live_features(problem.hessian), jnp.diagonal(problem.hessian), 0.0))

        def choose(scores: Array, first: int | Array, size: int, left: Array) -> Array:
            """The weights that the block at ``first`` loses, [rows, size]."""
            if pattern.span:
                return ~pattern.keep_mask(_block(scores, first, size))
            residual = jnp.where(jnp.arange(columns) >= first, scores, jnp.inf)
            return _block(lowest(residual, left, pattern.group), first, size)

        def prune_block(carry: _Carry, first: int | Array, size: int) -> _Carry:
            weight, keep, left = carry
            lost = choose(jnp.abs(weight) * norms, first, size, left)
            # U is upper triangular, so that P[block, :] = U[block, block]' U[block, :], zero left of the block.
            factor_rows = jax.lax.dynamic_slice_in_dim(factor, first, size, axis=0)
            inverse = matmul(_block(factor_rows, first, size).T, factor_rows)
            target = jnp.where(lost, _block(weight, first, size), 0.0)
            weight = weight - matmul(_solve_rows(_block(inverse, first, size), lost, target), inverse)
            weight = _set_block(weight, jnp.where(lost, 0.0, _block(weight, first, size)), first)
            if not pattern.span:
                left = left - jnp.sum(lost, axis=1 if pattern.group == "row" else None, keepdims=True, dtype=jnp.int32)
            return _Carry(weight, _set_block(keep, ~lost, first), left)

        carry = _Carry(problem.weight, jnp.ones((rows, columns), bool), _to_prune(pattern, rows, columns))
        firsts = jnp.arange(0, columns - size + 1, size)
        carry, _ = jax.lax.scan(lambda carry, first: (prune_block(carry, first, size), None), carry, firsts)
        if rest := columns % size:
            carry = prune_block(carry, columns - rest, rest)
        return Pruned(jnp.where(carry.keep, carry.weight, 0.0), carry.keep)


class _Carry(NamedTuple):
    """The state between two blocks."""

    weight: Array  # [rows, columns]
    keep: Array  # [rows, columns] bool
    left: Array  # [groups, 1] int32, weights that each comparison group still has to lose


def _to_prune(pattern: Pattern, rows: int, columns: int) -> Array:
    """``_Carry.left`` at the start, per row or in all; unused for N:M."""
    if pattern.span:
        return jnp.zeros((1, 1), jnp.int32)
    groups, size = (rows, columns) if pattern.group == "row" else (1, rows * columns)
    return jnp.full((groups, 1), pattern.pruned_in(size), jnp.int32)


def _block(array: Array, first: int | Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, first, size, axis=1)


def _set_block(array: Array, part: Array, first: int | Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(array, part, first, axis=1)


def _solve_rows(inverse: Array, lost: Array, target: Array) -> Array:
    """``target_S (P_SS)^-1`` of each row's own set ``S``, [rows, size].

    Zero outside of ``S``, as ``target`` is.

    Args:
      inverse: [size, size] float32, ``P`` over the block.
      lost: [rows, size] bool, ``S``.
      target: [rows, size] float32.
    """
    rows, size = lost.shape
    eye = jnp.eye(size, dtype=inverse.dtype)

    def row(lost: Array, target: Array) -> Array:
        system = jnp.where(lost[:, None] & lost, inverse, eye)
        factor = jax.lax.linalg.cholesky(system, symmetrize_input=False)
        return jax.scipy.linalg.cho_solve((factor, True), target)

    # Not alone: one program prunes the matrices of a group at the same time.
    batches = -(-rows // rows_at_once(size, inverse.dtype, alone=False))
    batch = -(-rows // batches)

    def split(array: Array) -> Array:
        # Batch k holds rows k, k + batches, ...: rows stay on their devices, and every device works on every batch.
        array = jnp.pad(array, ((0, batch * batches - rows), (0, 0)))
        return array.reshape(batch, batches, size).swapaxes(0, 1)

    solved = jax.lax.map(lambda each: jax.vmap(row)(*each), (split(lost), split(target)))
    return solved.swapaxes(0, 1).reshape(batch * batches, size)[:rows]
