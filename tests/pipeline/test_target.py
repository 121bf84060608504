"""Dense target, recapture in the block, and choices on held-out tokens."""

import dataclasses
import io
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from msgspec import structs
from rich.console import Console

from optima_tpu.config.parse import configure, parse
from optima_tpu.config.run_config import weights_settings
from optima_tpu.errors import UserError
from optima_tpu.method.acceptance import PerLayer
from optima_tpu.method.layer_rules import parse_layers
from optima_tpu.method.mask_swaps import Swaps
from optima_tpu.method.patterns import Unstructured
from optima_tpu.method.problem import LayerProblem, Pruned
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.row_sharding import RowLayout
from optima_tpu.method.selectors import ADMM, Wanda
from optima_tpu.method.solvers import CG
from optima_tpu.method.statistics import Drift, TokenSets
from optima_tpu.method.targets import DenseTarget, SelfTarget
from optima_tpu.models import family_of
from optima_tpu.models.activations import Activations
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.layers import scaled
from optima_tpu.pipeline.calibrate import Stream, accumulate
from optima_tpu.pipeline.journal import DENSE, Journal, open_journal
from optima_tpu.pipeline.layer_groups import groups_of_blocks, in_sequence, linear_groups
from optima_tpu.pipeline.memory_plan import Kept, block_passes
from optima_tpu.pipeline.opening_lines import greet
from optima_tpu.pipeline.plan.model import open_declared
from optima_tpu.pipeline.plan.plan import make_plan
from optima_tpu.pipeline.plan.topology import CHIPS, Machine
from optima_tpu.pipeline.sums import Capture
from optima_tpu.pipeline.walk import Streams, Walk, prune_block, prune_model, repeat_block
from optima_tpu.report.progress import Progress
from tests.support import ports
from tests.support.memory import block_of
from tests.support.meshes import mesh
from tests.support.oracles import input_of
from tests.support.plans import config_folder, run_config
from tests.support.problems import linear_of, oracle
from tests.support.pruning import compiled_forward, prune_calibrated, prune_matrices, walk_block
from tests.support.references import MIXTURES, REFERENCES, apart, small, tiny
from tests.support.tiny_models import tiny_llama

TIGHT = Recipe(Unstructured(0.5), Wanda(), CG(tolerance=1e-7))
BEYOND = dataclasses.replace(TIGHT, target=DenseTarget(0.5), recapture=True)
DRIFTING = dataclasses.replace(BEYOND, target=DenseTarget(0.5, gamma=0.5, weigh_tokens=True))
GROUPS = (("self_attn.o_proj",), ("mlp.down_proj",))
"""Two layers of one shape, of which the second reads what the first one changes."""


AROUND = dict.fromkeys(("self_attn.o_proj", "self_attn.out_proj"), ("before_attention", "after_attention"))
AROUND |= {"mlp.down_proj": ("after_attention", "after_mlp"), "fc2": ("before_mlp", "after_mlp")}


def decoder_on(shape):
    return Decoder.open(*tiny_llama(intermediate_size=36), mesh(*shape), batch=2)


def tokens(count=8):
    return np.random.default_rng(1).integers(0, 64, (count, 24)).astype(np.int32)


def walk(recipe, shape=(1, 1), blocks=2, windows=5, groups=GROUPS):
    decoder = decoder_on(shape)
    hidden, dense = decoder.embed(tokens()), decoder.embed(tokens())
    pruned = [
        jax.device_get(walk_block(decoder, index, hidden, groups, recipe, windows=windows, dense=dense))
        for index in range(blocks)
    ]
    return pruned, hidden, dense


@pytest.mark.parametrize(
    "architecture, weigh",
    [
        ("Llama", False),
        ("OPT", True),
        *(pytest.param(architecture, True, marks=pytest.mark.slow) for architecture in ("Granite", "Llama", "Cohere")),
    ],
)
def test_the_drift_is_that_of_the_inputs_in_both_streams(architecture, weigh):
    """Compares the drift with float64 products of the inputs themselves.

    7 windows divide no mesh, and OPT's biases make nonzero values of the zeros that pad them. The last layer of OPT has so few
    outputs that their drift is cheaper than the drift of the inputs. Its Hessian is accumulated in two panels, since no devices
    share its columns.
    """
    settings, shape = ({"ffn_dim": 112}, (8, 1)) if architecture == "OPT" else ({}, (4, 2))
    decoder, rng = Decoder.open(*small(architecture, **settings), mesh(*shape), batch=1), np.random.default_rng(0)
    hidden = rng.standard_normal((7, 11, decoder.config.d_model)).astype(np.float32)
    dense = hidden + 0.3 * rng.standard_normal(hidden.shape).astype(np.float32)
    whole, groups = next(decoder.blocks([1])), linear_groups(decoder)
    pruned = {name: jnp.where(jnp.abs(weight) > 0.1, weight, 0) for name, weight in whole.items()}
    target, further = DenseTarget(gamma=0.5, weigh_tokens=weigh), Activations.of(decoder.mesh, dense.copy())
    capture = Capture(groups, target, energy=True, advance=True)
    statistics = accumulate(decoder, 1, capture, (Stream(pruned, Activations.of(decoder.mesh, hidden)), Stream(whole, further)))
    behind = Activations.of(decoder.mesh, dense.copy())
    decoder.apply(1, whole, behind)
    assert np.abs(further.values - behind.values).max() < 1e-5 * np.abs(behind.values).max()
    positions = decoder.positions(1, 11)
    inputs, theirs = (
        compiled_forward(decoder.graph, decoder.state(parameters), x, positions)[1]
        for parameters, x in ((pruned, hidden), (whole, dense))
    )
    for names, (hessian, _, drift) in zip(groups, statistics, strict=True):
        x, other = (np.asarray(by_name[names[0]], np.float64).reshape(77, -1) for by_name in (inputs, theirs))
        around = AROUND.get(names[0])
        share = np.full((77, 1), 1 / 77)  # of every token in a mean
        if weigh and around:
            share = 1 / np.mean(np.asarray(theirs[around[1]], np.float64).reshape(77, -1) ** 2, axis=1, keepdims=True)
            assert share.max() > 1.5 * share.min()
            share /= share.sum()

        def same(computed, left, right, share=share):
            expected = left.T @ (share * right)
            return computed.dtype == np.float32 and np.abs(computed - expected).max() < 1e-5 * np.abs(expected).max()

        outputs = [(other - x) @ np.asarray(whole[name + ".weight"], np.float64).T for name in names]
        assert same(hessian, x, x)
        assert (drift.cross is None) == bool(drift.outputs) == (names == ("fc2",))
        assert same(drift.cross, other - x, x) if drift.cross is not None else same(*drift.outputs, *outputs, x)
        for output, energy in zip(outputs, drift.energy, strict=True):
            np.testing.assert_allclose(energy, (share * output**2).sum(axis=0), rtol=1e-5)
        for residual in drift.residual:
            assert (residual is None) == (around is None)
            if around:
                lost = (np.asarray(theirs[around[0]], np.float64) - np.asarray(inputs[around[0]], np.float64)).reshape(77, -1)
                assert same(residual, lost, x)


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda reference: reference.model)
def test_nothing_is_added_to_a_residual_stream_where_a_norm_follows(reference):
    norms = any(name in reference.model for name in ("Gemma2", "Gemma3", "Gemma4", "Olmo2", "Olmo3", "Glm4For", "Exaone4"))
    assert bool(family_of(reference.configuration({})).residuals) != norms


# The named ones have layers of other names, or add a share.
ADDING = ("Starcoder2ForCausalLM", "Qwen2MoeForCausalLM", "GraniteForCausalLM", "Qwen3_5ForCausalLM")


@pytest.mark.parametrize("reference", [each for each in apart(*ADDING) if family_of(each.values[0].configuration({})).residuals])
def test_a_residual_stream_is_what_the_outputs_are_added_to(reference):
    config, _, tensors = tiny(reference, reference.first)
    decoder = Decoder.open(config, tensors, mesh(1, 1))
    residuals = decoder.family.residuals
    x = np.random.default_rng(0).standard_normal((2, 9, decoder.config.d_model)).astype(np.float32)
    for kind in decoder.config.kinds:
        alike, parameters = decoder.at(kind), next(decoder.blocks([kind]))
        output, taps = compiled_forward(alike.graph, alike.state(parameters), x, decoder.positions(kind, 9))
        for name, (before, after) in residuals.items():
            if name in alike.linears:  # not so the layers of experts
                bias = parameters.get(name + ".bias", 0.0)
                assert np.abs(taps[before] + taps[name] @ parameters[name + ".weight"].T + bias - taps[after]).max() < 1e-4
        if getattr(config, "do_layer_norm_before", True):
            # In the units of the layer's output: Granite adds a share of it.
            units = scaled(output, 1 / getattr(config, "residual_multiplier", 1.0))
            assert (taps[[*residuals.values()][-1].after] == units).all()


@pytest.mark.parametrize("architecture, aims", [("Llama", True), ("Gemma2", False)])
def test_a_run_does_not_say_that_it_aims_at_a_stream_to_which_no_layer_adds(architecture, aims, tmp_path):
    reference = next(reference for reference in REFERENCES if reference.model.startswith(architecture))
    config, _, tensors = tiny(reference, reference.first)
    model = SimpleNamespace(
        decoder=Decoder.open(config, tensors, mesh(1, 1)), pretrained=SimpleNamespace(origin="a model", config=config)
    )
    text = SimpleNamespace(how="a text", cache="", ids=np.arange(64).reshape(2, 32))
    texts, console = SimpleNamespace(calibration=text, evaluation=text), Console(file=io.StringIO(), width=200)
    greet(console, parse(["--preset", "best", "--pattern", "2:4"]), model, texts, tmp_path, "")
    assert "dense target 0.5" in console.file.getvalue()
    assert ("residual drift 0.5, weighted tokens" in console.file.getvalue()) == aims


def test_a_token_that_one_model_sends_elsewhere_has_no_drift():
    reference = next(reference for reference in REFERENCES if reference.model in MIXTURES)
    config, _, tensors = tiny(reference, dict(num_experts=2, num_experts_per_tok=1))
    decoder, rng = Decoder.open(config, tensors, mesh(2, 2), batch=7), np.random.default_rng(0)
    hidden = rng.standard_normal((7, 11, config.hidden_size)).astype(np.float32)
    dense = hidden + 0.5 * rng.standard_normal(hidden.shape).astype(np.float32)
    whole, groups = (
        next(decoder.blocks([0])),
        tuple((f"mlp.experts.{expert}.{name}_proj",) for expert in (0, 1) for name in ("up", "down")),
    )
    streams = [Stream(whole, Activations.of(decoder.mesh, each)) for each in (hidden, dense)]
    statistics = accumulate(decoder, 0, Capture(groups, DenseTarget(), energy=True), streams)
    inputs, theirs = (
        compiled_forward(decoder.graph, decoder.state(whole), x, decoder.positions(0, 11))[1] for x in (hidden, dense)
    )
    for (name,), (_, _, drift) in zip(groups, statistics):
        x, other = (np.asarray(input_of(by_name, name), np.float64).reshape(77, -1) for by_name in (inputs, theirs))
        both = x.any(axis=1) & other.any(axis=1)
        assert 0 < both.sum() < x.any(axis=1).sum()
        expected = (other - x)[both].T @ x[both] / 77
        assert np.abs(drift.cross - expected).max() < 1e-5 * np.abs(expected).max()
        output = (other - x)[both] @ np.asarray(whole[name + ".weight"], np.float64).T
        np.testing.assert_allclose(drift.energy[0], (output**2).sum(axis=0) / 77, rtol=1e-5)


def two_sets(rng, rows=12, size=24):
    """Dense weights, and two token sets with the inputs of both streams.

    The sets are calibration and held-out tokens. The inputs are float64.
    """
    mixing, loss = rng.standard_normal((size, size)), rng.standard_normal((size, size)) / 12
    sets = []
    for count in (160, 90):
        x = rng.standard_normal((count, size)) @ mixing
        sets.append((x, x + x @ loss + 0.3 * rng.standard_normal(x.shape)))
    return rng.standard_normal((rows, size)).astype(np.float32), sets


def statistics_of(weight, x, other, lost=None):
    """Hessian and drift of the inputs ``x`` and ``other`` of the two streams.

    ``lost`` [tokens, d_out] is the drift of the residual stream, for a layer that adds to the stream.
    """
    difference = other - x
    return (
        jnp.asarray(x.T @ x / len(x), jnp.float32),
        Drift(
            jnp.asarray(difference.T @ x / len(x), jnp.float32),
            (jnp.asarray(((difference @ weight.T) ** 2).mean(axis=0), jnp.float32),),
            () if lost is None else (jnp.asarray(lost.T @ x / len(x), jnp.float32),),
        ),
    )


def group_of(weight, sets, recipe, shape=(1, 1), layout=RowLayout(), few=False):
    """Prunes one layer: its weights, mask, row outcomes and problem.

    Args:
      few: hold the drift for the outputs, as ``accumulate`` does where there are few outputs.
    """
    (hessian, drift), (unseen, unseen_drift) = (statistics_of(weight, *streams) for streams in sets)
    pull = recipe.target.alpha * weight @ drift.cross
    pull += recipe.target.gamma * drift.residual[0] if drift.residual else 0
    if few:
        drift, unseen_drift = (each._replace(cross=None, outputs=(weight @ each.cross,)) for each in (drift, unseen_drift))
    options = dict(held_out=unseen, layout=layout, drift=drift, held_out_drift=unseen_drift)
    (new,), (keep,), (rows,) = prune_matrices((jnp.asarray(weight),), hessian, recipe, mesh(*shape), **options)
    return new, keep, rows, LayerProblem(jnp.asarray(weight), hessian, pull)


def dense_error(streams, dense, weight):
    """Each row's mean squared distance from the dense model's output."""
    x, other = streams
    return ((x @ np.asarray(weight, np.float64).T - other @ dense.T) ** 2).mean(axis=0)


@pytest.mark.parametrize(
    "shape, layout, few", [((1, 1), RowLayout(), False), ((2, 4), RowLayout(split=True, rows=2), True)], ids=["whole", "split"]
)
def test_the_minimiser_is_that_of_the_normal_equations(shape, layout, few):
    weight, sets = two_sets(np.random.default_rng(0))
    new, keep, rows, problem = group_of(weight, sets, BEYOND, shape, layout, few)
    best = oracle(problem, Pruned(new, keep), BEYOND.damping)
    assert np.abs(new - best).max() < 1e-3 * np.abs(best).max()
    own = oracle(dataclasses.replace(problem, pull=None), Pruned(new, keep), BEYOND.damping)
    assert np.abs(own - best).max() > 0.03 * np.abs(best).max(), "the target makes no difference here"
    # And the report tells the errors against the dense model, from the inputs themselves.
    energy, before, after, drift = np.asarray(rows.dense, np.float64)
    dense = weight.astype(np.float64)
    np.testing.assert_allclose(energy, ((sets[1][1] @ dense.T) ** 2).mean(axis=0), rtol=1e-4)
    for reported, end in ((before, np.where(keep, weight, 0)), (after, new), (drift, weight)):
        np.testing.assert_allclose(reported, dense_error(sets[1], dense, end), rtol=1e-3)
    assert after.sum() < before.sum()


@pytest.mark.parametrize(
    "shape, layout", [((1, 1), RowLayout()), ((2, 4), RowLayout(split=True, rows=2))], ids=["whole", "split"]
)
def test_the_residual_streams_drift_is_aimed_at_too(shape, layout):
    rng = np.random.default_rng(2)
    weight, sets = two_sets(rng)
    through = rng.standard_normal((24, 12))
    sets = [(x, other, (other - x) @ through + 0.3 * rng.standard_normal((len(x), 12))) for x, other in sets]
    recipe = dataclasses.replace(BEYOND, target=DenseTarget(1.0, gamma=0.5))
    new, keep, rows, problem = group_of(weight, sets, recipe, shape, layout)
    best = oracle(problem, Pruned(new, keep), recipe.damping)
    assert np.abs(new - best).max() < 1e-3 * np.abs(best).max()
    plain, same, *_ = group_of(weight, sets, dataclasses.replace(recipe, target=DenseTarget(1.0)), shape, layout)
    assert (same == keep).all()

    def missed(weights, x, other, lost):
        """Each row's mean squared error toward dense output + ``lost`` / 2."""
        return ((x @ np.asarray(weights, np.float64).T - other @ weight.astype(np.float64).T - 0.5 * lost) ** 2).mean(axis=0)

    assert missed(new, *sets[0]).sum() < 0.9 * missed(plain, *sets[0]).sum()
    # The report tells the distance from the dense output alone.
    np.testing.assert_allclose(rows.dense[2], dense_error(sets[1][:2], weight.astype(np.float64), new), rtol=1e-3)


@pytest.mark.parametrize("pattern", ["0.5/layer", *(pytest.param(each, marks=pytest.mark.slow) for each in ("0.5/row", "2:4"))])
def test_best_is_the_same_on_every_mesh(pattern):
    """ADMM, exchanges and residual drift, with rows that divide no mesh.

    One run holds the drift of the inputs, the other one the drift of the outputs.
    """
    rng = np.random.default_rng(5)
    weight, sets = two_sets(rng, rows=15)
    sets = [(x, other, 0.3 * rng.standard_normal((len(x), 15))) for x, other in sets]
    recipe = parse(["--preset", "best", "--pattern", pattern, "--solver.tolerance", "1e-6", "--refine.share", "0.1"]).recipe
    (new, keep, rows), (other, other_keep, _) = (
        jax.device_get(group_of(weight, sets, recipe, shape, few=few)[:3]) for shape, few in (((1, 1), False), ((2, 4), True))
    )
    assert (keep == other_keep).all() and rows.exchanged.sum() > 0
    assert np.abs(new - other).max() < 1e-4 * np.abs(new).max()


def test_a_selector_aims_at_the_target_too():
    """ADMM with dense target and residual drift equals its float64 port."""
    rng = np.random.default_rng(5)
    weight, sets = two_sets(rng)
    sets = [(x, other, 5 * rng.standard_normal((len(x), 12))) for x, other in sets]
    selector = ADMM(rho_first=0.3, levels=3, inverses=2)
    recipe = dataclasses.replace(BEYOND, selector=selector, solver=None, target=DenseTarget(0.75, gamma=0.5))
    new, keep, _, problem = group_of(weight, sets, recipe)
    best, kept = ports.admm(*map(np.asarray, (problem.weight, problem.hessian, linear_of(problem))), recipe.pattern, selector)
    assert (keep == kept).all() and np.abs(new - best).max() < 1e-3 * np.abs(best).max()


@pytest.mark.parametrize("refine", [None, Swaps(2, 0.1)])
def test_layers_of_one_input_may_each_have_a_pattern(refine):
    """A layer that prunes nothing keeps all weights; its error starts at 0."""
    rules = parse_layers("self_attn.q_proj=0.25,self_attn.k_proj=0/row")
    groups = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)
    blocks, *_ = walk(dataclasses.replace(DRIFTING, layers=rules, refine=refine), groups=groups)
    for _, masks, reports in blocks:
        assert {report.name: report.sparsity for report in reports} == dict(zip((*groups[0], *groups[1]), (0.25, 0, 0.5, 0.5)))
        assert masks["self_attn.k_proj.weight"].all()
        assert [report.name for report in reports if report.error_before == 0] == ["self_attn.k_proj"]
        assert [report.name for report in reports if report.corrects_stream] == ["self_attn.o_proj"]


def test_making_up_for_the_residual_stream_keeps_it_closer_to_the_dense_models():
    apart = []
    for recipe in (BEYOND, DRIFTING):
        _, hidden, dense = walk(recipe, blocks=3)
        apart.append(np.sum((hidden.values - dense.values) ** 2))
    assert apart[1] < 0.97 * apart[0], apart


def test_alpha_0_is_the_papers_target_to_the_last_bit():
    zero_alpha, paper = walk(dataclasses.replace(TIGHT, target=DenseTarget(0.0)))[0], walk(TIGHT)[0]
    for (weights, _, reports), (others, _, papers) in zip(zero_alpha, paper, strict=True):
        for name, weight in weights.items():
            assert weight.tobytes() == others[name].tobytes(), name
        for report, other in zip(reports, papers, strict=True):
            assert report.dense_after is not None and other.dense_after is None
            assert structs.replace(report, dense_before=None, dense_after=None, dense_drift=None) == other
    assert zero_alpha[1][2][0].dense_drift > zero_alpha[0][2][0].dense_drift == 0  # both streams begin alike


def test_the_mesh_changes_no_weights():
    reference, hidden, dense = walk(DRIFTING)
    other, other_hidden, other_dense = walk(DRIFTING, (4, 2))
    for (weights, masks, reports), (other_weights, other_masks, others) in zip(reference, other):
        for name, keep in masks.items():
            assert (keep == other_masks[name]).all()
            assert np.abs(weights[name] - other_weights[name]).max() < 1e-3 * np.abs(weights[name]).max()
        for report, same in zip(reports, others, strict=True):
            for error in ("error_after", "held_out_after", "dense_before", "dense_after", "dense_drift"):
                assert getattr(same, error) == pytest.approx(getattr(report, error), rel=1e-3, abs=1e-7), error
    for stream, same in ((hidden, other_hidden), (dense, other_dense)):
        assert np.abs(stream.values - same.values).max() < 1e-3 * np.abs(stream.values).max()
    assert np.abs(hidden.values - dense.values).max() > 0.1


def test_recapture_is_a_walk_from_input_to_input():
    """By hand, each layer's statistics come from the block as it then is."""
    decoder, recipe = decoder_on((1, 1)), dataclasses.replace(TIGHT, recapture=True)
    hidden, again = decoder.embed(tokens()), decoder.embed(tokens())
    weights, masks, _ = walk_block(decoder, 0, hidden, GROUPS, recipe, windows=5)
    parameters = next(decoder.blocks([0]))
    for group in GROUPS:
        parts = [accumulate(decoder, 0, Capture((group,)), (Stream(parameters, again.part(*ends)),)) for ends in ((0, 5), (5, 8))]
        sets = tuple(map(TokenSets, *parts))
        parameters, keeps, _ = prune_calibrated(decoder, 0, parameters, (group,), sets, recipe)
        assert all((keep == masks[name]).all() for name, keep in keeps.items())
    decoder.apply(0, parameters, again)
    assert (hidden.values == again.values).all()
    once, _, _ = walk_block(decoder, 0, decoder.embed(tokens()), GROUPS, TIGHT, windows=5)
    first, second = (names[0] + ".weight" for names in GROUPS)
    assert np.abs(once[first] - weights[first]).max() < 1e-3 and np.abs(once[second] - weights[second]).max() > 1e-2


def test_what_a_pass_keeps_for_those_behind_it():
    """Attention's output, and the last input if devices share host memory."""

    def kept(decoder, recipe):
        return [part.kept for part in block_passes(decoder, 0, linear_groups(decoder), recipe, math.inf)]

    decoder, recipe = decoder_on((1, 1)), parse(["--preset", "best"]).recipe
    nothing, attended = Kept(), Kept(("self_attn.o_proj",), ("self_attn.o_proj",))
    assert kept(decoder, recipe) == [nothing, attended, nothing, Kept(("mlp.down_proj",))]
    elsewhere = dataclasses.replace(decoder, mesh=AbstractMesh((1, 1), ("data", "model")))
    assert kept(elsewhere, recipe) == [nothing, attended, nothing, nothing]
    assert kept(decoder, dataclasses.replace(recipe, recapture=False)) == [nothing]


def test_a_dense_target_is_a_walk_of_two_streams():
    """By hand, each layer reads the block as pruned so far and as it was."""
    decoder, recipe = decoder_on((1, 1)), DRIFTING
    hidden, dense, again, still = (decoder.embed(tokens()) for _ in range(4))
    for index in range(2):
        weights, masks, _ = walk_block(decoder, index, hidden, GROUPS, recipe, windows=5, dense=dense)
        whole = parameters = next(decoder.blocks([index]))
        for group in GROUPS:
            parts = []
            for ends, energy in (((0, 5), False), ((5, 8), True)):
                streams = (Stream(parameters, again.part(*ends)), Stream(whole, still.part(*ends)))
                parts.append(accumulate(decoder, index, Capture((group,), recipe.target, energy), streams))
            sets = tuple(map(TokenSets, *parts))
            parameters, keeps, _ = prune_calibrated(decoder, index, parameters, (group,), sets, recipe)
            assert all((keep == masks[name]).all() for name, keep in keeps.items())
        assert all((weights[name] == parameter).all() for name, parameter in parameters.items())
        decoder.apply(index, parameters, again)
        decoder.apply(index, whole, still)
    assert (hidden.values == again.values).all() and (dense.values == still.values).all()


@pytest.mark.parametrize(
    "preset, resident", [pytest.param("fast", False, marks=pytest.mark.slow), ("best", False), ("best", True)]
)
def test_a_run_that_goes_on_repeats_the_bits_of_both_streams(preset, resident):
    """Also if its hidden states stay on devices and the first run's did not.

    On a mesh, XLA may round a block differently in another program: what the program leaves out changes how devices share it.
    """
    recipe = parse(["--preset", preset, "--layers", "*.1.*.o_proj=dense"]).recipe
    # The masks do not matter, and those of these compile in a moment.
    decoder, recipe = decoder_on((2, 2)), dataclasses.replace(recipe, selector=Wanda(), solver=None, refine=None)
    walk = Walk(decoder, recipe, groups_of_blocks(decoder), windows=5)
    hidden, dense, again, still = (decoder.embed(tokens()) for _ in range(4))
    if resident:
        again, still = (stream.on_devices(decoder.batch) for stream in (again, still))
    for index in range(2):
        whole = next(decoder.blocks([index]))
        pruned = prune_block(walk, index, whole, Streams(hidden, dense if recipe.target.dense_stream else None)).parameters
        repeat_block(walk, index, pruned, again, dense=False)
        assert (again.take(again.rows) == hidden.values).all()
        if recipe.target.dense_stream:
            repeat_block(walk, index, whole, still, dense=True)
            assert (still.take(still.rows) == dense.values).all()


def test_the_dense_stream_goes_through_a_block_that_stays_dense():
    decoder, recipe = decoder_on((1, 1)), dataclasses.replace(BEYOND, layers=parse_layers("*.0.*=dense"))
    hidden, dense, still = (decoder.embed(tokens()) for _ in range(3))
    _, masks, reports = walk_block(decoder, 0, hidden, GROUPS, recipe, windows=5, dense=dense)
    decoder.apply(0, next(decoder.blocks([0])), still)
    assert not masks and not reports and (dense.values == still.values).all() and (hidden.values == still.values).all()


def test_a_stopped_walk_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    """Resumes after two blocks, with and without the saved hidden states."""
    decoder, recipe = decoder_on((1, 1)), BEYOND

    def prune(path):
        journal = open_journal(tmp_path / path, {"model": "a"}, {}, recompute=10)
        with Progress(Console(file=io.StringIO())) as progress:
            prune_model(Walk(decoder, recipe, (GROUPS,) * decoder.config.blocks, 5), tokens(), journal, progress)
        return journal

    def stopped(journal, index, *rest):
        journal.repeated = 3600.0 * (index == 0)
        save(journal, index, *rest)
        if index == 1:
            raise KeyboardInterrupt

    journal, save = prune("whole"), Journal.save
    dense = decoder.embed(tokens())
    decoder.apply(0, next(iter(decoder.blocks([0]))), dense)
    for path in ("kept", "lost"):
        monkeypatch.setattr(Journal, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            prune(path)
        monkeypatch.setattr(Journal, "save", save)
        assert (Journal(tmp_path / path).activations(decoder.mesh, 0, 8, DENSE).values == dense.values).all()
        if path == "lost":
            for file in (tmp_path / path / "activations").rglob("*.safetensors"):
                file.unlink()
        again = prune(path)
        assert not (tmp_path / path / "activations").exists()
        for index in range(3):
            assert again.report(index).layers == journal.report(index).layers
            for name, weight in journal.weights(index).items():
                assert weight.tobytes() == again.weights(index)[name].tobytes(), name


def test_experts_that_are_alike_are_captured_together():
    experts = tuple((f"mlp.experts.{expert}.{name}_proj",) for expert in (0, 1) for name in ("gate", "down"))
    groups = (("self_attn.q_proj", "self_attn.k_proj"), ("self_attn.o_proj",), *experts)
    assert in_sequence(groups) == (groups[:1], groups[1:2], (groups[2], groups[4]), (groups[3], groups[5]))


def test_a_pass_has_room_for_half_as_many_inputs_of_a_dense_target():
    block = block_of({"a": (8, 64), "b": (8, 64)}, mesh(1, 1))
    budget = 4 * 2 * 2 * 4 * 64 * 64  # a quarter holds the Hessians of both
    one, two = (
        block_passes(block, 0, (("a",), ("b",)), Recipe(Unstructured(0.5), Wanda(), None, target=target), budget)
        for target in (SelfTarget(), DenseTarget())
    )
    assert (len(one), len(two)) == (1, 2)


def test_the_plan_counts_both_streams(tmp_path):
    machine = Machine("there", CHIPS["v5e"], AbstractMesh((4, 2), ("data", "model")), 1, 0.5)
    folder = config_folder(tmp_path)

    def plan(**settings):
        config = run_config(folder, layers=(), **settings)
        return make_plan(config, open_declared(config.model, None, config.batch).on(machine.mesh), machine)

    paper, beyond = plan(), plan(target=DenseTarget(gamma=0.5, weigh_tokens=True), recapture=True)
    assert beyond.storage.hidden == 2 * paper.storage.hidden
    # One calibration, or one an input; four groups.
    assert [len(each.programs) for each in (paper, beyond)] == [1 + 4, 4 + 4]
    # What o and down add for the residual stream's drift, of every token of a step: [d_model, d_in] products.
    whole, drifting = (plan(target=DenseTarget(gamma=gamma), solver=None) for gamma in (0.0, 0.5))
    more = drifting.programs[0].work.flops - whole.programs[0].work.flops
    model = whole.model.decoder
    read = sum(model.block_shapes[name + ".weight"][1] for name in model.family.residuals)
    assert more == pytest.approx(whole.batch * 32 * 2 * model.config.d_model * read / 2)  # 32 tokens each, a model axis of 2


def test_the_settings_are_read_alike_from_the_command_line_and_a_file():
    command = ["--preset", "fast", "--target", "dense", "--target.alpha", "0.5", "--recapture", "true", "--accept", "per_layer"]
    config = parse(command)
    chosen = dict(target=DenseTarget(0.5), recapture=True, accept=PerLayer())
    assert {name: getattr(config.recipe, name) for name in chosen} == chosen
    file = {"target": {"name": "dense", "alpha": 0.5}, "recapture": True, "accept": "per_layer"}
    assert configure(file) == config
    plain = parse(["--preset", "fast"])
    assert (plain.recipe.target, plain.recipe.recapture) == (SelfTarget(), False)
    for change in ({"target": DenseTarget()}, {"recapture": True}):
        assert weights_settings(plain.changed(**change)) != weights_settings(plain)
    for argv, words in (
        (["--distill", "kl", "--calibration.held_out", "0"], "held_out of at least 1 where distill is kl"),
        (["--target", "dense", "--target.alpha", "-1"], "alpha from 0 to 1, got -1"),
        (["--target", "dense", "--target.gamma", "1.5"], "gamma from 0 to 1, got 1.5"),
    ):
        with pytest.raises(UserError, match=words):
            parse(argv)
