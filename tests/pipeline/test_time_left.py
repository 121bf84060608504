"""Stages take the steps that they name before; these give the time left."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from optima_tpu.evaluate import __main__ as evaluate
from optima_tpu.evaluate.harness import DecoderLM
from optima_tpu.launch import main
from optima_tpu.report.pace import Step
from optima_tpu.report.progress import Progress
from tests.support.runs import SMALL
from tests.support.tiny_models import tiny_folder


@pytest.fixture
def stages(monkeypatch) -> list[tuple[str, int, set[str], int]]:
    """Of each ended stage: name, steps left, kinds at start, stages ahead."""
    ended, begin, end = [], Progress.stage, Progress.end_stage

    def stage(progress, name, total, steps=None, counted="", done=0):
        begin(progress, name, total, steps, counted, done)
        progress.begun = {step.kind for step in progress._steps}, len(progress.ahead)

    def end_stage(progress):
        if progress._stage is not None:
            ended.append((progress._stage, len(progress._steps), *progress.begun))
        end(progress)

    monkeypatch.setattr(Progress, "stage", stage)
    monkeypatch.setattr(Progress, "end_stage", end_stage)
    return ended


def test_every_stage_of_a_run_and_an_evaluation_takes_the_steps_that_it_named(one_device, stages, tmp_path, capsys):
    model, run = tiny_folder(tmp_path / "model"), tmp_path / "run"
    arguments = ["--model", str(model), "--output", str(run), *SMALL, "--selector", "wanda", "--solver", "null"]
    arguments += ["--layers", "model.layers.1.mlp.*=dense"]
    assert main([*arguments, "--allocation", "owl", "--pattern", "0.6/row"]) == 0
    names = [name for name, *_ in stages]
    assert {"dense perplexity", "allocating", "pruning", "writing the checkpoint", "pruned perplexity", "reporting"} <= {*names}
    # Nothing counts the last step of a run: a signal there would end a finished run by another status than 0.
    assert [(name, left) for name, left, *_ in stages if left] == [("reporting", 1)]
    # What comes behind a stage is counted, up to the last one; those that the run does not take are not.
    assert [ahead for *_, ahead in stages] == [*reversed(range(len(stages)))]
    kinds = {name: begun for name, _, begun, _ in stages}
    assert kinds["pruned perplexity"] == kinds["dense perplexity"]
    assert kinds["writing the checkpoint"] == kinds["exporting for transformers"] <= kinds["pruning"]
    assert f"stages: {', '.join(names)}" in capsys.readouterr().out

    stages.clear()
    evaluated = ["--against", str(model), "--perplexity", "random,pydoc", "--length", "32", "--windows", "2"]
    assert evaluate.main([str(run), *evaluated]) == 0
    assert [(name, left, ahead) for name, left, _, ahead in stages] == [
        ("both models on random", 0, 1),
        ("both models on pydoc", 0, 0),
    ]
    assert stages[0][2] == stages[1][2]


def test_a_model_that_is_asked_later_is_expected_to_take_what_the_first_one_takes():
    asked, steps = [[Step("loglikelihood")], [Step("generate_until")]], [Step("texts 0", 64.0)] * 3
    progress = Progress(Console(file=io.StringIO()))
    progress.ahead = asked * 2
    DecoderLM._begin(SimpleNamespace(_progress=progress), "pruned: 3 continuations", steps)
    assert progress.ahead == [asked[1], steps, asked[1]]
    assert progress._steps == steps
