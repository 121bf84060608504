"""One dense factorisation per row, the reference for other solvers.

For small layers it is the simplest right choice.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from optima_tpu.method.linalg.scaling import RESOLUTION, ridged, rows_at_once, unit_diagonal
from optima_tpu.method.problem import LayerProblem, Pruned, Solution, pull_of
from optima_tpu.method.resources import Footprint
from optima_tpu.method.solvers.base import Solver


@dataclasses.dataclass(frozen=True)
class Exact(Solver):
    """Solves ``A_KK x = r_K`` row by row by Cholesky, in float64 if possible.

    Costs ``d_in^3 / 3`` per row: minutes for a layer of 1,000 inputs, not practical for 10,000. ``gap`` is the exact remaining
    ``(f - f*) / max(f*, 1e-8 sum_j w_j^2 H_jj)`` (the Newton decrement through the row's own factor), up to rounding.
    """

    def footprint(self) -> Footprint:
        # Fitted 6.8 (float64 matrices count twice) and 5.0, with one factorisation at a time; ``rows_at_once`` bounds the memory
        # of more.
        return Footprint(hessians=8, vectors=6)

    def __call__(self, problem: LayerProblem, pruned: Pruned) -> Solution:
        # Double precision is a property of the trace, not of this process: nothing outside the call changes.
        with jax.enable_x64(jax.default_backend() != "tpu"):
            return self._solve(problem, pruned)

    def _solve(self, problem: LayerProblem, pruned: Pruned) -> Solution:
        wide = jnp.result_type(float)
        hessian = problem.hessian.astype(wide)
        matrix, scale, live = unit_diagonal(hessian)
        size = hessian.shape[0]
        matrix = ridged(matrix, problem.damping)
        # This ridge makes a singular block definite: about one ulp of the largest eigenvalue, as much as rounding may change it.
        ridge = size * jnp.finfo(wide).eps
        pull = pull_of(problem).astype(wide)

        def row(weight: Array, pruned_weight: Array, keep: Array, pull: Array) -> tuple[Array, Array, Array]:
            free = keep & live
            start = jnp.where(live, (pruned_weight - weight).astype(wide) * scale, 0.0)
            pull = jnp.where(live, pull / scale, 0.0)
            block = jnp.where(free[:, None] & free, matrix, 0.0) + jnp.diag(jnp.where(free, ridge, 1.0))
            factor = jnp.linalg.cholesky(block)

            def residual(change: Array) -> Array:
                return jnp.where(free, pull - _matmul(matrix, change), 0.0)

            def correction(change: Array) -> Array:
                return jax.scipy.linalg.cho_solve((factor, True), residual(change))

            change = start + correction(start)
            change = change + correction(change)  # one step of iterative refinement, for ill-conditioned rows
            left = residual(change)
            scaled = jnp.where(live, weight.astype(wide) * scale, 0.0)
            value = change @ (_matmul(matrix, change) - 2 * pull)
            floor = RESOLUTION * (scaled @ scaled)
            decrement = left @ jax.scipy.linalg.cho_solve((factor, True), left)
            gap = jnp.where(decrement > 0, decrement / jnp.maximum(value, jnp.maximum(floor, 1e-30)), 0.0)
            solved = jnp.all(jnp.isfinite(change))
            moved = pruned_weight.astype(wide) + (change - start) / scale
            unmoved = jnp.where(keep, pruned_weight, 0.0).astype(wide)
            return jnp.where(free & solved, moved, unmoved), jnp.where(solved, gap, jnp.inf), solved

        rows = problem.weight.shape[0]
        batch = min(rows_at_once(size, wide, alone=True), rows)  # whole batches only, see rows_at_once
        padding = ((0, -rows % batch), (0, 0))
        arrays = (problem.weight, pruned.weight, pruned.keep, pull)
        weight, gap, solved = jax.lax.map(
            lambda each: row(*each), tuple(jnp.pad(array, padding) for array in arrays), batch_size=batch
        )
        weight, gap, solved = weight[:rows], gap[:rows], solved[:rows]
        return Solution(weight.astype(jnp.float32), gap.astype(jnp.float32), jnp.ones(gap.shape, jnp.int32), solved)


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
