"""Improves masks by exchanging weights, at prices from the solved problem.

The solution of a row prices every exchange. In unit-diagonal variables, let ``A`` be the damped Hessian, ``v`` the solved row,
``r`` its residual and ``K`` its kept inputs. The prices take each exchange alone, and assume that the other kept weights are
solved again:

    letting input i in wins     r_i^2 / s_i,    s_i = A_ii - A_iK A_KK^-1 A_Ki
    letting input j go costs    v_j^2 * s_j,    s_j = 1 / [A_KK^-1]_jj

The exact ``s`` would take one factorisation per row. Instead, all rows of a Hessian share one estimate: the average of ``s`` over
the sets ``K`` of the same size, by the deterministic equivalent of a random principal block,

    s_j = 1 / [(A + t I)^-1]_jj - t    with t such that    tr A (A + t I)^-1 = |K|

A round exchanges weights whose win exceeds the cost, solves again, and keeps the new mask of a row only if the row's objective
fell. So no row gets worse, however rough the estimate is, with a solver that does not leave its start for a worse point. The
given mask is solved in full, and so is the last one. The solves between them may be rough, since each point that they reach
bounds from above what its mask is worth: ``CG`` takes two steps in each.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32

from optima_tpu.errors import UserError
from optima_tpu.method.choice import Method
from optima_tpu.method.linalg.features import WHOLE, Features
from optima_tpu.method.linalg.inverses import inverse
from optima_tpu.method.linalg.scaling import ridged, unit_diagonal
from optima_tpu.method.linalg.traces import inverse_traces
from optima_tpu.method.patterns import Pattern
from optima_tpu.method.problem import Endpoint, LayerProblem, Pruned, Solution
from optima_tpu.method.resources import Footprint
from optima_tpu.method.solvers import SolveMask, Solver, SolveRows
from optima_tpu.runtime.bounds import Bound
from optima_tpu.runtime.loops import usual_turns

if TYPE_CHECKING:
    from optima_tpu.method.recipe import Recipe

# Newton steps for log t, each with an inverse, from where random vectors put t. They end after a short step, since each step
# squares the error: nearly always after the first.
_MOST_STEPS = 6
_SHORT_STEP = 0.1
_USUAL_STEPS = 1
# Halvings of the interval that t is known to be in; they leave less than a hundredth of a step.
_HALVINGS = 12
# The smallest damping of the estimate. Without damping, no t exists if a row keeps more inputs than the rank of the Hessian.
_LEAST_DAMPING = 1e-3


@dataclasses.dataclass(frozen=True)
class Swaps(Method):
    """Exchanges kept weights of a row for pruned ones if its objective falls.

    With N:M, both weights are of the same M. The number of kept weights stays the same in every row, and in every M. A round
    costs one rough solve that starts from the last solution.

    Attributes:
      rounds: number of rounds of exchanges. More rounds may find better masks; each costs one more rough solve.
      share: the largest share of a row's inputs that one round exchanges. A row that a round did not improve tries half as many
        exchanges in the next.
    """

    setting: ClassVar[str] = "refine"

    rounds: Annotated[int, Bound(1, hint="--refine null leaves the mask as it is")] = 4
    share: Annotated[float, Bound(above=0, most=0.5)] = 0.025

    def needs(self, recipe: "Recipe") -> None:
        """Raises UserError without a solver or a pattern with exchanges."""
        if recipe.solver is None:
            raise UserError(
                "expected a solver where refine is swaps, got none: its solution says what to exchange; "
                "take --solver cg or --refine null"
            )
        for pattern in recipe.patterns:
            if not pattern.exchanges:
                raise UserError(
                    f"expected a pattern whose masks can be exchanged, got {pattern}; take --preset fast or --refine null"
                )


@dataclasses.dataclass(frozen=True)
class Exchanging(Solver):
    """Wraps a solver in rounds of exchanges, for one Hessian and pattern.

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

    def footprint(self) -> Footprint:
        # A + t I and its inverse, in memory together with the solver's matrices. Of a row: weights, residual, wins, costs and the
        # temporary arrays of the selection.
        solver = self.solver.footprint()
        return Footprint(solver.hessians + 2, solver.vectors + 5)

    def __call__(self, problem: LayerProblem, pruned: Pruned) -> Solution:
        return self.prepare(problem.hessian, problem.damping)(problem)(pruned)

    def prepare(self, hessian: Float32[Array, "d_in d"], damping: float, features: Features = WHOLE) -> SolveRows:
        if features != WHOLE:
            raise ValueError("exchanges compare all features of a row: expected features that are not split over devices")
        solve = self.solver.prepare(hessian, damping, features)
        schur = schur_diagonal(hessian, damping, kept_share(self.pattern, hessian.shape[0]))

        def of_rows(problem: LayerProblem) -> SolveMask:
            solve_mask = solve(problem)

            def ended(solution: Solution) -> tuple[Solution, Endpoint]:
                return solution, solution.end or problem.endpoint(solution.weight)

            def solved(pruned: Pruned, rough: bool = False) -> Solution:
                state = self._start(pruned.keep, *ended(solve_mask(pruned)))
                state = self._exchanged(lambda pruned: ended(solve_mask(pruned, rough=True)), state, schur)
                solution = solve_mask(Pruned(state.weight, state.keep))
                return solution._replace(steps=state.steps + solution.steps, keep=state.keep)

            return solved

        return of_rows

    def _start(self, keep: Array, solution: Solution, end: Endpoint) -> "_State":
        """The state before the first round, from the solved mask."""
        rows, inputs = keep.shape
        most = jnp.full(rows, max(1, int(self.swaps.share * inputs)), jnp.int32)
        return _State(solution.weight, keep, end.value, end.residual, solution.steps, most)

    def _exchanged(
        self, compared: Callable[[Pruned], tuple[Solution, Endpoint]], state: "_State", schur: Float32[Array, " d_in"]
    ) -> "_State":
        """The state after all rounds.

        Args:
          compared: solves a new mask roughly.
        """

        def one_round(_: int | Array, state: _State) -> _State:
            alone = jnp.where(schur > 0, state.residual / jnp.where(schur > 0, schur, 1.0), 0.0)
            keep, count = self.pattern.exchange(alone * state.residual, state.weight**2 * schur, state.keep, state.limit)
            # A weight that comes in starts where it would end if it came alone and all others were solved again.
            start = jnp.where(keep, jnp.where(state.keep, state.weight, alone), 0.0)
            solution, end = compared(Pruned(start, keep))
            better = end.value < state.value

            def taken(new: Array, old: Array) -> Array:
                return jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

            return _State(
                weight=taken(solution.weight, state.weight),
                keep=taken(keep, state.keep),
                value=taken(end.value, state.value),
                residual=taken(end.residual, state.residual),
                steps=state.steps + solution.steps,
                limit=jnp.where(better, state.limit, count // 2),
            )

        return jax.lax.fori_loop(0, self.swaps.rounds, one_round, state)


class _State(NamedTuple):
    weight: Array  # [rows, d_in]
    keep: Array  # [rows, d_in] bool
    value: Array  # [rows]
    residual: Array  # [rows, d_in], of all inputs
    steps: Array  # [rows] int32
    limit: Array  # [rows] int32, most exchanges in the next round


class _Search(NamedTuple):
    steps: int | Array
    ridge: Array  # [], t
    last: Array  # [], the length of the last step in log t
    schur: Array  # [d_in], s at t


def kept_share(pattern: Pattern, inputs: int) -> float:
    """The share of a row's inputs that stay, on average."""
    return 1 - pattern.pruned_count((1, inputs)) / inputs


def schur_diagonal(hessian: Float32[Array, "d_in d_in"], damping: float, kept: float) -> Float32[Array, " d_in"]:
    """``s`` of the module times ``H_jj``, [d_in] float32; 0 for a dead input.

    The factor ``H_jj`` makes it fit weights and residuals that are not scaled to a unit diagonal.

    Args:
      hessian: [d_in, d_in] float32, undamped.
      damping: share of its diagonal.
      kept: share of the inputs that a row keeps.
    """
    matrix, scale, live = unit_diagonal(hessian)
    size = matrix.shape[0]
    damping = max(damping, _LEAST_DAMPING)
    matrix = ridged(matrix, damping)
    kept = min(max(kept, 0.5 / size), 1 - 0.5 / size)

    def newton(state: _Search) -> _Search:
        # Finds the root of size - t tr X - |K| in log t; the derivative is t^2 |X|^2 - t tr X < 0.
        inverted, ridge = inverse(ridged(matrix, state.ridge), damping), state.ridge
        diagonal, squares = jnp.diagonal(inverted), jnp.sum(inverted * inverted, axis=0)
        trace = ridge * jnp.sum(diagonal)
        slope = trace - ridge**2 * jnp.sum(squares)
        step = jnp.clip((size * (1 - kept) - trace) / jnp.maximum(slope, 1e-6 * size), -2.0, 2.0)
        following = ridge * jnp.exp(step)
        # At the following t by the derivative of s: after a short step, an inverse there would find the same.
        schur = 1 / diagonal - ridge + (following - ridge) * (squares / diagonal**2 - 1)
        return _Search(state.steps + 1, following, jnp.abs(step), schur)

    start = _Search(0, _estimated_ridge(matrix, damping, kept), jnp.float32(jnp.inf), jnp.zeros_like(scale))
    with usual_turns(_USUAL_STEPS):
        final = jax.lax.while_loop(lambda state: (state.steps < _MOST_STEPS) & (state.last > _SHORT_STEP), newton, start)
    schur = jnp.maximum(final.schur, 0.0)
    # If there is no inverse in float32, everything is NaN and nothing is exchanged.
    return jnp.where(live & (schur > 0), scale**2 * schur, 0.0)


def _estimated_ridge(matrix: Float32[Array, "d_in d_in"], damping: float, kept: float) -> Float32[Array, ""]:
    """``t``, [], by estimated traces.

    Args:
      matrix: [d_in, d_in] float32, ``A``, with a diagonal of 1 + damping and no eigenvalue below damping.
      kept: share of the inputs that a row keeps.
    """
    trace = inverse_traces(matrix)

    def halved(_: int | Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = jnp.sqrt(low * high)
        above = middle * trace(middle) > 1 - kept
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    # The mean of t / (lambda + t) over the eigenvalues rises in t. It is at least its value at their mean, A_jj, since it is
    # convex in lambda, and at most its value at the smallest.
    bounds = jnp.float32(damping * (1 - kept) / kept), jnp.float32((1 + damping) * (1 - kept) / kept)
    low, high = jax.lax.fori_loop(0, _HALVINGS, halved, bounds)
    return jnp.sqrt(low * high)
