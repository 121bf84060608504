"""Quantised runs, exported for the library compressed-tensors: the same model as the plain export."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from transformers import AutoModelForCausalLM

from optima_tpu import launch
from optima_tpu.export import main
from optima_tpu.models.checkpoints.export import read_masks
from tests.support.runs import SMALL, folder_tensors, only_error
from tests.support.tiny_models import tiny_folder

SIZES = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
RUNS = {
    "int4": ("bfloat16", ["--quantize", "int4", "--quantize.group", "16", "--layers", "self_attn.k_proj=dense"]),
    "int8": ("float32", ["--quantize", "int8"]),
}


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory) -> Path:
    """A finished run over a tiny model."""
    folder, (dtype, settings) = tmp_path_factory.mktemp("quantized"), RUNS[request.param]
    model = tiny_folder(folder / "model", dtype=dtype, **SIZES)
    assert launch.main([str(model), *SMALL, *settings, "--preset", "fast", "--output", str(folder / request.param)]) == 0
    return folder / request.param


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        return model(torch.arange(48).reshape(2, 24)).logits


def test_transformers_loads_it_as_the_same_model(run, tmp_path):
    out = tmp_path / "out"
    assert main([str(run), str(out), "--format", "compressed-tensors", "--max-shard-size", "20KB"]) == 0
    plain, stored, masks = folder_tensors(run / "hf"), folder_tensors(out), read_masks(out)
    bits = 4 if run.name == "int4" else 8
    for name, keep in masks.items():
        module = name.removesuffix("weight")
        shape = torch.Size(stored[module + "weight_shape"].tolist())
        values = unpack_from_int32(torch.from_numpy(stored[module + "weight_packed"]), bits, shape).numpy()
        assert name not in stored and (values[~keep] == 0).all()
        np.testing.assert_array_equal(values == 0, plain[name] == 0)
        assert stored[module + "weight_scale"].dtype == plain[name].dtype
    untouched = plain.keys() - masks.keys()
    assert untouched <= stored.keys() and all((stored[name] == plain[name]).all() for name in untouched)
    assert sum(array.nbytes for name, array in stored.items() if "proj" in name) < sum(
        array.nbytes for name, array in plain.items() if "proj" in name
    )
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: safetensors.numpy.load_file(out / file).keys() >= {name} for name, file in index.items()} == dict.fromkeys(
        stored, True
    )
    counted = {layer["name"]: layer["pruned"] for layer in json.loads((out / "optima_tpu.json").read_text())["layers"]}
    assert counted == {name: int((plain[name] == 0).sum()) for name in masks}
    assert torch.equal(logits(out), logits(run / "hf"))


def test_the_report_has_the_errors_around_the_quantisation(run):
    layers = [layer for block in json.loads((run / "report.json").read_text())["blocks"] for layer in block["layers"]]
    for names in (
        ("error_after", "error_quantized", "error_nearest"),
        ("held_out_after", "held_out_quantized", "held_out_nearest"),
    ):
        before, stored, nearest = (sum(layer[name] for layer in layers) for name in names)
        # 8 bits cost less than what the solver left on held-out text.
        assert before * 0.999 < stored < nearest


def test_a_run_without_integers_is_refused(run, tmp_path, capsys):
    model = run.parent / "model"
    assert (
        launch.main([str(model), *SMALL, "--selector", "magnitude", "--solver", "null", "--output", str(tmp_path / "run")]) == 0
    )
    capsys.readouterr()
    assert main([str(tmp_path / "run"), str(tmp_path / "out"), "--format", "compressed-tensors"]) == 2
    assert "expected a run with --quantize int4 or int8" in only_error(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_groups_that_do_not_fit_are_refused_before_anything_is_written(run, tmp_path, capsys):
    settings = ["--quantize", "int4", "--quantize.group", "24", "--output", str(tmp_path / "run")]
    assert launch.main([str(run.parent / "model"), *SMALL, *settings]) == 2
    assert "got 24 for a layer with 32; take 32 or 16 or null" in only_error(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
    assert launch.main([str(run.parent / "model"), *SMALL, "--quantize", "int4", "--distill", "kl"]) == 2
    assert "expected quantize null where distill is kl" in only_error(capsys.readouterr().err)
