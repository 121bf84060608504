"""Masks that travel from one run to another, and masks that do not fit."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from optima_tpu.launch import main
from optima_tpu.models.checkpoints.export import read_masks
from optima_tpu.runtime.checksums import ALL
from tests.support.runs import SMALL, folder_tensors

pytestmark = pytest.mark.usefixtures("one_device")


def prune(model, output, *arguments):
    words = ["--model", str(model), "--output", str(output), "--preset", "fast", "--selector", "imported"]
    return main([*words, *SMALL, *arguments])


def imported(model, output, path, *arguments):
    return prune(model, output, "--selector.path", str(path), *arguments)


@pytest.fixture(scope="module")
def masks(finished):
    """The finished run's exported masks, which tests save and damage."""
    return read_masks(finished.directory / "hf")


def test_the_masks_of_one_run_are_those_of_another(finished, tmp_path, capsys):
    """By mask file, or by zeros alone, which give the masked dense weights."""
    exported = finished.directory / "hf"
    reference = read_masks(exported)
    dense = folder_tensors(finished.model)
    assert imported(finished.model, tmp_path / "file", exported / "pruning_masks.npz") == 0
    (exported / "pruning_masks.npz").rename(tmp_path / "away.npz")
    try:
        assert imported(finished.model, tmp_path / "zeros", exported, "--solver", "null") == 0
    finally:
        (tmp_path / "away.npz").rename(exported / "pruning_masks.npz")
    for name in ("file", "zeros"):
        again = read_masks(tmp_path / name / "hf")
        assert again.keys() == reference.keys()
        assert all((again[weight] == keep).all() for weight, keep in reference.items())
    weights = folder_tensors(tmp_path / "zeros" / "hf")
    assert all((weights[name] == np.where(keep, dense[name], 0)).all() for name, keep in reference.items())
    file, zeros = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("file", "zeros"))
    assert file["manifest"]["masks"] == zeros["manifest"]["masks"]
    for solved, masked in zip(file["blocks"][0]["layers"], zeros["blocks"][0]["layers"]):
        assert solved["error_before"] == pytest.approx(masked["error_after"], rel=1e-5)
        assert solved["error_after"] < solved["error_before"]


@pytest.mark.parametrize("folder", ["hf", ""])
def test_with_its_weights_a_pruned_model_is_itself_again(folder, finished, tmp_path):
    """From the exported model, and from the run's own checkpoint."""
    arguments = (finished.directory / folder, "--selector.weights", "true")
    assert imported(finished.model, tmp_path / "same", *arguments, "--solver", "null") == 0
    source, again = folder_tensors(finished.directory / "hf"), folder_tensors(tmp_path / "same" / "hf")
    assert source.keys() == again.keys() and all((again[name] == weight).all() for name, weight in source.items())
    first, same = (json.loads((directory / "report.json").read_text()) for directory in (finished.directory, tmp_path / "same"))
    assert same["recipe"] == "imported weights, 0.5 per layer" and first["recipe"] == "wanda + cg, 0.5 per row"
    assert same["perplexity"] == pytest.approx(first["perplexity"], rel=1e-5)
    errors = [[layer["error_after"] for block in report["blocks"] for layer in block["layers"]] for report in (first, same)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    if folder:
        assert imported(finished.model, tmp_path / "solved", *arguments) == 0  # a start like that of any selector
        solved = json.loads((tmp_path / "solved" / "report.json").read_text())
        first = solved["blocks"][0]["layers"]
        assert [layer["error_before"] for layer in first] == pytest.approx(errors[0][: len(first)], rel=1e-3)
        assert all(layer["error_after"] <= layer["error_before"] * 1.001 for layer in first)


def test_weights_that_do_not_fit_are_one_line(finished, masks, tmp_path, capsys):
    np.savez(tmp_path / "masks.npz", **masks)
    shutil.copytree(finished.directory / "hf", tmp_path / "hf")
    (tmp_path / "hf" / ALL).unlink()
    name = next(name for name in masks if "up_proj" in name)
    arrays = folder_tensors(tmp_path / "hf")
    for file in (tmp_path / "hf").glob("*.safetensors*"):
        file.unlink()
    row, column = np.argwhere(masks[name])[0]
    for path, change, words in (
        (tmp_path / "masks.npz", None, "which has masks alone; take --selector.weights false"),
        (
            tmp_path / "hf",
            lambda weight: np.where((np.indices(weight.shape) == [[[row]], [[column]]]).all(0), np.nan, weight),
            f"{name}: expected finite weights where selector.weights is true, got nan",
        ),
        (tmp_path / "hf", lambda weight: weight[:-1], f"{name}: expected weights {masks[name].shape}, got "),
    ):
        if change:
            save_file(arrays | {name: np.ascontiguousarray(change(arrays[name]))}, tmp_path / "hf" / "model.safetensors")
        assert imported(finished.model, tmp_path / "run", path, "--selector.weights", "true") == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_run_with_other_masks_is_another_run(finished, masks, tmp_path, capsys):
    path = tmp_path / "masks.npz"
    np.savez(path, **masks)
    arguments = (path, "--solver", "null", "--export", "false")
    assert imported(finished.model, tmp_path / "run", *arguments) == 0
    name = next(iter(masks))
    # Two weights of one row change places.
    keep = masks[name].copy()
    keep[0, [np.flatnonzero(keep[0])[0], np.flatnonzero(~keep[0])[0]]] ^= True
    np.savez(path, **masks | {name: keep})
    capsys.readouterr()
    assert imported(finished.model, tmp_path / "run", *arguments) == 2
    message = "holds another run: the masks of selector.path have changed. To resume it, undo what has changed"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "lost, pattern, words",
    [
        ("model.layers.2.self_attn.o_proj.weight", "0.5", "no mask for 1 pruned layer (model.layers.2.self_attn.o_proj.weight)"),
        ("", "2:4", "model.layers.0.mlp.down_proj.weight: expected 2 kept of every 4, got"),
    ],
)
def test_masks_that_do_not_fit_are_one_line_before_anything_is_written(lost, pattern, words, finished, masks, tmp_path, capsys):
    """Each way not to fit is in tests/models/test_masks.py."""
    path = tmp_path / "masks.npz"
    np.savez(path, **{name: keep for name, keep in masks.items() if name != lost})
    assert imported(finished.model, tmp_path / "run", path, "--pattern", pattern) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_masks_must_be_named(finished, tmp_path, capsys):
    assert prune(finished.model, tmp_path / "run") == 2
    assert "expected masks to import, got none; give --selector.path" in capsys.readouterr().err
