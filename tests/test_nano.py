"""The method in one file, examples/nano.py, gives what the package gives."""

import ast
import importlib.util
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from optima_tpu import launch
from optima_tpu.models.checkpoints.export import read_masks
from tests.support.processes import python
from tests.support.runs import SMALL, folder_tensors
from tests.support.tiny_models import tiny_folder

pytestmark = pytest.mark.usefixtures("one_device")

FILE = Path(__file__).parents[1] / "examples" / "nano.py"


class Run(NamedTuple):
    """A finished run of preset ``fast`` on a tiny model, and its windows."""

    model: Path
    directory: Path
    tokens: np.ndarray


@pytest.fixture(scope="module")
def nano():
    before = jax.config.jax_default_matmul_precision  # the file sets it for its own process
    spec = importlib.util.spec_from_file_location("nano", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.GAP = 1e-6  # at the preset's 1e-3 a last bit may let a row stop a cycle earlier
    yield module
    jax.config.update("jax_default_matmul_precision", before)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    tokens = np.random.default_rng(0).integers(0, 256, (8, 32), np.int32)
    np.save(folder / "calibration.npy", tokens)
    np.save(folder / "evaluation.npy", tokens[::-1, ::-1])
    model = tiny_folder(folder / "model", dtype="bfloat16")
    sources = [f"--{part}.source=npy:{folder}/{part}.npy" for part in ("calibration", "evaluation")]
    settings = ["--preset", "fast", "--dtype", "float32", "--solver.tolerance", "1e-6", "--output", str(folder / "run")]
    assert launch.main([str(model), *settings, *SMALL, *sources, "--calibration.held_out", "0"]) == 0
    return Run(model, folder / "run", tokens)


@pytest.fixture(scope="module")
def pruned(nano, run):
    """All tensors of the model in float32, as examples/nano.py prunes them."""
    weights = {name: array.astype("float32") for name, array in nano.load(run.model).items()}
    matrices = nano.pruned(weights, nano.Shape.read(run.model), run.tokens)
    return weights | {name: matrix for name, matrix, _, _ in matrices}


def test_masks_are_equal_and_weights_agree_to_rounding(pruned, run):
    masks, expected = read_masks(run.directory / "hf"), folder_tensors(run.directory / "hf")
    assert len(masks) == 21 and pruned.keys() == expected.keys()
    for name, mask in masks.items():
        np.testing.assert_array_equal(np.asarray(pruned[name]) != 0, mask, err_msg=name)
    for name, matrix in expected.items():
        # Two points within 1e-6 of a quadratic's minimum, relative to it, are within the root of that of each other.
        assert np.abs(np.asarray(pruned[name]) - matrix).max() <= 1e-3 * np.abs(matrix).max(), name


def test_perplexities_before_and_after_agree(nano, pruned, run):
    report = json.loads((run.directory / "report.json").read_text())["perplexity"]
    shape, tokens = nano.Shape.read(run.model), run.tokens[::-1, ::-1][:8]
    dense = {name: array.astype("float32") for name, array in nano.load(run.model).items()}
    assert nano.perplexity(dense, shape, tokens) == pytest.approx(report["dense"], rel=1e-5)
    assert nano.perplexity(pruned, shape, tokens) == pytest.approx(report["pruned"], rel=1e-5)


def test_an_error_never_rises(nano, run):
    layers = list(nano.pruned(nano.load(run.model), nano.Shape.read(run.model), run.tokens))  # stored in bfloat16
    assert all(after <= before for _, _, before, after in layers)
    assert all(matrix.dtype == "bfloat16" for _, matrix, _, _ in layers)


def test_the_command_writes_a_folder_that_it_can_prune_again(nano, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nano, "WINDOWS", 4)
    monkeypatch.setattr(nano, "LENGTH", 32)
    (tmp_path / "text").write_text("All rows of a layer share one Hessian. " * 8)
    nano.main(run.model, tmp_path / "text", tmp_path / "out")
    assert "perplexity on 4 windows" in capsys.readouterr().out
    out = nano.load(tmp_path / "out")
    assert nano.Shape.read(tmp_path / "out").blocks == 3
    assert (np.asarray(out["model.layers.0.mlp.down_proj.weight"]) == 0).mean() == 0.5


def test_the_command_line_says_what_a_text_must_hold(run, tmp_path):
    (tmp_path / "text").write_text("All rows of a layer share one Hessian.")
    done = python(str(FILE), run.model, tmp_path / "text", tmp_path / "out")
    assert done.returncode == 1 and "expected a text of 36 windows of 512 tokens, got 0" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_the_file_is_short_and_imports_four_libraries():
    text = FILE.read_text()
    modules = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).partition(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert text.count("\n") <= 300
    assert modules == {
        "collections",
        "jax",
        "json",
        "math",
        "numpy",
        "pathlib",
        "safetensors",
        "shutil",
        "sys",
        "tokenizers",
        "typing",
    }
