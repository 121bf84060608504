"""SparseGPT against a float64 port of the published algorithm, and what must hold of it without one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optima_tpu.errors import UserError
from optima_tpu.method.patterns import NM, Unstructured
from optima_tpu.method.problem import LayerProblem
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.selectors import SparseGPT, Wanda
from tests.support import ports
from tests.support.meshes import mesh
from tests.support.problems import correlated_hessian, layer, row_objective
from tests.support.pruning import prune_matrices

ROWS, INPUTS, SELECTOR = 24, 72, SparseGPT(block=16)
PATTERNS = [
    *(Unstructured(share, group) for share in (0.5, 0.6, 0.7) for group in ("layer", "row")),
    NM(2, 4),
    NM(4, 8),
    NM(6, 8),
]
patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


@functools.partial(jax.jit, static_argnums=(0, 2))
def select(selector, problem, pattern):
    return selector(problem, pattern)


def with_dead_inputs(problem, dead):
    """The same layer where the inputs ``dead`` are always zero."""
    index = jnp.array(dead)
    hessian = problem.hessian.at[index].set(0.0).at[:, index].set(0.0)
    return LayerProblem(problem.weight, hessian)


def assert_same_as_port(problem, pattern, selector):
    pruned = select(selector, problem, pattern)
    weight, keep = ports.sparsegpt(
        np.asarray(problem.weight), np.asarray(problem.hessian), pattern, selector.block, selector.damping
    )
    assert (np.asarray(pruned.keep) == keep).all()
    assert np.abs(np.asarray(pruned.weight) - weight).max() <= 1e-4 * np.abs(weight).max()
    zeros = np.asarray(pruned.weight)[~keep]
    assert (zeros == 0).all() and not np.signbit(zeros).any()


@patterns
def test_mask_and_weights_are_those_of_the_published_algorithm(pattern):
    """With a smaller last block."""
    for seed in (0, 3, 4):  # no two scores at the edge of a mask are so close that rounding could decide
        assert_same_as_port(layer(np.random.default_rng(seed), ROWS, INPUTS), pattern, SELECTOR)


@pytest.mark.parametrize(
    "pattern, rows, inputs, block",
    [
        (Unstructured(0.5, "layer"), 24, 32, 128),  # one block
        (Unstructured(0.5, "layer"), 10, 64, 16),  # whole blocks
        (Unstructured(0.5, "layer"), 7, 24, 3),
        (NM(4, 8), 16, 48, 21),  # groups that do not divide the block
        (NM(4, 8), 7, 24, 3),  # a block below one group
    ],
    ids=str,
)
def test_every_shape_is_pruned_as_published(pattern, rows, inputs, block):
    assert_same_as_port(layer(np.random.default_rng(3), rows, inputs), pattern, SparseGPT(block=block))


def test_damping_is_a_share_of_the_mean_of_the_diagonal():
    """Where the Hessian is singular: 16 tokens for 72 inputs."""
    problem = layer(np.random.default_rng(1), ROWS, INPUTS, tokens=16)
    assert_same_as_port(problem, Unstructured(0.5, "layer"), SparseGPT(block=16, damping=0.1))


@patterns
def test_dead_inputs_go_first_and_move_nothing(pattern):
    # More dead inputs in the first block than any pattern prunes there, so that some of their weights stay.
    dead = [*range(14), 17, 30]
    problem = with_dead_inputs(layer(np.random.default_rng(3), ROWS, INPUTS), dead)
    assert_same_as_port(problem, pattern, SELECTOR)
    pruned = select(SELECTOR, problem, pattern)
    weight, keep = np.asarray(pruned.weight), np.asarray(pruned.keep)
    assert keep[:, dead].any()
    assert (weight[:, dead] == np.where(keep, problem.weight, 0.0)[:, dead]).all()
    # Among the scores of 0 the index decides, whatever the weights are.
    factors = jnp.arange(1.0, 1.0 + len(dead))
    larger = dataclasses.replace(problem, weight=problem.weight.at[:, jnp.array(dead)].multiply(factors))
    assert (select(SELECTOR, larger, pattern).keep == keep).all()


@settings(max_examples=10, deadline=None)
@given(
    st.one_of(
        st.builds(Unstructured, st.floats(0, 0.99), st.sampled_from(["row", "layer"])),
        st.sampled_from([NM(2, 4), NM(1, 4), NM(6, 8)]),
    ),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 50),
    st.integers(0, 2**31),
)
def test_counts_are_exact_whatever_the_shape(pattern, rows, eighths, block, seed):
    rng = np.random.default_rng(seed)
    inputs = 8 * eighths if isinstance(pattern, NM) else int(rng.integers(1, 8 * eighths + 1))
    # Few distinct weights and dead inputs: ties.
    weight, hessian = np.round(rng.standard_normal((rows, inputs))).astype(np.float32), correlated_hessian(rng, inputs)
    for dead in (0, inputs // 2):
        hessian[dead] = hessian[:, dead] = 0
    pruned = select(SparseGPT(block=block), LayerProblem(weight, hessian), pattern)
    keep = np.asarray(pruned.keep)
    assert (~keep).sum() == pattern.pruned_count(keep.shape)
    assert (np.asarray(pruned.weight)[~keep] == 0).all() and np.isfinite(pruned.weight).all()
    if isinstance(pattern, NM):
        assert (keep.reshape(-1, pattern.m).sum(axis=1) == pattern.n).all()
    elif pattern.group == "row":
        assert ((~keep).sum(axis=1) == pattern.pruned_in(inputs)).all()


def test_equal_scores_go_by_index_rows_first():
    problem = LayerProblem(np.ones((3, 4), np.float32), np.eye(4, dtype=np.float32))
    whole, halves = (select(SparseGPT(block=block), problem, Unstructured(0.5, "layer")).keep for block in (4, 2))
    assert whole.astype(int).tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]]
    # Six weights in a block of two inputs, of which three go.
    assert halves.astype(int).tolist() == [[0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]]


@patterns
def test_the_last_input_is_optimal_given_all_others(pattern):
    """What a sweep guarantees: the gradient of the damped objective vanishes there, in rows that keep it."""
    problem = layer(np.random.default_rng(3), ROWS, INPUTS)
    problem = dataclasses.replace(problem, weight=problem.weight.at[:, -1].multiply(10.0))  # most rows keep it
    pruned = select(SELECTOR, problem, pattern)
    hessian = np.asarray(problem.hessian, np.float64)
    change = np.asarray(pruned.weight, np.float64) - np.asarray(problem.weight, np.float64)
    damped = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(INPUTS)
    gradient, terms = change @ damped[:, -1], np.abs(change) @ np.abs(damped[:, -1])
    kept = np.asarray(pruned.keep)[:, -1]
    assert kept.sum() > ROWS / 2
    assert (np.abs(gradient)[kept] <= 1e-4 * terms[kept]).all()


@patterns
def test_the_layers_error_is_below_wandas(pattern):
    ratios = []
    for seed in range(4):
        # Inputs of like energy: every block loses the same share of its weights, whatever they carry.
        problem = layer(np.random.default_rng(seed), ROWS, INPUTS, spread=0.2)
        ours, wandas = (
            row_objective(problem, select(selector, problem, pattern).weight).sum() for selector in (SELECTOR, Wanda())
        )
        ratios.append(ours / wandas)
    assert np.mean(ratios) < 0.95


def test_another_target_does_not_change_the_sweep():
    problem = layer(np.random.default_rng(4), ROWS, INPUTS, target="other")
    own = dataclasses.replace(problem, pull=None)
    for one, two in zip(select(SELECTOR, problem, NM(2, 4)), select(SELECTOR, own, NM(2, 4))):
        assert (one == two).all()


@pytest.mark.parametrize("pattern, rows", [(Unstructured(0.5, "layer"), 16), (NM(2, 4), 13)], ids=str)
def test_the_mesh_does_not_change_the_result(pattern, rows):
    """Rows that divide the mesh, and rows that do not."""
    problem = layer(np.random.default_rng(5), rows, INPUTS)
    alone = select(SELECTOR, problem, pattern)
    recipe = Recipe(pattern, SELECTOR, None)
    for shape in ((1, 1), (4, 2), (2, 4)):
        (weight,), (keep,), _ = prune_matrices((problem.weight,), problem.hessian, recipe, mesh(*shape))
        assert (np.asarray(keep) == np.asarray(alone.keep)).all()
        assert np.abs(np.asarray(weight) - np.asarray(alone.weight)).max() <= 1e-5 * np.abs(alone.weight).max()


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"block": 0}, "selector.block of at least 1, got 0"),
        ({"damping": 0.0}, "above 0"),
        ({"damping": float("nan")}, "above 0"),
        ({"damping": float("inf")}, "finite"),
    ],
)
def test_impossible_settings_are_refused(options, expected):
    with pytest.raises(UserError, match=expected):
        SparseGPT(**options)


def test_an_nm_group_that_does_not_divide_the_inputs_is_refused():
    with pytest.raises(UserError, match="divisible by 4, got a layer with 6"):
        SparseGPT()(layer(np.random.default_rng(7), 2, 6), NM(2, 4))
