"""The paper's solver: MPAX's primal-dual hybrid gradient, vmapped over rows.

MPAX restarts and averages the iteration (raPDHG). In ``d = v - w``, the change of a row against its dense weights, every row is
the box-constrained quadratic program

    minimise  1/2 d H d' - e d'   subject to  d_j = -w_j  for pruned j      (e = g - w H; zero in OPTIMA, 2025, eq. 6)

Pruned entries are fixed by equal lower and upper bounds: a row has no constraint matrix of its own and all share ``H``.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from optima_tpu.method.linalg.features import matmul
from optima_tpu.method.linalg.scaling import RESOLUTION, damped, live_features, unit_diagonal
from optima_tpu.method.problem import LayerProblem, Pruned, Solution, optimality_residual, pull_of
from optima_tpu.method.resources import Footprint
from optima_tpu.method.solvers.base import Solver
from optima_tpu.runtime.bounds import Bound
from optima_tpu.runtime.loops import usual_turns

# The one constraint, sum(d) >= _FLOOR, never binds. MPAX estimates the norm of the constraint matrix by power
# iteration, which is 0 / 0 without a row or with only a zero row: every iterate would be NaN. Row and value are the paper's. They
# have a cost: see ``MPAX.primal_importance``.
_FLOOR = -1e5
# Below this the power iteration on H squares numbers that float32 cannot hold, with the same NaN. Such a Hessian is
# scaled up, which moves no minimum, and the paper's absolute tolerance is met by any point either way.
_SMALLEST_DIAGONAL = 1e-6
# The rounds of _solve_rows. A row that passes MPAX's third test, after 137 iterations, ends in the first round. With fewer rows
# at a time, rows wait less for each other, but each part reads the Hessian again. Chosen on two CPU cores.
_FIRST_LIMIT, _GROWTH, _PARTS, _LEAST = 128, 4, 8, 64
# MPAX tests every so many iterations, each with one product.
_TESTED = 64
# Iterations of a row, for plans: most rows of SmolLM2-135M need 73 or 137, the last one 14,473.
_ITERATIONS = 500


@dataclasses.dataclass(frozen=True)
class MPAX(Solver):
    """The paper's method, for comparisons, with the paper's defaults.

    The published code (paramathic/optima ``optima/weight_update.py``) works in bfloat16 around the same call of MPAX.
    Differences: Here the Hessian is summed from float32 products, and the change is added in float32. The two bounds of a pruned
    entry are equal; in the published code they are 1e-4 apart, and zeros overwrite the result. There is no equality constraint;
    the published code has one of zeros.

    Every row starts at its dense weights (``d = 0``); the first projection zeroes the pruned ones. The solver does not start from
    the selector's own weights. So a row may end above the selector's objective; the caller decides what to accept.

    ``converged`` is MPAX's status OPTIMAL. Its test is relative residual and gap below ``eps`` with ``1 + scale`` in
    the denominators, so it depends on the scale of weights and activations: a layer with small ones stops at the first
    test, after 73 iterations, however far from the optimum it is. The point returned is 64 iterations past the one tested.
    ``gap`` is ``optimality_residual`` of the (damped) problem: the relative KKT residual, dimensionless, whatever MPAX tested.
    ``steps`` counts MPAX's iterations, one product with ``H`` each, in the round that ended it (``_solve_rows``). A row whose
    result or data is not finite keeps its pruned weights.

    Attributes:
      eps_abs: absolute tolerance of MPAX.
      eps_rel: relative tolerance of MPAX.
      iteration_limit: the most iterations for a row; a row that reaches it is returned as not converged. MPAX tests every 64
        iterations.
      unit_diagonal: solve in ``d_j sqrt(H_jj)``, in units of the row's output ``sqrt(w H w')``. The tolerance is then independent
        of scale, and bounds ``gap`` except for the 1 that MPAX adds to its denominators.
      primal_importance: MPAX's initial balance of primal against dual steps; 1 is MPAX's default and the paper's. Here
        the dual stays 0, so the balance never adapts, and at 1 the constraint that never binds still limits the primal step. At
        1e-3 it does not, and the same number of iterations ends closer to the optimum, often tens of times closer.
    """

    eps_abs: Annotated[float, Bound(above=0)] = 1e-2
    eps_rel: Annotated[float, Bound(above=0)] = 1e-2
    iteration_limit: Annotated[int, Bound(1)] = 100_000
    unit_diagonal: bool = False
    primal_importance: Annotated[float, Bound(above=0)] = 1.0

    def footprint(self) -> Footprint:
        # Fitted 2.1 and 9.4, as MPAX's own 38 vectors a row are held for an eighth of the rows at once. In a batch of 256 rows it
        # is a quarter of the rows, and the fit is 13.8.
        return Footprint(hessians=4, vectors=14)

    def __call__(self, problem: LayerProblem, pruned: Pruned) -> Solution:
        # MPAX builds its loops from fresh closures, so outside jit each call would compile all of them anew.
        return _solve(
            problem,
            pruned,
            self.unit_diagonal,
            problem.damping,
            {
                "eps_abs": self.eps_abs,
                "eps_rel": self.eps_rel,
                "iteration_limit": self.iteration_limit,
                "primal_importance": self.primal_importance,
            },
            min(_ITERATIONS, self.iteration_limit),
        )


@functools.partial(jax.jit, static_argnames=("in_unit_diagonal", "usual"))
def _solve(
    problem: LayerProblem, pruned: Pruned, in_unit_diagonal: bool, damping: Array, options: dict[str, Array], usual: int
) -> Solution:
    """The solution; ``usual`` iterations of a row are what a plan counts."""
    weight, pull = problem.weight, pull_of(problem)
    live = live_features(problem.hessian)
    diagonal = jnp.where(live, jnp.diagonal(problem.hessian), 0.0)
    hessian = damped(jnp.where(live[:, None] & live, problem.hessian, 0.0), damping)
    if in_unit_diagonal:
        matrix, scale, _ = unit_diagonal(hessian)
        scaled = jnp.where(live, weight * scale, 0.0)
        energy = jnp.sum(scaled * matmul(scaled, matrix), axis=1, keepdims=True)
        energy = jnp.maximum(energy, RESOLUTION * jnp.sum(scaled * scaled, axis=1, keepdims=True))
        unit = jnp.sqrt(jnp.where(energy > 0, energy, 1.0)) / scale
        # 1/2 (x u) H (x u)' - e (x u)' over u_row^2: the Hessian stays the one that all rows share.
        slope = pull * unit / jnp.where(energy > 0, energy, 1.0)
    else:
        largest = jnp.max(diagonal)
        lift = jnp.where((largest > 0) & (largest < _SMALLEST_DIAGONAL), _SMALLEST_DIAGONAL / largest, 1.0)
        # A dead feature does not move. Its diagonal only needs the magnitude of the others, and must not be zero if all are dead.
        matrix = lift * (hessian + jnp.diag(jnp.where(live, 0.0, jnp.where(largest > 0, largest, 1.0))))
        unit, slope = jnp.ones_like(weight), lift * pull

    free = pruned.keep & live
    sound = jnp.all(jnp.isfinite(weight) & jnp.isfinite(pull), axis=1, keepdims=True) & jnp.all(jnp.isfinite(matrix))
    # Data that is not finite would iterate on NaN up to the iteration limit. Replace it by a problem whose solution is the start.
    matrix = jnp.where(jnp.isfinite(matrix), matrix, 0.0)
    slope = jnp.where(sound & live, slope, 0.0)
    fixed = jnp.where(sound & live, -weight / unit, 0.0)
    lower, upper = (jnp.where(free & sound, end, fixed) for end in (-jnp.inf, jnp.inf))
    # Products in full float32: TF32 and bfloat16, the defaults of GPU and TPU, stall or diverge on ill-conditioned
    # layers.
    with jax.default_matmul_precision("highest"), _root_logger_kept():
        change, optimal, _, steps = _solve_rows(options, matrix, _Rows(slope, lower, upper), usual)

    solved = sound & jnp.all(jnp.isfinite(change), axis=1, keepdims=True)
    moved = jnp.where(free & solved, weight + change * unit, jnp.where(pruned.keep, pruned.weight, 0.0))
    residual = optimality_residual(LayerProblem(weight, hessian, pull), Pruned(moved, free), moved)
    converged = solved[:, 0] & optimal
    gap = jnp.where(solved[:, 0] & jnp.isfinite(residual), residual, jnp.inf)
    return Solution(moved, gap, steps.astype(jnp.int32), converged)


class _Rows(NamedTuple):
    """What differs by row in ``min 1/2 d H d' - slope d'``, [rows, d_in]."""

    slope: Array
    lower: Array
    upper: Array


class _Result(NamedTuple):
    """The result of MPAX."""

    change: Array  # d [rows, d_in]
    optimal: Array  # [rows] bool, MPAX's test passed
    late: Array  # [rows] bool, it met the limit of iterations
    steps: Array  # [rows], iterations


def _solve_rows(options: dict[str, Array], matrix: Array, rows: _Rows, usual: int = _ITERATIONS) -> _Result:
    """Solves all rows in rounds, so that early rows do not wait for late ones.

    A vmapped loop ends with its last row. In a real layer most rows need 73 or 137 iterations, and the last one thousands. So the
    first round solves all rows with a low limit. Each further round solves the rows that met the limit again, from the start and
    with a higher limit, up to the limit of the options. A round solves a part of the rows at a time. MPAX's iterates depend
    neither on the limit nor on the other rows: every row gets the same result as in one loop, within rounding.
    """
    solve = jax.vmap(_solve_row, in_axes=(None, None, 0))
    count, last = len(rows.slope), jnp.asarray(options["iteration_limit"])
    at_a_time = min(count, max(count // _PARTS, _LEAST))

    def one_round(state: tuple[Array, _Result]) -> tuple[Array, _Result]:
        before, results = state
        higher = jnp.where(before > last // _GROWTH, last, before * _GROWTH)  # compared first: the product could overflow
        limit = jnp.minimum(last, jnp.maximum(higher, _FIRST_LIMIT))
        # The indices of late rows first, then an index out of range, which a read clips and a write drops.
        waiting = jnp.nonzero(results.late, size=count + at_a_time, fill_value=count)[0]

        def one_part(state: tuple[int | Array, _Result]) -> tuple[int | Array, _Result]:
            start, results = state
            part = jax.lax.dynamic_slice_in_dim(waiting, start, at_a_time)
            selected = jax.tree.map(lambda every: every.at[part].get(mode="clip"), rows)
            with usual_turns(-(-usual // _TESTED)):
                some = solve(options | {"iteration_limit": limit}, matrix, selected)
            return start + at_a_time, jax.tree.map(lambda every, new: every.at[part].set(new, mode="drop"), results, some)

        first: tuple[int | Array, _Result] = (0, results)
        with usual_turns(-(-count // at_a_time)):
            return limit, jax.lax.while_loop(lambda state: waiting[state[0]] < count, one_part, first)[1]

    unsolved = _Result(jnp.zeros_like(rows.slope), jnp.zeros(count, bool), jnp.ones(count, bool), jnp.zeros(count, jnp.int32))
    with usual_turns(1):  # a plan counts the iterations of all rounds
        return jax.lax.while_loop(
            lambda state: (state[0] < last) & jnp.any(state[1].late), one_round, (jnp.zeros_like(last), unsolved)
        )[1]


def _solve_row(options: dict[str, Array], matrix: Array, row: _Rows) -> _Result:
    """Solves one row: every array has one axis less."""
    # Imported where the solver runs: whoever takes another one needs no MPAX.
    from mpax import raPDHG
    from mpax.utils import QuadraticProgrammingProblem, TerminationStatus

    slope, lower, upper = row
    size = slope.shape[0]
    constraint = jnp.ones((1, size))
    # Built by hand: mpax.create_qp tests whether all of H is zero, which is not possible for a traced array.
    program = QuadraticProgrammingProblem(
        num_variables=size,
        num_constraints=1,
        variable_lower_bound=lower,
        variable_upper_bound=upper,
        isfinite_variable_lower_bound=jnp.isfinite(lower),
        isfinite_variable_upper_bound=jnp.isfinite(upper),
        objective_matrix=matrix,
        objective_vector=-slope,
        objective_constant=0.0,
        constraint_matrix=constraint,
        constraint_matrix_t=constraint.T,
        right_hand_side=jnp.full((1,), _FLOOR),
        num_equalities=0,
        equalities_mask=jnp.zeros((1,), bool),
        inequalities_mask=jnp.ones((1,), bool),
        is_lp=False,
    )
    # MPAX's scale-invariant weight would multiply primal_importance by |e| / |_FLOOR|: it overflows where e is rounding
    # noise.
    with jax.numpy_dtype_promotion("standard"):  # MPAX multiplies by masks
        result = raPDHG(**options, scale_invariant_initial_primal_weight=False).optimize(program)
    optimal, late = (
        result.termination_status == status for status in (TerminationStatus.OPTIMAL, TerminationStatus.ITERATION_LIMIT)
    )
    return _Result(result.primal_solution, optimal, late, result.iteration_count)


@contextlib.contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Restores the root logger's handlers and level, which MPAX replaces."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
