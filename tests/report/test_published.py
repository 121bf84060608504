"""A result's first sentence: number, error and published range, no praise."""

import math
import re

import pytest
from msgspec import structs

from optima_tpu.report.contents import Check, Outcome, Perplexities, TokenChanges
from optima_tpu.report.published import comparable, published, result
from tests.support import ROOT
from tests.support.fake_reports import ENTRIES, report_of

SMOLLM2 = 134_515_008


def reported(ratio=1.5, text="c4", error=0.01, **changes):
    settings = ENTRIES["configuration"] | {"evaluation": {"source": text}} | changes.pop("settings", {})
    tokens = TokenChanges(8, 0.1, error, 0.1, (-1.0, 1.0), (0.2, 0.6, 0.2), None, ())
    model = structs.replace(ENTRIES["model"], weights=changes.pop("weights", SMOLLM2))
    report = report_of((), configuration=settings, perplexity=Perplexities(20.0, 20.0 * ratio), tokens=tokens, model=model)
    return structs.replace(report, **{"sparsity": 0.5} | changes)


def test_every_published_row_has_a_ratio_and_a_source():
    for row in published():
        assert 1 < row.ratio < 25 and row.text in ("C4", "WikiText-2"), row
        papers = re.findall(r"arXiv:\d{4}\.\d{5}", row.source)
        assert papers or (ROOT / row.source).is_file(), row
        assert row.method in ("Wanda", "SparseGPT", "Thanos", "FISTAPruner", "ALPS", "DSnoT") or row.method.startswith(
            "OPTIMA from "
        )


def test_the_rows_whose_paper_nobody_recorded_become_fewer():
    unsure = [row for row in published() if row.source.count("arXiv:") > 1]
    assert len(unsure) <= 8 and all(" or " in row.source for row in unsure)


def test_measured_rows_stand_in_the_file_that_they_name():
    for row in published():
        if not row.source.startswith("arXiv:"):
            text = (ROOT / row.source).read_text()
            assert all(f"{value:g}" in text for value in (row.dense, row.pruned) if value != 29.19 and value != 31.26), row


def test_the_first_sentence_is_the_number_and_how_sure_it_is():
    line = result(reported(1.33))
    assert line.startswith("Perplexity 20.00 → 26.60: 1.33 times the dense model’s, worse (1.30 to 1.36 with two standard errors")
    assert (
        "Published methods at 50% with models of about this size: OPT-125M 1.21 times (FISTAPruner) to 1.43 times (Wanda), "
        in line
    )
    assert "on WikiText-2; SmolLM2-135M 1.75 times (OPTIMA from SparseGPT) to 2.27 times (Wanda), on WikiText-2 and C4." in line
    assert not re.search("good|usual|poor|known|rule of thumb", line, re.IGNORECASE)
    assert "how sure that is was not measured" in result(reported(1.33, error=None))
    assert "how sure that is was not measured" in result(reported(tokens=None))


@pytest.mark.parametrize("error", [0.005, 0.05, 0.5, 1e300])
@pytest.mark.parametrize("ratio", [0.9, 0.99, 1.01, 1.3, 2.2, 2.4, 9.0])
def test_two_standard_errors_decide_what_is_said(ratio, error):
    line, sure = result(reported(ratio, error=error)), 2 * error
    assert ("no difference that this text can show" in line) == (abs(math.log(ratio)) <= sure)
    assert ("above all of them" in line) == (math.log(ratio / (66.21 / 29.19)) > sure)
    assert ("below all of them" in line) == (math.log((33.54 / 27.67) / ratio) > sure)


def test_a_model_with_one_row_has_no_range():
    line = result(reported(1.5, settings={"pattern": "2:4"}, weights=7_620_000_000))
    assert "Qwen2.5-7B 1.66 times (SparseGPT), on WikiText-2." in line


def test_on_another_text_the_range_is_given_and_nothing_said_of_it():
    line = result(reported(9.0, text="pydoc"))
    assert "2.27 times (Wanda)" in line and "measured on another text" in line and "of them" not in line


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": {"pattern": "6:8"}, "sparsity": 0.25},
        {"settings": {"pattern": "my_lab:Comb?every=3"}},
        {"settings": {"pattern": "0.8"}, "sparsity": 0.8},
        {"sparsity": 0.0},
        {"sparsity": 0.479},
        {"settings": {"layers": "self_attn.*=dense"}},
        {"weights": 70_000_000_000},
        {"weights": 100},
        {"settings": {"pattern": "4:8"}, "weights": 200_000_000_000},
    ],
)
def test_where_nothing_is_published_the_number_stands_alone(changes):
    line = result(reported(**changes))
    assert "1.50 times the dense model’s, worse" in line and "ublished" not in line
    assert comparable(reported(**changes)) == []


@pytest.mark.parametrize("row", published(), ids=lambda row: f"{row.pattern} {row.model} {row.method}")
def test_a_run_like_a_published_one_is_within_the_range(row):
    share = 0.5 if ":" in row.pattern else int(row.pattern[:2]) / 100
    settings = {"pattern": row.pattern if ":" in row.pattern else f"{share}/row"}
    report = reported(row.ratio, settings=settings, sparsity=share + 0.02, weights=int(row.billions * 1e9))
    rows = comparable(report)
    assert row in rows and rows == sorted(rows, key=lambda each: each.ratio)
    assert "of them" not in result(report)


def test_trained_and_quantised_models_are_not_compared():
    quantised = {"settings": {"quantize": {"name": "int4", "group": None}}}
    assert "was quantised and not pruned, so published" in result(reported(**quantised, sparsity=0.0))
    assert "was quantised as well as pruned, so" in result(reported(**quantised))
    trained = Outcome((Check(0, 0.5), Check(3, 0.4)), 3, 5_000)
    assert "The model was trained after it was pruned, so" in result(reported(distillation=trained))
    refused = Outcome((Check(0, 0.5), Check(3, 0.6)), 0, 5_000)
    line = result(reported(distillation=refused, settings={"recover": {"model": "runs/x"}}))
    assert line.endswith("The weights are those of runs/x: training lowered no loss on held-out text.") and "ublished" not in line
