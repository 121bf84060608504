"""Errors on held-out text carry a caveat where that text chose something."""

import io

import pytest
from msgspec import structs
from rich.console import Console

from optima_tpu.config.run_config import EMBEDDED, weights_settings
from optima_tpu.method.allocation import Measured
from optima_tpu.method.patterns import Unstructured
from optima_tpu.report.contents import ExportedLayer, ExportForm, Sidecar
from optima_tpu.report.model_card import Card, model_card
from optima_tpu.report.page import render
from optima_tpu.report.runs import read_runs
from optima_tpu.report.summary import print_summary
from tests.support.fake_reports import MANIFEST, write_run

SAID = "also chose {}, so its error is slightly too low."


@pytest.mark.parametrize(("changes", "chosen"), [({}, None), ({"allocation": Measured()}, "the sparsities")])
def test_what_held_out_text_chose_is_said_of_the_errors_on_it(changes, chosen, tmp_path):
    config = EMBEDDED.changed(pattern=Unstructured(0.5), **changes)
    title, (run,) = read_runs([write_run(tmp_path / "run", config)])
    out = Console(file=io.StringIO(), width=80)
    print_summary(out, run.report, tmp_path)
    layers = tuple(ExportedLayer(**structs.asdict(layer)) for layer in run.report.layers)
    manifest = MANIFEST | {"recipe": weights_settings(config)}
    card = model_card(Card(Sidecar("x", manifest, {}, layers, ExportForm("plain", 1, True), ()), {}, None, "transformers"))
    page = render(title, [run])
    beginnings = {out.file.getvalue(): "no weight was fitted to; this text ", page: "<p>This text ", card: "The held-out text "}
    for text, beginning in beginnings.items():
        assert beginning + SAID.format(chosen) in text if chosen else "also chose" not in text


def test_of_several_runs_those_are_named(tmp_path):
    title, runs = read_runs(
        [write_run(tmp_path / "a", EMBEDDED.changed(pattern=Unstructured(0.5), allocation=Measured())), write_run(tmp_path / "b")]
    )
    page = render(title, runs)
    assert f"The held-out text of {runs[0].label} {SAID.format('the sparsities')}" in page and page.count("also chose") == 1
