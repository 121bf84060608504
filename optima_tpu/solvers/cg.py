"""Preconditioned conjugate gradients on all rows of a layer at once, stopped by a certificate. The default solver.

In variables that give the Hessian a unit diagonal (``v_j sqrt(H_jj)``), with ``A`` the scaled Hessian plus damping and ``D`` the
change of a row against its dense weights, every row minimises

    f(D) = D A D' - 2 e D'      over the kept coordinates; pruned ones are fixed at  D_j = -w_j

Every product is one matrix multiplication for all rows, since rows share ``A``; masks enter elementwise. The preconditioner is
the inverse ``X`` of the *whole* ``A``, masked: one factorisation a layer input, whatever the masks.

The certificate. With ``r`` the masked residual, ``f - f* = r A_KK^-1 r'`` exactly, and a principal block of an inverse dominates
the inverse of the block: ``A_KK^-1 <= (A^-1)_KK``. So ``r X r'``, the scalar that the iteration computes anyway, bounds what is
left to gain. With an extra ridge ``delta`` inside ``X`` the bound is ``(1 + delta / lambda_min(A)) r X r'``.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from optima_tpu.problem import LayerProblem, Pruned, Solution, drift, matmul
from optima_tpu.solvers.scaling import RESOLUTION, require, unit_diagonal

# Below this damping a float32 inverse of A is not accurate enough to certify with, and X gets a ridge of its own.
_SAFE_DAMPING = 1e-4
_EXTRA_RIDGE = 1e-3


@dataclasses.dataclass(frozen=True)
class CG:
    """Certified, batched, preconditioned conjugate gradients.

    The right choice almost always: within 1e-3 of the optimum in some ten products with ``H``, and it proves it. ``gap`` in the
    solution is an upper bound on ``(f - f*) / max(f*, 1e-8 sum_j w_j^2 H_jj)`` of the damped problem, where ``f`` counts from the
    unconstrained optimum (for ``linear = W H``: the squared change of the row's output). A row is never left worse than it came.

    Attributes:
      damping: ridge that pulls a row toward its *dense* weights, as a share of the Hessian's diagonal. Without any, a nearly
        singular layer fits the calibration set with huge weights and ruins the model.
      tolerance: certified relative gap at which a row stops.
      max_steps: most iterations for a row; rows that need more are reported as not converged.
      cycle: iterations between two exact recomputations of residual, objective and certificate, which also undo the drift of
        the recurrences in float32.
    """

    damping: float = 1e-2
    tolerance: float = 1e-3
    max_steps: int = 96
    cycle: int = 4

    def __post_init__(self):
        require(self.damping >= 0, "damping", "at least 0", self.damping)
        require(self.tolerance > 0, "tolerance", "above 0", self.tolerance)
        require(self.max_steps >= 1, "max_steps", "at least 1", self.max_steps)
        require(self.cycle >= 1, "cycle", "at least 1", self.cycle)

    def __call__(self, problem: LayerProblem, pruned: Pruned) -> Solution:
        shared = _share(problem.hessian, self.damping)
        free = pruned.keep & shared.live
        start = jnp.where(shared.live, (pruned.weight - problem.weight) * shared.scale, 0.0)
        pull = jnp.where(shared.live, drift(problem) / shared.scale, 0.0)
        # f counted from the unconstrained optimum is f + e A^-1 e'; X <= A^-1 keeps the certified gap an upper bound.
        # It is zero, at no cost, where the target is the layer's own output.
        offset = jax.lax.cond(jnp.any(pull != 0), lambda: _squares(matmul(pull, shared.root.T)), lambda: jnp.zeros(pull.shape[0]))
        rounding = 16 * jnp.finfo(offset.dtype).eps
        resolution = RESOLUTION * _squares(jnp.where(shared.live, problem.weight * shared.scale, 0.0))

        def precondition(residual: Array) -> Array:
            return jnp.where(free, matmul(residual, shared.inverse), 0.0)

        def measure(change: Array) -> tuple[Array, Array, Array]:
            image = matmul(change, shared.matrix)
            residual = jnp.where(free, pull - image, 0.0)
            value = jnp.sum(change * (image - 2 * pull), axis=1)
            decrement = jnp.sqrt(_squares(matmul(residual, shared.root.T)))
            noise = shared.noise * jnp.linalg.norm(change, axis=1)
            bound = jnp.where(jnp.any(free, axis=1), shared.looseness * (decrement + noise) ** 2, 0.0)
            # With a target of its own, f is a difference of large numbers: only what rounding cannot fake counts.
            optimum = value + offset - bound - rounding * (jnp.abs(value) + offset)
            gap = jnp.where(bound > 0, bound / jnp.maximum(optimum, jnp.maximum(resolution, _TINY)), 0.0)
            return residual, value, gap

        def step(_, carry):
            change, residual, direction, active = carry
            image = jnp.where(free, matmul(direction, shared.matrix), 0.0)
            curvature = jnp.sum(direction * image, axis=1)
            moves = active & (curvature > 0)
            safe = jnp.where(moves, curvature, 1.0)
            length = jnp.where(moves, jnp.sum(residual * direction, axis=1) / safe, 0.0)[:, None]
            change = change + length * direction
            residual = residual - length * image
            preconditioned = precondition(residual)
            # Conjugacy enforced against the direction just used, not assumed from the recurrences: it survives rounding and
            # the residual replacements.
            conjugate = jnp.where(moves, -jnp.sum(preconditioned * image, axis=1) / safe, 0.0)[:, None]
            return change, residual, preconditioned + conjugate * direction, active

        def cycle(state: _State) -> _State:
            change, _, direction, _ = jax.lax.fori_loop(
                0, self.cycle, step, (state.best, state.residual, state.direction, state.active))
            residual, value, gap = measure(change)
            # A row that stopped falling has met float32's floor (a NaN counts as not falling): it keeps its best point.
            fell = state.active & (value < state.value)
            gap = jnp.where(fell, gap, state.gap)
            return _State(
                count=state.count + 1,
                best=jnp.where(fell[:, None], change, state.best),
                value=jnp.where(fell, value, state.value),
                gap=gap,
                residual=residual,
                direction=direction,
                active=fell & (gap > self.tolerance),
                steps=state.steps + self.cycle * state.active)

        residual, value, gap = measure(start)
        gap = jnp.where(jnp.isfinite(value), gap, jnp.inf)
        state = _State(count=0, best=start, value=value, gap=gap, residual=residual, direction=precondition(residual),
                       active=jnp.isfinite(value) & (gap > self.tolerance), steps=jnp.zeros(value.shape, jnp.int32))
        limit = -(-self.max_steps // self.cycle)
        state = jax.lax.while_loop(lambda s: (s.count < limit) & jnp.any(s.active), cycle, state)
        # The change of the change is what is scaled back: a row that took no step keeps its weights to the last bit.
        moved = pruned.weight + (state.best - start) / shared.scale
        return Solution(jnp.where(free, moved, jnp.where(pruned.keep, pruned.weight, 0.0)), state.gap, state.steps,
                        state.gap <= self.tolerance)


_TINY = 1e-30  # keeps 0 / 0 out of the gap of a row without output


class _Shared(NamedTuple):
    """What depends on the Hessian alone."""

    matrix: Array  # [d_in, d_in], A
    inverse: Array  # [d_in, d_in], X, for the iteration
    root: Array  # [d_in, d_in], R with X = R'R, for the certificate: |R r|^2 keeps small values that r X r' loses to rounding
    scale: Array  # [d_in], sqrt(H_jj), 1 for a dead feature
    live: Array  # [d_in] bool
    looseness: Array  # [], 1 + (delta + rounding) / lambda_min(A); infinite where float32 cannot tell lambda_min from zero
    noise: Array  # [], what rounding may hide of sqrt(r X r'), per unit of the change


class _State(NamedTuple):
    count: int | Array
    best: Array  # [rows, d_in], the lowest point seen
    value: Array  # [rows], f there
    gap: Array  # [rows], certified there
    residual: Array  # [rows, d_in]
    direction: Array  # [rows, d_in]
    active: Array  # [rows] bool
    steps: Array  # [rows] int32


def _share(hessian: Array, damping: float) -> _Shared:
    matrix, scale, live = unit_diagonal(hessian)
    eye = jnp.eye(hessian.shape[0], dtype=hessian.dtype)
    matrix = matrix + damping * eye
    eps = jnp.finfo(hessian.dtype).eps
    # A bound must hold in spite of rounding: X is the inverse of a matrix within ``error`` of A, and a residual is off by up to
    # ``error`` times the length of the change that it was computed from.
    error = 2 * eps * jnp.max(jnp.sum(jnp.abs(matrix), axis=1))
    if damping >= _SAFE_DAMPING:
        ridge, smallest = 0.0, damping
    else:
        ridge, smallest = _EXTRA_RIDGE, jnp.linalg.eigvalsh(matrix)[0] - error
    looseness = jnp.where(smallest > 0, 1 + (ridge + error) / jnp.where(smallest > 0, smallest, 1.0), jnp.inf)
    factor = jnp.linalg.cholesky(matrix + ridge * eye)
    root = jax.scipy.linalg.solve_triangular(factor, eye, lower=True)
    noise = error * jax.lax.rsqrt(jnp.maximum(smallest, 0.0) + ridge)
    return _Shared(matrix, matmul(root.T, root), root, scale, live, looseness, noise)


def _squares(rows: Array) -> Array:
    return jnp.sum(rows * rows, axis=1)
