"""Improves the mask of every row by exchanging weights, with prices read from the solved problem.

The solution of a row prices every exchange. In unit-diagonal variables, let ``A`` be the damped Hessian, ``v`` the solved row,
``r`` its residual and ``K`` its kept inputs. The prices take each exchange alone, and assume that the other kept weights are
solved again:

    letting input i in wins     r_i^2 / s_i,    s_i = A_ii - A_iK A_KK^-1 A_Ki
    letting input j go costs    v_j^2 * s_j,    s_j = 1 / [A_KK^-1]_jj

The exact ``s`` would take one factorisation per row. Instead, all rows of a Hessian share one estimate: the average of ``s`` over
the sets ``K`` of the same size, by the deterministic equivalent of a random principal block,

    s_j = 1 / [(A + t I)^-1]_jj - t    with t such that    tr A (A + t I)^-1 = |K|

A round exchanges weights whose win exceeds the cost, solves again, and keeps the new mask of a row only if the row's objective
fell. So no row gets worse, however rough the estimate is.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32

from optima_tpu.errors import UserError
from optima_tpu.method.linalg.features import WHOLE, Features
from optima_tpu.method.linalg.inverses import inverse
from optima_tpu.method.linalg.scaling import unit_diagonal
from optima_tpu.method.linalg.smallest import PASSES_OF_A_MASK
from optima_tpu.method.patterns import Pattern
from optima_tpu.method.problem import Endpoint, LayerProblem, Pruned, Solution, endpoint
from optima_tpu.method.resources import Cost, Footprint
from optima_tpu.method.solvers import Solver, SolveRows

# Newton steps for log t, started at its value for an A without correlations. They end after a short step, since each step squares
# the error.
_MOST_STEPS = 6
_SHORT_STEP = 3e-2
# Inverses for the estimate of ``s``, the final one included: 3 or 4 for layers of SmolLM2, at most 7.
_INVERSES = 4
# The smallest damping of the estimate. Without damping, no t exists if a row keeps more inputs than the rank of the Hessian.
_LEAST_DAMPING = 1e-3


@dataclasses.dataclass(frozen=True)
class Swaps:
    """Exchanges kept weights for pruned ones of the same row (for N:M, of the same M) where the row's objective gains.

    The number of kept weights stays the same in every row, and in every M. A round costs one solve that starts from the last
    solution.

    Attributes:
      rounds: number of rounds of exchanges. More rounds may find better masks; each costs one more solve.
      share: the largest share of a row's inputs that one round exchanges. A row that a round did not improve tries half as many
        exchanges in the next.
    """

    rounds: int = 4
    share: float = 0.025

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UserError(f"expected refine.rounds of at least 1, got {self.rounds}; --refine null leaves the mask as it is")
        if not 0 < self.share <= 0.5:
            raise UserError(f"expected refine.share above 0 and at most 0.5, got {self.share}")


@dataclasses.dataclass(frozen=True)
class Exchanging(Solver):
    """Wraps a solver in rounds of exchanges, for the rows of one Hessian and one pattern.

    Attributes:
      solver: solves every mask; the solved objective decides.
      swaps: number of rounds and of exchanges.
      pattern: the pattern of all rows.
    """

    changes_masks: ClassVar[bool] = True

    solver: Solver
    swaps: Swaps
    pattern: Pattern

    @property
    def title(self) -> str:
        return f"{self.solver.title} with exchanges"

    def footprint(self, damping: float) -> Footprint:
        # A + t I and its inverse, in memory together with the solver's matrices. Of a row: weights, residual, wins, costs and the
        # temporary arrays of the selection.
        solver = self.solver.footprint(damping)
        return Footprint(solver.hessians + 2, solver.vectors + 5)

    def cost(self) -> Cost | None:
        each, solves = self.solver.cost(), self.swaps.rounds + 1
        # A round counts its pairs in two arrays, and makes two masks.
        if each is None:
            return None
        return Cost(
            products=solves * each.products,
            passes=solves * each.passes + 4 * (solves - 1) * PASSES_OF_A_MASK,
            inverses=each.inverses + _INVERSES,
            factorisations=solves * each.factorisations,
        )

    def __call__(self, problem: LayerProblem, pruned: Pruned) -> Solution:
        return self.prepare(problem.hessian, problem.damping)(problem)(pruned)

    def prepare(self, hessian: Float32[Array, "d_in d"], damping: float, features: Features = WHOLE) -> SolveRows:
        if features != WHOLE:
            raise ValueError("exchanges compare all features of a row: expected features that are not split over devices")
        solve = self.solver.prepare(hessian, damping, features)
        schur = schur_diagonal(hessian, damping, kept_share(self.pattern, hessian.shape[0]))

        def of_rows(problem: LayerProblem) -> Callable[[Pruned], Solution]:
            solve_rows = solve(problem)

            def solved(pruned: Pruned) -> tuple[Solution, Endpoint]:
                found = solve_rows(pruned)
                return found, found.end or endpoint(problem, found.weight)

            return lambda pruned: self._exchange(solved, pruned, schur)

        return of_rows

    def _exchange(
        self, solve: Callable[[Pruned], tuple[Solution, Endpoint]], pruned: Pruned, schur: Float32[Array, " d_in"]
    ) -> Solution:
        def exchanged(state: _State) -> tuple[Array, Array]:
            win = jnp.where(schur > 0, state.residual**2 / jnp.where(schur > 0, schur, 1.0), 0.0)
            return self.pattern.exchange(win, state.weight**2 * schur, state.keep, state.limit)

        def one_round(index: int | Array, state: _State) -> _State:
            # The first round solves on the given mask.
            keep, count = jax.lax.cond(index > 0, exchanged, lambda state: (state.keep, jnp.zeros_like(state.limit)), state)
            found, end = solve(Pruned(jnp.where(keep, state.weight, 0.0), keep))
            better = end.value < state.value

            def taken(new: Array, old: Array) -> Array:
                return jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

            return _State(
                weight=taken(found.weight, state.weight),
                keep=taken(keep, state.keep),
                value=taken(end.value, state.value),
                residual=taken(end.residual, state.residual),
                gap=taken(found.gap, state.gap),
                steps=state.steps + found.steps,
                converged=taken(found.converged, state.converged),
                limit=jnp.where(better, state.limit, count // 2),
            )

        rows, inputs = pruned.keep.shape
        state = _State(
            pruned.weight,
            pruned.keep,
            jnp.full(rows, jnp.inf),
            jnp.zeros(pruned.keep.shape),
            jnp.full(rows, jnp.inf),
            jnp.zeros(rows, jnp.int32),
            jnp.zeros(rows, bool),
            jnp.full(rows, max(1, int(self.swaps.share * inputs)), jnp.int32),
        )
        state = jax.lax.fori_loop(0, self.swaps.rounds + 1, one_round, state)
        return Solution(state.weight, state.gap, state.steps, state.converged, state.keep)


class _State(NamedTuple):
    weight: Array  # [rows, d_in]
    keep: Array  # [rows, d_in] bool
    value: Array  # [rows], infinite before the first solve
    residual: Array  # [rows, d_in], of all inputs
    gap: Array  # [rows]
    steps: Array  # [rows] int32
    converged: Array  # [rows] bool
    limit: Array  # [rows] int32, most exchanges in the next round


def kept_share(pattern: Pattern, inputs: int) -> float:
    """The share of a row's inputs that stay, on average."""
    return 1 - pattern.pruned_count((1, inputs)) / inputs


def schur_diagonal(hessian: Float32[Array, "d_in d_in"], damping: float, kept: float) -> Float32[Array, " d_in"]:
    """``s`` of the module docstring times ``H_jj``, [d_in] float32; 0 for a dead input.

    The factor ``H_jj`` makes it fit weights and residuals that are not scaled to a unit diagonal.

    Args:
      hessian: [d_in, d_in] float32, undamped.
      damping: share of its diagonal.
      kept: share of the inputs that a row keeps.
    """
    matrix, scale, live = unit_diagonal(hessian)
    size = matrix.shape[0]
    eye = jnp.eye(size, dtype=matrix.dtype)
    matrix = matrix + max(damping, _LEAST_DAMPING) * eye
    kept = min(max(kept, 0.5 / size), 1 - 0.5 / size)

    def newton(state: tuple[int | Array, Array, Array]) -> tuple[int | Array, Array, Array]:
        # Finds the root of size - t tr X - |K| in log t; the derivative is t^2 |X|^2 - t tr X < 0.
        steps, ridge, _ = state
        found = inverse(matrix + ridge * eye)
        trace = ridge * jnp.trace(found)
        slope = trace - ridge**2 * jnp.sum(found * found)
        step = jnp.clip((size * (1 - kept) - trace) / jnp.maximum(slope, 1e-6 * size), -2.0, 2.0)
        return steps + 1, ridge * jnp.exp(step), jnp.abs(step)

    start: tuple[int | Array, Array, Array] = (0, jnp.float32((1 + damping) * (1 - kept) / kept), jnp.float32(jnp.inf))
    _, ridge, _ = jax.lax.while_loop(lambda state: (state[0] < _MOST_STEPS) & (state[2] > _SHORT_STEP), newton, start)
    schur = jnp.maximum(1 / jnp.diagonal(inverse(matrix + ridge * eye)) - ridge, 0.0)
    # If there is no inverse in float32, everything is NaN and nothing is exchanged.
    return jnp.where(live & (schur > 0), scale**2 * schur, 0.0)
