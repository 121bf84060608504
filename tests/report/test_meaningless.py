"""Runs say if a text has no variety, or the dense model predicts nothing."""

import json
import math

import numpy as np
import pytest
from msgspec import structs

from optima_tpu.data import unigram_perplexity
from optima_tpu.launch import main
from optima_tpu.report.contents import Perplexities
from optima_tpu.report.meaningless import meaningless_lines
from optima_tpu.report.page import render
from optima_tpu.report.runs import read_runs
from tests.support.fake_reports import TEXT, report_of, write_run
from tests.support.records import put_json
from tests.support.tiny_models import tiny_folder


def report(calibration=1000.0, evaluation=1000.0, dense=30.0):
    texts = {"calibration": calibration, "evaluation": evaluation}
    changes = {name: structs.replace(TEXT, unigram_perplexity=value) for name, value in texts.items()}
    return report_of((), perplexity=Perplexities(dense, 40.0), **changes)


def test_the_unigram_perplexity_is_that_of_the_frequencies():
    assert unigram_perplexity(np.full((4, 8), 7)) == 1.0
    uniform = np.tile(np.arange(64), 1000).reshape(100, -1)
    assert unigram_perplexity(uniform) == pytest.approx(64, rel=1e-3)
    # A sample of a few tokens from many is not taken for a text of few.
    few = np.random.default_rng(0).integers(0, 1000, (4, 128))
    assert unigram_perplexity(few) > 500


def test_what_means_nothing_is_said_and_nothing_else():
    assert meaningless_lines(report()) == []
    assert meaningless_lines(report(evaluation=1.0, calibration=1.0, dense=1e9)) and meaningless_lines(report(dense=1000.0))
    (calibration,) = meaningless_lines(report(calibration=1.2))
    assert (
        "the calibration text is hardly more than one token again and again" in calibration
        and "--calibration.source" in calibration
    )
    (evaluation,) = meaningless_lines(report(evaluation=3.0, dense=2.0))
    assert "the evaluation text" in evaluation
    (dense,) = meaningless_lines(report(dense=49152.0))
    assert "the dense model does not predict the evaluation text (perplexity 49152; " in dense


def test_the_page_says_it_under_unusual(tmp_path):
    directory = write_run(tmp_path / "run")
    record = json.loads((directory / "report.json").read_text())
    record["evaluation"]["unigram_perplexity"] = 1.0
    put_json(directory / "report.json", record)
    page = render(*read_runs([directory]))
    assert "The evaluation text is hardly more than one token again and again" in page and "no meaning" in page


def test_a_run_says_it_before_its_first_step_and_at_its_end(one_device, tmp_path, capsys):
    """Norms of 0 give all tokens one probability; the text is one letter."""
    norms = lambda arrays: [array.fill(0) for name, array in arrays.items() if "norm" in name]  # noqa: E731
    model = tiny_folder(tmp_path / "model", change=norms, num_hidden_layers=1)
    (tmp_path / "a.txt").write_text("a" * 4000)
    words = f"--calibration.source file:{tmp_path / 'a.txt'} --evaluation.source random --evaluation.windows 4 --solver null"
    sizes = "--calibration.windows 4 --calibration.length 64 --calibration.held_out 0 --export false"
    assert main([str(model), *words.split(), *sizes.split(), "--output", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    greeting, _, rest = printed.partition("dense perplexity")
    assert "unusual      the calibration text is hardly more than one token" in greeting
    assert (
        rest.count("the dense model does not predict the evaluation text (perplexity 258") == 2
    )  # as soon as it is measured, and at the end
    assert "unusual     the calibration text" in rest
    record = json.loads((tmp_path / "run" / "report.json").read_text())
    assert record["calibration"]["unigram_perplexity"] == 1.0
    assert math.isclose(record["perplexity"]["dense"], 258, rel_tol=1e-3)
