"""What every form of an export does, whatever it stores."""

import json
from pathlib import Path

import pytest

from optima_tpu import launch
from optima_tpu.export import make_parser
from optima_tpu.models.checkpoints.export import SIDECAR, export
from optima_tpu.models.checkpoints.forms import FORMS
from optima_tpu.report.file import weights_on_disk
from optima_tpu.runtime import checksums
from tests.support.runs import SMALL
from tests.support.tiny_models import tiny_folder

SIZES = dict(hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A tiny quantised run, which every form can store."""
    folder = tmp_path_factory.mktemp("forms")
    settings = ["--preset", "fast", "--quantize", "int8", "--quantize.group", "null", "--output", str(folder / "run")]
    assert launch.main([str(tiny_folder(folder / "model", **SIZES)), *SMALL, *settings]) == 0
    return folder / "run"


@pytest.fixture(scope="module", params=FORMS)
def exported(request, run, tmp_path_factory):
    """The name of a form, and a folder of this form."""
    out = tmp_path_factory.mktemp(request.param) / "out"
    assert export(run, out, form=request.param).anew
    return request.param, out


def test_a_folder_is_sealed_and_lists_its_files(exported):
    name, out = exported
    assert checksums.damage(out) == ""
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    listed = json.loads((out / SIDECAR).read_text())["files"] if (out / SIDECAR).exists() else None
    # A packed folder lists the files of the plain folder that it is unpacked to.
    assert listed is None or name == "packed" or set(listed) | {SIDECAR, checksums.ALL} == files


def test_an_export_that_is_asked_for_again_is_known(exported, run):
    name, out = exported
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert not export(run, out, form=name).anew
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_form_says_what_it_stores(exported):
    name, out = exported
    form = FORMS[name]
    (choices,) = (action.help for action in make_parser()._actions if "--format" in action.option_strings)
    assert f"{name}: {form.text}" in choices
    assert (out / "README.md").exists() and (not form.card or form.card in (out / "README.md").read_text())


def test_the_bytes_of_a_form_that_is_chosen_for_its_size_are_counted(exported):
    name, out = exported
    assert not FORMS[name].compact or weights_on_disk(out, FORMS[name].weights) > 0
