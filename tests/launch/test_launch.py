"""Whole runs by the command line, to a folder that transformers loads."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from optima_tpu import export
from optima_tpu.launch import main
from optima_tpu.method.patterns import parse_pattern
from optima_tpu.models.checkpoints import open_model
from optima_tpu.models.checkpoints.export import read_masks
from optima_tpu.models.checkpoints.source import DTYPES
from optima_tpu.models.decoder import Decoder
from tests.support.meshes import mesh
from tests.support.oracles import logits_of
from tests.support.processes import python
from tests.support.runs import SMALL, folder_tensors
from tests.support.tiny_models import tiny_folder

LAYERS = 7
BLOCKS = 3
OF_ONE_SHAPE = ["--layers", ",".join(f"*.{name}_proj=dense" for name in ("q", "k", "v", "gate", "up"))]
"""Prunes o_proj and down_proj: where a method's programs take long to compile, one is enough."""


def assert_pruned(source: Path, exported: Path, pattern: str, matrices: int = LAYERS * BLOCKS) -> None:
    """Asserts exact zeros in pruned matrices, and other tensors unchanged."""
    before, after, masks = folder_tensors(source), folder_tensors(exported), read_masks(exported)
    assert before.keys() == after.keys() and len(masks) == matrices
    assert all(name.endswith("_proj.weight") for name in masks)
    for name, weight in after.items():
        assert (weight.shape, weight.dtype) == (before[name].shape, before[name].dtype)
        if name not in masks:
            assert weight.tobytes() == before[name].tobytes(), name
            continue
        zero = weight == 0
        assert (zero == ~masks[name]).all() and not np.signbit(weight[zero]).any(), name
        match pattern:
            case "2:4":
                assert (zero.reshape(-1, 4).sum(axis=1) == 2).all(), name
            case "0.5":
                assert (zero.sum(axis=1) == weight.shape[1] // 2).all(), name
        assert zero.sum() == parse_pattern(pattern).pruned_count(weight.shape), name
        assert np.isfinite(weight).all()


def test_only_the_weights_are_changed(finished):
    exported = finished.directory / "hf"
    assert_pruned(finished.model, exported, "0.5")
    kept = sorted(path for path in finished.model.iterdir() if "safetensors" not in path.name)
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= {path.name for path in kept}
    for path in kept:
        assert (exported / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_report_is_complete(finished):
    report = json.loads((finished.directory / "report.json").read_text())
    size = sum(weight.size for name, weight in folder_tensors(finished.model).items() if "_proj" in name)
    assert (report["weights"], report["pruned"], report["sparsity"]) == (size, size // 2, 0.5)
    assert report["perplexity"]["pruned"] > 0 and report["perplexity"]["dense"] > 0
    recipe = "wanda + cg, 0.5 per row"
    assert report["recipe"] == recipe and f"recipe       {recipe}\n" in finished.printed
    card = (finished.directory / "hf" / "README.md").read_text()
    assert f"\n{recipe}. Calibrated on {report['calibration']['how']}. All settings" in card
    assert report["configuration"]["pattern"] == "0.5" and report["configuration"]["model"] == str(finished.model)
    assert report["environment"]["mesh"] == {"data": 4, "model": 2}
    stages = {"dense perplexity", "pruning", "writing the checkpoint", "pruned perplexity", "exporting for transformers"}
    assert stages <= set(report["seconds"])
    assert [block["index"] for block in report["blocks"]] == list(range(BLOCKS))
    for block in report["blocks"]:
        assert len(block["layers"]) == LAYERS
        for layer in block["layers"]:
            assert layer["sparsity"] == 0.5 and layer["error_after"] < layer["error_before"]
            assert 0 < layer["rows_converged"] <= layer["rows"] == layer["shape"][0]
    assert set(report["files"]) == {"report", "checkpoint", "transformers"}
    for path in report["files"].values():
        assert Path(path).exists() and path in finished.printed


def test_what_is_not_printed_to_a_terminal_is_plain_lines(finished):
    assert "\x1b" not in finished.printed and "\r" not in finished.printed
    for index in range(BLOCKS):
        assert finished.printed.count(f"block {index} ({index + 1} of {BLOCKS}): calibration error ") == 1
    assert "dense perplexity" in finished.printed and "perplexity  dense" in finished.printed
    assert finished.printed.splitlines()[-1].startswith(f"report      {finished.directory}/report.html: open it in a browser; ")
    assert re.search(rf"^record +{finished.directory}/report.json$", finished.printed, re.MULTILINE)


def test_transformers_agrees_with_our_forward_pass_on_the_exported_model(finished):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished.directory / "hf"
    ids = np.random.default_rng(3).integers(0, 258, (8, 32)).astype(np.int32)
    pretrained = open_model(str(folder))
    ours = logits_of(Decoder.open(pretrained.config, pretrained.tensors, mesh(4, 2)), ids)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-3 * np.abs(theirs).max()
    text = "as it was"
    assert AutoTokenizer.from_pretrained(folder)(text) == AutoTokenizer.from_pretrained(finished.model)(text)


def test_the_export_command_writes_the_same_bytes(finished, tmp_path):
    assert export.main([str(finished.directory), str(tmp_path / "hf")]) == 0
    names = sorted(path.name for path in (finished.directory / "hf").iterdir())
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == names
    for name in names:
        assert (tmp_path / "hf" / name).read_bytes() == (finished.directory / "hf" / name).read_bytes(), name


def test_one_device_in_a_process_of_its_own_without_torch_agrees_with_eight(finished, tmp_path):
    arguments = finished.arguments.copy()
    arguments[arguments.index("4x2")] = "1x1"
    result = python("-m", "optima_tpu.launch", *arguments, "--cpu-devices", 1, "--output", tmp_path / "run")
    assert (result.returncode, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout and "\r" not in result.stdout
    assert "block 2 (3 of 3): calibration error " in result.stdout
    masks, other_masks = read_masks(finished.directory / "hf"), read_masks(tmp_path / "run" / "hf")
    expected, other = folder_tensors(finished.directory / "hf"), folder_tensors(tmp_path / "run" / "hf")
    for name, keep in masks.items():
        assert (keep == other_masks[name]).all(), name
        assert np.abs(other[name] - expected[name]).max() < 1e-3 * np.abs(expected[name]).max(), name


@pytest.mark.parametrize(
    ("dtype", "pattern", "options", "untied"),
    [
        ("float16", "0.6/layer", ["--selector", "magnitude", "--solver", "null"], False),
        ("float32", "2:4", ["--preset", "fast", "--solver", "exact"], True),
        ("bfloat16", "2:4", ["--preset", "fast", "--solver", "mpax", "--accept", "per_layer", *OF_ONE_SHAPE], False),
    ],
    ids=["null in float16", "exact", "mpax in bfloat16"],
)
def test_every_solver_runs_end_to_end(one_device, tmp_path, dtype, pattern, options, untied):
    """On one device; test_prune.py compares meshes."""
    model = tiny_folder(tmp_path / "model", dtype=dtype, tie_word_embeddings=not untied, num_hidden_layers=1)
    run = tmp_path / "run"
    assert main(["--model", str(model), "--output", str(run), "--pattern", pattern, *options, *SMALL]) == 0
    assert_pruned(model, run / "hf", pattern, 2 if "--layers" in options else LAYERS)
    tensors = folder_tensors(run / "hf")
    assert {tensor.dtype for tensor in tensors.values()} == {DTYPES[dtype]} and ("lm_head.weight" in tensors) == untied
    report = json.loads((run / "report.json").read_text())
    assert report["weighed_layers"] == []
    for layer in (layer for block in report["blocks"] for layer in block["layers"]):
        assert layer["error_after"] <= layer["error_before"]
        if "null" in options:
            assert layer["error_after"] == layer["error_before"]


def test_what_runs_where_no_method_is_named_is_the_best_preset(one_device, tmp_path, capsys):
    model, run = tiny_folder(tmp_path / "model", num_hidden_layers=2), tmp_path / "run"
    assert main(["--model", str(model), "--output", str(run), *OF_ONE_SHAPE, *SMALL]) == 0
    assert_pruned(model, run / "hf", "0.5/layer", 2 * 2)  # ADMM compares the weights of a whole matrix
    report, printed = json.loads((run / "report.json").read_text()), capsys.readouterr().out
    assert report["weighed_layers"] == ["self_attn.o_proj", "mlp.down_proj"]
    assert "o_proj and down_proj: tokens weighed" in printed and "came in by exchange" in printed
    for layer in (layer for block in report["blocks"] for layer in block["layers"]):
        assert layer["dense_after"] is not None
