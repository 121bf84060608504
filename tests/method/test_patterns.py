"""Masks: exact counts, the best scores kept, ties by index."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optima_tpu.errors import UserError
from optima_tpu.method.linalg.smallest import lowest, pairs_that_pay
from optima_tpu.method.patterns import NM, Unstructured, parse_pattern

PATTERNS = st.one_of(
    st.builds(Unstructured, st.floats(0, 0.99), st.sampled_from(["row", "layer"])),
    st.sampled_from([NM(2, 4), NM(4, 8), NM(6, 8), NM(1, 4), NM(8, 16), NM(2, 4, 8), NM(3, 4, 4), NM(4, 16, 2)]),
)


@settings(max_examples=30, deadline=None)
@given(PATTERNS, st.integers(1, 6), st.integers(0, 2**31), st.integers(1, 6))
def test_counts_are_exact_and_no_pruned_score_beats_a_kept_one_of_its_group(pattern, rows, seed, levels):
    # Few distinct levels: ties everywhere, as in 4-bit checkpoints.
    scores = np.random.default_rng(seed).integers(0, levels, (rows, 32)).astype(np.float32)
    keep = np.asarray(jax.jit(pattern.keep_mask)(scores))
    assert (~keep).sum() == pattern.pruned_count(scores.shape)
    if isinstance(pattern, NM):  # inputs j, j + stride, ... of every m * stride
        size = pattern.m * pattern.stride
        parts = [
            np.s_[:, first + j : first + size : pattern.stride] for first in range(0, 32, size) for j in range(pattern.stride)
        ]
    else:
        parts = [np.s_[:, :]]
    flat = isinstance(pattern, Unstructured) and pattern.group == "layer"
    lines = [(row, kept) for part in parts for row, kept in zip(scores[part], keep[part])]
    for group_scores, group_keep in [(scores.ravel(), keep.ravel())] if flat else lines:
        expected = len(group_keep) - group_keep.sum()
        # The rule itself, as a stable sort by (score, index).
        order = sorted(range(len(group_scores)), key=lambda i: (group_scores[i], i))
        assert sorted(np.flatnonzero(~group_keep)) == sorted(order[:expected])


@pytest.mark.parametrize(
    "columns, sparsity, expected", [(100, 0.29, 29), (576, 0.5, 288), (10, 0.0, 0), (3, 0.99, 2), (1000, 0.7, 700)]
)
def test_decimal_sparsities_count_as_written(columns, sparsity, expected):
    assert Unstructured(sparsity).pruned_count((2, columns)) == 2 * expected


def test_nan_scores_go_first():
    keep = Unstructured(0.5).keep_mask(jnp.array([[jnp.nan, -5.0, 3.0, jnp.nan]]))
    assert keep.tolist() == [[False, True, True, False]]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("0.5", Unstructured(0.5)),
        ("0.6/layer", Unstructured(0.6, "layer")),
        ("2:4", NM(2, 4)),
        ("6:8", NM(6, 8)),
        ("2:4@128", NM(2, 4, 128)),
    ],
)
def test_patterns_are_read_from_text(text, expected):
    assert parse_pattern(text) == expected
    assert parse_pattern(expected.text()) == expected


@pytest.mark.parametrize("text", ["1.0", "-0.1", "4:4", "0:4", "half", "2:4:8", "0.5/block", "nan", "2:4@", "2:4@0", "2@4:8"])
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(UserError, match="expected"):
        parse_pattern(text)


def test_an_nm_group_that_does_not_divide_the_inputs_is_refused():
    with pytest.raises(UserError, match="divisible by 4, got a layer with 6"):
        NM(2, 4).keep_mask(jnp.ones((2, 6)))


@pytest.mark.parametrize(
    "columns, advice",
    [
        (576, "divisible by 512, got a layer with 576; 2:4@16 fits it"),
        (36, "with 36; 2:4@9 fits it"),
        (37, "with 37; choose an M that divides it"),
    ],
)
def test_a_stride_that_does_not_fit_is_refused_with_one_that_does(columns, advice):
    with pytest.raises(UserError, match=advice):
        NM(2, 4, 128).pruned_count((1, columns))


def test_what_violates_a_stride_is_named():
    keep = np.arange(64) % 32 < 16  # inputs 0 to 15 of every 32
    assert NM(2, 4, 8).violation(keep[None]) is None and NM(2, 4, 8).holds(~keep[None])
    assert NM(2, 4).violation(keep[None]) and not NM(2, 4).holds(~keep[None])
    keep[33] = False
    message = "expected 2 kept of every 4, got 1 in row 0, group 9 (inputs 33 to 57 by 8), wrong in 1 of 16 groups"
    assert NM(2, 4, 8).violation(keep[None]) == message


# Few shapes: each is compiled.
@given(st.sampled_from([(1, 1), (4, 7)]), st.integers(2, 5), st.sampled_from(["row", "layer"]), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_the_lowest_of_every_group_are_found_with_ties_by_index(shape, levels, group, seed):
    rows, columns = shape
    rng = np.random.default_rng(seed)
    values = rng.choice([-np.inf, -3e20, -1.0, -0.0, 0.0, 1e-30, 1.0, 3e20, np.inf], size=levels)
    scores = values[rng.integers(0, levels, (rows, columns))].astype(np.float32)
    scores[rng.random(scores.shape) < 0.1] = np.nan
    flat = np.where(np.isnan(scores), -np.inf, scores).reshape((rows, columns) if group == "row" else (1, -1))
    counts = rng.integers(0, flat.shape[1] + 1, (len(flat), 1)).astype(np.int32)
    expected = np.zeros(flat.shape, bool)
    for line, count, found in zip(flat, counts[:, 0], expected):
        found[np.argsort(line, kind="stable")[:count]] = True
    found = jax.jit(lowest, static_argnames="group")(scores, counts, group)
    assert (np.asarray(found).reshape(flat.shape) == expected).all()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_the_pairs_that_pay_are_those_of_two_sorted_lists(seed):
    """With ties, and with infinities, as of what is kept already or pruned already; some rows are all of one kind."""
    rng = np.random.default_rng(seed)
    win, cost = rng.choice([0.0, 1e-30, 0.5, 1.0, 3e20], size=(2, 5, 8)).astype(np.float32)
    keep = rng.random((5, 8)) < rng.choice([0.0, 0.5, 1.0], size=(5, 1))
    win[keep], cost[~keep] = -np.inf, np.inf
    pairs = zip(np.sort(-win, axis=1), np.sort(cost, axis=1))
    found = jax.jit(pairs_that_pay)(win, cost)
    assert found.tolist() == [np.sum(-dearest > cheapest) for dearest, cheapest in pairs] and found.dtype == jnp.int32


def test_a_sparsity_below_one_leaves_a_weight():
    assert Unstructured(1 - 1e-12).pruned_in(4096) == 4095 and Unstructured(0.5).pruned_in(0) == 0
