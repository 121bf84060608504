"""Masks: exact counts, the best scores kept, ties by index."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optima_tpu.errors import UserError
from optima_tpu.method.linalg.smallest import lowest, pairs_that_pay, totals
from optima_tpu.method.patterns import NM, Dense, Heads, Neurons, Unstructured, WholeInputs, parse_pattern

PATTERNS = st.one_of(
    st.builds(Unstructured, st.floats(0, 0.99), st.sampled_from(["row", "layer"])),
    st.sampled_from([NM(2, 4), NM(4, 8), NM(6, 8), NM(1, 4), NM(8, 16), NM(2, 4, 8), NM(3, 4, 4), NM(4, 16, 2)]),
    st.sampled_from([WholeInputs(0.25, 4), WholeInputs(0.4, 1), WholeInputs(0.5, 3), WholeInputs(0.0), Neurons(0.5, 16)]),
    st.sampled_from([Dense(), Heads(0.5, total=4), Heads(0.3, total=8), Heads(0.25, 2, 8), Heads(0.7, total=2)]),
)


@settings(max_examples=30, deadline=None)
@given(PATTERNS, st.sampled_from([1, 5]), st.integers(0, 2**31), st.integers(1, 6))
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
    if isinstance(pattern, WholeInputs):
        width = 32 // pattern.parts_in(32)
        assert (keep == np.repeat(keep[:1, ::width], width, axis=1)).all()
        scores, keep = scores.sum(axis=0).reshape(1, -1, width).sum(axis=2), keep[:1, ::width]
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
        ("dense", Dense()),
        ("0.25/input", WholeInputs(0.25, 128)),
        ("0.25/input@64", WholeInputs(0.25, 64)),
        ("0.3/neuron", Neurons(0.3)),
        ("0.3/neuron@1", Neurons(0.3, 1)),
        ("0.33/head", Heads(0.33)),
        ("0.33/head@2", Heads(0.33, 2)),
    ],
)
def test_patterns_are_read_from_text(text, expected):
    assert parse_pattern(text) == expected
    assert parse_pattern(expected.text()) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("1.0", "-0.1", "4:4", "0:4", "half", "2:4:8", "0.5/block", "nan", "2:4@", "2:4@0", "2@4:8", "2:4/input"),
        *("1/input", "-1/input", "0.5/input@", "0.5/input@0", "0.5/input@x", "x/neuron"),
    ],
)
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(UserError, match="expected"):
        parse_pattern(text)


@pytest.mark.parametrize(
    "text, meant", [("2/4", "2:4"), ("20%", "0.2"), ("50%/row", "0.5/row"), ("25%/neuron@64", "0.25/neuron@64")]
)
def test_a_pattern_of_another_program_is_named_as_it_is_here(text, meant):
    with pytest.raises(UserError, match=rf"; did you mean {meant}\?$"):
        parse_pattern(text)
    assert parse_pattern(meant)


@pytest.mark.parametrize(
    "columns, advice",
    [(576, "by 512, got a layer with 576; 2:4@16 fits"), (36, "2:4@9 fits"), (37, "choose an M that divides it")],
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
    for line, count, row in zip(flat, counts[:, 0], expected):
        row[np.argsort(line, kind="stable")[:count]] = True
    actual = jax.jit(lowest, static_argnames="group")(scores, counts, group)
    assert (np.asarray(actual).reshape(flat.shape) == expected).all()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_the_pairs_that_pay_are_those_of_two_sorted_lists(seed):
    """With ties, infinities, and rows that are all kept or all pruned."""
    rng = np.random.default_rng(seed)
    win, cost = rng.choice([0.0, 1e-30, 0.5, 1.0, 3e20], size=(2, 5, 8)).astype(np.float32)
    keep = rng.random((5, 8)) < rng.choice([0.0, 0.5, 1.0], size=(5, 1))
    win[keep], cost[~keep] = -np.inf, np.inf
    pairs = zip(np.sort(-win, axis=1), np.sort(cost, axis=1))
    counts = jax.jit(pairs_that_pay)(win, cost)
    assert counts.tolist() == [np.sum(-dearest > cheapest) for dearest, cheapest in pairs] and counts.dtype == jnp.int32


def test_a_sparsity_below_one_leaves_a_weight():
    assert Unstructured(1 - 1e-12).pruned_in(4096) == 4095 and Unstructured(0.5).pruned_in(0) == 0


def test_kept_inputs_come_in_multiples():
    assert [WholeInputs(0.25).kept(columns) for columns in (1536, 8960, 4864)] == [1152, 6784, 3712]
    assert WholeInputs(0.25, 1).kept(101) == 76 and WholeInputs(0.0).kept(100) == 100
    assert WholeInputs(0.25).pruned_count((576, 1536)) == 576 * 384


def test_heads_are_cut_by_the_nearest_number_a_half_down():
    counts = {(0.33, 3): 2, (0.5, 3): 2, (0.51, 3): 1, (0.25, 8): 6, (0.33, 8): 5, (0.0, 3): 3}
    assert {(share, heads): Heads(share).kept(heads) for share, heads in counts} == counts
    assert Heads(0.5, 4).kept(32) == Heads(0.5, 4).kept(30) == 16 and Heads(0.33, total=3).pruned_count((576, 576)) == 576 * 192
    with pytest.raises(UserError, match=r"how wide a head is, where the pattern is 0.33/head, got a layer .* take 0.33/input$"):
        Heads(0.33).pruned_count((576, 576))


@pytest.mark.parametrize(
    "pattern, columns, instead",
    [
        (WholeInputs(0.05), 1536, "0.09/input or 0.05/input@64"),
        (WholeInputs(0.25), 96, "0.25/input@8"),
        (Neurons(0.25), 32, "0.25/neuron@8"),
        (WholeInputs(0.01, 1), 32, "0.04/input@1"),
        (WholeInputs(0.5), 1, "another pattern, such as 2:4"),
        (Heads(0.1), 3, "0.34/head"),
        (Heads(0.1, 4), 32, "0.13/head@4 or 0.1/head"),
        (Heads(0.9), 3, "0.67/head"),
        (Heads(0.5), 1, "another pattern, such as 2:4"),
    ],
)
def test_a_share_that_prunes_nothing_or_all_is_refused_with_one_that_works(pattern, columns, instead):
    rounded = f", since the kept number is rounded up to a multiple of {pattern.multiple}" if pattern.multiple > 1 else ""
    with pytest.raises(UserError, match=rf" none of {columns:,} {pattern.word}s?{rounded}; take {instead}$"):
        pattern.kept(columns)
    for text in instead.split(" or ") if "/" in instead else ():
        assert 0 < parse_pattern(text).kept(columns) < columns


def test_what_violates_whole_inputs_is_named():
    pattern, keep = WholeInputs(0.5, 2), np.ones((3, 8), bool)
    keep[:, [1, 2, 5, 6]] = False
    assert pattern.holds(~keep) and pattern.violation(keep) is None
    assert pattern.violation(keep | (np.arange(8) == 1)) == "expected 4 of 8 inputs pruned in all rows, got 3"
    fewer = keep & (np.arange(8) != 0)
    assert pattern.violation(fewer) == "expected 4 of 8 inputs pruned in all rows, got 5"
    assert pattern.violation(fewer, or_fewer=True) is None and pattern.holds(~fewer)
    ragged = keep.copy()
    ragged[1, 3] = False
    assert pattern.violation(ragged) == "expected every input pruned in all rows or in none, got input 3 pruned in some"
    assert pattern.violation(ragged, or_fewer=True) is None


@given(st.sampled_from([1, 3, 4, 33]), st.integers(0, 2**32 - 1), st.sampled_from([0, -100, 100]))  # few: each is compiled
@settings(max_examples=30, deadline=None)
def test_totals_are_sums_that_do_not_depend_on_the_order_of_rows(rows, seed, exponent):
    rng = np.random.default_rng(seed)
    scores = (rng.standard_normal((rows, 8)) * 2.0**exponent * np.exp(rng.standard_normal(8))).astype(np.float32)
    result = np.asarray(totals(jnp.asarray(scores)))
    assert (result == totals(jnp.asarray(scores[rng.permutation(rows)]))).all()
    sums = scores.sum(axis=0, dtype=np.float64)
    unit = 2.0 ** (30 - rows.bit_length() - np.frexp(np.abs(scores).max())[1])
    np.testing.assert_allclose(result[0], sums * unit, rtol=1e-6, atol=1e-6 * np.abs(scores).max() * unit)


def test_an_input_with_an_unknown_score_goes_first():
    scores = jnp.array([[jnp.nan, -5.0, 3.0, 1.0], [9.0, -5.0, 3.0, jnp.inf]])
    assert WholeInputs(0.25, 1).keep_mask(scores).tolist() == [[False, True, True, True]] * 2
    assert WholeInputs(0.5, 1).keep_mask(scores).tolist() == [[False, False, True, True]] * 2
