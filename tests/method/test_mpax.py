"""What is special to MPAX. What every solver must do is in test_solvers.py."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optima_tpu.method.patterns import Unstructured
from optima_tpu.method.problem import LayerProblem, Pruned
from optima_tpu.method.selectors import Wanda
from optima_tpu.method.solvers import MPAX, Exact, mpax
from optima_tpu.pipeline.plan.hlo import COLLECTIVE, text_inside_loops
from optima_tpu.runtime.mesh import ROWS, make_mesh
from tests.support.problems import select, wide

ROW_COUNT, SIZE = 12, 32


@pytest.fixture(scope="module")
def layer() -> tuple[LayerProblem, Pruned]:
    """Correlated inputs of very different scale, as in a language model."""
    rng = np.random.default_rng(0)
    mixing = np.eye(SIZE) + 0.5 * rng.standard_normal((SIZE, SIZE)) / np.sqrt(SIZE)
    inputs = rng.standard_normal((400, SIZE)) @ mixing * np.exp(1.5 * rng.standard_normal(SIZE)) * 0.1
    hessian = jnp.asarray(inputs.T @ inputs / 400, jnp.float32)
    problem = LayerProblem(jnp.asarray(rng.standard_normal((ROW_COUNT, SIZE)), jnp.float32), hessian)
    return problem, select(Wanda(), problem, Unstructured(0.5))


exact = jax.jit(Exact())


def excess(layer, solver: MPAX) -> float:
    """Mean ``f - f*`` of the rows, relative to their outputs' mean square."""
    problem, pruned = layer
    solved, best = solver(problem, pruned).weight, exact(problem, pruned).weight
    return float(jnp.mean((problem.value(solved) - problem.value(best)) / problem.energy()))


in_rounds = jax.jit(mpax._solve_rows)
in_one_loop = jax.jit(jax.vmap(mpax._solve_row, in_axes=(None, None, 0)))


def test_a_tighter_tolerance_comes_closer(layer):
    tolerances = (1e-2, 1e-4, 1e-6)
    far, near, nearest = (excess(layer, MPAX(eps, eps, 5000, unit_diagonal=True)) for eps in tolerances)
    assert far > 10 * near > 0
    assert nearest < 1e-6


def test_unit_diagonal_and_a_low_primal_importance_come_closer_at_equal_tolerance(layer):
    paper, scaled = excess(layer, MPAX()), excess(layer, MPAX(unit_diagonal=True))
    assert paper > 5 * scaled
    assert scaled > 2 * excess(layer, MPAX(unit_diagonal=True, primal_importance=1e-3))


def test_a_row_at_the_iteration_limit_is_not_converged(layer):
    problem, pruned = layer
    nothing_to_do = Pruned(pruned.weight.at[0].set(problem.weight[0]), pruned.keep.at[0].set(True))
    solution = MPAX(1e-6, 1e-6, iteration_limit=70)(problem, nothing_to_do)
    np.testing.assert_array_equal(solution.converged, np.arange(ROW_COUNT) == 0)
    assert 70 <= int(solution.steps[1:].min()) <= int(solution.steps[1:].max()) < 70 + 2 * 64
    np.testing.assert_array_equal(solution.weight[0], problem.weight[0])
    assert bool(jnp.all(jnp.isfinite(solution.weight)))


@pytest.mark.parametrize("limit", [70, 600, 3000])
@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 150])  # a round of one part, and rounds of several
def test_the_rounds_end_every_row_where_one_loop_would(layer, count, limit):
    rng = np.random.default_rng(count)
    hessian = layer[0].hessian
    # Rows of very different size: by MPAX's test some are done at once and some take thousands of iterations.
    weight = jnp.asarray(rng.standard_normal((count, SIZE)) * np.logspace(-3, 1, count)[:, None], jnp.float32)
    fixed = jnp.where(jnp.asarray(rng.random(weight.shape) < 0.5), -weight, jnp.nan)
    rows = mpax._Rows(jnp.zeros_like(weight), *(jnp.where(jnp.isnan(fixed), end, fixed) for end in (-jnp.inf, jnp.inf)))
    options = {"eps_abs": 1e-3, "eps_rel": 1e-3, "iteration_limit": limit, "primal_importance": 1.0}
    with jax.default_matmul_precision("highest"):
        rounds, one_loop = in_rounds(options, hessian, rows), in_one_loop(options, hessian, rows)
    np.testing.assert_array_equal(rounds.steps, one_loop.steps)
    for ended in ("optimal", "late"):
        np.testing.assert_array_equal(getattr(rounds, ended), getattr(one_loop, ended))
    size = jnp.linalg.norm(one_loop.change, axis=1, keepdims=True)
    np.testing.assert_allclose(rounds.change / size, one_loop.change / size, atol=1e-5)
    if count > 1:  # some rows end in the first round and, where the limit is high, some in every other one
        assert int(rounds.steps.min()) < 128 and int(rounds.steps.max()) >= limit


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_the_gap_is_the_residual_of_the_damped_problem(layer, damping):
    """In float64: the residual of kept weights as a share of a row's size."""
    problem, pruned = layer
    solution = MPAX()(dataclasses.replace(problem, damping=damping), pruned)
    weight, hessian, _ = wide(problem, damping)
    residual = (np.asarray(solution.weight, np.float64) - weight) @ hessian / np.sqrt(np.diagonal(hessian))
    size = np.sqrt(np.sum(weight * (weight @ hessian), axis=1))
    expected = np.where(pruned.keep, np.abs(residual), 0).max(axis=1) / size
    assert expected.min() > 1e-4
    np.testing.assert_allclose(solution.gap, expected, rtol=1e-2)


@pytest.mark.slow  # of XLA alone
def test_left_to_the_compiler_the_loop_has_a_collective_and_its_trace_leaves_the_root_logger_alone(layer):
    """This is the collective that test_prune.py must not find in its loops."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    mesh = make_mesh("4x2")  # tests/conftest.py simulates 8 devices
    problem, pruned = layer

    def split(array):
        return jax.device_put(array[:8], NamedSharding(mesh, ROWS))

    hessian = jax.device_put(problem.hessian, NamedSharding(mesh, P()))
    eight = LayerProblem(split(problem.weight), hessian), Pruned(*map(split, pruned))
    assert COLLECTIVE.search(text_inside_loops(jax.jit(MPAX()).lower(*eight).compile().as_text()))
    assert (root.handlers, root.level) == before


def test_one_shape_is_compiled_once(layer):
    problem, pruned = layer
    MPAX()(problem, pruned)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    MPAX()(problem, pruned)
    MPAX(1e-3, 1e-3, 1000)(problem, pruned)  # tolerances and limits are arguments of the program
    assert not compiled
    jax.jit(lambda x: x + 1)(problem.weight)
    assert compiled  # the listener does hear
