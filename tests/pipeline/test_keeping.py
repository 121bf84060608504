"""A stage's result is made once and kept; the same code lists the stages."""

import contextlib
import importlib
import pkgutil
from types import SimpleNamespace

import pytest

from optima_tpu import pipeline
from optima_tpu.config.parse import parse
from optima_tpu.pipeline import run, stages
from optima_tpu.pipeline.allocate import ALLOCATING
from optima_tpu.pipeline.cutting import CUTTING
from optima_tpu.pipeline.distill.stages import TRAINING, UNTRAINED
from optima_tpu.pipeline.keeping import Keeper, Stage, StageWork, traced
from optima_tpu.pipeline.repair import perplexity_files
from optima_tpu.report.pace import Step
from optima_tpu.report.run_directory import names_kept
from optima_tpu.runtime.kept import KeptRecord


class Shown:
    """A progress that records its stages."""

    def __init__(self):
        self.stages, self.ahead = [], ()

    def stage(self, name, total, steps, counted, done):
        self.stages.append((name, total, steps, [list(each) for each in self.ahead]))
        self.done = done


def stage(name, kept, made, seconds=1):
    """A stage that stores its result in ``kept`` and its name in ``made``."""

    def make(work, *inputs):
        made.append(name)
        kept[name] = (name, *inputs)
        return kept[name]

    return Stage(name, make, lambda work, *inputs: kept.get(name), lambda opened: [] if name in kept else [Step(name)] * seconds)


def take(kept):
    """Runs three stages; the last one reads the results of the others."""
    made, progress = [], Shown()
    first, second, last = (stage(name, kept, made) for name in ("first", "second", "last"))

    def body(keep):
        one = keep(first)
        return keep(last, one, keep(second, one))

    keep = Keeper(StageWork(SimpleNamespace(), progress, contextlib.ExitStack()), traced(body))
    return keep.names, body(keep), made, progress.stages


def test_results_reach_the_stages_that_need_them():
    names, result, made, shown = take({})
    assert names == made == ["first", "second", "last"]
    assert result == ("last", ("first",), ("second", ("first",)))
    assert [name for name, *_ in shown] == made
    assert [len(ahead) for *_, ahead in shown] == [2, 1, 0]


@pytest.mark.parametrize("known", range(4))
def test_what_is_kept_is_not_made_again(known):
    kept = {}
    whole = take(kept)[1]
    few = dict(list(kept.items())[:known])
    names, result, made, _ = take(few)
    assert result == whole and made == names == list(kept)[known:]


def test_a_stage_begins_where_an_earlier_start_ended():
    """With blocks 0 to 22 of 30 pruned, the progress starts at 23.

    Computing what enters block 23 takes long before block 23 begins.
    """
    progress = Shown()
    work = StageWork(SimpleNamespace(left=7), progress, contextlib.ExitStack())
    walk = Stage(
        "walk", lambda work: True, steps=lambda opened: [Step("block")] * 7, count=lambda opened: 30, done=lambda opened: 23
    )
    Keeper(work, [walk])(walk)
    assert progress.stages[0][:2] == ("walk", 30) and progress.done == 23


def test_tracing_does_nothing():
    kept, made = {}, []
    assert [each.name for each in traced(lambda keep: keep(stage("only", kept, made)))] == ["only"]
    assert not kept and not made


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], set()),
        (["--allocation", "owl"], {ALLOCATING}),
        (["--distill", "kl"], {TRAINING, UNTRAINED}),
        (["--calibration.written", "4"], {stages.WRITTEN_TEXT}),
        (["--cut.blocks", "2"], {CUTTING}),
    ],
)
def test_a_run_has_the_stages_that_its_settings_ask_for(settings, expected):
    optional = {ALLOCATING, CUTTING, TRAINING, UNTRAINED, stages.WRITTEN_TEXT}
    config = parse(["org/model", "--pattern", "0.5/row", *settings])
    assert set(traced(lambda keep: run.pruning(config, keep))) & optional == expected


def test_every_record_that_a_stage_keeps_is_compared_with_its_checksum():
    """Without its row of FILES a resume reads a damaged record as it is."""
    names = [module.name for module in pkgutil.walk_packages(pipeline.__path__, pipeline.__name__ + ".")]
    values = [value for name in names for value in vars(importlib.import_module(name)).values()]
    kept = {value.name for value in values if isinstance(value, KeptRecord)}
    assert {"speed.json", "left_out.json"} < kept <= set(names_kept("whole"))
    assert {*perplexity_files("dense"), *perplexity_files("pruned")} <= set(names_kept("whole"))
