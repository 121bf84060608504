"""A gpt-oss in MXFP4 is the model that transformers expands it to."""

import io
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console

from optima_tpu.config.run_config import Calibration, Evaluation, RunConfig
from optima_tpu.errors import UserError
from optima_tpu.method.patterns import NM
from optima_tpu.method.selectors import Magnitude
from optima_tpu.models.checkpoints import open_model
from optima_tpu.models.checkpoints.export import read_masks
from optima_tpu.models.checkpoints.mxfp4 import expand, without_mxfp4
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline.plan.model import open_declared
from optima_tpu.pipeline.run import run
from tests.support.fake_run import assert_same
from tests.support.meshes import mesh
from tests.support.oracles import logits_of
from tests.support.references import BY_MODEL, far_from, save
from tests.support.runs import folder_tensors, opened
from tests.support.tiny_models import MemoryTensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")

GPT_OSS = BY_MODEL["GptOssForCausalLM"]
SIZES = dict(vocab_size=258, hidden_size=64, intermediate_size=32, num_local_experts=3, num_hidden_layers=1)
NAME = "model.layers.0.mlp.experts.down_proj"


def halves(rng, experts: int, d_in: int, d_out: int, scales: tuple[int, int] = (118, 126)) -> tuple[np.ndarray, np.ndarray]:
    """Random blocks and scales; the weights have the size of usual ones."""
    shape = experts, d_out, d_in // 32
    return rng.integers(0, 256, (*shape, 16), np.uint8), rng.integers(*scales, shape, np.uint8)


def expanded_by_transformers(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[experts, d_in, d_out] bfloat16."""
    matrices = mxfp4.convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))
    return matrices.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A gpt-oss as published: experts in MXFP4, no dtype in config.json."""
    path = tmp_path_factory.mktemp("mxfp4") / "model"
    save(path, GPT_OSS, SIZES, torch.bfloat16)
    arrays, rng = folder_tensors(path), np.random.default_rng(0)
    for name in [name for name in arrays if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, d_in, d_out = arrays.pop(name).shape
        arrays[name + "_blocks"], arrays[name + "_scales"] = halves(rng, experts, d_in, d_out)
    safetensors.numpy.save_file(arrays, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    del config["dtype"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def expanded(folder) -> Path:
    """The same, as transformers writes it in bfloat16."""
    quantization = transformers.Mxfp4Config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.bfloat16)
    model.save_pretrained(folder.parent / "expanded")
    return folder.parent / "expanded"


def test_every_code_with_every_scale_is_what_transformers_reads():
    """Except at scale 255: NaN by the standard, 2^128 in transformers."""
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 1, 16), (16, 256, 16))[None]
    scales = np.broadcast_to(np.arange(256, dtype=np.uint8), (1, 16, 256))
    actual, expected = np.swapaxes(expand(blocks, scales), 1, 2), expanded_by_transformers(blocks.copy(), scales.copy())
    last = actual.shape[1] - 32
    assert_same(actual[:, :last], expected[:, :last])
    assert np.isnan(actual[:, last:]).all()


@pytest.mark.parametrize(
    "index",
    [
        (...,),
        (slice(1, 2),),
        (slice(2, 3), slice(5, 70), slice(3, 9)),
        (..., slice(64, 96), slice(None)),
        (slice(None), slice(33, 90, 7), slice(0, 9, 2)),
        (slice(None), slice(40, 40)),
    ],
)
def test_parts_are_read_as_those_of_the_whole(index):
    blocks, scales = halves(np.random.default_rng(0), 3, 96, 10, (0, 254))
    source = without_mxfp4(MemoryTensors({NAME + "_blocks": blocks, NAME + "_scales": scales}))
    assert source.names() == (NAME,) and source.shape(NAME) == (3, 96, 10) and source.dtype(NAME) == ml_dtypes.bfloat16
    assert_same(source.read(NAME, index), expanded_by_transformers(blocks, scales)[index])


def test_the_folder_is_the_model_that_transformers_expands(folder, expanded):
    for dtype in (None, "float32"):
        ours, theirs = (open_model(str(where), dtype) for where in (folder, expanded))
        assert ours.tensors.names() == theirs.tensors.names()
        for name in ours.tensors.names():
            assert_same(ours.tensors.read(name), theirs.tensors.read(name))
    config = json.loads(open_model(str(folder)).assets["config.json"])
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    assert open_declared(str(folder), None, 4).decoder.tensors.dtype(NAME) == ml_dtypes.bfloat16

    tokens = np.random.default_rng(0).integers(1, 256, (2, 24)).astype(np.int32)
    logits = logits_of(Decoder.open(ours.config, ours.tensors, mesh(1, 1), batch=2), tokens)
    model = transformers.AutoModelForCausalLM.from_pretrained(expanded, attn_implementation="eager", dtype=torch.float32)
    assert (far_from(model, logits, tokens) < 1e-4).all()


def test_it_is_pruned_and_exported_in_bfloat16(folder, expanded, tmp_path):
    config = RunConfig(
        model=str(folder),
        output=str(tmp_path),
        calibration=Calibration("random", windows=4, length=16, held_out=0),
        evaluation=Evaluation("random", windows=4),
    ).changed(pattern=NM(2, 4), selector=Magnitude(), solver=None)
    run(config, Console(file=io.StringIO()), opened(config, (1, 1)))
    out = tmp_path / "hf"
    before, after = folder_tensors(expanded), folder_tensors(out)
    assert {name: (a.shape, a.dtype) for name, a in after.items()} == {name: (a.shape, a.dtype) for name, a in before.items()}
    dense, sparse, masks = open_model(str(expanded)).tensors, open_model(str(out)).tensors, read_masks(out)
    assert sum("experts" in name for name in masks) == 2 * 3
    for name in dense.names():
        keep = masks.get(name, np.True_)
        assert_same(sparse.read(name), np.where(keep, dense.read(name), np.zeros_like(dense.read(name))))
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    _, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop(NAME + "_scales"), f"expected {NAME}_scales beside {NAME}_blocks, got none"),
        (lambda a: a.pop(NAME + "_blocks"), f"expected {NAME}_blocks beside {NAME}_scales, got none"),
        (lambda a: a.update({NAME: np.zeros((3, 32, 4))}), f"expected {NAME} in MXFP4 alone"),
        (lambda a: a.update({NAME + "_blocks": a[NAME + "_blocks"][..., :8]}), r"_blocks: .* got uint8 \[3, 4, 1, 8\]"),
        (lambda a: a.update({NAME + "_blocks": a[NAME + "_blocks"][0]}), r"_blocks: .* got uint8 \[4, 1, 16\]"),
        (lambda a: a.update({NAME + "_scales": a[NAME + "_scales"][:2]}), r"_blocks: .* and uint8 \[2, 4, 1\]"),
        (lambda a: a.update({NAME + "_blocks": a[NAME + "_blocks"].view(np.int8)}), r"_blocks: .* got int8 \[3, 4, 1, 16\]"),
        (lambda a: a.update({NAME + "_scales": a[NAME + "_scales"].astype("f4")}), r"_blocks: .* and float32 \[3, 4, 1\]"),
    ],
)
def test_halves_that_do_not_fit_are_refused_by_name(change, message):
    blocks, scales = halves(np.random.default_rng(0), 3, 32, 4)
    arrays = {NAME + "_blocks": blocks, NAME + "_scales": scales}
    change(arrays)
    with pytest.raises(UserError, match=message) as refused:
        without_mxfp4(MemoryTensors(arrays))
    assert "\n" not in str(refused.value) and NAME in str(refused.value)
