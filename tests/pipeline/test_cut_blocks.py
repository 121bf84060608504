"""Blocks are left out by their effect on the predictions.

The walk then aims at the dense model with all of its blocks.
"""

import dataclasses
import functools
import io
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from optima_tpu.config.parse import parse
from optima_tpu.config.run_config import CutStructures, RunConfig
from optima_tpu.errors import UserError
from optima_tpu.evaluate.distance import distance
from optima_tpu.evaluate.model import open_evaluated
from optima_tpu.launch import main
from optima_tpu.method.patterns import NM
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.selectors import Imported, Wanda
from optima_tpu.method.solvers import CG
from optima_tpu.method.targets import DenseTarget
from optima_tpu.models.checkpoints.source import Pretrained
from optima_tpu.models.decoder import Decoder, head_logits
from optima_tpu.models.model import Model, without_blocks
from optima_tpu.pipeline import cutting, stages, walk
from optima_tpu.pipeline.cut_blocks import TRIED, choices
from optima_tpu.pipeline.layer_groups import groups_of_blocks
from optima_tpu.pipeline.opening_lines import greet
from optima_tpu.pipeline.recover.config import RecoverConfig
from optima_tpu.pipeline.recover.start import open_start
from optima_tpu.pipeline.walk import Streams, Walk, WholeDense, _pass_left_out, prune_block
from optima_tpu.report.contents import LeftOut
from optima_tpu.report.pace import Pace
from optima_tpu.runtime.processes import fetch
from tests.support.meshes import mesh
from tests.support.runs import SMALL, folder_tensors
from tests.support.tiny_models import tiny_folder, tiny_llama

TOKENS = np.random.default_rng(1).integers(0, 64, (6, 24)).astype(np.int32)


def dense_model(shape=(1, 1), blocks=5) -> Model:
    config, source = tiny_llama(num_hidden_layers=blocks)
    assets = {"config.json": (json.dumps(config.to_diff_dict() | {"architectures": config.architectures})).encode()}
    return Model(Pretrained(config, source, assets, "", ""), Decoder.open(config, source, mesh(*shape), batch=2))


def divergence(model: Model, left_out: tuple[int, ...]) -> float:
    """Mean ``KL(dense || without)`` of the predictions, in float64."""
    both = [model.decoder, without_blocks(model, left_out).decoder]
    p, q = (log_probabilities(each) for each in both)
    return float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)[:, :-1]))


def log_probabilities(decoder: Decoder) -> np.ndarray:
    hidden, blocks = decoder.embed(TOKENS), range(decoder.config.blocks)
    for index, parameters in zip(blocks, decoder.blocks(blocks)):
        decoder.apply(index, parameters, hidden)
    batches = hidden.batches(2)
    logits = np.concatenate([fetch(head_logits(decoder.head(), each.hidden))[each.filled] for each in batches]).astype(np.float64)
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


@pytest.mark.parametrize("shape", [pytest.param((1, 1), marks=pytest.mark.slow), (4, 2)])
def test_the_choice_is_that_of_brute_force_one_block_after_the_other(shape):
    model, before = dense_model(shape), LeftOut()
    for chosen in itertools.islice(choices(model, TOKENS, before), 3):
        tried = [(*before.blocks, index) for index in range(5) if index not in before.blocks]
        by_force = {left_out: divergence(model, left_out) for left_out in tried}
        before = chosen
        best = min(by_force, key=by_force.__getitem__)
        assert chosen.blocks == best and abs(chosen.divergences[-1] - by_force[best]) < 1e-5 * by_force[best]


def test_only_the_blocks_that_turn_the_stream_least_are_tried():
    model = dense_model()
    (first,) = next(choices(model, TOKENS, LeftOut(), tried=1)).blocks
    hidden, turns = model.decoder.embed(TOKENS), []
    for index, parameters in zip(range(5), model.decoder.blocks(range(5))):
        before = hidden.values.copy()
        model.decoder.apply(index, parameters, hidden)
        norms = np.linalg.norm(before, axis=-1) * np.linalg.norm(hidden.values, axis=-1)
        turns.append(1 - np.mean(np.sum(before * hidden.values, axis=-1) / norms))
    assert first == np.argmin(turns)


def test_the_time_of_the_choices_follows_from_the_text_that_the_dense_model_read(tmp_path):
    config, texts = SimpleNamespace(cut=SimpleNamespace(blocks=3)), SimpleNamespace(evaluation=SimpleNamespace(ids=TOKENS[:3]))
    opened = SimpleNamespace(model=dense_model(), directory=tmp_path, config=config, texts=texts, held_out=TOKENS[2:], dense=None)
    read, ahead = stages.DENSE_PERPLEXITY.steps(opened), cutting.CUTTING.steps(opened)
    pace = functools.reduce(lambda pace, step: pace.after(step, step.work), read, Pace())
    first, second, third = (pace.left([step]) for step in ahead)
    assert first > second > third and pace.left(ahead) == pytest.approx(first + second + third)
    # Each try of a choice passes through half of the blocks and the head.
    assert third > TRIED / 2 * sum(step.work for step in read) * len(TOKENS[2:]) / len(TOKENS[:3]) * 3 / 5


def test_the_dense_stream_passes_what_the_pruned_stream_skips():
    """A later block is thus fitted toward the dense model's own output."""
    model, left_out = dense_model(), (0, 1, 3)
    decoder = without_blocks(model, left_out).decoder
    walk = Walk(
        decoder,
        Recipe(NM(2, 4), Wanda(), CG(), target=DenseTarget(alpha=1.0)),
        groups_of_blocks(decoder),
        4,
        whole=WholeDense(model.decoder, (2, 4)),
    )
    streams, expected = Streams(decoder.embed(TOKENS), decoder.embed(TOKENS)), model.decoder.embed(TOKENS)
    whole = model.decoder.blocks(range(5))
    for index, parameters in zip(range(2), decoder.blocks(range(2))):
        _pass_left_out(walk, index, streams.dense)
        prune_block(walk, index, parameters, streams)
        for block in [range(3), range(3, 5)][index]:
            model.decoder.apply(block, next(whole), expected)
        np.testing.assert_array_equal(streams.dense.values, expected.values)
        assert np.abs(streams.pruned.values - expected.values).max() > 0.01


@pytest.mark.parametrize(
    "words, line, idle",
    [
        ([], "0 weights to prune, {} to re-fit", True),
        (["--cut.blocks", "2"], "0 weights to prune, up to {} to re-fit", True),
        (["--cut.blocks", "2", "--target", "dense"], "0 weights to prune, up to {} to re-fit", False),
        (["--quantize", "int4", "--quantize.group", "null"], "0 weights to prune, {} to re-fit", False),
        (["--pattern", "0.5/row"], "{} weights to prune\n", False),
    ],
)
def test_a_run_says_which_weights_it_prunes_and_which_it_moves_alone(words, line, idle, tmp_path):
    model, text = dense_model(), SimpleNamespace(how="a text", cache="", ids=TOKENS)
    config = parse(["--preset", "fast", "--pattern", "0/row", *words])
    console = Console(file=io.StringIO(), width=200)
    greet(console, config, model, SimpleNamespace(calibration=text, evaluation=text), tmp_path, "")
    left = model.decoder.config.blocks - config.cut.blocks
    of_block = sum(math.prod(model.decoder.block_shapes[f"{name}.weight"]) for name in model.decoder.linears)
    printed = console.file.getvalue()
    assert line.format(f"{left * of_block:,}") in printed and ("prunes no weight, and nothing moves one" in printed) == idle


def test_the_distance_from_the_dense_model_is_that_of_the_predictions():
    model = dense_model()
    measured = distance(model.decoder, without_blocks(model, (1, 3)).decoder, TOKENS, left_out=2).distance
    assert abs(measured.kl - divergence(model, (1, 3))) < 1e-5 * measured.kl and len(measured.hidden_errors) == 1
    with pytest.raises(UserError, match="expected a model of 4 blocks, as in the dense model, got 3"):
        distance(model.decoder, without_blocks(model, (1, 3)).decoder, TOKENS, left_out=1)


def test_a_model_may_be_cut_alone(one_device, tmp_path, capsys, monkeypatch):
    """With --pattern dense no weight changes, and nothing has a mask.

    The walk passes no text through the blocks.
    """
    monkeypatch.setattr(walk, "_streams_before", None)
    model = tiny_folder(tmp_path / "model", num_hidden_layers=4)
    words = ["--model", str(model), "--output", str(tmp_path / "run"), "--cut.blocks", "2", "--pattern", "dense"]
    assert main([*words, *SMALL]) == 0
    dense, small = folder_tensors(model), folder_tensors(tmp_path / "run" / "hf")
    chosen = json.loads((tmp_path / "run" / "left_out.json").read_text())
    left_out = chosen["blocks"]
    assert len(set(left_out)) == len(chosen["divergences"]) == 2
    kept = [index for index in range(4) if index not in left_out]
    for name, tensor in small.items():
        old = (
            name.replace("layers.1.", f"layers.{kept[1]}.")
            if "layers.1." in name
            else name.replace("layers.0.", f"layers.{kept[0]}.")
        )
        assert tensor.tobytes() == dense[old].tobytes(), name
    assert not (tmp_path / "run" / "hf" / "pruning_masks.npz").exists()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["weights"] == report["pruned"] == 0 and report["removed"] > 0 and report["recipe"] == "dense, 2 blocks cut"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Anything unusual" in page and "Layer errors" not in page and "Solver</h2>" not in page
    assert "Blocks left out" in page and report["model"]["blocks"] == 4 and [each["index"] for each in report["blocks"]] == [0, 1]
    printed, card = capsys.readouterr().out, (tmp_path / "run" / "hf" / "README.md").read_text()
    assert "\nNo layer was pruned.\n" in printed and "error   " not in printed and "Layer errors" not in card
    assert f"\nleft out    blocks {left_out[0]}, {left_out[1]} of the dense model, in this order; on held-out windows" in printed
    for name in ("README.md", "optima_tpu.json"):
        assert all(str(block) in (tmp_path / "run" / "hf" / name).read_text() for block in left_out)
    for trained in (tmp_path / "run", tmp_path / "run" / "hf"):
        assert open_evaluated(str(trained), mesh(1, 1)).run.left_out == 2
        start = open_start(RecoverConfig(str(trained), tokens="256"), mesh(1, 1), lambda spec: None)
        assert not start.names and start.record.left_out.blocks == tuple(left_out)


def test_a_re_fit_begins_behind_the_first_gap_and_with_the_dense_weights(one_device, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cutting, "choices", lambda *arguments: iter([LeftOut((2,), (0.1,))]))
    model, run = tiny_folder(tmp_path / "model", num_hidden_layers=5), tmp_path / "run"
    words = ["--model", str(model), "--output", str(run), "--preset", "best", "--cut.blocks", "1", "--pattern", "0/row"]
    assert main([*words, *SMALL]) == 0
    dense, small = folder_tensors(model), folder_tensors(run / "hf")
    for name, tensor in small.items():
        if "layers.0." in name or "layers.1." in name:
            assert tensor.tobytes() == dense[name].tobytes(), name
    card = (run / "hf" / "README.md").read_text()
    assert "# model, cut to 4 of 5 blocks and re-fitted\n" in card and "- sparse" not in card
    assert "the weights of 14 matrices were re-fitted, and none of them was pruned" in card
    assert "it is without the block 2 of the source" in card
    assert "\nleft out    block 2 of the dense model; on held-out windows" in capsys.readouterr().out
    blocks = json.loads((run / "report.json").read_text())["blocks"]
    assert [len(block["layers"]) for block in blocks] == [0, 0, 7, 7]
    layers = [layer for block in blocks for layer in block["layers"]]
    assert all(layer["error_before"] == 0 and layer["error_after"] > 0 for layer in layers)
    # o_proj and down_proj also make up for what the hidden states lost before them.
    own = [layer for layer in layers if layer["name"] not in ("self_attn.o_proj", "mlp.down_proj")]
    assert all(layer["dense_after"] < layer["dense_before"] for layer in own)


def test_masks_of_the_dense_model_do_not_go_with_fewer_blocks():
    with pytest.raises(UserError, match="^expected a selector that chooses masks where the model loses 1 block, got imported"):
        RunConfig("here", cut=CutStructures(1), recipe=dataclasses.replace(Recipe(), selector=Imported("masks")))
