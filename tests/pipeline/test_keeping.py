"""A stage's result is made once and kept; what is left follows from it."""

import contextlib
import importlib
import json
import pkgutil
from types import SimpleNamespace

import pytest

from optima_tpu import pipeline
from optima_tpu.config.parse import parse
from optima_tpu.pipeline import run, stages
from optima_tpu.pipeline.cutting import CUTTING
from optima_tpu.pipeline.distill.stages import TRAINING, UNTRAINED
from optima_tpu.pipeline.keeping import Keeper, KeptResult, Stage, StageWork, traced
from optima_tpu.pipeline.perplexities import perplexity_files
from optima_tpu.report.pace import Step
from optima_tpu.report.run_directory import FILES, lost_with, names_kept
from optima_tpu.runtime.kept import KeptRecord


class Shown:
    """A progress that records its stages."""

    def __init__(self):
        self.stages, self.ahead, self.seconds = [], (), {}

    def stage(self, name, total, steps, counted, done):
        self.stages.append((name, total, steps, [list(each) for each in self.ahead]))
        self.done = done

    def end_stage(self):
        self.seconds[self.stages[-1][0]] = 1.0


def stage(name, kept, made, seconds=1):
    """A stage that stores its result in ``kept`` and its name in ``made``."""

    def make(work, *inputs):
        made.append(name)
        return (name, *inputs)

    store = KeptResult(lambda opened: kept.get(name), lambda opened, result: kept.__setitem__(name, result))
    return Stage(name, make, store, lambda opened: [Step(name)] * seconds)


def take(kept, directory):
    """Runs three stages; the last one reads the results of the others."""
    made, progress = [], Shown()
    first, second, last = (stage(name, kept, made) for name in ("first", "second", "last"))

    def body(keep):
        one = keep(first)
        return keep(last, one, keep(second, one))

    keep = Keeper(StageWork(SimpleNamespace(directory=directory), progress, contextlib.ExitStack()), traced(body))
    return keep.names, body(keep), made, progress.stages


def test_results_reach_the_stages_that_need_them(tmp_path):
    names, result, made, shown = take({}, tmp_path)
    assert names == made == ["first", "second", "last"]
    assert result == ("last", ("first",), ("second", ("first",)))
    assert [name for name, *_ in shown] == made
    assert [len(ahead) for *_, ahead in shown] == [2, 1, 0]


@pytest.mark.parametrize("known", range(4))
def test_what_is_kept_is_not_made_again(known, tmp_path):
    kept = {}
    whole = take(kept, tmp_path)[1]
    few = dict(list(kept.items())[:known])
    names, result, made, _ = take(few, tmp_path)
    assert result == whole and made == names == list(kept)[known:]


def test_a_stage_begins_where_an_earlier_start_ended(tmp_path):
    """With blocks 0 to 22 of 30 pruned, the progress starts at 23.

    Computing what enters block 23 takes long before block 23 begins.
    """
    progress = Shown()
    work = StageWork(SimpleNamespace(directory=tmp_path), progress, contextlib.ExitStack())
    walk = Stage(
        "walk", lambda work: True, steps=lambda opened: [Step("block")] * 7, count=lambda opened: 30, done=lambda opened: 23
    )
    Keeper(work, [walk])(walk)
    assert progress.stages[0][:2] == ("walk", 30) and progress.done == 23


def test_the_seconds_of_a_stage_outlive_the_start_that_did_it(tmp_path):
    take({}, tmp_path)
    assert not (tmp_path / "seconds.json").exists()  # before the run has a directory
    (tmp_path / "run.json").touch()
    take({"first": 1}, tmp_path)
    assert json.loads((tmp_path / "seconds.json").read_text()) == {"second": 1.0, "last": 1.0}


def test_tracing_does_nothing():
    kept, made = {}, []
    assert [each.name for each in traced(lambda keep: keep(stage("only", kept, made)))] == ["only"]
    assert not kept and not made


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], set()),
        (["--allocation", "owl"], {"allocating"}),
        (["--distill", "kl"], {TRAINING.name, UNTRAINED.name}),
        (["--calibration.written", "4"], {stages.WRITTEN_TEXT.name}),
        (["--cut.blocks", "2"], {CUTTING.name}),
    ],
)
def test_a_run_has_the_stages_that_its_settings_ask_for(settings, expected):
    optional = {"allocating", *(each.name for each in (CUTTING, TRAINING, UNTRAINED, stages.WRITTEN_TEXT))}
    config = parse(["org/model", "--pattern", "0.5/row", *settings])
    assert {each.name for each in traced(lambda keep: run.pruning(config, None, keep))} & optional == expected


def test_every_record_that_a_stage_keeps_is_compared_with_its_checksum():
    """Without its row of FILES a resume reads a damaged record as it is."""
    names = [module.name for module in pkgutil.walk_packages(pipeline.__path__, pipeline.__name__ + ".")]
    values = [value for name in names for value in vars(importlib.import_module(name)).values()]
    kept = {value.name for value in values if isinstance(value, KeptRecord)}
    assert {"speed.json", "left_out.json"} < kept <= set(names_kept("whole"))
    assert {*perplexity_files("dense"), *perplexity_files("pruned")} <= set(names_kept("whole"))


@pytest.mark.parametrize(
    ("lost", "too"),
    [
        ("dense.json", {"dense_losses.npy"}),
        ("pruned_losses.npy", {"pruned.json"}),
        ("checkpoint", {"pruned.json", "pruned_losses.npy"}),
        ("distillation.json", {"checkpoint", "pruned.json", "pruned_losses.npy"}),
        ("left_out.json", {"journal"}),
        ("speed.json", set()),
    ],
)
def test_what_was_made_from_a_lost_file_is_lost_too(lost, too):
    assert lost_with({lost}) == {lost} | too


def test_files_are_made_after_files_of_the_table():
    assert {name for file in FILES.values() for name in file.after} <= set(FILES)
