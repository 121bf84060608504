"""What the benchmarks print of a model: the same as a whole run."""

import contextlib
import json
import re
import runpy
import statistics
import sys
from pathlib import Path

import pytest

import benchmarks
from benchmarks import layer_errors, records
from optima_tpu.report.runs import read_report

COMMANDS = [path.stem for path in sorted(Path(benchmarks.__path__[0]).glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_explains_itself(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with contextlib.suppress(SystemExit):
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    assert re.search("usage: |python -m ", capsys.readouterr().out)


@pytest.mark.slow
def test_layer_errors_are_those_of_a_whole_run(finished, capsys):
    report = read_report(finished.directory)
    layers = report.layers
    layer_errors.main([str(len(report.blocks)), "--beside", "cg,cg-undamped", *finished.arguments])
    printed = capsys.readouterr().out
    means = {
        name: statistics.fmean(getattr(layer, name) for layer in layers)
        for name in ("error_before", "error_after", "held_out_after")
    }
    errors = re.search(r"selector (\S+), final (\S+), held out (\S+)", printed).groups()
    assert [float(value) for value in errors] == pytest.approx(list(means.values()), abs=6e-5)
    assert float(re.search(r"perplexity (\S+),", printed)[1]) == pytest.approx(report.perplexity.pruned, abs=6e-4)
    # Beside the run's cg one with a gap of 0.1%, not of 0.0001%, and one without damping, which makes the error itself smallest.
    beside = {name: float(value) for name, value in re.findall(r"(\S+): mean error (\S+),", printed)}
    assert beside["cg"] == pytest.approx(means["error_after"], rel=2e-3, abs=6e-5)
    assert beside["cg-undamped"] <= means["error_after"] + 6e-5  # printed with four digits


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["9"], "expected 1 to"),
        (["1", "--beside", "mpax"], "got mpax"),
        (["1", "--target", "dense"], "own outputs"),
        (["1", "--allocation", "owl"], "the same sparsity for every block"),
        (["1", "--no-such", "2"], "no setting"),
    ],
)
def test_what_layer_errors_refuses(finished, arguments, expected):
    with pytest.raises(SystemExit, match=expected):
        layer_errors.main([*arguments, *finished.arguments])


def test_new_rows_of_a_record_leave_its_notes_and_the_commits_of_the_others(tmp_path, monkeypatch):
    path, facts = tmp_path / "record.json", dict(title="new", hardware=None, notes=[])
    monkeypatch.setattr(records, "commit", lambda: "aaa")
    records.write_rows(path, facts, [["a", 1], ["b", 2], ["c", 3]])
    assert json.loads(path.read_text()) == dict(facts, commit="aaa", rows=[["a", 1], ["b", 2], ["c", 3]])
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(title="old", hardware="a core", notes=["a note"])))
    monkeypatch.setattr(records, "commit", lambda: "bbb")
    records.write_rows(path, facts, [["b", 4], ["d", 5]])
    monkeypatch.setattr(records, "commit", lambda: "ccc")
    records.write_rows(path, facts, [["d", 6]])
    assert json.loads(path.read_text()) == dict(
        title="new",
        hardware="a core",
        notes=["a note"],
        commit={"b": "bbb", "d": "ccc", "the others": "aaa"},
        rows=[["a", 1], ["b", 4], ["c", 3], ["d", 6]],
    )
