"""Pruning a block: equal on every mesh, compiled once, solved locally."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optima_tpu.config.parse import parse
from optima_tpu.errors import UserError
from optima_tpu.method.acceptance import PerLayer, PerRow, accept_rows
from optima_tpu.method.layer_rules import LayerRule
from optima_tpu.method.patterns import NM, Unstructured
from optima_tpu.method.problem import Pruned
from optima_tpu.method.prune_group import prune_group
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.row_sharding import ON_EVERY_DEVICE, RowLayout
from optima_tpu.method.selectors import ADMM, Magnitude, SparseGPT, Wanda
from optima_tpu.method.solvers import CG, MPAX, Exact
from optima_tpu.method.statistics import Drift, TokenSets, TokenStatistics
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline.layer_groups import linear_groups
from optima_tpu.pipeline.plan.hlo import COLLECTIVE, text_inside_loops
from optima_tpu.report.findings import unusual
from tests.support.meshes import mesh
from tests.support.problems import correlated_hessian, layer, row_objective, select, solve
from tests.support.pruning import group_arguments, measure, prune_calibrated, prune_layer, prune_matrices, walk_block
from tests.support.tiny_models import tiny_llama

RECIPES = {
    # Tight tolerances: rows that stop at a threshold may stop a step apart on two meshes, and then differ by the threshold.
    "wanda cg": Recipe(Unstructured(0.5), Wanda(), CG(tolerance=1e-6)),
    "magnitude per layer": Recipe(Unstructured(0.6, "layer"), Magnitude(), None),
    # The paper's 2:4, attention dense; of the MLP one layer, since MPAX takes seconds to compile for each group of layers.
    "2:4 mpax": Recipe(
        NM(2, 4),
        Wanda(),
        MPAX(eps_abs=1e-4, eps_rel=1e-4, unit_diagonal=True),
        PerLayer(),
        layers=tuple(LayerRule(path, None) for path in ("self_attn.*", "mlp.gate_proj", "mlp.up_proj")),
    ),
}


@functools.cache
def walk(recipe, shape, blocks=3):
    """Prunes a tiny model: (weights, masks, reports) by block, last states."""
    decoder = Decoder.open(*tiny_llama(), mesh(*shape), batch=2)
    hidden = decoder.embed(np.random.default_rng(1).integers(0, 64, (10, 24)).astype(np.int32))
    groups = linear_groups(decoder)
    pruned = []
    for index in range(blocks):
        parameters, masks, reports = walk_block(decoder, index, hidden, groups, recipe)
        pruned.append((jax.device_get(parameters), jax.device_get(masks), reports))
    return pruned, hidden


def recipes(*slow: str):
    """Parametrizes a test by recipe; names in ``slow`` are marked slow."""
    each = [pytest.param(recipe, id=name, marks=[pytest.mark.slow] * (name in slow)) for name, recipe in RECIPES.items()]
    return pytest.mark.parametrize("recipe", each)


# Whole runs of the first in test_launch.py and test_resume.py hold it; of the second the solve has no communication, see below.
@recipes("wanda cg", "2:4 mpax")
def test_the_mesh_does_not_change_the_result(recipe):
    reference, hidden = walk(recipe, (1, 1), blocks=2)
    other, other_hidden = walk(recipe, (2, 4), blocks=2)
    for (weights, masks, _), (other_weights, other_masks, _) in zip(reference, other):
        for name, keep in masks.items():
            assert (keep == other_masks[name]).all()
            assert np.abs(weights[name] - other_weights[name]).max() < 1e-3 * np.abs(weights[name]).max()
    assert np.abs(hidden.values - other_hidden.values).max() < 1e-3 * np.abs(hidden.values).max()


@recipes("2:4 mpax")  # a run of test_launch.py holds it
def test_every_layer_is_pruned_exactly_and_never_worse_than_its_mask(recipe):
    for index, (weights, masks, reports) in enumerate(walk(recipe, (1, 1), blocks=2)[0]):
        assert len(reports) == len(masks) == (1 if recipe.layers else 7)
        for report in reports:
            weight, keep = weights[report.name + ".weight"], masks[report.name + ".weight"]
            assert (report.block, report.shape) == (index, weight.shape)
            assert (weight[~keep] == 0).all()
            assert (~keep).sum() == report.pruned == recipe.pattern.pruned_count(weight.shape)
            assert report.error_after <= report.error_before * (1 + 1e-5)
            if recipe.solver:
                assert report.error_after < report.error_before


@pytest.mark.parametrize(
    "preset, layout",
    [
        pytest.param("fast", RowLayout(split=True, rows=2), id="fast, split", marks=pytest.mark.slow),
        pytest.param("best", ON_EVERY_DEVICE, id="best"),
    ],
)
def test_groups_that_lie_apart_are_pruned_like_the_same_inputs_side_by_side(preset, layout):
    """2:4@8 equals 2:4 on reordered inputs: masks, weights and errors.

    Two matrices share the inputs. Their errors on held-out tokens are equal too.
    """
    apart, rng = NM(2, 4, stride=8), np.random.default_rng(8)
    order, rows = apart.order(32), (9, 14)

    def statistics(seed: int, order: np.ndarray) -> tuple[jax.Array, Drift | None]:
        rng = np.random.default_rng(seed)
        hessian = correlated_hessian(rng, 32, spread=0.5)
        drift = Drift(
            jnp.asarray(0.1 * (rng.standard_normal((32, 32)) @ hessian)[order][:, order], jnp.float32),
            tuple(jnp.asarray(rng.random(count) + 1, jnp.float32) for count in rows),
            (None, jnp.asarray(0.1 * (rng.standard_normal((rows[1], 32)) @ hessian)[:, order], jnp.float32)),
        )
        return jnp.asarray(hessian[order][:, order]), drift if preset == "best" else None

    weights = tuple(rng.standard_normal((count, 32)).astype(np.float32) for count in rows)

    def pruned(pattern: NM, order: np.ndarray):
        # A tight tolerance: rows that stop at a threshold may stop a step apart, and then differ by the threshold.
        recipe = parse(["--preset", preset, "--pattern", str(pattern), "--solver.tolerance", "1e-6"]).recipe
        (hessian, drift), (held_out, unseen) = statistics(1, order), statistics(2, order)
        return prune_matrices(
            tuple(jnp.asarray(weight[:, order]) for weight in weights),
            hessian,
            recipe,
            mesh(4, 2),
            layout=layout,
            drift=drift,
            held_out=held_out,
            held_out_drift=unseen,
        )

    for weight, keep, outcome, other_weight, other_keep, other in zip(*pruned(apart, np.arange(32)), *pruned(NM(2, 4), order)):
        np.testing.assert_array_equal(keep[:, order], other_keep)
        np.testing.assert_allclose(weight[:, order], other_weight, atol=1e-3 * np.abs(other_weight).max())
        for name in ("before", "after", "held_out", "dense", "exchanged"):
            value, expected = getattr(outcome, name), getattr(other, name)
            assert (value is None) == (expected is None) == (preset == "fast" and name in ("dense", "exchanged"))
            if value is not None:
                # Against the dense model's outputs an error is a small difference of terms as large as their energy.
                np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-5 * outcome.energy.max())
        assert outcome.after.sum() < outcome.before.sum()


@pytest.mark.parametrize("solver", [CG(), MPAX()], ids=["cg", "mpax"])
def test_the_solve_has_no_collective_inside_its_loop_and_does_not_copy_the_hessian_per_row(solver):
    """On eight devices, no while loop's body has a collective."""
    rows, size = 128, 64  # of the rows of one device
    shapes = (jax.ShapeDtypeStruct((8 * rows, size), jnp.float32),), jax.ShapeDtypeStruct((size, size), jnp.float32)
    recipe = Recipe(Unstructured(0.5), Wanda(), solver)
    executable = prune_group.lower(*group_arguments(*shapes, recipe, mesh(4, 2))).compile()
    inside = text_inside_loops(executable.as_text())
    assert inside and not COLLECTIVE.search(inside)
    assert f"f32[{rows},{size},{size}]" not in executable.as_text()
    assert executable.memory_analysis().temp_size_in_bytes < 60 * rows * size * 4 + 20 * size * size * 4


def test_the_second_block_compiles_nothing(caplog):
    decoder = Decoder.open(*tiny_llama(), mesh(2, 2), batch=2)
    hidden = decoder.embed(np.random.default_rng(1).integers(0, 64, (10, 25)).astype(np.int32))  # a length of its own
    groups = linear_groups(decoder)[:2]  # several matrices, and one

    def compilations(index):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
            walk_block(decoder, index, hidden, groups, RECIPES["wanda cg"])
        return [record.message for record in caplog.records if "Finished XLA compilation" in record.message]

    assert compilations(0)
    assert not compilations(1)


def test_an_expert_that_saw_no_token_is_pruned_by_magnitude_and_named():
    decoder = Decoder.open(*tiny_llama(), mesh(4, 2))
    parameters, name = next(decoder.blocks([0])), "self_attn.o_proj"
    weight = np.asarray(parameters[name + ".weight"])
    nothing = jax.device_put(np.zeros((weight.shape[1],) * 2, np.float32), jax.NamedSharding(decoder.mesh, jax.P()))
    parameters, keeps, (report,) = prune_calibrated(
        decoder, 0, parameters, ((name,),), (TokenStatistics(nothing, jnp.int32(0)),), Recipe(Unstructured(0.5), Wanda(), CG())
    )
    kept = np.asarray(keeps[name + ".weight"])
    assert (
        np.sort(np.abs(np.where(kept, weight, 0)), axis=1)
        == np.sort(np.abs(weight), axis=1) * (np.arange(weight.shape[1]) >= weight.shape[1] // 2)
    ).all()
    assert np.abs(parameters[name + ".weight"] - np.where(kept, weight, 0)).max() < 1e-6
    assert (report.dead_inputs, report.tokens) == (weight.shape[1], 0)
    assert unusual([report])["few_tokens"] == {"block 0 self_attn.o_proj": 0}


def test_weights_of_a_selector_that_are_no_numbers_are_refused():
    """All inputs of the layer are equal, so its Hessian is singular.

    A damping this small does not make it positive definite.
    """
    decoder = Decoder.open(*tiny_llama(), mesh(1, 1))
    parameters, name = next(decoder.blocks([0])), "self_attn.o_proj"
    singular = (TokenStatistics(jnp.ones((parameters[name + ".weight"].shape[1],) * 2), jnp.int32(99)),)
    for solver in (None, CG()):
        recipe = Recipe(Unstructured(0.5), SparseGPT(damping=1e-12), solver)
        with pytest.raises(UserError, match=r"model.layers.0.self_attn.o_proj: expected finite .* raise --selector.damping"):
            prune_calibrated(decoder, 0, parameters, ((name,),), singular, recipe)


def test_rows_that_the_mesh_does_not_divide_are_solved_alike():
    problem = layer(np.random.default_rng(0), 13, 24)
    recipe = Recipe(Unstructured(0.5), Wanda(), CG())
    alone, _ = prune_layer(problem, recipe)
    (weight,), (keep,), _ = prune_matrices((problem.weight,), problem.hessian, recipe, mesh(4, 2))
    assert (keep == alone.keep).all()
    assert np.abs(weight - alone.weight).max() < 1e-4 * np.abs(alone.weight).max()


def test_nothing_moves_where_nothing_goes_on_any_mesh():
    """ADMM would follow the rounding of a linear term.

    A linear term from one product less the same term from another product is rounding alone.
    """
    rng = np.random.default_rng(3)
    weights = tuple(jnp.asarray(rng.standard_normal((rows, 256)), jnp.float32) for rows in (576, 192, 192))
    hessian = jnp.asarray(correlated_hessian(rng, 256), jnp.float32)
    recipe = Recipe(Unstructured(0.0, "layer"), ADMM(levels=2), None)
    new, _, _ = prune_matrices(weights, hessian, recipe, mesh(8, 1))
    assert all((one == other).all() for one, other in zip(new, weights, strict=True))


@recipes("2:4 mpax")  # no solver measures the errors
def test_the_report_holds_the_errors_on_both_texts_in_float64(recipe):
    """Checks two layers that read one input; a bias changes no error."""
    rng = np.random.default_rng(0)
    inputs, unseen = (rng.standard_normal((tokens, 24)) @ rng.standard_normal((24, 24)) for tokens in (96, 40))
    dense = tuple(jnp.asarray(rng.standard_normal((rows, 24)), jnp.float32) for rows in (8, 12))
    hessian, held_out = (jnp.asarray(x.T @ x / len(x), jnp.float32) for x in (inputs, unseen))
    new, _, reports = prune_matrices(dense, hessian, recipe, mesh(2, 2), held_out=held_out)
    masked, _, _ = prune_matrices(dense, hessian, Recipe(recipe.pattern, recipe.selector, None), mesh(2, 2))
    for weight, before, after, rows in zip(dense, masked, new, reports):
        bias = rng.standard_normal(len(weight))
        for x, energy, reported in (
            (inputs, rows.energy, (rows.before, rows.after)),
            (unseen, rows.held_out[0], rows.held_out[1:]),
        ):
            output = x @ np.asarray(weight, np.float64).T
            np.testing.assert_allclose(energy, (output**2).mean(axis=0), rtol=1e-4)
            for final, value in zip((before, after), reported):
                change = (x @ np.asarray(final, np.float64).T + bias) - (output + bias)
                np.testing.assert_allclose(value, (change**2).mean(axis=0), rtol=1e-3)


def test_held_out_windows_do_not_touch_the_weights():
    tokens, others = np.random.default_rng(1).integers(0, 64, (2, 10, 24)).astype(np.int32)
    others[:6] = tokens[:6]
    decoder = Decoder.open(*tiny_llama(), mesh(1, 1), batch=2)
    groups, recipe = linear_groups(decoder), RECIPES["wanda cg"]

    def walk(tokens, windows=None):
        hidden = decoder.embed(tokens)
        weights, _, reports = walk_block(decoder, 0, hidden, groups, recipe, windows=windows)
        return weights, reports, hidden.part(0, 6).values

    weights, reports, hidden = walk(tokens, 6)
    same, other_reports, same_hidden = walk(others, 6)
    alone, without, _ = walk(tokens[:6])
    assert (hidden == same_hidden).all()
    for name, weight in weights.items():
        assert (weight == same[name]).all()
        # What judges nothing is another program, in which XLA may round a weight otherwise: one in its last bit was seen.
        assert np.abs(weight - alone[name]).max() < 1e-6 * np.abs(weight).max()
    for report, other, bare in zip(reports, other_reports, without):
        assert bare.held_out_before is bare.held_out_after is None
        assert report.error_after == other.error_after == pytest.approx(bare.error_after, rel=1e-6)
        assert report.held_out_after != other.held_out_after
        # Fitted to the others, 144 tokens: an error there says more of the tokens than of the layer.
        assert report.error_after < report.held_out_after


@pytest.mark.parametrize("accept", [PerRow(), PerLayer()], ids=["per row", "per layer"])
def test_a_solver_is_judged_by_its_own_damped_objective(accept):
    """Undamped ADMM leaves a smaller undamped error than a damped solver."""
    problem = layer(np.random.default_rng(3), 12, 32, tokens=48, spread=2.0)
    selector, pattern = ADMM(damping=0.0), Unstructured(0.5)
    start = prune_layer(problem, Recipe(pattern, selector, None))[0].weight
    final, rows = prune_layer(problem, Recipe(pattern, selector, Exact(damping=1.0), accept))
    assert not rows.refused.any()
    assert (row_objective(problem, final.weight, 1.0) <= row_objective(problem, start, 1.0) * (1 + 1e-5)).all()
    assert (row_objective(problem, final.weight) > row_objective(problem, start)).all()
    assert np.allclose(rows.after, row_objective(problem, final.weight), rtol=1e-3)  # no damping in what is reported


@pytest.mark.parametrize("accept", [PerRow(), PerLayer()], ids=["per row", "per layer"])
def test_what_is_better_without_the_solvers_damping_alone_is_refused(accept):
    problem = layer(np.random.default_rng(3), 12, 32, tokens=48, spread=2.0)
    pruned = select(Wanda(), problem, Unstructured(0.5))
    ends = [solve(Exact(), problem, pruned, damping) for damping in (1.0, 0.0)]
    damped = Pruned(ends[0].weight, pruned.keep)
    for damping, refused in ((0.0, False), (1.0, True)):
        tokens = TokenSets(dataclasses.replace(problem, damping=damping))
        _, rows = accept_rows(tokens, damped, ends[1], accept, jnp.dtype(jnp.float32), measure)
        assert rows.refused.all() if refused else not rows.refused.any()


def test_the_papers_rule_refuses_whole_layers_and_the_row_rule_single_rows():
    before = jnp.array([1.0, 1.0, 1.0, 1.0])
    mixed = jnp.array([0.1, 0.1, 0.1, 1.1])
    yes, few = jnp.ones(4, bool), jnp.array([True, True, True, False])
    assert PerRow()(before, mixed, few).tolist() == [True, True, True, False]
    assert PerLayer(0.95)(before, mixed, yes).all()
    assert not PerLayer(0.95)(before, mixed, few).any()
    assert PerLayer(0.75)(before, mixed, few).all()
    assert not PerLayer(0.95)(before, before, yes).any() and PerRow()(before, before, few).all()
    broken = mixed.at[0].set(jnp.nan)
    assert not PerLayer(0.0)(before, broken, yes).any() and not PerRow()(before, broken, yes)[0]
