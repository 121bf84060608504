"""Quantised exports for compressed-tensors hold the plain export's model."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from transformers import AutoModelForCausalLM

from optima_tpu import launch
from optima_tpu.errors import UserError
from optima_tpu.export import main
from optima_tpu.models.checkpoints import open_model
from optima_tpu.models.checkpoints.export import export, read_masks
from optima_tpu.models.checkpoints.orbax import CheckpointTensors
from optima_tpu.models.checkpoints.source import DTYPES
from optima_tpu.pipeline.plan.model import open_declared
from tests.support.fake_run import (
    MANIFEST,
    assert_same,
    begun,
    block_report,
    finished_run,
    on_host,
    small_model,
    write_checkpoint,
)
from tests.support.meshes import mesh
from tests.support.runs import SMALL, folder_tensors, only_error
from tests.support.tiny_models import MemoryTensors, tiny_folder

SIZES = dict(hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("quantized") / "model", dtype="bfloat16", **SIZES)


@pytest.fixture(scope="module")
def run(model) -> Path:
    """A tiny run: o_proj and down_proj in groups of 16, the others dense."""
    settings = ["--quantize", "int4", "--quantize.group", "16", "--layers", "*=dense,self_attn.o_proj=0.5,mlp.down_proj=0.5"]
    assert launch.main([str(model), *SMALL, *settings, "--preset", "fast", "--output", str(model.parent / "run")]) == 0
    return model.parent / "run"


def logits(folder: Path, **options) -> torch.Tensor:
    dtype = json.loads((folder / "config.json").read_text())["dtype"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    with torch.no_grad():
        return model(torch.arange(48).reshape(2, 24)).logits


def assert_the_same(out: Path, plain: Path, bits: int) -> None:
    """Checks that both exports agree: integers, zeros, tensors and logits."""
    dense, stored, masks = folder_tensors(plain), folder_tensors(out), read_masks(out)
    for name, keep in masks.items():
        module = name.removesuffix("weight")
        shape = torch.Size(stored[module + "weight_shape"].tolist())
        values = unpack_from_int32(torch.from_numpy(stored[module + "weight_packed"]), bits, shape).numpy()
        assert name not in stored and not values[~keep].any()
        np.testing.assert_array_equal(values == 0, dense[name] == 0)
        assert stored[module + "weight_scale"].dtype == dense[name].dtype
    untouched = dense.keys() - masks.keys()
    assert untouched <= stored.keys() and all((stored[name] == dense[name]).all() for name in untouched)
    counted = {layer["name"]: layer["pruned"] for layer in json.loads((out / "optima_tpu.json").read_text())["layers"]}
    assert counted == {name: int((dense[name] == 0).sum()) for name in masks}
    assert torch.equal(logits(out), logits(plain))
    for dtype in (None, "float16"):  # as this program reads both
        ours, theirs = (open_model(str(folder), dtype) for folder in (out, plain))
        assert ours.tensors.names() == theirs.tensors.names() and "quantization_config" not in ours.config.to_dict()
        for name in ours.tensors.names():
            for index in ((...,), (slice(3, 9),), (..., slice(-8, None))):
                assert_same(ours.tensors.read(name, index), theirs.tensors.read(name, index))


def assert_activations_are_rounded(out: Path, plain: Path, weights) -> None:
    """Checks int8 weights and, for each token, inputs rounded to 8 bits."""
    stored, dense = folder_tensors(out), folder_tensors(plain)
    assert all(stored[name].dtype == np.int8 and ((stored[name] == 0) == (dense[name] == 0)).all() for name in weights)
    model = AutoModelForCausalLM.from_pretrained(out, dtype="float32")
    seen = {}
    for name, module in model.named_modules():
        if name + ".weight" in weights:
            module.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
    with torch.no_grad():
        model(torch.arange(48).reshape(2, 24))
    assert len(seen) == len(weights)
    for name, (inputs, output) in seen.items():
        x = inputs.numpy()
        scale = np.abs(x).max(axis=-1, keepdims=True) / 127.5
        rounded = np.clip(np.round(x / scale), -128, 127) * scale
        expected, unrounded = (each @ dense[name + ".weight"].astype(np.float32).T for each in (rounded, x))
        error = np.abs(output.numpy() - expected).max()
        assert error < 1e-2 * np.abs(output.numpy() - unrounded).max(), name


def assert_gguf_is_the_same(out: Path, plain: Path, bits: int, weights, scales) -> None:
    """Checks the GGUF file's integers, float16 scales, tensors and logits."""
    dense, tensors = folder_tensors(plain), open_model(str(out / "model.gguf")).tensors
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out / "model.gguf").tensors}
    assert kinds["blk.0.ffn_up.weight"] == kinds["blk.0.attn_q.weight"] == f"Q{bits}_0" and kinds["output_norm.weight"] == "F32"
    for name, expected in dense.items():
        actual, expected = tensors.read(name), expected.astype(np.float32)
        if name in weights:
            half, scale = (scales[name].astype(dtype).astype(np.float32) for dtype in (np.float16, np.float32))
            expected = np.round(expected / scale) * half
        np.testing.assert_array_equal(actual, expected)
    counted = {layer["name"]: layer["pruned"] for layer in json.loads((out / "optima_tpu.json").read_text())["layers"]}
    assert counted == {name: int((dense[name] == 0).sum()) for name in weights}
    theirs = logits(out, gguf_file="model.gguf")
    exact = all((scale.astype(np.float16).astype(scale.dtype) == scale).all() for scale in scales.values())
    assert torch.equal(theirs, logits(plain)) if exact else torch.allclose(theirs, logits(plain), atol=2e-3)


def test_transformers_loads_a_run_as_the_same_model(run, tmp_path):
    out = tmp_path / "out"
    assert main([str(run), str(out), "--format", "compressed-tensors", "--max-shard-size", "20KB"]) == 0
    assert_the_same(out, run / "hf", 4)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert open_declared(str(out), None, 4).decoder.tensors.dtype("model.norm.weight") == DTYPES["bfloat16"]
    stored = folder_tensors(out)
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in stored.values())


def test_layers_that_were_cut_and_then_quantised_are_integers_too(tmp_path):
    model, run = tiny_folder(tmp_path / "model", **SIZES | dict(intermediate_size=64)), tmp_path / "run"
    settings = ["--pattern", "2:4", "--layers", "*=0.25/neuron@16", "--quantize", "int8", "--preset", "fast"]
    assert launch.main([str(model), *SMALL, *settings, "--output", str(run)]) == 0
    for form in ("compressed-tensors", "compressed-tensors-w8a8"):
        export(run, tmp_path / form, form=form)
    stored = folder_tensors(tmp_path / "compressed-tensors")
    assert stored["model.layers.0.mlp.down_proj.weight_shape"].tolist() == [32, 48]
    assert "model.layers.0.mlp.down_proj.weight" not in read_masks(tmp_path / "compressed-tensors")
    assert torch.equal(logits(tmp_path / "compressed-tensors"), logits(run / "hf"))
    assert folder_tensors(tmp_path / "compressed-tensors-w8a8")["model.layers.0.mlp.down_proj.weight"].dtype == np.int8


@pytest.mark.parametrize(("bits", "dtype"), [(8, "bfloat16"), pytest.param(8, "float32", marks=pytest.mark.slow), (4, "float16")])
def test_every_width_and_dtype_comes_back(tmp_path, capsys, bits, dtype):
    model = tiny_folder(tmp_path / "model", dtype=dtype, **SIZES)
    source, rng, half = MemoryTensors(folder_tensors(model)), np.random.default_rng(bits), 2 ** (bits - 1)
    weights, masks, scales = {}, {}, {}
    for name in (name for name in source.names() if "proj" in name):
        keep = rng.random(source.shape(name)) < 0.5
        scales[name] = (np.exp(rng.uniform(-1, 1, (32, 1))) / 6 / half).astype(DTYPES[dtype])
        numbers = np.where(keep, rng.integers(-half, half, keep.shape), 0)
        weights[name], masks[name] = (numbers * scales[name].astype(np.float32)).astype(DTYPES[dtype]), keep
    imported = {"pattern": "0.1", "selector": {"name": "imported"}, "quantize": {"name": f"int{bits}", "group": None}}
    assets = {path.name: path.read_bytes() for path in model.iterdir() if path.suffix == ".json" and "index" not in path.name}
    journal = begun(tmp_path / "run", MANIFEST | {"recipe": MANIFEST["recipe"] | imported}, assets)
    report = block_report(0, {name.split(".", 3)[3].removesuffix(".weight"): keep for name, keep in masks.items()})
    journal.save(0, weights, masks, report, on_host(np.zeros((1, 1, 1))), scales=scales)
    write_checkpoint(journal, source, mesh(1, 1))
    dense = sum(array.nbytes for array in folder_tensors(model).values())
    for out, form in (("plain", "plain"), ("out", "compressed-tensors"), ("gguf", "gguf")):
        assert main([str(tmp_path / "run"), str(tmp_path / out), "--format", form]) == 0
        first, *_, last = capsys.readouterr().out.splitlines()
        assert first.startswith(f"writing and checking {len(source.names())} tensors of {dense:,} bytes as {form}")
        (small,) = (path.stat().st_size for path in (tmp_path / out).iterdir() if path.suffix in (".safetensors", ".gguf"))
        sizes = f"weight files: plain {dense:,} bytes, {form} {small:,} ({small / dense:.3f} of the plain)"
        assert last == (f"wrote {tmp_path / out}" if form == "plain" else sizes)
    assert_the_same(tmp_path / "out", tmp_path / "plain", bits)
    assert_gguf_is_the_same(tmp_path / "gguf", tmp_path / "plain", bits, weights, scales)
    if (bits, dtype) == (8, "float32"):
        export(tmp_path / "run", tmp_path / "w8a8", form="compressed-tensors-w8a8")
        assert_activations_are_rounded(tmp_path / "w8a8", tmp_path / "plain", weights)
        with pytest.raises(
            UserError, match="in the format pack-quantized, got 'int-quantized'; this program reads integers of weights alone"
        ):
            open_model(str(tmp_path / "w8a8"))


def test_the_report_has_the_errors_around_the_quantisation(run):
    layers = [layer for block in json.loads((run / "report.json").read_text())["blocks"] for layer in block["layers"]]
    for names in (
        ("error_after", "error_quantized", "error_nearest"),
        ("held_out_after", "held_out_quantized", "held_out_nearest"),
    ):
        before, stored, nearest = (sum(layer[name] for layer in layers) for name in names)
        assert before < stored < nearest
    scales = CheckpointTensors(run).scales(CheckpointTensors(run).quantized())
    assert len(scales) == len(layers) == 2 and {scale.shape for scale in scales.values()} == {(32, 2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda settings, weights: weights.update(symmetric=False), "expected symmetric integers"),
        (lambda settings, weights: weights.update(actorder="group"), "actorder: expected null, got str"),
        (lambda settings, weights: weights.update(num_bits=3), "num_bits: invalid enum value 3"),
        (lambda settings, weights: weights.update(num_bits=8), "expected integers and scales of"),
    ],
)
def test_integers_that_are_stored_otherwise_are_refused(run, tmp_path, change, message):
    export(run, tmp_path / "out", form="compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    change(config["quantization_config"], config["quantization_config"]["config_groups"]["group_0"]["weights"])
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        open_model(str(tmp_path / "out"))


def test_activations_need_integers_by_rows(run, tmp_path):
    with pytest.raises(UserError, match="--quantize int8 --quantize.group null .* got .* with int4 by groups of 16"):
        export(run, tmp_path / "out", form="compressed-tensors-w8a8")


def test_groups_that_are_no_blocks_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="a multiple of 32 inputs for a GGUF file, got one for 16 in .* --quantize.group 32"):
        export(run, tmp_path / "out", form="gguf")
    assert not (tmp_path / "out").exists()


def test_a_run_without_integers_is_refused(tmp_path):
    finished_run(tmp_path / "run", small_model())
    with pytest.raises(
        UserError,
        match="expected a run with --quantize int4 or int8 .* prune again with --quantize .*, or take --format plain, packed or gguf$",
    ):
        export(tmp_path / "run", tmp_path / "out", form="compressed-tensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--quantize", "int4", "--quantize.group", "24"], "got 24 for a layer with 32; take 32 or 16 or null"),
        (["--quantize", "int4", "--quantize.group", "16", "--distill", "kl"], "expected quantize null where distill is kl"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(model, tmp_path, capsys, settings, message):
    assert launch.main([str(model), *SMALL, *settings, "--output", str(tmp_path / "run")]) == 2
    assert message in only_error(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
