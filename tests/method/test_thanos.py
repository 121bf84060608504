"""Thanos against a float64 port of its paper's algorithm, and what must hold whatever the port says."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optima_tpu.errors import UserError
from optima_tpu.method.patterns import NM, Unstructured
from optima_tpu.method.problem import LayerProblem
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.selectors import Thanos, Wanda
from tests.support import ports
from tests.support.meshes import mesh
from tests.support.problems import assert_obeys, layer, oracle, select
from tests.support.pruning import prune_matrices

ROW, LAYER = Unstructured(0.6, "row"), Unstructured(0.5, "layer")
PATTERNS = [ROW, Unstructured(0.7, "row"), LAYER, NM(2, 4), NM(6, 8)]
# (rows, columns, block, dead inputs): a last block of another size, dead inputs in two blocks; a block that no M
# divides, more columns than rows; one block, wider than the layer.
SHAPES = [((24, 40, 16, (3, 4, 35)), PATTERNS)]
SHAPES += [(shape, [ROW, LAYER, NM(2, 4)]) for shape in ((11, 96, 18, ()), (32, 24, 256, (5,)))]
patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


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


@patterns
def test_of_uncorrelated_inputs_it_is_wanda_ties_and_dead_inputs_included(pattern):
    """Nothing moves then, and all blocks take what one look at the matrix takes. Few scores: ties everywhere."""
    rng = np.random.default_rng(1)
    weight = rng.integers(-2, 3, (24, 40)).astype(np.float32)
    problem = LayerProblem(jnp.asarray(weight), jnp.diag(jnp.asarray(rng.choice([0.0, 1.0, 4.0], 40), jnp.float32)))
    pruned, expected = select(Thanos(16), problem, pattern), select(Wanda(), problem, pattern)
    assert (pruned.keep == expected.keep).all()
    assert (pruned.weight == expected.weight).all()
    assert_obeys(pruned, pattern)


@pytest.mark.parametrize("pattern", [LAYER, NM(2, 4)], ids=str)
def test_one_block_is_moved_to_the_damped_optimum(pattern):
    problem = problem_of(32, 24, (5,))
    pruned = select(Thanos(256), problem, pattern)
    ridge = 0.01 * jnp.mean(jnp.diagonal(problem.hessian)) * jnp.eye(24)
    best = oracle(LayerProblem(problem.weight, problem.hessian + ridge), pruned)
    assert np.abs(pruned.weight - best).max() <= 1e-4 * np.abs(best).max()


@pytest.mark.parametrize("pattern", [LAYER, ROW, NM(2, 4)], ids=str)
def test_dead_inputs_go_first_and_do_not_touch_the_others(pattern):
    problem = problem_of(24, 40, (3, 4, 35))
    pruned = select(Thanos(16), problem, pattern)
    dead = np.isin(np.arange(40), (3, 4, 35))
    kept = np.asarray(pruned.keep)[:, dead]
    assert not kept.any()
    # Whatever their weights: only the mask of an N:M group could tell, and there they go first as well.
    louder = LayerProblem(jnp.where(dead, 100 * problem.weight, problem.weight), problem.hessian)
    loud = select(Thanos(16), louder, pattern)
    assert (loud.keep == pruned.keep).all() and (loud.weight == pruned.weight).all()


def test_weights_of_dead_inputs_that_stay_keep_their_values():
    problem = problem_of(24, 40, range(1, 40))
    pruned = select(Thanos(16), problem, NM(2, 4))
    assert np.asarray(pruned.keep)[:, 4:].any()
    assert (pruned.weight == jnp.where(pruned.keep, problem.weight, 0.0))[:, 1:].all()


def test_the_target_of_the_problem_is_not_read():
    problem = problem_of(24, 40)
    once = select(Thanos(16), problem, NM(2, 4))
    again = select(Thanos(16), dataclasses.replace(problem, pull=jnp.ones_like(problem.weight)), NM(2, 4))
    assert (once.weight == again.weight).all() and (once.keep == again.keep).all()


@pytest.mark.parametrize(
    "pattern, rows", [(Unstructured(0.6, "layer"), 32), (Unstructured(0.6, "row"), 13), (NM(2, 4), 32)], ids=str
)
def test_the_mesh_does_not_change_the_result(pattern, rows):
    """Also with rows that it does not divide. Eight devices factorise at once, and none waits for ever."""
    problem, recipe = problem_of(rows, 40), Recipe(pattern, Thanos(8), None)

    def pruned(*shape):
        (weight,), (keep,), _ = jax.device_get(prune_matrices((problem.weight,), problem.hessian, recipe, mesh(*shape)))
        return weight, keep

    weight, keep = pruned(1, 1)
    for other, other_keep in (pruned(4, 2), pruned(2, 4)):
        assert (keep == other_keep).all()
        assert np.abs(weight - other).max() <= 1e-5 * np.abs(weight).max()


@pytest.mark.parametrize("settings", [{"block": 0}, {"damping": 0.0}, {"damping": -1.0}, {"damping": np.nan}], ids=str)
def test_settings_without_meaning_are_refused(settings):
    with pytest.raises(UserError, match="expected selector[.]"):
        Thanos(**settings)


def test_an_nm_group_that_does_not_divide_the_inputs_is_refused():
    with pytest.raises(UserError, match="divisible by 8, got a layer with 12"):
        Thanos()(problem_of(4, 12), NM(4, 8))


def test_factorisations_that_run_side_by_side_are_done_where_they_are_called(monkeypatch):
    """The masks of a group are chosen at the same time; two batches would wait for the same threads, and may for ever."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # as where this was seen
    text = jax.jit(Thanos(block=16), static_argnums=1).lower(problem_of(24, 40), Unstructured(0.5)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @lapack" in line and 'num_batch_dims = "1"' in line]
    assert calls and all(re.search(r"-> \(?tensor<1x", call) for call in calls), calls
