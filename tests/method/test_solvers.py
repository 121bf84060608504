"""Contracts of all solvers and of the optimal ones, against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optima_tpu.method.acceptance import PerRow
from optima_tpu.method.linalg import features, inverses, scaling
from optima_tpu.method.mask_swaps import Swaps
from optima_tpu.method.patterns import Unstructured
from optima_tpu.method.problem import LayerProblem, Pruned, optimality_residual
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.selectors import ADMM, Magnitude, Wanda, admm
from optima_tpu.method.solvers import CG, MPAX, Adam, Exact
from tests.support.problems import ALIKE, PATTERNS, layer, oracle, row_objective, select, solve, wide
from tests.support.pruning import prune_layer

ROWS, SIZE = 24, 32
# Each solver with a damping, and how closely two runs of it on rescaled problems must agree, in units of the largest weight.
SOLVERS = {
    "cg": (CG(tolerance=3e-5), 1e-2, 1e-2),
    "cg undamped": (CG(tolerance=3e-5, max_steps=200), 0.0, 1e-2),
    "mpax": (MPAX(eps_abs=1e-5, eps_rel=1e-5, iteration_limit=20_000, unit_diagonal=True), 0.0, 3e-2),
    "mpax damped": (MPAX(eps_abs=1e-5, eps_rel=1e-5, iteration_limit=20_000, unit_diagonal=True), 1e-2, 3e-2),
    "exact": (Exact(), 0.0, 1e-4),
    "exact damped": (Exact(), 1e-2, 1e-4),
    "adam": (Adam(), 0.0, 1e-4),
    "adam damped": (Adam(), 1e-2, 1e-4),
}
# Those that reach the optimum, with what they must come to on these problems: the gap relative to what can be gained, and
# the residual. CG's tolerance is relative to the error of the optimum, which is more than the gain where much is pruned.
OPTIMAL = {
    "cg": (1e-4, 1e-2),
    "cg undamped": (1e-4, 1e-2),
    "mpax": (1e-3, 1e-2),
    "mpax damped": (1e-3, 1e-2),
    "exact": (1e-5, 1e-4),
    "exact damped": (1e-5, 1e-4),
}
contract = pytest.mark.parametrize("solver, damping", [each[:2] for each in SOLVERS.values()], ids=SOLVERS)
# With another target MPAX compiles another program, for seconds: damped it is the harder one.
_SLOW = {("mpax", "other"): [pytest.mark.slow]}
with_targets = pytest.mark.parametrize(
    "solver, damping, target",
    [
        pytest.param(*each[:2], target, id=f"{target}-{name}", marks=_SLOW.get((name, target), []))
        for target in ("self", "other")
        for name, each in SOLVERS.items()
    ],
)
optimal = pytest.mark.parametrize(
    "solver, damping, gap, residual", [(*SOLVERS[name][:2], *goal) for name, goal in OPTIMAL.items()], ids=OPTIMAL
)
optimal_with_targets = pytest.mark.parametrize(
    "solver, damping, gap, residual, target",
    [
        pytest.param(*SOLVERS[name][:2], *goal, target, id=f"{target}-{name}", marks=_SLOW.get((name, target), []))
        for target in ("self", "other")
        for name, goal in OPTIMAL.items()
    ],
)
patterns = pytest.mark.parametrize(
    "pattern", [pytest.param(each, id=str(each), marks=[pytest.mark.slow] * (each in ALIKE)) for each in PATTERNS]
)
targets = pytest.mark.parametrize("target", ["self", "other"])


def problem_and_mask(seed=0, target="self", rows=ROWS, **hessian):
    problem = layer(np.random.default_rng(seed), rows, SIZE, target=target, **hessian)
    return problem, select(Wanda(), problem, Unstructured(0.5))


@with_targets
@patterns
def test_zeros_stay_and_no_row_gets_worse(solver, damping, target, pattern):
    problem = layer(np.random.default_rng(1), ROWS, SIZE, target=target)
    pruned = select(Magnitude(), problem, pattern)
    solution = solve(solver, problem, pruned, damping)
    weight = np.asarray(solution.weight)
    assert np.isfinite(weight).all() and solution.converged.all()
    assert (weight[~np.asarray(pruned.keep)] == 0).all()
    before, after = (row_objective(problem, each, damping) for each in (pruned.weight, weight))
    assert (after <= before * (1 + 1e-6) + 1e-9).all()


@optimal_with_targets
@patterns
def test_a_solver_reaches_the_optimum_of_every_row(solver, damping, gap, residual, target, pattern):
    problem = layer(np.random.default_rng(1), ROWS, SIZE, target=target)
    pruned = select(Magnitude(), problem, pattern)
    weight = solve(solver, problem, pruned, damping).weight
    best = row_objective(problem, oracle(problem, pruned, damping), damping)
    excess = row_objective(problem, weight, damping) - best
    # What can be gained at all is the scale: with another target the optimum itself may be near zero.
    gain = row_objective(problem, pruned.weight, damping) - best
    assert (excess <= gap * gain + 1e-6 * np.abs(best)).all()
    if not damping:
        assert np.max(optimality_residual(problem, pruned, weight)) < residual


@contract
def test_rows_do_not_know_each_other(solver, damping):
    """Half of the rows, each twice, in another order: nothing new compiles."""
    problem, pruned = problem_and_mask(2)
    expected = solve(solver, problem, pruned, damping).weight
    order = np.random.default_rng(0).permutation(np.arange(ROWS) // 2 * 2)
    other = LayerProblem(problem.weight[order], problem.hessian), Pruned(*(array[order] for array in pruned))
    assert np.abs(solve(solver, *other, damping).weight - expected[order]).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("solver, damping, wobble", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("scale", [1e-8, 1e6])
def test_the_scale_of_the_hessian_does_not_matter(solver, damping, wobble, scale):
    problem, pruned = problem_and_mask(3)
    once = solve(solver, problem, pruned, damping)
    again = solve(solver, LayerProblem(problem.weight, problem.hessian * scale), pruned, damping)
    assert np.abs(once.weight - again.weight).max() <= wobble * np.abs(once.weight).max()


@contract
def test_rows_without_a_choice_come_back_as_they_are(solver, damping):
    problem, pruned = problem_and_mask(4)
    keep = pruned.keep.at[0].set(False).at[1].set(True)
    start = Pruned(jnp.where(keep, problem.weight, 0.0), keep)
    solution = solve(solver, problem, start, damping)
    assert (solution.weight[0] == 0).all()
    assert np.abs(solution.weight[1] - problem.weight[1]).max() <= 1e-6 * np.abs(problem.weight[1]).max()
    assert solution.converged[:2].all()


def problem_with_dead_inputs():
    problem, _ = problem_and_mask(5)
    dead = [3, 17]
    hessian = problem.hessian.at[jnp.array(dead)].set(0.0).at[:, jnp.array(dead)].set(0.0)
    problem = LayerProblem(problem.weight, hessian)
    return problem, select(Magnitude(), problem, Unstructured(0.5)), dead


@contract
def test_dead_inputs_keep_the_selectors_weights(solver, damping):
    problem, pruned, dead = problem_with_dead_inputs()
    solution = solve(solver, problem, pruned, damping)
    assert np.isfinite(solution.weight).all()
    assert (solution.weight[:, dead] == pruned.weight[:, dead]).all()
    assert (row_objective(problem, solution.weight) < row_objective(problem, pruned.weight)).all()


@optimal
def test_dead_inputs_do_not_keep_the_others_from_the_optimum(solver, damping, gap, residual):
    problem, pruned, _ = problem_with_dead_inputs()
    solution = solve(solver, problem, pruned, damping)
    best = row_objective(problem, np.asarray(solve(Exact(), problem, pruned, damping).weight), damping)
    assert (row_objective(problem, solution.weight, damping) <= best * (1 + 10 * gap) + 1e-6).all()


@pytest.mark.parametrize("solver, damping, wobble", [SOLVERS[name] for name in OPTIMAL], ids=OPTIMAL)
@pytest.mark.parametrize("power, dead", [(-14, False), (-22, True)])
def test_an_input_is_dead_whose_energy_is_nothing_beside_the_largest(solver, damping, wobble, power, dead):
    """An input of 4e-9 of its former energy is alive, one of 6e-14 is dead."""
    problem = layer(np.random.default_rng(5), ROWS, SIZE, spread=0.0)
    pruned = select(Magnitude(), problem, Unstructured(0.5))
    once = solve(solver, problem, pruned, damping).weight
    units = jnp.ones(SIZE).at[3].set(2.0**power)
    other = LayerProblem(problem.weight / units, problem.hessian * units * units[:, None])
    again = solve(solver, other, Pruned(pruned.weight / units, pruned.keep), damping).weight * units
    if dead:
        assert (again[:, 3] == pruned.weight[:, 3]).all()
    else:
        assert np.abs(again - once).max() <= wobble * np.abs(once).max() < np.abs(once - pruned.weight)[:, 3].max()


@contract
def test_a_layer_that_sees_nothing_is_left_alone(solver, damping):
    problem, _ = problem_and_mask(6)
    problem = LayerProblem(problem.weight, jnp.zeros_like(problem.hessian))
    pruned = select(Magnitude(), problem, Unstructured(0.5))
    assert (solve(solver, problem, pruned, damping).weight == pruned.weight).all()


# A weight that is no number stays in its row behind CG: who reads a model refuses it.
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("array, name", [*(("pull", name) for name in SOLVERS), ("weight", "adam"), ("weight", "exact")])
def test_a_row_that_is_not_finite_keeps_its_weights_and_says_so(name, bad, array):
    solver, damping, _ = SOLVERS[name]
    clean, pruned = problem_and_mask(8)
    clean = dataclasses.replace(clean, pull=jnp.zeros_like(clean.weight))
    problem = dataclasses.replace(clean, **{array: getattr(clean, array).at[3, 5].set(bad)})
    solution, expected = (solve(solver, each, pruned, damping) for each in (problem, clean))
    np.testing.assert_array_equal(solution.weight[3], pruned.weight[3])
    assert not solution.converged[3] and np.isinf(solution.gap[3]) and solution.steps[3] < 100
    others = np.arange(ROWS) != 3
    np.testing.assert_array_equal(solution.weight[others], expected.weight[others])
    np.testing.assert_array_equal(solution.converged[others], expected.converged[others])


# With damping, whose minimiser may have more of the error that is counted.
@pytest.mark.parametrize(
    "name, dtype",
    [
        ("cg", jnp.float32),
        *((name, jnp.bfloat16) for name in ("cg", "exact damped", "adam damped")),
        pytest.param("mpax damped", jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_no_row_gets_worse_after_the_cast(name, dtype):
    solver, damping, _ = SOLVERS[name]
    problem, _ = problem_and_mask(7, spread=2.0)
    recipe = Recipe(Unstructured(0.5), Wanda(), dataclasses.replace(solver, damping=damping), PerRow())
    before, _ = prune_layer(problem, Recipe(recipe.pattern, recipe.selector, None), dtype)
    after, rows = prune_layer(problem, recipe, dtype)
    f = row_objective(problem, after.weight)
    assert (f <= row_objective(problem, before.weight) * (1 + 1e-5)).all()
    assert np.allclose(rows.after, f, rtol=1e-3)
    assert (np.asarray(after.weight) == np.asarray(after.weight.astype(dtype).astype(jnp.float32))).all()
    assert not np.signbit(np.asarray(after.weight)[~np.asarray(after.keep)]).any()


@pytest.mark.parametrize(
    "target, tokens, damping",
    [  # each target by turns; the first with the other one would count from no optimum
        pytest.param(target, tokens, damping, marks=[pytest.mark.slow] * ((row + column + (target == "other")) % 2))
        for target in ("self", "other")
        for row, tokens in enumerate([16, 64, 1024])
        for column, damping in enumerate([0.0, 1e-4, 1e-2])
    ],
)
def test_no_certificate_of_cg_lies(damping, tokens, target):
    """Also for singular Hessians (16 tokens) and at the limit of float32."""
    for seed in range(5):
        problem, pruned = problem_and_mask(seed, target=target, tokens=tokens, spread=2.0)
        for tolerance in (1e-1, 1e-3):
            solution = solve(CG(tolerance=tolerance), problem, pruned, damping)
            exact = solve(Exact(), problem, pruned, damping).weight
            weight, hessian, pull = wide(problem, damping)
            if pull.any() and not damping and tokens < SIZE:
                continue  # no unconstrained optimum to count f from
            shift = np.sum(pull * np.linalg.lstsq(hessian, pull.T, rcond=1e-12)[0].T, axis=1)
            energy = np.sum(weight**2 * np.diag(hessian), axis=1)
            best = row_objective(problem, exact, damping)
            optimum = np.maximum(best + shift, 1e-8 * energy)
            excess = row_objective(problem, solution.weight, damping) - best
            assert (excess <= solution.gap * optimum * 1.001 + 1e-6 * optimum + 1e-9 * energy).all()


@pytest.mark.parametrize(
    "bits, damping",
    [
        pytest.param(16, 0.0, id="TPU-0.0"),
        pytest.param(11, 1e-2, id="GPU-0.01"),
        pytest.param(16, 1e-2, id="TPU-0.01", marks=pytest.mark.slow),
        pytest.param(11, 0.0, id="GPU-0.0", marks=pytest.mark.slow),
    ],
)
def test_the_rough_products_of_accelerators_do_for_a_direction_and_a_mask(monkeypatch, damping, bits):
    """Factors are rounded to 16 bits (TPU, three passes) or 11 (TF32)."""
    problem = layer(np.random.default_rng(3), ROWS, SIZE, spread=1.0)

    def pruned_and_solved():
        def both(problem):  # in one program, of these products
            pruned = ADMM(damping=0.1)(problem, Unstructured(0.5, "row"))
            return pruned, CG()(dataclasses.replace(problem, damping=damping), pruned)

        return jax.jit(both)(problem)

    mask, full = pruned_and_solved()
    expected = row_objective(problem, oracle(problem, mask, damping), damping).sum()

    def rounded(a, b):
        a, b = (jax.lax.reduce_precision(array, 8, bits - 1) for array in (a, b))
        return features.matmul(a, b)

    for module in (features, admm, inverses):
        monkeypatch.setattr(module, "rough_matmul", rounded)
    pruned, solution = pruned_and_solved()
    assert solution.converged.all() and solution.steps.max() <= full.steps.max() + CG().cycle
    best = row_objective(problem, oracle(problem, pruned, damping), damping)
    assert (row_objective(problem, solution.weight, damping) <= 1.002 * best).all()
    assert best.sum() <= 1.01 * expected


def test_cg_reports_what_it_could_not_finish():
    problem, pruned = problem_and_mask(8, spread=2.0)
    solution = solve(CG(tolerance=1e-6, max_steps=4), problem, pruned)
    assert not solution.converged.any() and (solution.gap > 1e-6).all() and (solution.steps == 4).all()


@pytest.mark.parametrize("tokens", [None, 16], ids=["regular", "singular"])
@pytest.mark.parametrize("damping", [1e-2, 0.3])
def test_cg_certifies_rows_that_keep_all_weights(damping, tokens):
    """Such a row reaches ``f = 0`` but for rounding.

    Its gap is then a share of what the dense weights leave to be gained.
    """
    problem = layer(np.random.default_rng(0), ROWS, 256, target="other", tokens=tokens)
    solution = solve(CG(), problem, Pruned(problem.weight, jnp.ones(problem.weight.shape, bool)), damping)
    weight, hessian, pull = wide(problem, damping)
    best = weight + np.linalg.solve(hessian, pull.T).T
    least, before, after = (row_objective(problem, each, damping) for each in (best, weight, solution.weight))
    assert solution.converged.all() and (after - least <= CG().tolerance * (before - least)).all()


@pytest.mark.parametrize("refine", [None, Swaps()], ids=["alone", "with exchanges"])
def test_cg_certifies_nothing_where_the_hessian_is_none(refine):
    """An indefinite Hessian, as rounding may make of a large singular one."""
    problem = LayerProblem(jnp.ones((3, 2)), jnp.array([[1, 1.02], [1.02, 1]], jnp.float32))
    recipe = Recipe(Unstructured(0.5, "row"), Wanda(), CG(), refine=refine)
    pruned, rows = prune_layer(problem, recipe)
    assert not np.asarray(rows.converged).any() and np.isinf(rows.gap).all()
    assert np.isfinite(pruned.weight).all()


@targets
def test_a_rough_solve_of_cg_knows_where_it_ends(target):
    """The recurrences give the objective and the residual of the weights."""
    problem, pruned = problem_and_mask(target=target)
    problem, damping = dataclasses.replace(problem, damping=0.3), 0.3
    solution = jax.jit(lambda problem, pruned: CG().prepare(problem.hessian, damping)(problem)(pruned, rough=True))(
        problem, pruned
    )
    dense, hessian, pull = wide(problem, damping)
    objective, before = (row_objective(problem, weight, damping) for weight in (solution.weight, pruned.weight))
    np.testing.assert_allclose(solution.end.value, objective, rtol=1e-4)
    residual = pull - (np.asarray(solution.weight, np.float64) - dense) @ hessian
    assert np.abs(solution.end.residual - residual).max() < 1e-5 * np.abs(dense @ hessian).max()
    assert (objective < before).all() and not solution.converged.any() and (solution.gap == np.inf).all()
    assert (solution.weight == np.where(pruned.keep, solution.weight, 0)).all()


def test_damping_bounds_how_far_weights_move():
    """Undamped, a nearly singular layer fits its tokens with huge weights.

    Inputs a, a + 1e-3 b and b, of which b is pruned: the optimum is the difference of the first two, times 1,000.
    """
    mixing = np.array([[1, 0], [1, 1e-3], [0, 1]])
    problem = LayerProblem(jnp.ones((1, 3)), jnp.asarray(mixing @ mixing.T, jnp.float32))
    keep = jnp.array([[True, True, False]])
    pruned = Pruned(jnp.where(keep, problem.weight, 0.0), keep)
    assert np.abs(solve(Exact(), problem, pruned, 0.0).weight).max() > 500
    assert np.abs(solve(CG(), problem, pruned, 1e-2).weight).max() < 2


def test_live_features_are_the_same_on_the_host():
    for diagonal in ([1, 0, -1, np.nan, np.inf, 2e-12, 0.9e-12], [0, 0], [np.nan, np.nan], [3e38, 1, 4e26]):
        hessian = np.diag(np.asarray(diagonal, np.float32))
        np.testing.assert_array_equal(scaling.live_diagonal(np.diagonal(hessian)), scaling.live_features(jnp.asarray(hessian)))
