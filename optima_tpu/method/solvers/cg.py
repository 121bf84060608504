"""The default solver: certified conjugate gradients on all rows at once.

In variables that give the Hessian a unit diagonal (``v_j sqrt(H_jj)``), with ``A`` the scaled Hessian plus damping and ``D`` the
change of a row against its dense weights, every row minimises

    f(D) = D A D' - 2 e D'      over the kept coordinates; pruned ones are fixed at  D_j = -w_j

Every product is one matrix multiplication for all rows, since rows share ``A``; masks enter elementwise. The preconditioner is
the inverse ``X`` of the *whole* ``A``, masked: one factorisation per layer input serves all masks.

The certificate. With ``r`` the masked residual, ``f - f* = r A_KK^-1 r'`` exactly, and a principal block of an inverse dominates
the inverse of the block: ``A_KK^-1 <= (A^-1)_KK``. So ``r X r'``, the scalar that the iteration computes anyway, bounds the
remaining improvement. With an extra ridge ``delta`` inside ``X`` the bound is ``(1 + delta / lambda_min(A)) r X r'``.

If the features are sharded over devices (``Features``), each device holds its columns of ``A``, ``X`` and ``R'`` and its part of
every row. An iteration then costs two all-gathers, of the rows that are multiplied by ``A`` and by ``X``, and two all-reduces of
a few numbers per row. The check after a cycle costs two all-gathers and two all-reduces.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32

from optima_tpu.errors import UserError
from optima_tpu.method.linalg.blocked_cholesky import inverse_by_panels
from optima_tpu.method.linalg.features import WHOLE, Features
from optima_tpu.method.linalg.inverses import inverse_and_root
from optima_tpu.method.linalg.scaling import RESOLUTION, ridged, unit_diagonal
from optima_tpu.method.problem import Endpoint, LayerProblem, Pruned, Solution
from optima_tpu.method.resources import Footprint
from optima_tpu.method.solvers.base import SolveMask, Solver, SolveRows
from optima_tpu.runtime.bounds import Bound
from optima_tpu.runtime.loops import usual_turns

# Below this damping a float32 inverse of A is too inaccurate for the certificate, and X gets an extra ridge.
SAFE_DAMPING = 1e-4
_EXTRA_RIDGE = 1e-3
# Steps of a rough solve, which only has to tell a better mask from a worse one.
_ROUGH_STEPS = 2


def usual_steps(inputs: int, damping: float) -> float:
    """The usual number of steps until the slowest row of a layer converges.

    Plans use this estimate. It grows with the inputs and falls with the damping: a product of powers of both, which
    interpolates means over all blocks of whole runs on 32 x 512 tokens of C4. Damping 0.01: 10 for 576 inputs and 11 for 1,536
    (SmolLM2-135M), 18 for 1,536 and 48 for 8,960 (Qwen2.5-Coder-1.5B). Damping 0.3: 4 to 5 for 576 and 7 for 1,536
    (SmolLM2-135M; half of what the two solves around exchanges take). ``o_proj``, whose rows are few, took nearly twice as many
    steps. With Python's documentation instead of C4 they were 14 and 16. Other widths and dampings are extrapolated.
    """
    return 10 * (inputs / 576) ** 0.55 * (max(damping, 0.01) / 0.01) ** -0.22


@dataclasses.dataclass(frozen=True)
class CG(Solver):
    """Certified, batched, preconditioned conjugate gradients.

    The right choice almost always: after about a dozen iterations it is within 1e-3 of the optimum, with a proof. ``gap`` in the
    solution is an upper bound on ``(f - f*) / max(f*, 1e-8 sum_j w_j^2 H_jj)`` of the damped problem, where ``f`` counts from the
    unconstrained optimum (for no pull: the squared change of the row's output). A row that keeps all its weights can reach that
    optimum, so ``f*`` is 0: its gap is a share of ``f`` at the dense weights. No row gets worse.

    Attributes:
      tolerance: the certified relative gap at which a row stops. A larger one stops earlier, with weights that are further from
        the optimum.
      max_steps: the most iterations for a row, rounded up to whole cycles; rows that need more are reported as not converged.
      cycle: iterations between two exact recomputations of residual, objective and certificate, which also undo the drift of
        the recurrences in float32.
    """

    damping: Annotated[float, Bound(0)] = dataclasses.field(default=1e-2, kw_only=True)
    tolerance: Annotated[float, Bound(above=0)] = 1e-3
    max_steps: Annotated[int, Bound(1)] = 96
    cycle: Annotated[int, Bound(1)] = 4

    def footprint(self) -> Footprint:
        # H, A, X, R' and the temporary arrays of a factorisation: fitted 5.6. A row's change, residual, direction, best point,
        # image and preconditioned residual: fitted 7.3. Features may be split if no eigenvalue of the whole Hessian is needed.
        return Footprint(hessians=6, vectors=8, split=self.damping >= SAFE_DAMPING)

    def __call__(self, problem: LayerProblem, pruned: Pruned) -> Solution:
        return self.prepare(problem.hessian, problem.damping)(problem)(pruned)

    def prepare(self, hessian: Float32[Array, "d_in d"], damping: float, features: Features = WHOLE) -> SolveRows:
        shared = _share(hessian, damping, features)

        def of_rows(problem: LayerProblem) -> SolveMask:
            rows = _Rows.of(problem, shared, features)

            def solved(pruned: Pruned, rough: bool = False) -> Solution:
                return rows.improved(pruned, _ROUGH_STEPS) if rough else self._solve(rows, pruned)

            return solved

        return of_rows

    def _solve(self, rows: "_Rows", pruned: Pruned) -> Solution:
        free = rows.free(pruned)
        choices, fixed = rows.features.sums(*(each.astype(jnp.float32) for each in (free, rows.shared.live & ~free)))
        # Where every weight moves, f* is 0, and rounding keeps f above any share of the resolution.
        smallest = jnp.where(fixed == 0, jnp.maximum(rows.resolution, rows.offset), rows.resolution)

        def cycle(state: _State) -> _State:
            path = state.path._replace(change=state.best, residual=state.residual)
            path = jax.lax.fori_loop(0, self.cycle, lambda _, path: rows.step(path, free), path)
            value, residual = rows.measure(path.change)
            # A row whose objective stopped falling has reached the accuracy of float32 (a NaN counts as not falling): it keeps
            # its best point.
            active = state.path.active
            fell = active & (value < state.value)
            best, residual = (
                jnp.where(fell[:, None], new, old) for new, old in ((path.change, state.best), (residual, state.residual))
            )
            value = jnp.where(fell, value, state.value)
            gap = rows.gap(best, jnp.where(free, residual, 0.0), value, choices, smallest)
            return _State(
                cycles=state.cycles + 1,
                best=best,
                value=value,
                gap=gap,
                residual=residual,
                path=path._replace(active=fell & (gap > self.tolerance)),
                steps=state.steps + jnp.where(active, self.cycle, 0),
            )

        # The first certificate comes with the first cycle: nearly every row needs one, and all rows are multiplied together.
        path = rows.start(pruned)
        state = _State(
            cycles=0,
            best=path.change,
            value=path.value,
            gap=jnp.full(path.value.shape, jnp.inf),
            residual=path.residual,
            path=path,
            steps=jnp.zeros(path.value.shape, jnp.int32),
        )
        limit, usual = -(-self.max_steps // self.cycle), usual_steps(len(rows.shared.matrix), self.damping)
        with usual_turns(min(limit, max(1.0, usual / self.cycle))):
            state = jax.lax.while_loop(lambda s: (s.cycles < limit) & jnp.any(s.path.active), cycle, state)
        return Solution(
            rows.moved(pruned, state.best - path.change),
            state.gap,
            state.steps,
            state.gap <= self.tolerance,
            end=Endpoint(state.value, state.residual * rows.shared.scale),
        )


_TINY = 1e-30  # keeps 0 / 0 out of the gap of a row without output


class _Rows(NamedTuple):
    """What all solves of some rows share, in the scaled variables."""

    weight: Array  # [rows, d], the dense weights, not scaled
    pull: Array | None  # [rows, d], e; None if the target is the layer's own output
    offset: Array  # [rows], e X e'
    resolution: Array  # [rows], the smallest objective that a gap is a share of
    shared: "_Shared"
    features: Features

    @classmethod
    def of(cls, problem: LayerProblem, shared: "_Shared", features: Features) -> "_Rows":
        (energy,) = features.sums(_square(jnp.where(shared.live, problem.weight * shared.scale, 0.0)))
        pull, offset = None, jnp.zeros_like(energy)
        if problem.pull is not None:
            pull = jnp.where(shared.live, problem.pull / shared.scale, 0.0)
            # f counted from the unconstrained optimum is f + e A^-1 e'; X <= A^-1 keeps the certified gap an upper bound.
            (offset,) = features.sums(_square(features.product(pull, shared.root)))
        return cls(problem.weight, pull, offset, RESOLUTION * energy, shared, features)

    def free(self, pruned: Pruned) -> Array:
        """[rows, d] bool, the weights that move."""
        return pruned.keep & self.shared.live

    def start(self, pruned: Pruned) -> "_Path":
        """The path at its start, the given weights."""
        shared = self.shared
        change = jnp.where(shared.live, (pruned.weight - self.weight) * shared.scale, 0.0)
        value, residual = self.measure(change)
        zero = jnp.zeros_like(change)
        return _Path(change, residual, value, zero, zero, jnp.zeros_like(value), jnp.isfinite(value))

    def step(self, path: "_Path", free: Array) -> "_Path":
        """One step of conjugate gradients, by two products."""
        shared, features, residual = self.shared, self.features, path.residual
        # Only the direction depends on this product: what it is worth is measured by the second one.
        preconditioned = jnp.where(free, features.rough_product(jnp.where(free, residual, 0.0), shared.inverse), 0.0)
        # Enforce conjugacy to the last direction instead of assuming it from the recurrences: it survives rounding and the
        # residual replacements.
        (overlap,) = features.sums(preconditioned * path.image)
        bent = path.curvature > 0
        conjugate = jnp.where(bent, -overlap / jnp.where(bent, path.curvature, 1.0), 0.0)[:, None]
        direction = preconditioned + conjugate * path.direction
        image = features.product(direction, shared.matrix)
        curvature, slope = features.sums(direction * image, residual * direction)
        moves = path.active & (curvature > 0)
        length = jnp.where(moves, slope / jnp.where(moves, curvature, 1.0), 0.0)
        return path._replace(
            change=path.change + length[:, None] * direction,
            residual=residual - length[:, None] * image,
            value=path.value - length * slope,
            direction=direction,
            image=image,
            curvature=jnp.where(moves, curvature, 0.0),
        )

    def improved(self, pruned: Pruned, steps: int) -> Solution:
        """The weights after ``steps`` steps, by recurrences, not certified."""
        start, free = self.start(pruned), self.free(pruned)
        path = jax.lax.fori_loop(0, steps, lambda _, path: self.step(path, free), start)
        return Solution(
            self.moved(pruned, path.change - start.change),
            jnp.full(path.value.shape, jnp.inf),
            jnp.full(path.value.shape, steps, jnp.int32),
            jnp.zeros(path.value.shape, bool),
            end=Endpoint(path.value, path.residual * self.shared.scale),
        )

    def moved(self, pruned: Pruned, moves: Array) -> Array:
        """The weights of ``pruned`` plus ``moves`` in the scaled variables.

        A row that does not move keeps its exact weights.
        """
        weight = pruned.weight + moves / self.shared.scale
        return jnp.where(self.free(pruned), weight, jnp.where(pruned.keep, pruned.weight, 0.0))

    def measure(self, change: Array) -> Endpoint:
        """The objective [rows] and the residual of all inputs [rows, d]."""
        return LayerProblem(jnp.zeros_like(change), self.shared.matrix, self.pull).endpoint(change, self.features)

    def gap(self, change: Array, residual: Array, value: Array, choices: Array, smallest: Array) -> Array:
        """The certified gap, [rows].

        Args:
          residual: [rows, d], 0 for inputs that are not free.
          choices: [rows], number of free inputs.
          smallest: [rows], the smallest objective that the gap is a share of.
        """
        shared = self.shared
        decrement, length = self.features.sums(_square(self.features.product(residual, shared.root)), _square(change))
        distance = jnp.sqrt(decrement) + shared.noise * jnp.sqrt(length)
        bound = jnp.where((choices > 0) & (distance != 0), shared.looseness * distance**2, 0.0)
        # With a pull e, f is a difference of large numbers: subtract the largest error that rounding can cause.
        rounding = 16 * jnp.finfo(value.dtype).eps
        optimum = value + self.offset - bound - rounding * (jnp.abs(value) + self.offset)
        gap = jnp.where(bound == 0, 0.0, bound / jnp.maximum(optimum, jnp.maximum(smallest, _TINY)))
        # If A has no factor in float32, or the weights are not finite, nothing is certified.
        return jnp.where(jnp.isfinite(value) & ~jnp.isnan(gap), gap, jnp.inf)


class _Shared(NamedTuple):
    """What all rows share, from the Hessian and the damping alone.

    A device holds d of the d_in features.
    """

    matrix: Array  # [d_in, d], A
    inverse: Array  # [d_in, d], X, for the iteration
    root: Array  # [d_in, d], R' with X = R'R, for the certificate: |R r|^2 keeps small values that r X r' loses to rounding
    scale: Array  # [d], sqrt(H_jj), 1 for a dead feature
    live: Array  # [d] bool
    looseness: Array  # [], 1 + (delta + rounding) / lambda_min(A); infinite where float32 cannot tell lambda_min from zero
    noise: Array  # [], the largest error of sqrt(r X r') by rounding, per unit of the change


class _Path(NamedTuple):
    """The current point of the iteration, and the step that led to it."""

    change: Array  # [rows, d_in], D
    residual: Array  # [rows, d_in], of all inputs
    value: Array  # [rows], f
    direction: Array  # [rows, d_in], of the last step
    image: Array  # [rows, d_in], of the last direction
    curvature: Array  # [rows], along the last direction; 0 before the first step
    active: Array  # [rows] bool


class _State(NamedTuple):
    cycles: int | Array  # done so far
    best: Array  # [rows, d_in], the lowest point seen
    value: Array  # [rows], f at best
    gap: Array  # [rows], certified at best; infinite before the first cycle
    residual: Array  # [rows, d_in], of all inputs at best
    path: _Path
    steps: Array  # [rows] int32


def _share(hessian: Array, damping: float, features: Features) -> _Shared:
    matrix, scale, live = unit_diagonal(hessian, features)
    matrix = ridged(matrix, damping, features)
    eps = jnp.finfo(hessian.dtype).eps
    # A bound must hold in spite of rounding: X is the inverse of a matrix within ``error`` of A, and a residual is off by up to
    # ``error`` times the length of the change that it was computed from.
    error = 2 * eps * features.maximum(jnp.sum(jnp.abs(matrix), axis=0))
    if damping >= SAFE_DAMPING:
        ridge, smallest = 0.0, damping
    else:
        if features != WHOLE:
            raise UserError(
                f"expected the solver's damping to be at least {SAFE_DAMPING} where a Hessian is split over devices, "
                f"got {damping}: the certificate needs eigenvalues of the whole Hessian; raise --solver.damping"
            )
        ridge, smallest = _EXTRA_RIDGE, jnp.linalg.eigvalsh(matrix)[0] - error
    looseness = jnp.where(smallest > 0, 1 + (ridge + error) / jnp.where(smallest > 0, smallest, 1.0), jnp.inf)
    noise = error * jax.lax.rsqrt(jnp.maximum(smallest, 0.0) + ridge)
    if features == WHOLE:
        inverse, root = inverse_and_root(ridged(matrix, ridge))
    else:
        inverse, root = inverse_by_panels(matrix, features)
    root = features.transpose(root)
    return _Shared(matrix, inverse, root, scale, live, looseness, noise)


def _square(rows: Array) -> Array:
    return rows * rows
