"""The objective of a row, against float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.problems import layer, wide

DAMPING = 0.5


@pytest.fixture(scope="module", params=["self", "other"])
def problem(request):
    return layer(np.random.default_rng(5), 6, 20, target=request.param)


@pytest.fixture(scope="module")
def weight(problem):
    return problem.weight + jnp.asarray(np.random.default_rng(6).standard_normal(problem.weight.shape), jnp.float32)


def expected(problem, weight):
    """(output, displacement, value, residual) in float64, with the damping."""
    dense, hessian, pull = wide(problem)
    change, diagonal = np.asarray(weight, np.float64) - dense, np.diag(hessian)
    image = change @ hessian
    output, displacement = (change * image).sum(axis=1), (change**2 * diagonal).sum(axis=1)
    value = output + DAMPING * displacement - 2 * (pull * change).sum(axis=1)
    return output, displacement, value, pull - image - DAMPING * diagonal * change


def test_errors_are_without_damping_and_pull(problem, weight):
    errors = dataclasses.replace(problem, damping=DAMPING).errors(weight)
    output, displacement, _, _ = expected(problem, weight)
    np.testing.assert_allclose(errors.output, output, rtol=1e-5)
    np.testing.assert_allclose(errors.displacement, displacement, rtol=1e-5)


def test_value_and_residual_count_the_damping(problem, weight):
    damped = dataclasses.replace(problem, damping=DAMPING, offset=jnp.arange(6.0))
    _, _, value, residual = expected(problem, weight)
    np.testing.assert_allclose(damped.value(weight), value + np.arange(6), rtol=1e-5)
    np.testing.assert_allclose(damped.endpoint(weight).residual, residual, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(damped.value(weight, damped.errors(weight)), value + np.arange(6), rtol=1e-5)


def test_the_energy_is_the_error_of_pruning_everything(problem):
    np.testing.assert_allclose(problem.energy(), problem.errors(jnp.zeros_like(problem.weight)).output, rtol=1e-5)
