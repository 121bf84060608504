"""Another mask of the same size for every row, found with the solved problem at hand.

A solved row says what another mask would be worth. In unit-diagonal variables, with ``A`` the damped Hessian, ``v`` the solved
row, ``r`` its residual and ``K`` its kept inputs, to second order and before the others make up for it

    letting input i in wins     r_i^2 / s_i,    s_i = A_ii - A_iK A_KK^-1 A_Ki
    letting input j go costs    v_j^2 * s_j,    s_j = 1 / [A_KK^-1]_jj

``s`` would take a factorisation a row. One estimate of it serves all rows of a Hessian: what it is on average over the sets ``K``
of that size, by the deterministic equivalent of a random principal block,

    s_j = 1 / [(A + t I)^-1]_jj - t    with t such that    tr A (A + t I)^-1 = |K|

So a round exchanges where the winnings exceed the costs, solves again, and takes the new mask of a row only where its objective
fell. No row ever gets worse, however rough the estimate is.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from optima_tpu.errors import UserError
from optima_tpu.method.footprint import Footprint, footprint_of
from optima_tpu.method.linalg.features import WHOLE, Features, matmul
from optima_tpu.method.linalg.inverses import inverse
from optima_tpu.method.linalg.scaling import unit_diagonal
from optima_tpu.method.linalg.smallest import lowest, pairs_that_pay
from optima_tpu.method.patterns import NM, Pattern
from optima_tpu.method.problem import LayerProblem, Pruned, Solution, pull_of
from optima_tpu.method.row_sharding import Layout, over_rows, prepared, solution_specs
from optima_tpu.method.solvers import Solver, damping_of

# Newton steps for log t, from its value for an A without correlations: until one is short, as errors are squared by each.
_MOST_STEPS = 6
_SHORT_STEP = 3e-2
FACTORISATIONS = 4
"""Of matrices of the Hessian's size, for the estimate of ``s``: with the last one 3 or 4 for layers of SmolLM2, at most 7."""
# The estimate's least damping: with none there is no t where a row keeps more inputs than the Hessian has directions.
_LEAST_DAMPING = 1e-3


@dataclasses.dataclass(frozen=True)
class Swaps:
    """Exchanges kept weights for pruned ones of the same row (in N:M of the same M) where the solved row gains.

    The numbers of weights stay what they are, in every row and in every M. A round costs a solve from where the last one ended.

    Attributes:
      rounds: how often weights are exchanged.
      share: of a row's inputs, at most so many are exchanged in a round. A row for which a round was too much tries half of it.
    """

    rounds: int = 4
    share: float = 0.025

    def __post_init__(self):
        if self.rounds < 1:
            raise UserError(f"expected refine.rounds of at least 1, got {self.rounds}; --refine null leaves the mask as it is")
        if not 0 < self.share <= 0.5:
            raise UserError(f"expected refine.share above 0 and at most 0.5, got {self.share}")


class Refined(NamedTuple):
    """A solution on a mask of its own.

    Attributes:
      solution: on that mask; its steps are those of all rounds.
      keep: [d_out, d_in] bool.
    """

    solution: Solution
    keep: Array


@dataclasses.dataclass(frozen=True)
class Refining:
    """A solver with rounds of exchanges around it, for the rows of one Hessian and one pattern.

    The objective is the solver's own, with its damping.
    """

    solver: Solver
    swaps: Swaps
    pattern: Pattern

    @property
    def footprint(self) -> Footprint:
        # A + t I and its inverse, while the solver's are there. A row's weights, residual, winnings, costs and what the
        # selection makes of them.
        solver = footprint_of(self.solver, None)
        return Footprint(solver.hessians + 2, solver.vectors + 8)

    def prepare(self, hessian: Array, features: Features = WHOLE) -> Callable[[LayerProblem, Pruned], Refined]:
        """What depends on the Hessian alone is done here, once; see :meth:`solvers.CG.prepare`."""
        if features != WHOLE:
            raise ValueError("exchanges compare all features of a row: they cannot be split over devices")
        solve, damping = prepared(self.solver, hessian, features), damping_of(self.solver)
        schur = schur_diagonal(hessian, damping, kept_share(self.pattern, hessian.shape[0]))
        return lambda problem, pruned: self._refine(problem, pruned, solve, damping, schur)

    def _refine(self, problem: LayerProblem, pruned: Pruned, solve: Solver, damping: float, schur: Array) -> Refined:
        pull, ridge = pull_of(problem), damping * jnp.diagonal(problem.hessian)

        def measure(weight: Array) -> tuple[Array, Array]:
            """Objective and residual of every row."""
            change = weight - problem.weight
            image = matmul(change, problem.hessian) + ridge * change
            return jnp.sum(change * (image - 2 * pull), axis=1), pull - image

        def exchanged(state: _State) -> tuple[Array, Array]:
            win = jnp.where(schur > 0, state.residual**2 / jnp.where(schur > 0, schur, 1.0), 0.0)
            return exchange(win, state.weight**2 * schur, state.keep, state.limit, self.pattern)

        def one_round(index: int, state: _State) -> _State:
            # The first one solves on the mask that came.
            keep, count = jax.lax.cond(index > 0, exchanged, lambda state: (state.keep, jnp.zeros_like(state.limit)), state)
            found = solve(problem, Pruned(jnp.where(keep, state.weight, 0.0), keep))
            value, residual = measure(found.weight)
            better = value < state.value

            def taken(new: Array, old: Array) -> Array:
                return jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

            return _State(
                weight=taken(found.weight, state.weight),
                keep=taken(keep, state.keep),
                value=taken(value, state.value),
                residual=taken(residual, state.residual),
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
        return Refined(Solution(state.weight, state.gap, state.steps, state.converged), state.keep)


class _State(NamedTuple):
    weight: Array  # [rows, d_in]
    keep: Array  # [rows, d_in] bool
    value: Array  # [rows], infinite before the first solve
    residual: Array  # [rows, d_in], of all inputs
    gap: Array  # [rows]
    steps: Array  # [rows] int32
    converged: Array  # [rows] bool
    limit: Array  # [rows] int32, at most so many exchanges


def refining_over_rows(refining: Refining, mesh: Mesh, layout: Layout) -> Callable[[LayerProblem, Pruned], Refined]:
    """The rows split over the mesh, as ``sharding.over_rows`` does it for a solver alone: they are independent here too."""
    return over_rows(refining, mesh, layout, Refined(solution_specs(layout), layout.matrix))


def exchange(win: Array, cost: Array, keep: Array, limit: Array, pattern: Pattern) -> tuple[Array, Array]:
    """The mask after the exchanges that win more than they cost, the best ``limit`` of each row, and their number.

    Pairs are the dearest to let in with the cheapest to let go, the second with the second, and so on; in an N:M one pair in each
    M. Of equals the lower index comes first.

    Args:
      win: [rows, d_in] float32, at least 0, read where a weight is pruned.
      cost: [rows, d_in] float32, at least 0, read where it is kept.
      keep: [rows, d_in] bool.
      limit: [rows] int32, at least 0.

    Returns:
      [rows, d_in] bool and [rows] int32.
    """
    win, cost = jnp.where(keep, -jnp.inf, win), jnp.where(keep, cost, jnp.inf)
    if isinstance(pattern, NM):
        inside = (*keep.shape[:-1], -1, pattern.m)
        win, cost, kept = win.reshape(inside), cost.reshape(inside), keep.reshape(inside)
        profit = jnp.max(win, axis=-1) - jnp.min(cost, axis=-1)
        count = jnp.minimum(jnp.sum(profit > 0, axis=-1, dtype=jnp.int32), limit)
        chosen = lowest(-profit, count[:, None], "row")[..., None]
        enters, leaves = (
            chosen & (jnp.arange(pattern.m) == best[..., None]) for best in (jnp.argmax(win, axis=-1), jnp.argmin(cost, axis=-1))
        )
        return ((kept | enters) & ~leaves).reshape(keep.shape), count
    count = jnp.minimum(pairs_that_pay(win, cost), limit)
    return (keep | lowest(-win, count[:, None], "row")) & ~lowest(cost, count[:, None], "row"), count


def kept_share(pattern: Pattern, inputs: int) -> float:
    """The share of a row's inputs that stay, on average."""
    return 1 - pattern.pruned_count((1, inputs)) / inputs


def schur_diagonal(hessian: Array, damping: float, kept: float) -> Array:
    """``s`` of the module, times ``H_jj``: for weights and residuals as they are, [d_in] float32; 0 for a dead input.

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

    def newton(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        # Of size - t tr X - |K| as a function of log t, whose derivative is t^2 |X|^2 - t tr X < 0.
        steps, ridge, _ = state
        found = inverse(matrix + ridge * eye)
        trace = ridge * jnp.trace(found)
        slope = trace - ridge**2 * jnp.sum(found * found)
        step = jnp.clip((size * (1 - kept) - trace) / jnp.maximum(slope, 1e-6 * size), -2.0, 2.0)
        return steps + 1, ridge * jnp.exp(step), jnp.abs(step)

    _, ridge, _ = jax.lax.while_loop(
        lambda state: (state[0] < _MOST_STEPS) & (state[2] > _SHORT_STEP),
        newton,
        (0, jnp.float32((1 + damping) * (1 - kept) / kept), jnp.float32(jnp.inf)),
    )
    schur = jnp.maximum(1 / jnp.diagonal(inverse(matrix + ridge * eye)) - ridge, 0.0)
    # Where float32 finds no inverse, so that all is NaN, nothing is exchanged.
    return jnp.where(live & (schur > 0), scale**2 * schur, 0.0)
