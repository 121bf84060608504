"""Each selector against its published formula, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from optima_tpu.patterns import NM, Unstructured
from optima_tpu.problem import self_target
from optima_tpu.selectors import Magnitude, Wanda
from tests.helpers import layer


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.6, "layer"), NM(2, 4)], ids=str)
def test_wanda_keeps_the_largest_products_of_weight_and_input_norm(pattern):
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((200, 16)) * np.exp(rng.standard_normal(16))
    weight = rng.standard_normal((8, 16))
    problem = self_target(jnp.asarray(weight, jnp.float32), jnp.asarray(inputs.T @ inputs / 200, jnp.float32))
    pruned = Wanda()(problem, pattern)
    scores = np.abs(weight) * np.linalg.norm(inputs, axis=0)
    keep = np.asarray(pruned.keep)
    groups = {"row": scores.shape, "layer": (1, -1)}[pattern.group] if isinstance(pattern, Unstructured) else (-1, pattern.m)
    for group, kept in zip(scores.reshape(groups), keep.reshape(groups)):
        assert group[kept].min() > group[~kept].max()
    assert (np.asarray(pruned.weight) == np.where(keep, problem.weight, 0)).all()


def test_magnitude_looks_at_weights_alone():
    problem = layer(np.random.default_rng(1), 6, 16, spread=3.0)
    keep = np.asarray(Magnitude()(problem, Unstructured(0.5, "layer")).keep)
    size = np.abs(np.asarray(problem.weight))
    assert size[keep].min() > size[~keep].max() and keep.sum() == 48


def test_shift_zero_ranks_the_weights_of_dead_inputs_by_size():
    """With a dead input the plain score ties at zero and the first of them goes; the shifted one keeps the larger."""
    hessian = jnp.diag(jnp.array([0.0, 0.0, 1.0, 4.0]))
    problem = self_target(jnp.array([[5.0, 1.0, 0.1, 0.1]]), hessian)
    # Scores: 0, 0, 0.1, 0.2 against 5, 1, 0.1 sqrt(2), 0.1 sqrt(5).
    assert Wanda()(problem, Unstructured(0.5)).keep.tolist() == [[False, False, True, True]]
    assert Wanda(shift_zero=True)(problem, Unstructured(0.5)).keep.tolist() == [[True, True, False, False]]
    dead = problem._replace(hessian=jnp.zeros((4, 4)))
    assert Wanda(shift_zero=True)(dead, Unstructured(0.5)).keep.tolist() == [[True, True, False, False]]
