"""A sweep runs each cell of a table once, and reports their results."""

import json
import math
import threading
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from msgspec import structs

from optima_tpu.config.run_config import to_dict, weights_settings
from optima_tpu.data import Tokens
from optima_tpu.errors import UserError
from optima_tpu.method.selectors import Magnitude
from optima_tpu.pipeline.inputs import Texts, token_digest
from optima_tpu.pipeline.journal import Journal
from optima_tpu.pipeline.perplexities import KeptPerplexity, perplexity_files
from optima_tpu.pipeline.sweep import runner, tables
from optima_tpu.report import published
from optima_tpu.report.contents import Perplexities
from optima_tpu.report.file import write_report
from optima_tpu.report.records import BlockReport
from optima_tpu.report.run_record import refuse_another, write_run
from optima_tpu.runtime.files import in_turn
from optima_tpu.runtime.kept import KeptRecord
from optima_tpu.sweep import main
from tests.support.fake_reports import ENTRIES, TEXT, layer
from tests.support.processes import python
from tests.support.runs import only_error, snapshot
from tests.support.sweeps import TABLE, write_sweep


def perplexity_of(config) -> float:
    """What the stand-in of a run finds."""
    return 20 + 4 * (config.recipe.solver is None) + 2 * isinstance(config.recipe.selector, Magnitude) + config.calibration.seed


class StandIn:
    """Replaces ``run`` and its readers by instant ones, and counts calls."""

    def __init__(self, monkeypatch):
        self.counts, self.ran, self.stop, self.code = Counter(), [], {}, "0+1"
        for name in ("open_model_on_mesh", "read_texts", "on_model", "manifest_of", "run", "is_export_of", "faults"):
            monkeypatch.setattr(runner, name, getattr(self, name))

    def open_model_on_mesh(self, config):
        self.counts["model"] += 1
        return SimpleNamespace(name=config.model, pretrained=SimpleNamespace(config=None))

    def on_model(self, config, model):
        return config

    def read_texts(self, config, model):
        self.counts["texts"] += 1
        rng = np.random.default_rng(config.calibration.seed)
        calibration = Tokens(rng.integers(0, 9, (config.calibration.windows, 8)), "random windows", 100)
        return Texts(calibration, Tokens(np.full((config.evaluation.windows or 2, 8), 1), "other windows", 16))

    def manifest_of(self, config, model, texts):
        digest = token_digest(texts.calibration.ids)
        manifest = {"model": "ab" * 32, "recipe": weights_settings(config), "calibration": digest, "code": self.code}
        return json.loads(json.dumps(manifest))

    def is_export_of(self, directory, folder):
        return folder.exists()

    def faults(self, directory):
        return {}

    def run(self, config, console, model, texts, dense, summary):
        directory, manifest = config.run_directory, self.manifest_of(config, model, texts)
        self.ran.append(directory.name)
        self.counts["dense"] += dense is None
        assert dense in (None, (10.0, None)) and model.name == config.model
        if directory.exists():
            refuse_another(directory, manifest, to_dict(config))
        else:
            directory.mkdir(parents=True)
            write_run(directory, manifest, to_dict(config))
        if error := self.stop.get(directory.name):
            raise error
        kept = KeptPerplexity(token_digest(texts.evaluation.ids), 10.0, None)
        KeptRecord(perplexity_files("dense")[0], KeptPerplexity).write(directory, kept)
        for folder in ("journal", "checkpoint", "assets"):
            (directory / folder / "inner").mkdir(parents=True, exist_ok=True)
        counts = {"rows": 4, "rows_converged": 3, "rows_refused": 2, "held_out_before": None, "held_out_after": 0.5}
        blocks = [
            BlockReport(
                index,
                1.5,
                (
                    layer(index, **counts, error_before=0.2 + index, error_after=0.1),
                    layer(index, **counts, error_before=0.4, error_after=math.inf),
                ),
            )
            for index in range(2)
        ]
        names = ["report.json", "checkpoint", *(["hf"] if config.export else [])]
        changes = {
            "manifest": manifest,
            "configuration": to_dict(config),
            "model": structs.replace(ENTRIES["model"], origin=config.model, blocks=2),
            "calibration": structs.replace(TEXT, how=texts.calibration.how),
            "evaluation": structs.replace(TEXT, how=texts.evaluation.how, tokens=16, digest=token_digest(texts.evaluation.ids)),
            "perplexity": Perplexities(10.0, perplexity_of(config)),
            "files": dict(zip(("report", "checkpoint", "transformers"), (str(directory / name) for name in names))),
        }
        if config.export:
            (directory / "hf").mkdir(exist_ok=True)
        return write_report(directory / "report.json", ENTRIES | changes, blocks)


@pytest.fixture
def stand_in(monkeypatch):
    return StandIn(monkeypatch)


@pytest.fixture
def sweep(tmp_path):
    """Runs the command line over a file with one pattern."""

    def call(*argv, **changes) -> int:
        path = write_sweep(tmp_path / "small.yaml", **({"patterns": {"50%": {"pattern": 0.5}}} | changes))
        return main([path, "--output", str(tmp_path / "out"), *argv])

    return call


def read_results(tmp_path) -> list[dict]:
    return json.loads((tmp_path / "out" / "results.json").read_text())


def test_what_cells_have_in_common_is_opened_and_measured_once(sweep, stand_in):
    assert sweep(seeds=[0, 1], patterns=TABLE["patterns"]) == 0
    assert len(stand_in.ran) == 16
    assert stand_in.counts == {"model": 1, "texts": 2, "dense": 1}  # one text for each seed


def test_other_models_and_texts_are_opened_apart(sweep, stand_in):
    patterns = {
        "a": {"dtype": "bfloat16"},
        "b": {"evaluation": {"windows": 3}},
        "c": {"evaluation": {"windows": 4}, "mesh": "8x1"},
        "d": {"evaluation": {"windows": 5}},
    }
    assert sweep(patterns=patterns, updates={"cg": {}}) == 0
    assert stand_in.counts == {"model": 3, "texts": 4, "dense": 4}  # b and d differ in the text that they are measured on alone


@pytest.mark.parametrize(("source", "texts"), [("self", 2), ("self?temperature=0.5", 2), ("random", 1)])
def test_a_model_of_another_dtype_writes_its_own_text(sweep, stand_in, source, texts):
    run = TABLE["run"] | {"dtype": "float32", "calibration": {"source": source, "windows": 4}, "evaluation": {"source": "pydoc"}}
    assert sweep(run=run, updates={"none": {"solver": None}, "cg": {}, "half": {"dtype": "bfloat16"}}) == 0
    assert len(stand_in.ran) == 6 and stand_in.counts["texts"] == texts


def test_the_files_hold_what_the_runs_found(sweep, stand_in, tmp_path, capsys):
    assert sweep("--batch", "3", seeds=[0, 1], leave_out=[{"mask": "magnitude", "update": "cg"}]) == 0
    results = read_results(tmp_path)
    assert [(entry["mask"], entry["update"], entry["seed"]) for entry in results] == [
        (mask, update, seed) for seed in (0, 1) for mask, update in (("wanda", "none"), ("wanda", "cg"), ("magnitude", "none"))
    ]
    last = results[-1]
    assert last == {
        "mask": "magnitude",
        "update": "none",
        "pattern": "50%",
        "windows": 4,
        "seed": 1,
        "state": "finished",
        "perplexity": 27,
        "dense": 10.0,
        "log_ratio_stderr": None,
        "error_before": pytest.approx((0.2 + 0.4 + 1.2 + 0.4) / 4),
        "error_after": None,
        "held_out_before": None,
        "held_out_after": 0.5,
        "seconds": 3.0,
        "rows_not_converged": 4,
        "rows_refused": 8,
        "sparsity": 0.5,
        "reason": None,
        "report": "cells/magnitude_none_50_4-windows_seed-1/report.json",
    }
    assert (tmp_path / "out" / last["report"]).exists()
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| magnitude | none | 26.50 ± 0.71 (n=2) |" in text and "| dense |  | 10.00 |" in text
    command = f"python -m optima_tpu.sweep {tmp_path / 'small.yaml'} --batch 3 --output {tmp_path / 'out'}"
    about = ("model: org/name, 2 blocks", "calibration: random windows", "evaluation: other windows, 16 tokens", "code: 0+1")
    methods = "wanda + cg: preset fast", "magnitude + none: preset fast --selector magnitude --solver null"
    assert all(f"- {line}" in text for line in methods) and "solver.damping 0.25" in text
    assert "\nUnusual:\n" in text and "all cells: rows not converged: block 0 self_attn.q_proj (1 row)" in text
    for line in (*about, "hardware: 8 x cpu (cpu), mesh 4x2, jax 1", f"command: {command}"):
        assert f"- {line}\n" in text
    assert len((tmp_path / "out" / "results.csv").read_text().splitlines()) == 1 + 6
    fields = json.loads((tmp_path / "out" / "table.json").read_text())
    cells = [(field["update"], field["seeds"], field["perplexity"]) for field in fields]
    assert cells == [("none", 2, 24.5), ("cg", 2, 20.5), ("none", 2, 26.5)]
    assert fields[2]["perplexity_spread"] == pytest.approx(0.5**0.5) and fields[2]["error_after"] is None
    assert len((tmp_path / "out" / "table.csv").read_text().splitlines()) == 1 + 3
    printed = capsys.readouterr().out
    assert "cell 5 of 6: wanda + cg, 50%, 4 windows, seed 1\n" in printed
    assert "26.50 ± 0.71 (n=2)" in printed and str(tmp_path / "out" / "table.md") in printed


def test_an_interrupted_sweep_goes_on_at_the_cell_that_is_not_finished(sweep, stand_in, tmp_path, capsys):
    stand_in.stop = {"magnitude_none_50_4-windows_seed-0": KeyboardInterrupt()}
    assert sweep() == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert [entry["state"] for entry in read_results(tmp_path)] == ["finished", "finished", "missing", "missing"]
    before = (tmp_path / "out" / "table.md").read_text()
    assert "| magnitude | none | - |" in before and "| wanda | none | 24.00 |" in before
    stand_in.stop, stand_in.ran, stand_in.counts = {}, [], Counter()
    assert sweep() == 0
    assert stand_in.ran == ["magnitude_none_50_4-windows_seed-0", "magnitude_cg_50_4-windows_seed-0"]
    assert stand_in.counts["dense"] == 0  # the finished cells know it
    assert "resuming  2 of 4 cells done" in capsys.readouterr().out
    resumed = (tmp_path / "out" / "table.md").read_text()

    assert sweep() == 0 and len(stand_in.ran) == 2  # nothing is left to run
    assert (tmp_path / "out" / "table.md").read_text() == resumed
    assert sweep("--output", str(tmp_path / "whole")) == 0
    whole = (tmp_path / "whole" / "table.md").read_text()
    one, other = ([line for line in table.splitlines() if line.startswith("|")] for table in (whole, resumed))
    assert one == other
    assert json.loads((tmp_path / "whole" / "results.json").read_text()) == read_results(tmp_path)


def test_a_failed_cell_is_told_and_tried_again(sweep, stand_in, tmp_path, capsys):
    stand_in.stop = {"wanda_cg_50_4-windows_seed-0": UserError("expected 4, got 9")}
    assert sweep() == 1
    assert len(stand_in.ran) == 4
    assert "failed: expected 4, got 9" in (printed := capsys.readouterr().out)
    assert "failed  wanda + cg, 50%, 4 windows, seed 0: expected 4, got 9" in printed
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| wanda | cg | failed |" in text and "- wanda + cg, 50%, 4 windows, seed 0: expected 4, got 9" in text
    assert [(entry["state"], entry["reason"], entry["report"] is None) for entry in read_results(tmp_path)][:2] == [
        ("finished", None, False),
        ("failed", "expected 4, got 9", True),
    ]
    stand_in.stop, stand_in.ran = {}, []
    assert sweep() == 0
    assert stand_in.ran == ["wanda_cg_50_4-windows_seed-0"]
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| wanda | cg | 20.00 |" in text and "Failed" not in text


def test_all_settings_are_looked_at_before_the_first_cell_runs(sweep, stand_in, tmp_path, capsys):
    assert sweep(updates={"cg": {}, "bad": {"solver": {"name": "cg", "damping": -1}}}) == 2
    assert "cell wanda + bad, 50%: " in capsys.readouterr().err
    assert not stand_in.ran and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda stand_in: {"updates": {"none": {"solver": None}, "cg": {"solver": {"name": "cg", "damping": 0.5}}}},
            ["wanda_cg_50_4-windows_seed-0", "solver.damping is 0.25 there, 0.5 here"],
        ),
        (lambda stand_in: setattr(stand_in, "code", "0+2"), ["wanda_none_50_4-windows_seed-0", "code: 0+1 there, 0+2 here"]),
        (lambda stand_in: {"run": TABLE["run"] | {"evaluation": {"windows": 3}}}, ["measured on another text"]),
    ],
)
def test_cells_of_another_sweep_are_refused(sweep, stand_in, tmp_path, capsys, change, said):
    assert sweep() == 0
    before, stand_in.ran = snapshot(tmp_path / "out"), []
    changes = change(stand_in) or {}
    for argv in ([], ["--only", "magnitude + none"], ["--dry-run"]):  # no table mixes two kinds of runs
        assert sweep(*argv, **changes) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "another --output" in message and all(part in message for part in said), message
    assert not stand_in.ran and snapshot(tmp_path / "out") == before


def test_a_table_with_finished_cells_of_another_sweep_is_not_replaced(sweep, stand_in, tmp_path, capsys):
    assert sweep("--only", "wanda") == 0
    before, stand_in.ran = snapshot(tmp_path / "out"), []
    exact = {"exact": {"solver": "exact"}}
    for argv in ([], ["--only", "magnitude"], ["--dry-run"]):
        capsys.readouterr()
        assert sweep(*argv, updates=exact) == 2
        assert capsys.readouterr().err == (
            f"error: expected a sweep with all finished cells of {tmp_path / 'out' / 'results.json'}, got one without "
            "wanda + none, 50%, 4 windows, seed 0 and 1 more; choose another --output, put them back into the file, or delete "
            "results.json to go on without them (their runs stay)\n"
        )
    assert not stand_in.ran and snapshot(tmp_path / "out") == before

    assert sweep(masks={"wanda": {}}, updates=TABLE["updates"] | exact) == 0  # a row more, and none that was run less
    assert stand_in.ran == ["wanda_exact_50_4-windows_seed-0"]
    (tmp_path / "out" / "results.json").unlink()
    assert sweep(masks={"wanda": {}}, updates=exact) == 0 and len(stand_in.ran) == 1
    assert [entry["update"] for entry in read_results(tmp_path)] == ["exact"]


@pytest.mark.parametrize("text", ["[", "3", "{}", "[3]", '[{"mask": "wanda"}]', '[{"perplexity": 3.5}]'])
def test_a_damaged_results_json_is_replaced_and_another_s_only_by_force(sweep, stand_in, tmp_path, capsys, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text(text)
    assert sweep() == 2
    assert "which holds another results.json: choose another, or add --force to replace it" in capsys.readouterr().err
    assert (tmp_path / "out" / "results.json").read_text() == text and not stand_in.ran
    assert sweep("--force") == 0 and len(read_results(tmp_path)) == 4
    (tmp_path / "out" / "results.json").write_text(text)  # beside the cells of the sweep
    (tmp_path / "out" / "cells").mkdir(exist_ok=True)
    assert sweep() == 0 and len(read_results(tmp_path)) == 4


def test_the_pruned_models_of_finished_cells_are_removed(sweep, stand_in, tmp_path):
    assert sweep(updates={"cg": {}}, masks={"wanda": {}}) == 0
    cell = tmp_path / "out" / "cells" / "wanda_cg_50_4-windows_seed-0"
    assert sorted(path.name for path in cell.iterdir()) == [
        "dense.json",
        "report.json",
        "run.json",
        "run.lock",
        "sha256-all.json",
    ]
    assert json.loads((cell / "report.json").read_text())["files"] == {"report": str(cell / "report.json")}
    (cell / "checkpoint").mkdir()  # as if that had been interrupted
    assert sweep(updates={"cg": {}}, masks={"wanda": {}}) == 0
    assert not (cell / "checkpoint").exists() and len(stand_in.ran) == 1


def test_kept_checkpoints_stay(sweep, stand_in, tmp_path):
    one = {"updates": {"cg": {}}, "masks": {"wanda": {}}}
    assert sweep("--keep-checkpoints", **one) == 0
    assert sweep(**one) == 0  # also when the table is made again without the option
    cell = tmp_path / "out" / "cells" / "wanda_cg_50_4-windows_seed-0"
    left = {"dense.json", "report.json", "run.json", "sha256-all.json", "journal", "checkpoint", "assets"}
    assert {path.name for path in cell.iterdir()} == left


def test_kept_models_are_exported_where_that_is_asked_for_later(sweep, stand_in, tmp_path, capsys):
    one = {"updates": {"cg": {}}, "masks": {"wanda": {}}}
    assert sweep("--keep-checkpoints", **one) == 0
    assert sweep("--export", "true", **one) == 0 and len(stand_in.ran) == 1  # without checkpoints there are no exports
    assert sweep("--keep-checkpoints", "--export", "true", "--only", "wanda", **one) == 0
    assert len(stand_in.ran) == 2 and (tmp_path / "out" / "cells" / stand_in.ran[0] / "hf").exists()
    capsys.readouterr()
    assert sweep("--keep-checkpoints", "--export", "true", **one) == 0
    assert len(stand_in.ran) == 2 and "resuming  1 of 1 cell done" in capsys.readouterr().out


def test_models_that_were_removed_are_made_again_where_they_are_to_be_kept(sweep, stand_in, tmp_path, capsys):
    one = {"updates": {"cg": {}}, "masks": {"wanda": {}}}
    assert sweep(**one) == 0
    assert sweep("--keep-checkpoints", **one) == 0
    assert "an earlier sweep removed its pruned model, so the cell runs again" in capsys.readouterr().out
    assert len(stand_in.ran) == 2 and (tmp_path / "out" / "cells" / stand_in.ran[0] / "checkpoint").exists()
    assert sweep("--keep-checkpoints", **one) == 0
    assert len(stand_in.ran) == 2


def test_what_does_not_fit_the_model_is_said_before_the_first_cell_runs(sweep, stand_in, monkeypatch, capsys):
    def manifest_of(config, model, texts):
        if config.recipe.solver is None:
            raise UserError("the rule fits no layer")
        return stand_in.manifest_of(config, model, texts)

    monkeypatch.setattr(runner, "manifest_of", manifest_of)
    assert sweep(updates={"cg": {}, "none": {"solver": None}}, masks={"wanda": {}}) == 2
    assert capsys.readouterr().err == "error: wanda + none, 50%, 4 windows, seed 0: the rule fits no layer\n"
    assert not stand_in.ran


def test_a_cell_whose_report_is_damaged_is_run_again(sweep, stand_in, tmp_path):
    one = {"updates": {"cg": {}}, "masks": {"wanda": {}}}
    assert sweep(**one) == 0
    (tmp_path / "out" / "cells" / stand_in.ran[0] / "report.json").write_text('{"manifest')
    assert sweep(**one) == 0 and len(stand_in.ran) == 2


def test_any_error_of_a_cell_is_its_own(sweep, stand_in, tmp_path, capsys):
    stand_in.stop = {"wanda_cg_50_4-windows_seed-0": RuntimeError("RESOURCE_EXHAUSTED: out of\nmemory")}
    assert sweep() == 1 and len(stand_in.ran) == 4
    captured = capsys.readouterr()
    assert "failed: RuntimeError: RESOURCE_EXHAUSTED: out of memory\n" in captured.out and "Traceback" in captured.err
    assert [entry["state"] for entry in read_results(tmp_path)] == ["finished", "failed", "finished", "finished"]
    stand_in.stop = {}
    assert sweep() == 0 and stand_in.ran[4:] == ["wanda_cg_50_4-windows_seed-0"]


def test_only_the_cells_that_were_asked_for_run(sweep, stand_in, tmp_path):
    assert sweep("--only", "magnitude + none") == 0
    assert stand_in.ran == ["magnitude_none_50_4-windows_seed-0"]
    assert sweep("--only", "wanda + cg", "--only=seed 1", seeds=[0, 1]) == 0
    assert stand_in.ran[1:] == [
        "wanda_cg_50_4-windows_seed-0",
        *(f"{name}_50_4-windows_seed-1" for name in ("wanda_none", "wanda_cg", "magnitude_none", "magnitude_cg")),
    ]
    states = {(entry["mask"], entry["update"], entry["seed"]): entry["state"] for entry in read_results(tmp_path)}
    assert [key for key, state in states.items() if state == "missing"] == [("wanda", "none", 0), ("magnitude", "cg", 0)]


@pytest.fixture
def beside(sweep, stand_in, monkeypatch):
    """Runs another terminal's command to its end inside the first cell."""

    def call(*argv, code="0+1", then=None):
        def run(config, **inputs):
            monkeypatch.setattr(runner, "run", stand_in.run)
            stand_in.code = code
            assert sweep(*argv) == 0
            stand_in.code, stand_in.stop = "0+1", then or {}
            return stand_in.run(config, **inputs)

        monkeypatch.setattr(runner, "run", run)

    return call


def test_the_last_to_write_keeps_what_another_terminal_has_finished(sweep, stand_in, beside, tmp_path):
    beside("--only", "magnitude")
    assert sweep("--only", "wanda") == 0
    assert [name.partition("_50")[0] for name in stand_in.ran] == ["magnitude_none", "magnitude_cg", "wanda_none", "wanda_cg"]
    cells = [(entry["state"], entry["perplexity"]) for entry in read_results(tmp_path)]
    assert cells == [("finished", perplexity) for perplexity in (24, 20, 26, 22)]


def test_a_cell_that_was_another_terminal_s_has_not_failed_once_that_has_finished_it(sweep, beside, tmp_path):
    beside("--only", "magnitude + none", then={"magnitude_none_50_4-windows_seed-0": UserError("another process is at work")})
    assert sweep() == 0
    assert [entry["state"] for entry in read_results(tmp_path)] == ["finished"] * 4


def test_a_cell_that_another_terminal_has_run_otherwise_is_not_taken(sweep, beside, tmp_path):
    beside("--only", "magnitude", code="0+2")
    assert sweep("--only", "wanda") == 0
    assert [entry["state"] for entry in read_results(tmp_path)] == ["finished", "finished", "missing", "missing"]


def test_the_tables_are_written_by_one_process_after_the_other(tmp_path):
    entered = threading.Event()

    def enter():
        with in_turn(tmp_path / "out"):
            entered.set()

    with in_turn(tmp_path / "out"):
        other = threading.Thread(target=enter)
        other.start()
        assert not entered.wait(0.3)
    other.join(10)
    assert entered.is_set()


def test_only_with_a_name_of_no_cell_is_an_error(sweep, stand_in, capsys):
    assert sweep("--only", "wanda", "--only", "adam") == 2
    assert "got 'adam'" in capsys.readouterr().err and not stand_in.ran


def test_a_dry_run_lists_the_cells_and_runs_none(sweep, stand_in, tmp_path, capsys):
    assert sweep("--dry-run") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [
        "cell 1 of 4: wanda + none, 50%, 4 windows, seed 0: to run",
        "    pattern 0.5/row, selector wanda, solver null",
    ]
    assert not stand_in.counts and not (tmp_path / "out").exists()  # the model is not even opened
    assert sweep("--only", "wanda + cg") == 0
    before = snapshot(tmp_path / "out")
    capsys.readouterr()
    assert sweep("--dry-run", "--only", "cg") == 0
    states = [line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines() if line.startswith("cell")]
    assert states == ["not chosen", "finished", "not chosen", "to run"]
    assert snapshot(tmp_path / "out") == before and len(stand_in.ran) == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "expected the file of the sweep as first argument, got nothing"),
        (["--model", "x", "FILE"], "expected the file of the sweep as first argument, got --model; see "),
        (["--ouput", "x"], "as first argument, got --ouput; did you mean FILE --output?"),
        (["FILE", "--ouput", "x"], "there is no setting --ouput; did you mean --output?"),
        (["FILE", "--keep-checkpoint"], "there is no setting --keep_checkpoint; did you mean --keep_checkpoints?"),
        (["FILE", "--config", "x"], "a sweep has no --config"),
        (["FILE", "--print_config"], "a sweep has no --print_config"),
        (["FILE", "--output"], "--output"),
    ],
)
def test_a_wrong_command_line_is_one_line(stand_in, tmp_path, capsys, argv, said):
    path = write_sweep(tmp_path / "small.yaml")
    assert main([path if word == "FILE" else word for word in argv]) == 2
    assert said in only_error(capsys.readouterr().err) and not stand_in.ran


def test_all_cells_have_the_devices_of_one_process(sweep, stand_in, capsys):
    assert sweep(updates={"a": {"cpu_devices": 8}, "b": {"solver": None, "cpu_devices": 4}}) == 2
    assert "expected one cpu_devices for all cells" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--num-processes", "2"], ["--coordinator", "localhost:1"], ["--process-id=0"]])
def test_a_sweep_in_several_processes_is_refused(sweep, stand_in, capsys, options):
    assert sweep(*options) == 2
    assert "expected a sweep in one process" in capsys.readouterr().err and not stand_in.ran


def test_a_real_sweep_is_the_runs_it_names(finished, tmp_path, monkeypatch, capsys):
    """Interrupted in its third cell; each cell equals a single run."""
    texts = {"calibration": {"source": "random", "windows": 8, "length": 32}, "evaluation": {"source": "random", "windows": 8}}
    run = {"model": str(finished.model), "mesh": "4x2", **texts}
    updates = {"none": {"solver": None}, "cg": {"solver": {"name": "cg", "tolerance": 1e-6}}}
    axes = {"updates": updates, "patterns": {"50%": {"pattern": 0.5}}, "leave_out": [{"mask": "magnitude", "update": "cg"}]}
    path = write_sweep(tmp_path / "real.yaml", run=run, **axes)
    out = tmp_path / "out"
    save, saved = Journal.save, []

    def stopped(journal, index, *rest):
        save(journal, index, *rest)
        saved.append((journal.directory.name, index))
        if len(saved) == 3 + 3 + 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "save", stopped)
    for module in (published, tables):
        monkeypatch.setattr(module, "published_range", lambda report: "Published methods reach this.")
    assert main([path, "--output", str(out)]) == 130
    assert main([path, "--output", str(out)]) == 0
    names = [f"{cell}_50_8-windows_seed-0" for cell in ("wanda_none", "wanda_cg", "magnitude_none")]
    assert saved == [(name, index) for name in names for index in range(3)]  # every block of every cell once
    printed = capsys.readouterr().out
    assert printed.count("dense perplexity\n") == 1 and printed.count("stages: dense perplexity") == 1
    assert printed.count("Published methods reach this.") == 1
    assert "\npublished   all cells: Published methods reach this.\n" in printed
    assert "\nrecord  " in printed and "\ncheckpoint " not in printed and "\nsize  " not in printed  # of models that are removed

    results = json.loads((out / "results.json").read_text())
    assert [entry["state"] for entry in results] == ["finished"] * 3
    alone = json.loads((finished.directory / "report.json").read_text())
    report = json.loads((out / results[1]["report"]).read_text())
    assert report["perplexity"] == alone["perplexity"] and report["manifest"] == alone["manifest"]
    assert report["tokens"] == alone["tokens"]  # from the losses of single tokens, which the first cell measured for all
    assert [block["layers"] for block in report["blocks"]] == [block["layers"] for block in alone["blocks"]]
    none, cg, magnitude = results
    assert none["dense"] == cg["dense"] == magnitude["dense"] == alone["perplexity"]["dense"]
    assert cg["error_after"] < cg["error_before"] == pytest.approx(none["error_before"], rel=0.5)
    assert none["error_after"] == none["error_before"] < magnitude["error_after"] and 0 < cg["held_out_after"]
    for name in names:
        assert all(path.is_file() for path in (out / "cells" / name).iterdir())

    # The finished table again, on another mesh.
    written = (out / "results.json").read_text()
    assert main([path, "--output", str(out), "--mesh", "2x4"]) == 0
    again = capsys.readouterr().out
    assert "resuming  3 of 3 cells done" in again and "\x1b" not in again
    assert (out / "results.json").read_text() == written


@pytest.mark.slow  # on another mesh of the same process: in the test above
def test_a_finished_sweep_is_told_again_in_a_process_with_other_devices(finished, tmp_path):
    run = {"model": str(finished.model), "calibration": {"source": "random", "windows": 8, "length": 32}}
    run |= {"mesh": "4x2", "evaluation": {"source": "random", "windows": 4}}
    one = {"updates": {"none": {"solver": None}}, "patterns": {"50%": {"pattern": 0.5}}}
    path, out = write_sweep(tmp_path / "real.yaml", run=run, **one), tmp_path / "out"
    assert main([path, "--output", str(out)]) == 0
    written = (out / "results.json").read_text()
    again = python("-m", "optima_tpu.sweep", path, "--output", out, "--mesh", "2x1", "--cpu-devices", 2)
    assert (again.returncode, again.stderr) == (0, "")
    assert "resuming  2 of 2 cells done" in again.stdout and "\x1b" not in again.stdout
    assert (out / "results.json").read_text() == written
