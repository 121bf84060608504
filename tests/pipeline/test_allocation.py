"""Blocks trade sparsity as a rule asks; the model loses as many weights."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optima_tpu.config.parse import parse
from optima_tpu.errors import UserError
from optima_tpu.evaluate.distance import distance
from optima_tpu.launch import main
from optima_tpu.method.allocation import OWL, Measured, SparsitySteps, allocate, grain, rounded, steps_of
from optima_tpu.method.layer_rules import parse_layers
from optima_tpu.method.patterns import Unstructured
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.selectors import Magnitude, Wanda
from optima_tpu.method.solvers import CG
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline.allocate import allocated, allocation_rules
from optima_tpu.pipeline.calibrate import Stream, accumulate
from optima_tpu.pipeline.layer_groups import groups_of_blocks, linear_groups
from optima_tpu.pipeline.sums import Capture
from optima_tpu.pipeline.walk import Walk
from optima_tpu.report.contents import Allocated
from tests.support.meshes import mesh
from tests.support.pruning import prune_calibrated
from tests.support.runs import SMALL
from tests.support.tiny_models import MemoryTensors, tiny_folder, tiny_llama

RECIPE = Recipe(Unstructured(0.6), Wanda(), CG(tolerance=1e-6))
TOKENS = np.random.default_rng(1).integers(0, 64, (10, 24)).astype(np.int32)
WINDOWS = 6
ONE = parse_layers("self_attn.*=dense,mlp.gate_proj=dense,mlp.up_proj=dense")
"""Rules that leave one layer of a block to be pruned: each group of layers and sparsity compiles programs of its own."""
WIDE = {"hidden_size": 48, "intermediate_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}  # a grain of 1/48


def decoder(shape=(1, 1), **settings) -> Decoder:
    return Decoder.open(*tiny_llama(**(WIDE | settings)), mesh(*shape), batch=2)


def measured(model: Decoder, recipe: Recipe, allocation) -> Allocated:
    return allocated(Walk(model, recipe, groups_of_blocks(model), WINDOWS), TOKENS, allocation)


@given(st.lists(st.floats(-8, 8), min_size=1, max_size=40))
def test_rounding_keeps_the_sum(numbers):
    wanted = np.asarray(numbers) - np.mean(numbers)
    integers = rounded(wanted)
    assert integers.sum() == 0 and (np.abs(integers - wanted) < 1 + 1e-6).all()


@given(st.floats(0.3, 0.7), st.sampled_from([(48, 96), (576, 1536), (4096, 14336), (896, 4864)]), st.integers(-5, 5))
def test_a_step_is_the_same_share_of_every_layer(sparsity, inputs, steps):
    size = grain(inputs)
    assert abs(size - 0.02) < 0.011
    for count in inputs:
        moved = Unstructured(sparsity + steps * size).pruned_in(count) - Unstructured(sparsity).pruned_in(count)
        assert moved == round(steps * size * count) and abs(steps * size * count - moved) < 1e-6


@given(st.lists(st.tuples(st.floats(-6, 1), st.floats(0.01, 3)), min_size=2, max_size=12), st.integers(1, 6))
def test_measured_is_the_minimum(blocks, most):
    """No small trade between two blocks lowers the total measured loss."""
    low, rise = np.asarray(blocks).T
    wanted = Measured().wanted(np.exp(np.stack([low, low + rise], axis=1)), SparsitySteps(0.02, most))
    assert abs(wanted.sum()) < 1e-6 and (np.abs(wanted) < most + 1e-6).all()
    slope = rise / (2 * most)
    marginal = np.log(slope) + low + slope * (wanted + most)
    may_rise, may_fall = wanted < most - 1e-6, wanted > -most + 1e-6
    if may_rise.any() and may_fall.any():
        assert marginal[may_rise].min() > marginal[may_fall].max() - 1e-4


@pytest.mark.parametrize("allocation", [OWL(), Measured()], ids=["owl", "measured"])
@given(st.data())
def test_blocks_trade_with_those_of_their_size(allocation, data):
    weights = data.draw(st.lists(st.sampled_from([0, 100, 300]), min_size=2, max_size=10))
    number = st.floats(1e-6, 1.0)
    scores = np.asarray(data.draw(st.lists(st.tuples(number, number), min_size=len(weights), max_size=len(weights))))
    steps = SparsitySteps(1 / 48, 3)
    moves = allocate(allocation, scores, weights, steps)
    reach = math.ceil(allocation.reach / steps.size) if isinstance(allocation, OWL) else steps.most
    assert (np.abs(moves) <= reach).all()
    for size in set(weights):
        own = moves[np.asarray(weights) == size]
        assert own.sum() == 0 and (size or not own.any())


def test_more_outliers_keep_more():
    shares = np.array([[0.01], [0.03], [0.02], [0.03]])
    wanted = OWL(limit=0.08).wanted(shares, SparsitySteps(0.02, 4))
    assert np.abs(wanted - 8 * (0.625 - np.array([0, 1, 0.5, 1]))).max() < 1e-9
    assert not OWL().wanted(np.full((4, 1), 0.3), SparsitySteps(0.02, 4)).any()


def test_outliers_are_counted_as_published():
    """Against numpy in float64, with the inputs of the dense model."""
    model = decoder(num_hidden_layers=2)
    allocation = measured(model, RECIPE, OWL(outlier=2.0))
    hidden, groups = model.embed(TOKENS[:WINDOWS]), linear_groups(model)
    for index in range(2):
        block = next(model.blocks([index]))
        statistics = accumulate(model, index, Capture(groups), (Stream(block, hidden),))
        wide = {name: np.asarray(value, np.float64) for name, value in block.items()}
        scores = np.concatenate(
            [
                np.ravel(np.abs(wide[name + ".weight"]) * np.sqrt(np.diag(np.asarray(one.hessian, np.float64))))
                for names, one in zip(groups, statistics)
                for name in names
            ]
        )
        assert allocation.scores[index] == pytest.approx([np.mean(scores > 2 * scores.mean())], abs=2 / scores.size)
        model.apply(index, block, hidden)


def test_a_loss_is_the_divergence_of_the_model_with_one_block_pruned():
    model = decoder(num_hidden_layers=2)
    # Two steps of 1/48; what the run itself does to the layers does not count.
    run_recipe = dataclasses.replace(RECIPE, selector=Magnitude(), solver=None, layers=ONE)
    allocation = measured(model, run_recipe, Measured(limit=0.05))
    hidden, groups, index = model.embed(TOKENS[:WINDOWS]), (("mlp.down_proj",),), 1
    model.apply(0, next(model.blocks([0])), hidden)
    statistics = accumulate(model, index, Capture(groups), (Stream(next(model.blocks([index])), hidden),))
    for sparsity, loss in zip((0.6 - 2 / 48, 0.6 + 2 / 48), allocation.scores[index]):
        recipe = Recipe(Unstructured(sparsity), Wanda(), CG())
        pruned, _, _ = prune_calibrated(model, index, next(model.blocks([index])), groups, statistics, recipe)
        changed = {model.prefix(index) + name: np.asarray(value) for name, value in pruned.items()}
        other = dataclasses.replace(model, tensors=MemoryTensors(model.tensors.arrays | changed))
        assert loss == pytest.approx(distance(model, other, TOKENS[WINDOWS:]).distance.kl, rel=1e-3)
        assert loss > 0


@pytest.mark.parametrize("allocation", [OWL(), pytest.param(Measured(), marks=pytest.mark.slow)], ids=["owl", "measured"])
def test_the_mesh_does_not_change_the_allocation(allocation):
    recipe = dataclasses.replace(RECIPE, solver=None, layers=ONE)
    reference, other = (measured(decoder(shape), recipe, allocation) for shape in ((1, 1), (2, 4)))
    assert reference.sparsity == other.sparsity and len(set(reference.sparsity)) > 1
    assert np.allclose(reference.scores, other.scores, rtol=1e-2)


def test_layers_with_a_rule_are_left_out():
    model, rules = decoder(), parse_layers("self_attn.*=dense,model.layers.1.*=0.3/row")
    allocation = measured(model, dataclasses.replace(RECIPE, layers=rules), OWL())
    assert allocation.sparsity[1] is None is allocation.scores[1] and allocation.sparsity[0] + allocation.sparsity[
        2
    ] == pytest.approx(1.2)
    assert [rule.path for rule in allocation_rules(allocation, model, RECIPE.pattern)] == ["model.layers.0.*", "model.layers.2.*"]
    with pytest.raises(UserError, match="--allocation uniform"):
        measured(model, dataclasses.replace(RECIPE, layers=parse_layers("*=0.3/row")), OWL())


def test_a_run_loses_as_many_weights_as_without(one_device, tmp_path, monkeypatch):
    model, output = tiny_folder(tmp_path / "model", **WIDE), tmp_path / "run"
    command = ["--model", str(model), "--output", str(output), "--pattern", "0.6/row", "--allocation", "measured"]
    dense = "self_attn.*=dense,mlp.gate_proj=dense,mlp.up_proj=dense"
    command += ["--solver", "null", "--layers", dense, *SMALL]
    assert main(command) == 0
    report = json.loads((output / "report.json").read_text())
    layers = [layer for block in report["blocks"] for layer in block["layers"]]
    assert {layer["name"] for layer in layers} == {"mlp.down_proj"}  # --layers goes over it
    shapes = [tuple(layer["shape"]) for layer in layers]
    assert report["pruned"] == sum(Unstructured(0.6).pruned_count(shape) for shape in shapes)
    for sparsity, block in zip(report["allocation"]["sparsity"], report["blocks"]):
        assert all(layer["sparsity"] == pytest.approx(sparsity, abs=1 / 48) for layer in block["layers"])
    assert len(set(report["allocation"]["sparsity"])) > 1
    # Stopped before its first block, a run goes on with the blocks' sparsities that it had made.
    for file in ("report.json", "journal", "hf", "checkpoint"):
        (output / file).rename(tmp_path / ("old " + file))
    monkeypatch.setattr("optima_tpu.pipeline.allocate.allocated", lambda *_: pytest.fail("made again"))
    assert main(command) == 0
    assert json.loads((output / "report.json").read_text())["allocation"] == report["allocation"]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--pattern", "2:4"], "got 2:4, which fixes what every row loses"),
        (["--selector", "imported", "--selector.path", "x"], "got imported"),
        (["--allocation.limit", "0.6"], "below 0.5, got 0.6"),
        (["--calibration.held_out", "0"], "held_out of at least 1 where allocation is measured"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(argv, words):
    with pytest.raises(UserError, match=words):
        parse(["--allocation", "measured", *argv])


@pytest.mark.parametrize(
    "allocation, sparsity, inputs, words",
    [
        (OWL(limit=0.01), 0.6, (48,), "limit of at least 0.0208"),
        (OWL(), 0.6, (1023, 1024), "got 1023, 1024: take --allocation"),
        (OWL(), 0.85, (48,), "more than 0.181 away from 0 and from 1"),
        (Measured(), 0.06, (48,), "more than 0.181 away from 0 and from 1"),
    ],
)
def test_sparsities_without_room_are_refused(allocation, sparsity, inputs, words):
    with pytest.raises(UserError, match=words):
        steps_of(allocation, sparsity, inputs)


def test_a_refused_run_leaves_no_directory(tmp_path, capsys):
    model, output = tiny_folder(tmp_path / "model", **WIDE), tmp_path / "run"
    command = ["--model", str(model), "--output", str(output), "--preset", "fast", "--allocation", "measured", *SMALL]
    assert main([*command, "--pattern", "0.06/row"]) != 0
    assert "away from 0 and from 1" in capsys.readouterr().err
    assert not output.exists()
