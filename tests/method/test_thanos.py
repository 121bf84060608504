"""Thanos against a float64 port of its paper, and by its properties."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optima_tpu.method.patterns import NM, Unstructured
from optima_tpu.method.problem import LayerProblem
from optima_tpu.method.selectors import Thanos
from tests.support import ports
from tests.support.problems import assert_obeys, layer, select

ROW, LAYER = Unstructured(0.6, "row"), Unstructured(0.5, "layer")
PATTERNS = [ROW, Unstructured(0.7, "row"), LAYER, NM(2, 4), NM(6, 8)]
# (rows, columns, block, dead inputs): a last block of another size, dead inputs in two blocks; a block that no M
# divides, more columns than rows; one block, wider than the layer.
SHAPES = [((24, 40, 16, (3, 4, 35)), PATTERNS)]
SHAPES += [(shape, [ROW, LAYER, NM(2, 4)]) for shape in ((11, 96, 18, ()), (32, 24, 256, (5,)))]


def problem_of(rows, columns, dead=(), seed=0, **settings) -> LayerProblem:
    problem = layer(np.random.default_rng(seed), rows, columns, **settings)
    index = jnp.array(dead, int)
    return LayerProblem(problem.weight, problem.hessian.at[index].set(0.0).at[:, index].set(0.0))


@pytest.mark.parametrize("shape, pattern", [(shape, pattern) for shape, some in SHAPES for pattern in some], ids=str)
def test_is_the_published_algorithm(shape, pattern):
    rows, columns, block, dead = shape
    problem = problem_of(rows, columns, dead)
    pruned = select(Thanos(block), problem, pattern)
    weight, keep = ports.thanos(np.asarray(problem.weight), np.asarray(problem.hessian), pattern, block, 0.01)
    assert (pruned.keep == keep).all()
    assert np.abs(pruned.weight - weight).max() <= 1e-4 * np.abs(weight).max()
    assert_obeys(pruned, pattern)


def test_weights_of_dead_inputs_that_stay_keep_their_values():
    problem = problem_of(24, 40, range(1, 40))
    pruned = select(Thanos(16), problem, NM(2, 4))
    assert np.asarray(pruned.keep)[:, 4:].any()
    assert (pruned.weight == jnp.where(pruned.keep, problem.weight, 0.0))[:, 1:].all()


def test_factorisations_that_run_side_by_side_are_done_where_they_are_called(monkeypatch):
    """Two batches at once could wait for the same threads for ever."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # as where this was seen
    text = jax.jit(Thanos(block=16), static_argnums=1).lower(problem_of(24, 40), Unstructured(0.5)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @lapack" in line and 'num_batch_dims = "1"' in line]
    assert calls and all(re.search(r"-> \(?tensor<1x", call) for call in calls), calls
