"""What is special to Adam. What every solver must do is in test_solvers.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optima_tpu.method.patterns import Unstructured
from optima_tpu.method.problem import LayerProblem, Pruned, optimality_residual
from optima_tpu.method.row_sharding import RowSharding
from optima_tpu.method.selectors import Wanda
from optima_tpu.method.solvers import Adam, Exact
from optima_tpu.pipeline.plan.hlo import COLLECTIVE, text_inside_loops
from optima_tpu.runtime.mesh import make_mesh
from tests.support.problems import layer, row_objective, select, solve

ROWS, SIZE, TOKENS = 10, 32, 300
RATES = Adam().learning_rates


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer: its data in float64, and the problem for the solver."""

    inputs: np.ndarray  # [tokens, d_in]
    problem: LayerProblem
    pruned: Pruned

    @property
    def weight(self) -> np.ndarray:
        return np.asarray(self.problem.weight, np.float64)

    def miss(self, weight: np.ndarray) -> np.ndarray:
        """``X V' - X W'``, [tokens, d_out], in which a bias cancels."""
        return self.inputs @ (np.asarray(weight, np.float64) - self.weight).T

    def loss(self, weight: np.ndarray) -> np.ndarray:
        """The mean over tokens of the squared error of every output."""
        return np.mean(self.miss(weight) ** 2, axis=0)


def make_layer(seed: int, *, size_of_weights: float = 0.1, spread: float = 1.0) -> Layer:
    rng = np.random.default_rng(seed)
    mixing = np.eye(SIZE) + rng.standard_normal((SIZE, SIZE)) / np.sqrt(SIZE)
    # Not centred, as no activation of a language model is.
    inputs = rng.standard_normal((TOKENS, SIZE)) @ mixing + rng.standard_normal(SIZE)
    inputs = inputs * np.exp(spread * rng.standard_normal(SIZE))
    weight = jnp.asarray(size_of_weights * rng.standard_normal((ROWS, SIZE)), jnp.float32)
    problem = LayerProblem(weight, jnp.asarray(inputs.T @ inputs / TOKENS, jnp.float32))
    return Layer(inputs, problem, select(Wanda(), problem, Unstructured(0.5)))


def descend(layer: Layer, rate: float, steps: int = 20) -> np.ndarray:
    """Adam's published path on the data, [steps + 1, d_out, d_in] float64."""
    keep = np.asarray(layer.pruned.keep)
    weight = np.asarray(layer.pruned.weight, np.float64)
    first, second, visited = np.zeros_like(weight), np.zeros_like(weight), [weight]
    for step in range(steps):
        gradient = np.where(keep, 2 * layer.miss(weight).T @ layer.inputs / TOKENS, 0)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        mean, square = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        weight = weight - rate * (1 - step / steps) * mean / (np.sqrt(square) + 1e-8)
        visited.append(weight)
    return np.stack(visited)


def best_of(layer: Layer, rates: tuple[float, ...], steps: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(weights, step, whether all rates end above the start) of each row."""
    runs = np.stack([descend(layer, rate, steps) for rate in rates])
    losses = np.stack([[layer.loss(weight) for weight in run] for run in runs])
    flat = losses.reshape(-1, ROWS)
    best = np.argmin(flat, axis=0)
    weights = runs.reshape(-1, ROWS, SIZE)[best, np.arange(ROWS)]
    return weights, best % (steps + 1), np.all(losses[:, -1] > losses[:, 0], axis=0)


@pytest.mark.parametrize("rates, steps", [*(((rate,), 20) for rate in RATES), (RATES, 20), (RATES, 7), ((1e-3,), 1)])
def test_is_the_published_recipe(rates, steps):
    layer = make_layer(0)
    solution = solve(Adam(steps, rates), layer.problem, layer.pruned)
    weights, step, _ = best_of(layer, rates, steps)
    start = np.asarray(layer.pruned.weight)
    assert np.abs(solution.weight - weights).max() <= 1e-3 * np.abs(weights - start).max()
    np.testing.assert_array_equal(solution.steps, step)


@pytest.mark.parametrize("rates", [*((rate,) for rate in RATES), RATES])
def test_divergence_is_reported_and_never_handed_on(rates):
    """Rates 1e-2 and 1e-3 overshoot in every row here, 1e-4 in some."""
    layer = make_layer(4, size_of_weights=3e-3, spread=2.0)
    solution = solve(Adam(learning_rates=rates), layer.problem, layer.pruned)
    _, _, diverged = best_of(layer, rates)
    assert diverged.any() == (max(rates) >= 1e-4 and len(rates) == 1)
    assert diverged.all() == (min(rates) >= 1e-3)
    np.testing.assert_array_equal(solution.converged, ~diverged)
    assert (layer.loss(solution.weight) <= layer.loss(layer.pruned.weight)).all()


def test_a_start_that_no_step_improves_comes_back_to_the_last_bit():
    """The start is an optimum that even the smallest rate leaves upwards."""
    layer = make_layer(5, spread=2.0)
    optimum = solve(Exact(), layer.problem, layer.pruned).weight
    solution = solve(Adam(), layer.problem, Pruned(optimum, layer.pruned.keep))
    unmoved = np.asarray(solution.steps) == 0
    assert unmoved.sum() > ROWS // 2 and not solution.converged[unmoved].any()
    np.testing.assert_array_equal(solution.weight[unmoved], optimum[unmoved])
    assert (row_objective(layer.problem, solution.weight) <= row_objective(layer.problem, optimum)).all()


def test_what_it_says_of_a_row():
    problem = layer(np.random.default_rng(7), ROWS, SIZE, target="other")
    pruned = select(Wanda(), problem, Unstructured(0.5))
    solution = solve(Adam(), problem, pruned)
    np.testing.assert_allclose(solution.gap, optimality_residual(problem, pruned, solution.weight), rtol=1e-3)
    assert (solution.gap > 0).all() and (solution.steps > 0).all() and (solution.steps <= 20).all()
    assert (row_objective(problem, solution.weight) < row_objective(problem, pruned.weight)).all()


@pytest.mark.parametrize("shape", ["4x2", "8x1"])
def test_a_mesh_changes_nothing_and_no_loop_communicates(shape):
    """Ten rows do not divide over eight devices."""
    problem, pruned = make_layer(9).problem, make_layer(9).pruned
    program = jax.jit(RowSharding(make_mesh(shape)).solve(Adam())).lower(problem, pruned).compile()
    alone, sharded = solve(Adam(), problem, pruned), program(problem, pruned)
    np.testing.assert_allclose(sharded.weight, alone.weight, atol=1e-6)
    np.testing.assert_array_equal(sharded.converged, alone.converged)
    inside = text_inside_loops(program.as_text())
    assert inside and not COLLECTIVE.search(inside)
