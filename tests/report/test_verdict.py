"""The verdict keeps to what is known, and says so where nothing is."""

import dataclasses
import json
import math
import re
import shlex

import pytest

from optima_tpu.config.parse import configure, parse
from optima_tpu.config.presets import PRESETS
from optima_tpu.config.run_config import to_dict
from optima_tpu.method.selectors import Wanda
from optima_tpu.report.verdict import BANDS, Measured, verdict, verdict_of
from optima_tpu.runtime.program import program
from tests.support.fake_reports import write_run

SMOLLM2 = 134_515_008


def judged(ratio=1.5, dense=20.0, text="c4", tokens=None, error=None, **changes):
    facts = {"pattern": "0.5", "sparsity": 0.5, "weights": SMOLLM2} | changes
    return verdict(Measured(dense, ratio * dense, text, tokens, error), **facts)


@pytest.mark.parametrize("band", BANDS, ids=lambda band: f"{band.pattern} {band.size[0]}")
def test_every_band_has_its_borders(band):
    assert 1 < band.best < band.worst
    share = 0.5 if ":" in band.pattern else int(band.pattern[:2]) / 100
    facts = {"pattern": band.pattern if ":" in band.pattern else str(share), "sparsity": share}
    middle = math.sqrt(band.best * band.worst)
    words = {
        band.best / 2: "good",
        middle * 0.999: "good",
        middle * 1.001: "usual",
        band.worst * 0.999: "usual",
        band.worst * 1.001: "poor",
        1e300: "poor",
    }
    for size in (band.size[0] * 1e9, band.size[1] * 1e9 - 1):
        found = {ratio: judged(ratio, weights=int(size), **facts) for ratio in words}
        assert {ratio: each.word for ratio, each in found.items()} == words
        assert all("rule of thumb" in each.text for each in found.values())
        assert [("Try the preset" in each.text) for each in found.values()] == [word == "poor" for word in words.values()]
    assert f"{band.worst}" in judged(2, weights=int(size), **facts).text


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"text": "random"}, "random tokens"),
        (
            {"pattern": "6:8", "sparsity": 0.25},
            "no results are known for the pattern 6:8 in a model of 135 million weights, measured on c4",
        ),
        ({"pattern": "my_lab:Comb?every=3"}, "no results"),
        ({"pattern": "0.8", "sparsity": 0.8}, "for 80.0% pruned weights"),
        ({"pattern": "0.3/row", "sparsity": 0.3}, "no results"),
        ({"sparsity": 0.0}, "no results"),
        ({"rules": "self_attn.*=dense"}, "their own settings"),
        ({"weights": 70_000_000_000}, "70.0 billion weights"),
        ({"weights": 100}, "in a model of 100 weights"),
        ({"pattern": "4:8", "weights": 3_000_000_000}, "no results"),
        ({"text": "pydoc"}, "no published results are known on Python’s documentation. Known results at 50% and this size"),
        ({"text": "pydoc", "weights": 70_000_000_000}, "no results are known for 50.0% pruned weights"),
        ({"text": "file:/home/me/x.txt", "pattern": "6:8"}, "on file:x.txt"),
        ({"dense": 101.0}, "hardly predicts this text (perplexity 101.0)"),
        ({"text": "file:/home/me/x.txt"}, None),
    ],
)
def test_where_nothing_is_known_it_says_so(changes, why):
    found = judged(**changes)
    assert (found.word == "unknown") == (why is not None)
    assert "1.50 times the dense model’s" in found.text and (why or "rule of thumb") in found.text
    assert "/home" not in found.text


def test_the_advice_is_never_what_the_run_is():
    def advice(ratio, text, preset="fast", **methods):
        return judged(ratio, text=text, methods=to_dict(configure({"model": "a", "preset": preset, **methods}))).text

    wanda = {"selector": {"name": "wanda"}, "solver": None}
    for methods in ({}, {"selector": "sparsegpt", "solver": None}):
        assert "--solver null --selector wanda`" in advice(1.5, "pydoc", **methods)
    assert "--solver null --selector sparsegpt`" in advice(1.5, "pydoc", **wanda)
    assert "Try the preset `best`, more" in advice(9, "c4", **wanda) and "Try more" in advice(9, "c4", "best")
    assert "Try the preset `best`, more" in advice(9, "c4", "best", recapture=False)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_command_that_compares_runs_a_published_method_on_the_same_texts(preset):
    settings = {"model": "./a b", "pattern": "2:4", "evaluation": {"source": "pydoc", "windows": 7}}
    run = configure({**settings, "preset": preset, "output": "mine", "calibration": {"samples": 9}})
    text = judged(text="pydoc", pattern="2:4", methods=to_dict(run)).text
    words = shlex.split(re.search("`(.*)`", text)[1].removeprefix(program("prune")))
    compared = parse(words)
    assert compared == dataclasses.replace(
        configure({**settings, "calibration": {"samples": 9}}), selector=Wanda(), solver=None, damping=None
    )
    assert (compared.calibration, compared.evaluation) == (run.calibration, run.evaluation)
    older = judged(text="pydoc", methods=to_dict(run) | {"gone": 1}).text
    assert older.endswith(f"run a published method on it: `{program('prune')} --model './a b' --solver null --selector wanda`")


def test_shares_near_a_band_have_it():
    known = [share for share in (0.479, 0.48, 0.5, 0.52, 0.521) if judged(pattern="0.5", sparsity=share).word != "unknown"]
    assert known == [0.48, 0.5, 0.52]


def test_small_models_are_allowed_more_than_large_ones():
    assert [judged(1.7, weights=int(size)).word for size in (1.3e8, 8e9)] == ["usual", "poor"]


@pytest.mark.parametrize("band", BANDS, ids=lambda band: f"{band.pattern} {band.size[0]}")
def test_it_is_as_sure_as_the_evaluation_is_large(band):
    """Two standard errors of the log-ratio are compared with half of the band, known or as they follow from the tokens."""
    share = 0.5 if ":" in band.pattern else int(band.pattern[:2]) / 100
    facts = {
        "pattern": band.pattern if ":" in band.pattern else str(share),
        "sparsity": share,
        "weights": int(band.size[0] * 1e9),
    }
    half = math.log(band.worst / band.best) / 2
    enough = math.ceil((2 * 3.4 / half) ** 2)
    for sure, unsure in (({"error": 0.49 * half}, {"error": 0.51 * half}), ({"tokens": enough}, {"tokens": enough - 1})):
        assert judged(0.999 * band.worst, **sure, **facts).word == "usual"
        found = judged(0.999 * band.worst, **unsure, **facts)
        assert found.word == "unknown" and found.text.startswith("The evaluation is too small to tell: ")
    found = judged(1.5, tokens=96, error=half, **facts)
    assert judged(1.5, tokens=96, error=1e300, **facts).word == "unknown"
    assert f"between {1.5 * band.best / band.worst:.3g}" in found.text and "Measure on more text, about 400 tokens." in found.text


def test_it_is_read_from_a_report_old_or_new(tmp_path):
    report = json.loads((write_run(tmp_path / "run") / "report.json").read_text())
    found = verdict_of(report | {"weights": SMOLLM2})
    assert found.word == "unknown" and "1.50 times" in found.text  # measured on pydoc, as the settings say
    report["configuration"]["evaluation"]["source"] = "wikitext2"
    assert verdict_of(report | {"weights": SMOLLM2}).word == "good"
    assert "on 96 tokens" in verdict_of(report | {"weights": SMOLLM2, "evaluation": {"tokens": 96}}).text
    sure = {"evaluation": {"tokens": 96}, "tokens": {"mean_stderr": 0.01}}
    assert verdict_of(report | {"weights": SMOLLM2} | sure).word == "good"
    assert verdict_of(report | {"weights": 10, "model": {"weights": 70_000_000_000}}).word == "unknown"
    bare = {"configuration": {}, "perplexity": {"dense": 2.0, "pruned": 3.0}}
    assert verdict_of(bare).word == "unknown"


def test_what_was_quantised_too_is_not_judged():
    report = {"configuration": {"quantize": {"name": "int4"}}, "perplexity": {"dense": 2.0, "pruned": 3.0}}
    assert "1.50 times the dense model’s. It was quantised and not pruned, so" in verdict_of(report | {"sparsity": 0.0}).text
    assert "It was quantised as well as pruned, so" in verdict_of(report | {"sparsity": 0.5}).text
