"""SparseGPT against a float64 port of its algorithm, and by properties."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optima_tpu.method.patterns import NM, Unstructured
from optima_tpu.method.problem import LayerProblem
from optima_tpu.method.selectors import SparseGPT
from tests.support import ports
from tests.support.problems import correlated_hessian, layer, select

ROWS, INPUTS, SELECTOR = 24, 72, SparseGPT(block=16)
PATTERNS = [
    *(Unstructured(share, group) for share in (0.5, 0.6, 0.7) for group in ("layer", "row")),
    NM(2, 4),
    NM(4, 8),
    NM(6, 8),
]
patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


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
def test_dead_inputs_are_pruned_as_published_and_move_nothing(pattern):
    # More dead inputs in the first block than any pattern prunes there, so that some of their weights stay.
    dead = [*range(14), 17, 30]
    problem = with_dead_inputs(layer(np.random.default_rng(3), ROWS, INPUTS), dead)
    assert_same_as_port(problem, pattern, SELECTOR)
    pruned = select(SELECTOR, problem, pattern)
    weight, keep = np.asarray(pruned.weight), np.asarray(pruned.keep)
    assert keep[:, dead].any()
    assert (weight[:, dead] == np.where(keep, problem.weight, 0.0)[:, dead]).all()


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
