"""What is special to Adam. What every solver must do is in test_solvers.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optima_tpu.errors import UserError
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
    """A linear layer with a bias, as it is: its data in float64, and the problem that the solver is given."""

    inputs: np.ndarray  # [tokens, d_in]
    bias: np.ndarray  # [d_out]
    problem: LayerProblem
    pruned: Pruned

    @property
    def weight(self) -> np.ndarray:
        return np.asarray(self.problem.weight, np.float64)

    def miss(self, weight: np.ndarray, bias: bool = True) -> np.ndarray:
        """``(X V' + b) - (X W' + b)``, [tokens, d_out]. ``bias=False`` forgets the first b, as the published code."""
        wanted = self.inputs @ self.weight.T + self.bias
        return self.inputs @ np.asarray(weight, np.float64).T + bias * self.bias - wanted

    def loss(self, weight: np.ndarray, bias: bool = True) -> np.ndarray:
        """Mean square over the tokens of what every output is off by."""
        return np.mean(self.miss(weight, bias) ** 2, axis=0)


def make_layer(seed: int, *, size_of_weights: float = 0.1, spread: float = 1.0) -> Layer:
    rng = np.random.default_rng(seed)
    mixing = np.eye(SIZE) + rng.standard_normal((SIZE, SIZE)) / np.sqrt(SIZE)
    # Not centred, as no activation of a language model is.
    inputs = rng.standard_normal((TOKENS, SIZE)) @ mixing + rng.standard_normal(SIZE)
    inputs = inputs * np.exp(spread * rng.standard_normal(SIZE))
    weight = jnp.asarray(size_of_weights * rng.standard_normal((ROWS, SIZE)), jnp.float32)
    problem = LayerProblem(weight, jnp.asarray(inputs.T @ inputs / TOKENS, jnp.float32))
    return Layer(inputs, 5 * rng.standard_normal(ROWS), problem, select(Wanda(), problem, Unstructured(0.5)))


def descend(layer: Layer, rate: float, steps: int = 20, bias: bool = True) -> np.ndarray:
    """Every point that Adam visits, [steps + 1, d_out, d_in] float64: the published recipe, on the data."""
    keep = np.asarray(layer.pruned.keep)
    weight = np.asarray(layer.pruned.weight, np.float64)
    first, second, visited = np.zeros_like(weight), np.zeros_like(weight), [weight]
    for step in range(steps):
        gradient = np.where(keep, 2 * layer.miss(weight, bias).T @ layer.inputs / TOKENS, 0)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        mean, square = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        weight = weight - rate * (1 - step / steps) * mean / (np.sqrt(square) + 1e-8)
        visited.append(weight)
    return np.stack(visited)


def published_choice(layer: Layer, bias: bool = True) -> np.ndarray:
    """One learning rate for the whole matrix, by the total loss of its last point."""
    ends = [descend(layer, rate, bias=bias)[-1] for rate in RATES]
    return min(ends, key=lambda weight: layer.loss(weight, bias).sum())


def best_of(layer: Layer, rates: tuple[float, ...], steps: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(weights, step, whether every rate ended above its start) of each row."""
    runs = np.stack([descend(layer, rate, steps) for rate in rates])
    losses = np.stack([[layer.loss(weight) for weight in run] for run in runs])
    flat = losses.reshape(-1, ROWS)
    best = np.argmin(flat, axis=0)
    weights = runs.reshape(-1, ROWS, SIZE)[best, np.arange(ROWS)]
    return weights, best % (steps + 1), np.all(losses[:, -1] > losses[:, 0], axis=0)


@pytest.mark.parametrize("rates, steps", [*(((rate,), 20) for rate in RATES), (RATES, 20), (RATES, 7), ((1e-3,), 1)])
def test_is_the_published_recipe_on_a_layer_with_a_bias(rates, steps):
    layer = make_layer(0)
    solution = solve(Adam(steps, rates), layer.problem, layer.pruned)
    weights, step, _ = best_of(layer, rates, steps)
    start = np.asarray(layer.pruned.weight)
    assert np.abs(solution.weight - weights).max() <= 1e-3 * np.abs(weights - start).max()
    np.testing.assert_array_equal(solution.steps, step)


def test_the_steps_are_those_of_torch(monkeypatch):
    torch = pytest.importorskip("torch")
    # torchax, which tests of models import, names an accelerator without streams, and torch 2.15 asks each for its stream.
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **options: None)
    layer = make_layer(1)
    keep = torch.tensor(np.asarray(layer.pruned.keep))
    inputs, wanted = torch.tensor(layer.inputs), torch.tensor(layer.inputs @ layer.weight.T)
    weight = torch.nn.Parameter(torch.tensor(np.asarray(layer.pruned.weight, np.float64)))
    adam = torch.optim.Adam([weight], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(adam, start_factor=1.0, end_factor=0.0, total_iters=20)
    for _ in range(20):
        adam.zero_grad()
        torch.nn.functional.mse_loss(inputs @ weight.T, wanted).backward()
        adam.step()
        schedule.step()
        weight.data[~keep] = 0
    found = solve(Adam(learning_rates=(1e-3,)), layer.problem, layer.pruned)
    assert (found.steps == 20).all()  # the last point is the best, so it is what comes back
    last, start = weight.detach().numpy(), np.asarray(layer.pruned.weight)
    assert np.abs(found.weight - last).max() <= 1e-3 * np.abs(last - start).max()


def test_a_bias_cancels():
    """The objective from the Hessian is the layer's own loss, bias and all. Forgetting one of the two ruins it."""
    layer = make_layer(2)
    solution = solve(Adam(), layer.problem, layer.pruned)
    before, after = layer.loss(layer.pruned.weight), layer.loss(solution.weight)
    assert np.allclose(row_objective(layer.problem, solution.weight), after, rtol=1e-4)
    assert (after < before).all()
    remembered, forgotten = (layer.loss(published_choice(layer, bias)).sum() for bias in (True, False))
    assert remembered < before.sum() < forgotten


def test_leaves_at_most_the_error_of_the_published_choice():
    layer = make_layer(3)
    ours = layer.loss(solve(Adam(), layer.problem, layer.pruned).weight)
    published = layer.loss(published_choice(layer))
    assert (ours <= published * (1 + 1e-5)).all() and ours.sum() < 0.999 * published.sum()


@pytest.mark.parametrize("rates", [*((rate,) for rate in RATES), RATES])
def test_divergence_is_reported_and_never_handed_on(rates):
    """Small weights behind inputs of very different scale: 1e-2 and 1e-3 overshoot in every row, 1e-4 in some."""
    layer = make_layer(4, size_of_weights=3e-3, spread=2.0)
    solution = solve(Adam(learning_rates=rates), layer.problem, layer.pruned)
    _, _, diverged = best_of(layer, rates)
    assert diverged.any() == (max(rates) >= 1e-4 and len(rates) == 1)
    assert diverged.all() == (min(rates) >= 1e-3)
    np.testing.assert_array_equal(solution.converged, ~diverged)
    assert (layer.loss(solution.weight) <= layer.loss(layer.pruned.weight)).all()


def test_a_start_that_no_step_improves_comes_back_to_the_last_bit():
    """The optimum of an ill-conditioned layer, which even the smallest learning rate leaves upwards."""
    layer = make_layer(5, spread=2.0)
    optimum = solve(Exact(), layer.problem, layer.pruned).weight
    solution = solve(Adam(), layer.problem, Pruned(optimum, layer.pruned.keep))
    unmoved = np.asarray(solution.steps) == 0
    assert unmoved.sum() > ROWS // 2 and not solution.converged[unmoved].any()
    np.testing.assert_array_equal(solution.weight[unmoved], optimum[unmoved])
    assert (row_objective(layer.problem, solution.weight) <= row_objective(layer.problem, optimum)).all()


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**40], ids="{:.0e}".format)
def test_the_scale_of_the_loss_changes_nothing(scale):
    """Where the published eps would be felt: gradients of 1e-18. A power of two leaves no rounding behind."""
    problem, pruned = make_layer(6).problem, make_layer(6).pruned
    scaled = LayerProblem(problem.weight, problem.hessian * scale)
    once, again = solve(Adam(), problem, pruned), solve(Adam(), scaled, pruned)
    np.testing.assert_array_equal(once.weight, again.weight)
    np.testing.assert_array_equal(once.steps, again.steps)


def test_what_it_says_of_a_row():
    problem = layer(np.random.default_rng(7), ROWS, SIZE, target="other")
    pruned = select(Wanda(), problem, Unstructured(0.5))
    solution = solve(Adam(), problem, pruned)
    np.testing.assert_allclose(solution.gap, optimality_residual(problem, pruned, solution.weight), rtol=1e-3)
    assert (solution.gap > 0).all() and (solution.steps > 0).all() and (solution.steps <= 20).all()
    assert (row_objective(problem, solution.weight) < row_objective(problem, pruned.weight)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("array", ["weight", "pull"])
def test_a_row_that_is_not_finite_keeps_its_weights_and_says_so(bad, array):
    clean = make_layer(8)
    problem = dataclasses.replace(clean.problem, pull=jnp.zeros_like(clean.problem.weight))
    problem = dataclasses.replace(problem, **{array: getattr(problem, array).at[3, 5].set(bad)})
    solution, expected = solve(Adam(), problem, clean.pruned), solve(Adam(), clean.problem, clean.pruned)
    np.testing.assert_array_equal(solution.weight[3], clean.pruned.weight[3])
    assert not solution.converged[3] and np.isinf(solution.gap[3]) and solution.steps[3] == 0
    others = np.arange(ROWS) != 3
    np.testing.assert_array_equal(solution.weight[others], expected.weight[others])
    np.testing.assert_array_equal(solution.converged[others], expected.converged[others])


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


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"steps": 0}, "steps"),
        ({"learning_rates": ()}, "one number or more"),
        ({"learning_rates": (1e-2, 0.0)}, "above 0"),
        ({"learning_rates": (float("nan"),)}, "finite"),
        ({"learning_rates": (float("inf"),)}, "finite"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(UserError, match=words):
        Adam(**settings)
