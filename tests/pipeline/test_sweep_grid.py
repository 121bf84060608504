"""A sweep's file defines the cells, and its table has their results."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from optima_tpu.errors import UserError
from optima_tpu.method.patterns import NM, Unstructured
from optima_tpu.method.selectors import Magnitude, Wanda
from optima_tpu.method.solvers import CG, MPAX
from optima_tpu.pipeline.sweep.cells import Cell, differences
from optima_tpu.pipeline.sweep.grid import read_grid
from optima_tpu.pipeline.sweep.tables import CellResult, csv_text, layout, markdown
from optima_tpu.report.averages import averages
from tests.support.refusals import refusal


def test_cells_are_the_product_in_order_seed_by_seed(file):
    grid = read_grid(file(seeds=[0, 3], output="out"))
    assert (grid.masks, grid.updates, grid.patterns) == (("wanda", "magnitude"), ("none", "cg"), ("50%", "2:4 MLP"))
    assert [(cell.seed, cell.pattern, cell.mask, cell.update) for cell in grid.cells] == [
        (seed, pattern, mask, update)
        for seed in (0, 3)
        for pattern in ("50%", "2:4 MLP")
        for mask in ("wanda", "magnitude")
        for update in ("none", "cg")
    ]
    last = grid.cells[-1]
    assert (
        last.config.recipe.pattern == NM(2, 4)
        and last.config.recipe.selector == Magnitude()
        and last.config.recipe.solver == CG(damping=0.25)
    )
    assert [(rule.path, rule.pattern) for rule in last.config.recipe.layers] == [("self_attn.*", None)]
    assert (last.config.calibration.seed, last.config.calibration.windows, last.config.calibration.length) == (3, 4, 8)
    assert last.directory == Path("out/cells/magnitude_cg_2of4-mlp_4-windows_seed-3")
    assert not any(cell.config.export for cell in grid.cells)
    first = grid.cells[0].config.recipe
    assert (first.pattern, first.selector, first.solver, first.layers) == (Unstructured(0.5), Wanda(), None, ())
    assert str(last) == "magnitude + cg, 2:4 MLP, 4 windows, seed 3"


def test_a_plain_sparsity_is_that_of_the_mask_s_own_group(file):
    groups = {cell.mask: cell.config.recipe.pattern.group for cell in read_grid(file()).cells if cell.pattern == "50%"}
    assert groups == {"wanda": "row", "magnitude": "layer"}


def test_windows_are_an_axis(file):
    cells = read_grid(file(windows=[2, 16])).cells
    assert len(cells) == 16 and [cell.config.calibration.windows for cell in cells] == [2] * 8 + [16] * 8
    assert len({cell.directory for cell in cells}) == 16


def test_an_axis_and_a_setting_under_a_label_may_be_called_samples(file):
    rules = [{"samples": 2, "mask": "wanda"}]
    own = read_grid(file(windows=[2, 16], leave_out=[{"windows": 2, "mask": "wanda"}])).cells
    assert len(own) == 12 and read_grid(file(samples=[2, 16], leave_out=rules)).cells == own
    labels = {"few": {"calibration": {"samples": 2}}, "many": {"calibration": {"windows": 16}}}
    path = file(patterns=labels, run={"model": "org/name", "calibration": {"source": "pydoc", "samples": 3}})
    assert [cell.windows for cell in read_grid(path).cells] == 4 * [2] + 4 * [16]
    for word in ("samples", "windows"):
        with pytest.raises(UserError, match="expected calibration.windows 2, as the labels of the file say, got 4"):
            read_grid(path, [f"--calibration.{word}", "4"])


def test_a_cell_keeps_its_directory_when_the_table_grows(file):
    small = {cell.directory for cell in read_grid(file()).cells}
    assert small < {cell.directory for cell in read_grid(file(seeds=[0, 1], windows=[4, 8])).cells}


def only_cell(file, **changes) -> Cell:
    one = {"masks": {"m": {}}, "updates": {"u": {}}, "patterns": {"p": {}}}
    (cell,) = read_grid(file(**(one | changes))).cells
    return cell


def test_later_settings_go_over_earlier_ones(file):
    run = {"model": "org/name", "batch": 1, "dtype": "float32", "mesh": "1x1", "calibration": {"source": "pydoc", "length": 9}}
    config = only_cell(
        file,
        run=run,
        patterns={"p": {"batch": 2, "dtype": "bfloat16", "mesh": "2x1"}},
        masks={"m": {"batch": 3, "dtype": "float16"}},
        updates={"u": {"batch": 4, "calibration": {"windows": 5}, "export": True}},
    ).config
    assert (config.mesh, config.dtype, config.batch, config.export) == ("2x1", "float16", 4, True)
    assert (config.calibration.source, config.calibration.length, config.calibration.windows) == ("pydoc", 9, 5)


@pytest.mark.parametrize(
    ("run", "update", "solver"),
    [
        ({"name": "cg", "damping": 0.5}, {"name": "mpax", "eps_abs": 0.1}, MPAX(eps_abs=0.1)),  # another method: its own options
        ({"name": "cg", "damping": 0.5}, {"name": "cg", "max_steps": 7}, CG(damping=0.5, max_steps=7)),
        ({"name": "cg", "damping": 0.5}, {"name": "CG", "max_steps": 7}, CG(damping=0.5, max_steps=7)),
        ({"name": "cg", "damping": 0.5}, {"max_steps": 7}, CG(damping=0.5, max_steps=7)),
        ({"name": "cg", "damping": 0.5}, "cg", CG(damping=0.5)),
        ({"name": "cg", "damping": 0.5}, None, None),
        (None, "mpax", MPAX()),
        ("mpax", {"eps_abs": 0.1}, MPAX(eps_abs=0.1)),
    ],
)
def test_a_method_takes_the_options_of_its_own_name_only(file, run, update, solver):
    config = only_cell(file, run={"model": "m", "solver": run}, updates={"u": {"solver": update}}).config
    assert config.recipe.solver == solver


def test_the_command_line_goes_over_all_cells(file):
    grid = read_grid(file(windows=[2]), ["--model", "other", "--mesh=4x2", "--calibration.windows", "3", "--cpu-devices", "8"])
    assert {(cell.config.model, cell.config.mesh, cell.windows, cell.config.cpu_devices) for cell in grid.cells} == {
        ("other", "4x2", 3, 8)
    }


def test_seeds_that_draw_the_same_tokens_are_no_repetitions(file):
    path = file(seeds=[0, 1])
    message = (
        "expected one seed where calibration.source is npy:ids.npy, got 0 and 1: a source of token ids draws the same tokens "
        "for every seed; write seeds: [0]"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        read_grid(path, ["--calibration.source", "npy:ids.npy"])
    rules = [{"seed": 1, "mask": "magnitude"}, {"seed": 0, "mask": "wanda"}]
    assert len(read_grid(file(seeds=[0, 1], leave_out=rules), ["--calibration.source", "npy:ids.npy"]).cells) == 8
    assert len(read_grid(file(seeds=[1], windows=[2, 4]), ["--calibration.source", "npy:ids.npy"]).cells) == 16


def test_left_out_cells_match_every_given_key(file):
    whole = read_grid(file(seeds=[0, 1], windows=[2, 4])).cells
    rules = [{"mask": "magnitude", "update": "cg"}, {"pattern": "2:4 MLP", "seed": 1, "windows": 2}]
    left = read_grid(file(seeds=[0, 1], windows=[2, 4], leave_out=rules)).cells
    assert list(left) == [
        cell
        for cell in whole
        if (cell.mask, cell.update) != ("magnitude", "cg") and (cell.pattern, cell.seed, cell.windows) != ("2:4 MLP", 1, 2)
    ]
    assert len(left) == 32 - 8 - 3


def test_the_output_is_the_command_line_s_then_the_file_s_then_the_name(file):
    assert read_grid(file(output="a/b"), output="c").output == Path("c")
    assert read_grid(file(output="a/b")).output == Path("a/b")
    # Two models by one file have two directories.
    assert read_grid(file()).output == Path("runs/tables/small-name")
    assert read_grid(file(), ["--model", "org/other@main"]).output == Path("runs/tables/small-other")


def test_differences_tell_what_varies_and_nothing_else(file):
    masks = {"wanda": {"selector": {"name": "wanda", "shift_zero": True}}, "magnitude": {"selector": "magnitude"}}
    descriptions = differences(read_grid(file(masks=masks, seeds=[0, 1])).cells)
    assert descriptions[1] == "pattern 0.5/row, selector wanda, selector.shift_zero True, solver cg, solver.damping 0.25"
    assert descriptions[-2] == "pattern 2:4, layers self_attn.*=dense, selector magnitude, solver null"


ERRORS = [
    ({"mask": {"wanda": {}}}, ["there is no mask in a sweep", "masks"]),
    ({"masks": None}, ["expected masks as LABEL: {settings}, at least one, got None"]),
    ({"updates": {}}, ["expected updates", "at least one"]),
    ({"patterns": [0.5]}, ["expected patterns", "[0.5]"]),
    ({"patterns": {0.5: {"pattern": 0.5}}}, ["label under patterns, got 0.5", "in quotes"]),
    ({"updates": {None: {"solver": None}}}, ["label under updates, got None"]),
    ({"masks": {"*": {}}}, ["label under masks, got '*'"]),
    ({"masks": {"wanda": None}}, ["expected settings under masks, wanda", "None"]),
    ({"masks": {"wanda": "wanda"}}, ["expected settings under masks, wanda", "'wanda'"]),
    ({"run": "model"}, ["expected settings under run"]),
    ({"run": {"model": "m", "solver.damping": 0.1}}, ["under run, got 'solver.damping'"]),
    ({"run": {"model": "m", "output": "x"}}, ["run has an output"]),
    ({"masks": {"wanda": {"output": "x"}}}, ["masks, wanda has an output"]),
    ({"output": 3}, ["expected output to be a directory, got 3"]),
    ({"windows": 16}, ["expected windows to be a list", "16"]),
    ({"windows": [0]}, ["expected windows", "at least 1"]),
    ({"windows": []}, ["expected windows"]),
    ({"windows": [2], "samples": [2]}, ["expected calibration.samples or calibration.windows, which are one setting, got both"]),
    ({"leave_out": [{"windows": 2, "samples": 2}]}, ["leave_out 1: expected calibration.samples or calibration.windows"]),
    (
        {"masks": {"m": {"calibration": {"windows": 2, "samples": 2}}}},
        ["masks, m: expected calibration.samples or calibration.windows"],
    ),
    ({"seeds": [0, 0]}, ["expected seeds", "different"]),
    ({"seeds": [True]}, ["expected seeds"]),
    ({"seeds": [0.5]}, ["expected seeds"]),
    ({"leave_out": {"mask": "wanda"}}, ["expected leave_out as a list"]),
    ({"leave_out": [{}]}, ["expected leave_out as a list"]),
    ({"leave_out": [{"masks": "wanda"}]}, ["leave_out 1: expected some of pattern, mask, update, windows, seed, got 'masks'"]),
    ({"leave_out": [{"mask": "wanda", "update": "cgg"}]}, ["leave_out 1: there is no update 'cgg'", "none, cg"]),
    ({"leave_out": [{"pattern": 0.5}]}, ["there is no pattern 0.5", "50%, 2:4 MLP", "in quotes"]),
    ({"leave_out": [{"seed": 0}]}, ["there is no seed 0", "none in this file"]),
    ({"leave_out": [{"seed": 2}], "seeds": [0, 1]}, ["there is no seed 2, expected one of 0, 1"]),
    ({"leave_out": [{"mask": "wanda"}, {"mask": "wanda", "update": "cg"}]}, ["leave_out 2 matches no remaining cell"]),
    ({"leave_out": [{"mask": "wanda"}, {"mask": "magnitude"}]}, ["leaves no cell"]),
    ({"updates": {"cg": {"solver": "cgg"}}}, ["cell wanda + cg, 50%: expected solver to be one of", "cgg"]),
    ({"masks": {"wanda": {"selektor": "wanda"}}}, ["cell wanda + none, 50%: there is no setting selektor", "selector"]),
    (
        {"patterns": {"ok": {"pattern": 0.5}, "bad": {"pattern": "4:2"}}},
        ["cell wanda + none, bad: pattern: expected a pattern N:M"],
    ),
    ({"patterns": {"2:4": {"pattern": "2:4"}, "2of4": {"pattern": 0.5}}}, ["wanda + none, 2:4", "2of4", "would share"]),
    ({"patterns": {"a": {"pattern": 0.5}, "b": {"pattern": 0.5}}}, ["wanda + none, a", "wanda + none, b", "the same settings"]),
]


@pytest.mark.parametrize(("changes", "said"), ERRORS)
def test_a_wrong_file_is_one_line_that_names_it(file, changes, said):
    path = file(**changes)
    message = refusal(read_grid, path)
    assert message.startswith(path) and all(part in message for part in said), message


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--calibration.seed", "5"], "--calibration.seed would make cells equal"),
        (["--solver.damping", "0.1"], "cell wanda + none, 50%: --solver.damping is an option of solver"),
        (["--batch", "many"], "cell wanda + none, 50%: expected batch to be a whole number"),
        (["--dryrun"], "cell wanda + none, 50%: there is no setting --dryrun; did you mean --dry_run?"),
        (["--calibration.source", "nowhere"], "cell wanda + none, 50%: expected a text"),
        (["stray"], "stray"),
    ],
)
def test_a_wrong_setting_on_the_command_line_is_one_line(file, argv, said):
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        read_grid(file(seeds=[0, 1]), argv, beside=["dry_run"])
    assert str(caught.value).startswith("on the command line, for cell wanda") == (argv[0] != "--calibration.seed")


def test_of_two_mistakes_the_file_has_the_first_word(file):
    path = file(masks={"wanda": {"selektor": "wanda"}})
    with pytest.raises(UserError, match=f"{path}: cell wanda .*selektor"):
        read_grid(path, ["--batch", "many"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("masks: {a: {}, a: {}}", "line 1: expected every setting once, got 'a' twice"),
        ("- 1", "expected settings"),
        ("a: [", "expected YAML"),
    ],
)
def test_what_is_not_a_sweep_is_said_with_the_file(tmp_path, text, said):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        read_grid(path)
    assert str(path) in str(caught.value)
    with pytest.raises(UserError, match="cannot read .*: No such file"):
        read_grid(tmp_path / "absent.yaml")


RESULTS = [
    CellResult("wanda", "none", "50%", 4, 0, "finished", perplexity=20.0, dense=10.0, report="x/report.json"),
    CellResult("wanda", "none", "50%", 4, 1, "finished", perplexity=23.0, dense=10.0, report="x/report.json"),
    CellResult("wanda", "cg", "50%", 4, 0, "finished", perplexity=1234567.8, dense=10.0, report="x/report.json"),
    CellResult("wanda", "cg", "50%", 4, 1, "failed", reason="it | diverged"),
    CellResult("magnitude", "none", "50%", 4, 0, "failed", reason="no"),
    CellResult("magnitude", "none", "50%", 4, 1),
    CellResult("magnitude", "cg", "50%", 4, 0),
    CellResult("magnitude", "cg", "50%", 4, 1),
    CellResult("wanda", "cg", "2:4 MLP", 4, 0, "finished", perplexity=30.25, dense=10.0, report="x/report.json"),
    CellResult("wanda", "cg", "2:4 MLP", 4, 1, "finished", perplexity=30.75, dense=10.0, report="x/report.json"),
]


def test_the_table_is_mean_and_sample_deviation_over_seeds(file):
    table = layout(read_grid(file()), RESULTS)
    assert table.head == ("mask", "update", "50%", "2:4 MLP")
    spread = np.std([30.25, 30.75], ddof=1)
    assert table.rows == (
        ("dense", "", "10.00", "10.00"),
        ("wanda", "none", "21.50 ± 2.12 (n=2)", "-"),
        ("wanda", "cg", "1234568 (n=1, 1 failed)", f"30.50 ± {spread:.2f} (n=2)"),
        ("magnitude", "none", "failed", "-"),
        ("magnitude", "cg", "-", "-"),
    )


def test_one_seed_has_the_standard_error_of_its_run(file):
    results = [structs.replace(RESULTS[0], log_ratio_stderr=0.05), RESULTS[4]]
    table = layout(read_grid(file()), results)
    assert table.rows[1] == ("wanda", "none", "20.00 ± 1.00")
    assert table.caption.startswith("Perplexity, lower is better; ± one standard error against the dense model")


def test_window_counts_are_columns_and_one_seed_has_no_spread(file):
    results = [
        CellResult("wanda", "cg", "50%", windows, 0, "finished", perplexity=20.0 + windows, dense=dense, report="x/report.json")
        for windows, dense in ((16, 10.0), (2, 10.5))
    ]
    table = layout(read_grid(file()), results)
    assert table.head == ("mask", "update", "50%, 2 windows", "50%, 16 windows")
    assert table.rows == (("dense", "", "10.50", "10.00"), ("wanda", "cg", "22.00", "36.00"))


def test_markdown_has_the_header_the_rows_and_the_failures(file):
    grid = read_grid(file())
    text = markdown("small", {"model": "org/name", "command": "python x"}, layout(grid, RESULTS), RESULTS, ["all cells: strange"])
    lines = text.splitlines()
    assert lines[0] == "# small" and "- model: org/name" in lines and "- command: python x" in lines
    assert "| mask | update | 50% | 2:4 MLP |" in lines and "| --- | --- | ---: | ---: |" in lines
    assert "| wanda | none | 21.50 ± 2.12 (n=2) | - |" in lines
    assert "- wanda + cg, 50%, 4 windows, seed 1: it | diverged" in lines
    assert "\nUnusual:\n\n- all cells: strange\n" in text
    assert "Perplexity, lower is better; mean ± sample standard deviation over n seeds. Seeds: 0, 1. " in text
    assert "5 of 10 cells finished" in text and "Seeds: 0, 1" in text
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_csv_has_a_line_for_each_cell():
    rows = list(csv.DictReader(csv_text(list(map(structs.asdict, RESULTS))).splitlines()))
    assert [row["state"] for row in rows] == [result.state for result in RESULTS]
    assert rows[1]["perplexity"] == "23.0" and rows[4]["perplexity"] == "" and rows[3]["reason"] == "it | diverged"


def test_averages_are_mean_and_sample_deviation_of_the_seeds_that_are_finished():
    fields = {(field["mask"], field["update"], field["pattern"]): field for field in averages(RESULTS)}
    assert len(fields) == len(averages(RESULTS)) == 5
    whole, half = fields["wanda", "cg", "2:4 MLP"], fields["wanda", "cg", "50%"]
    none = fields["magnitude", "none", "50%"]
    assert (whole["seeds"], whole["failed"], whole["windows"]) == (2, 0, 4)
    assert whole["perplexity"] == 30.5 and whole["perplexity_spread"] == pytest.approx(np.std([30.25, 30.75], ddof=1))
    assert (half["seeds"], half["failed"], half["perplexity"], half["perplexity_spread"]) == (1, 1, 1234567.8, None)
    assert (none["seeds"], none["perplexity"], none["perplexity_spread"]) == (0, None, None)
