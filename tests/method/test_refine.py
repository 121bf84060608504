"""Masks that are refined under the solve."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from optima_tpu.config.parse import configure, parse
from optima_tpu.config.run_config import weights_settings
from optima_tpu.config.written import flags
from optima_tpu.errors import UserError
from optima_tpu.method.acceptance import PerRow, RowErrors, accept_rows
from optima_tpu.method.layer_rules import LayerRule
from optima_tpu.method.linalg.traces import inverse_traces
from optima_tpu.method.mask_swaps import Exchanging, Swaps, schur_diagonal
from optima_tpu.method.patterns import NM, Unstructured
from optima_tpu.method.problem import Errors, Pruned, Solution, pull_of
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.selectors import Magnitude, Wanda
from optima_tpu.method.solvers import CG, Exact
from optima_tpu.method.statistics import TokenSets, TokenStatistics
from optima_tpu.models.decoder import Decoder
from optima_tpu.report.layer_means import exchanged
from optima_tpu.report.summary import print_summary
from tests.support import fake_reports
from tests.support.meshes import mesh
from tests.support.problems import correlated_hessian, layer, oracle, row_objective, select, solve, wide
from tests.support.pruning import prune_calibrated, prune_matrices
from tests.support.tiny_models import tiny_llama

ROUNDS = 4
schur = jax.jit(schur_diagonal, static_argnums=(1, 2))


def refined(solver, swaps: Swaps, pattern, problem, pruned, damping: float | None = None) -> Solution:
    """Solved with exchanges, by default with the solver's own damping."""
    return solve(Exchanging(solver, swaps, pattern), problem, pruned, solver.damping if damping is None else damping)


def schur_by_eigenvalues(hessian: np.ndarray, damping: float, kept: float) -> np.ndarray:
    """``s_j H_jj`` of the deterministic equivalent, float64; dead inputs 0."""
    diagonal = np.diagonal(hessian).astype(np.float64)
    scale = np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
    values, vectors = np.linalg.eigh(np.where(np.eye(len(scale)) > 0, 1 + damping, hessian / scale / scale[:, None]))
    low, high = -30.0, 10.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (values / (values + np.exp(middle))).sum() > kept * len(scale) else (low, middle)
    return diagonal * (1 / ((vectors**2) @ (1 / (values + np.exp(low)))) - np.exp(low))


def best_pairs(win: np.ndarray, cost: np.ndarray, keep: np.ndarray, limit: int, pattern) -> list[tuple[int, int]]:
    """A row's ``limit`` best (enters, leaves) that win more than they cost."""
    if isinstance(pattern, NM):
        groups = pattern.groups(np.arange(len(keep))[None])[0].tolist()
        pairs = [
            (
                max((i for i in group if not keep[i]), key=lambda i: (win[i], -i)),
                min((j for j in group if keep[j]), key=lambda j: (cost[j], j)),
            )
            for group in groups
        ]
        pairs.sort(key=lambda pair: -(win[pair[0]] - cost[pair[1]]))
    else:
        enter, leave = np.flatnonzero(~keep), np.flatnonzero(keep)
        pairs = list(zip(sorted(enter, key=lambda i: -win[i]), sorted(leave, key=lambda j: cost[j])))
    return [(i, j) for i, j in pairs if win[i] > cost[j]][:limit]


@pytest.mark.parametrize(
    "pattern, solver, selector, target",
    [
        (Unstructured(0.5), CG(tolerance=1e-5), Wanda(), "self"),
        (Unstructured(0.7, "layer"), CG(tolerance=1e-5), Magnitude(), "other"),
        (NM(2, 4), Exact(), Wanda(), "other"),
    ],
    ids=["row cg", "layer cg", "2:4 exact"],
)
def test_no_row_gets_worse_than_the_solved_start_and_the_numbers_stay(pattern, solver, selector, target):
    """Against exact float64 optima; the second layer has a dead input."""
    damping = solver.damping
    for seed, dead in ((0, []), (1, [3])):
        problem = layer(np.random.default_rng(seed), 12, 40, target=target)
        hessian = problem.hessian.at[jnp.array(dead, int)].set(0.0).at[:, jnp.array(dead, int)].set(0.0)
        problem = dataclasses.replace(problem, hessian=hessian, pull=jnp.where(jnp.diagonal(hessian) > 0, pull_of(problem), 0.0))
        live, pruned = np.asarray(jnp.diagonal(hessian) > 0), select(selector, problem, pattern)
        weight, _, steps, converged, keep, _ = refined(solver, Swaps(ROUNDS, 0.1), pattern, problem, pruned)
        weight, keep, before = np.asarray(weight), np.asarray(keep), np.asarray(pruned.keep)
        assert keep.dtype == bool and (weight[~keep] == 0).all() and np.isfinite(weight).all()
        if isinstance(pattern, NM):
            assert (pattern.groups(keep).sum(axis=-1) == pattern.n).all()
        assert (keep.sum(axis=1) == before.sum(axis=1)).all()
        start, solved = (
            row_objective(problem, oracle(problem, Pruned(None, mask & live), damping), damping) for mask in (before, keep)
        )
        objectives = row_objective(problem, weight, damping)
        scale = row_objective(problem, np.asarray(pruned.weight), damping)
        assert (np.abs(objectives - solved) <= 1e-3 * np.abs(scale)).all(), "not solved on the mask that is returned"
        assert (objectives <= start + 1e-5 * np.abs(scale)).all()
        assert objectives.sum() < 0.97 * start.sum() if target == "self" else objectives.sum() < start.sum()
        assert (keep != before).any() and not keep[:, dead].any()
        assert converged.all() and (steps > 0).any()


@pytest.mark.parametrize("kept", [0.5, 0.95, 1.0])
def test_no_schur_complement_is_negative_where_a_row_keeps_more_than_the_hessian_has_directions(kept):
    x = np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)
    complements = np.asarray(schur(jnp.asarray(x.T @ x), 0.0, kept))
    assert np.isfinite(complements).all() and (complements >= 0).all()


def test_nothing_is_exchanged_where_float32_finds_no_inverse():
    broken = jnp.asarray(np.eye(32, dtype=np.float32) + 5 * (1 - np.eye(32, dtype=np.float32)))
    assert (schur(broken, 0.01, 0.5) == 0).all()


@pytest.mark.parametrize("size, off", [(60, 0.005), (256, 0.03)], ids=["all unit vectors", "random vectors"])
def test_traces_of_inverses_are_those_of_the_eigenvalues(size, off):
    hessian = correlated_hessian(np.random.default_rng(3), size, spread=0.1) + 0.05 * np.eye(size, dtype=np.float32)
    values = np.linalg.eigvalsh(hessian.astype(np.float64))
    shifts = np.float32([0.03, 0.3, 3.0])
    traces = jax.jit(lambda matrix, shifts: jax.lax.map(inverse_traces(matrix), shifts))(hessian, shifts)
    np.testing.assert_allclose(traces, [np.mean(1 / (values + shift)) for shift in shifts], rtol=off)


def test_the_schur_complements_are_those_of_the_deterministic_equivalent():
    """Against float64 eigenvalues, and exchange costs on random input sets."""
    rng = np.random.default_rng(2)
    hessian, damping = correlated_hessian(rng, 60), 0.01
    hessian[5] = hessian[:, 5] = 0.0
    diagonal = np.diagonal(hessian).astype(np.float64)
    live = diagonal > 0
    for kept in (0.3, 0.5, 0.75):
        complements = np.asarray(schur(jnp.asarray(hessian), damping, kept))
        np.testing.assert_allclose(complements, schur_by_eigenvalues(hessian, damping, kept), rtol=1e-3)
    scale = np.sqrt(np.where(live, diagonal, 1.0))
    matrix = np.where(np.eye(60) > 0, 1.0, hessian / scale / scale[:, None]) + damping * np.eye(60)
    costs = [[] for _ in range(60)]
    for _ in range(200):
        inside = rng.permutation(60)[:45]
        for index, cost in zip(inside, 1 / np.diagonal(np.linalg.inv(matrix[np.ix_(inside, inside)]))):
            costs[index].append(cost * diagonal[index])
    means = np.asarray([np.mean(cost) for cost in costs])
    np.testing.assert_allclose(complements[live], means[live], rtol=0.1)
    assert np.abs(diagonal[live] / means[live] - 1).max() > 0.5, "the diagonal alone would do"


def test_exchanges_are_the_best_pairs_that_pay():
    """Against a loop over pairs, with ties."""
    rng = np.random.default_rng(3)
    for pattern, size in ((Unstructured(0.5), 20), (NM(2, 4), 20), (NM(2, 4, stride=5), 20)):
        win, cost = rng.integers(0, 9, (2, 6, size)).astype(np.float32)
        keep = np.asarray(select(Magnitude(), layer(rng, 6, size), pattern).keep)
        limit = np.array([0, 1, 2, 3, 4, 4], np.int32)
        actual, count = jax.jit(pattern.exchange)(*map(jnp.asarray, (win, cost, keep, limit)))
        for row, most in enumerate(limit):
            pairs = best_pairs(win[row], cost[row], keep[row], most, pattern)
            expected = keep[row].copy()
            for i, j in pairs:
                expected[i], expected[j] = True, False
            assert (np.asarray(actual)[row] == expected).all() and count[row] == len(pairs)


@pytest.mark.parametrize("rounds", [1, 5])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=["row", "2:4"])
def test_a_round_is_that_of_the_docstring(pattern, rounds):
    """Against float64 rounds in which some rows must halve their exchanges."""
    damping, share = 0.3, 0.4
    problem = layer(np.random.default_rng(7), 24, 40, target="other")
    pruned = select(Wanda(), problem, pattern)
    dense, hessian, pull = wide(problem, damping)
    schur = schur_by_eigenvalues(np.asarray(problem.hessian), damping, 0.5)
    keep = np.asarray(pruned.keep)
    weight, limit, halved = oracle(problem, pruned, damping), np.full(len(keep), int(share * 40)), 0
    for _ in range(rounds):
        residual, new = pull - (weight - dense) @ hessian, keep.copy()
        pairs = [best_pairs(*row, pattern) for row in zip(residual**2 / schur, weight**2 * schur, keep, limit)]
        for row, exchanges in zip(new, pairs):
            for i, j in exchanges:
                row[i], row[j] = True, False
        solved = oracle(problem, Pruned(None, new), damping)
        better = row_objective(problem, solved, damping) < row_objective(problem, weight, damping)
        halved += (better & (limit < int(share * 40))).sum()
        limit = np.where(better, limit, [len(exchanges) // 2 for exchanges in pairs])
        weight, keep = (np.where(better[:, None], taken, old) for taken, old in ((solved, weight), (new, keep)))
    assert (keep != np.asarray(pruned.keep)).any() and (halved > 0) == (rounds > 1)
    solution = refined(Exact(), Swaps(rounds, share), pattern, problem, pruned, damping)
    assert (np.asarray(solution.keep) == keep).all()
    assert np.abs(solution.weight - weight).max() < 1e-4 * np.abs(weight).max()
    assert (solution.steps == 2 + rounds).all()


def test_a_refused_row_has_the_selectors_mask_back():
    problem = layer(np.random.default_rng(4), 6, 20)
    pruned = select(Wanda(), problem, Unstructured(0.5))
    new = jnp.roll(pruned.keep, 1, axis=1)
    solution = Solution(jnp.where(new, problem.weight, 0.0), jnp.zeros(6), jnp.ones(6, jnp.int32), jnp.ones(6, bool), new)
    better = jnp.array([True, False] * 3)
    final, rows = accept_rows(
        TokenSets(problem),
        pruned,
        solution,
        PerRow(),
        jnp.dtype(jnp.float32),
        lambda *_: RowErrors(jnp.ones(6), Errors(jnp.ones(6), jnp.ones(6)), Errors(jnp.where(better, 0.5, 2.0), jnp.ones(6))),
    )
    assert (final.keep == jnp.where(better[:, None], new, pruned.keep)).all()
    assert (final.weight == jnp.where(final.keep, problem.weight, 0.0)).all()
    assert (rows.exchanged == jnp.where(better, jnp.sum(new & ~pruned.keep, axis=1), 0)).all() and rows.exchanged.sum() > 0


def test_the_mesh_does_not_change_the_mask():
    """Two matrices with one input, whose rows divide no mesh."""
    recipe = Recipe(Unstructured(0.5), Wanda(), CG(tolerance=1e-8), refine=Swaps(2, 0.1))
    problem = layer(np.random.default_rng(5), 15, 40)
    weights = (problem.weight[:9], problem.weight[9:])
    (reference, keeps, reports), (other, other_keeps, _) = (
        jax.device_get(prune_matrices(weights, problem.hessian, recipe, mesh(*shape))) for shape in ((1, 1), (2, 4))
    )
    for weight, keep, same, same_keep, rows in zip(reference, keeps, other, other_keeps, reports):
        assert (keep == same_keep).all() and np.abs(weight - same).max() < 1e-4 * np.abs(weight).max()
        assert (rows.after < rows.before).all() and rows.exchanged.sum() > 0


def test_a_layer_with_another_pattern_keeps_it():
    decoder, groups = Decoder.open(*tiny_llama(), mesh(1, 1)), (("mlp.gate_proj", "mlp.up_proj"),)
    recipe = Recipe(Unstructured(0.5), Wanda(), CG(), layers=(LayerRule("mlp.up_proj", NM(2, 4)),), refine=Swaps(2, 0.1))
    statistics = (TokenStatistics(jnp.asarray(correlated_hessian(np.random.default_rng(6), 36)), jnp.int32(99)),)
    _, keeps, reports = prune_calibrated(decoder, 0, next(decoder.blocks([0])), groups, statistics, recipe)
    gate, up = (np.asarray(keeps[name + ".weight"]) for name in groups[0])
    assert (up.reshape(-1, 4).sum(axis=1) == 2).all() and (gate.sum(axis=1) == 18).all()
    assert (gate.reshape(-1, 4).sum(axis=1) != 2).any() and all(report.exchanged > 0 for report in reports)


def test_the_summary_tells_how_much_came_in(tmp_path):
    plain, refined = (fake_reports.layer(shape=(8, 20), pruned=80, exchanged=count) for count in (None, 4))
    assert exchanged([plain]) is None and exchanged([plain, refined, refined]) == 8 / 160
    console = Console(file=io.StringIO(), width=200)
    print_summary(console, fake_reports.report_of(fake_reports.blocks_of([refined])), tmp_path)
    assert "masks       5.00% of the kept weights came in by exchange" in console.file.getvalue()


def test_exchanges_are_the_same_setting_by_flags_and_file_and_need_a_solver():
    config = parse(["--preset", "fast", "--refine", "swaps", "--refine.rounds", "2"])
    assert config.recipe.refine == Swaps(2) and configure({"refine": {"name": "swaps", "rounds": 2}}) == config
    assert configure({}, flags(config)[2:]) == config
    plain = parse(["--preset", "fast"])
    assert plain.recipe.refine is None and weights_settings(config) != weights_settings(plain)
    for argv, words in (
        (["--solver", "null"], "--refine null"),
        (["--refine.rounds", "0"], "at least 1, got 0"),
        (["--refine.share", "0.7"], "at most 0.5, got 0.7"),
    ):
        with pytest.raises(UserError, match=words):
            parse(["--preset", "best", *argv])
    recipe = Recipe(Unstructured(0.5), Wanda(), CG(), layers=(LayerRule("b", NM(2, 4)),), refine=Swaps())
    assert recipe.solved_together(("a", "b", "c"), "model.layers.0.") == (("a", "c"), ("b",))
