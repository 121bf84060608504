"""Arguments are read and refused before libraries load, in the same words."""

import contextlib
import inspect
import io
import json
import runpy
import subprocess
import sys

import numpy as np
import pytest

from optima_tpu.cli import main
from optima_tpu.config.choices import CHOICES
from optima_tpu.config.options import alternatives, fields
from optima_tpu.config.parse import parse
from optima_tpu.config.run_config import RunConfig
from optima_tpu.data import token_digest
from optima_tpu.errors import UserError
from optima_tpu.runtime import light
from optima_tpu.runtime.command import announce
from optima_tpu.runtime.program import COMMANDS
from tests.support import ROOT

CHILD = """
import contextlib, io, json, runpy, sys

class Refuses:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in LIBRARIES:
            raise AssertionError(f"{name} is imported")

LIBRARIES = "jax", "jaxlib", "numpy", "scipy", "mpax", "optax", "transformers", "pyarrow", "torch", "huggingface_hub", "matplotlib"
sys.meta_path.insert(0, Refuses())
from optima_tpu.cli import main
from optima_tpu.runtime import light

modules = light._Modules()
light._Modules = lambda: modules
"""
"""What a child runs before :func:`here`: it forbids the libraries, and loads the light modules once for all of its commands."""

EACH = """
for words in json.loads(sys.stdin.read()):
    print(words, file=sys.stderr)
    print(json.dumps(here(*words)))
"""

REFUSED = [
    ["prune", "--pattrn", "2"],
    ["prune", "--batch", "many"],
    ["prune", "--batch", "0"],
    ["prune", "--solver.tolerance", "-1"],
    ["prune", "--solver", "mpxa"],
    ["prune", "--pattern", "2:x"],
    ["prune", "--pattern", "4:2"],
    ["prune", "--layers", "mlp.*"],
    ["prune", "--refine", "swaps", "--solver", "null"],
    ["prune", "--allocation", "owl", "--pattern", "2:4"],
    ["prune", "--preset", "fsat"],
    ["prune", "--config", "nowhere.yaml"],
    ["prune", "./nowhere"],
    ["prune", "--mesh", "4x"],
    ["prune", "--mesh", "4x2", "--cpu_devices", "4"],
    ["prune", "--coordinator", "here:99999", "--num_processes", "2", "--process_id", "0"],
    ["prune", "--coordinator", "here:80", "--num_processes", "2", "--process_id", "2"],
    ["prune", "--num_processes", "2"],
    ["prune", "--calibration.source", "wikitxt"],
    ["prune", "--calibration.source", "file:nowhere.txt"],
    ["prune", "configs", "--calibration.source", "hub:a/b@train", "--evaluation.source", "hub:a/b@train"],
    ["prune", "configs", "--calibration.source", "self", "--calibration.written", "4", "--evaluation.source", "pydoc"],
    ["evaluate", "configs", "--lenght", "7"],
    ["evaluate", "configs", "--mesh", "4x2", "--cpu_devices", "4"],
    ["evaluate", "configs", "--perplexity", "file:nowhere.txt"],
    ["recover", "configs", "--tokens", "many"],
    ["recover", "configs", "--tokens", "1k", "--source", "hub:a/b@train"],
    ["recover", "configs", "--tokens", "1k", "--process_id", "1"],
    ["plan", "--topologie", "v5e:4x2"],
    ["sweep", "nowhere.yaml"],
    ["sweep", "configs/tables/adam.yaml", "--only", "nothing"],
    ["report", "a", "--ouput", "b"],
    ["report", "a", "--output", "nowhere/page.html"],
    ["export", "a"],
    ["push", "a"],
    ["unpack", "a"],
    ["check", "nowhere"],
    ["check", "configs", "--length", "1"],
    ["verify", "nowhere"],
    ["verify", "configs"],
    ["figures", "layer-errors", "a", "--output", "nowhere.txt"],
    ["data", "a@b"],
]
SHOWN = [["--version"], *([name, "--help"] for name in COMMANDS), ["prune", "--preset", "paper", "--print_config"]]


@pytest.fixture
def narrow(monkeypatch):
    """Help texts have the width of the terminal."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(ROOT)


def here(words: list[str], module: str = "") -> list:
    """[status, output, errors] of a command in this process.

    The status names the library that the command imports first, if it imports one. With ``module``, the module is
    run by its name.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if module:
                sys.argv = ["x", *words]
                sys.modules.pop(module, None)
                runpy.run_module(module, run_name="__main__")
            status = main(words)
        except SystemExit as exits:
            status = exits.code
        except AssertionError as error:
            status = str(error)
    return [status, out.getvalue(), err.getvalue()]


def without_libraries(
    commands: list[list[str]], modules: list[str] | None = None, libraries: tuple[str, ...] | None = None
) -> list[list]:
    """[status, output, errors] of commands in a process without libraries."""
    few = f"\nLIBRARIES = {libraries}\n" if libraries else ""
    child = subprocess.run(
        [sys.executable, "-c", CHILD + few + inspect.getsource(here) + EACH],
        input=json.dumps(list(zip(commands, modules)) if modules else [[words] for words in commands]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return [json.loads(line) for line in child.stdout.splitlines()]


def test_arguments_are_explained_and_refused_without_jax_in_the_same_words(narrow):
    commands = REFUSED + SHOWN
    for words, result in zip(commands, without_libraries(commands), strict=True):
        assert result[0] == (2 if words in REFUSED else 0), (words, result)
        assert result == here(words), words


def test_a_file_is_compared_with_its_checksum_without_jax(narrow, finished, tmp_path):
    (good,) = without_libraries([["verify", str(finished.directory)]])
    assert good[0] == 0 and "all match" in good[1]
    (tmp_path / "run.json").write_bytes((finished.directory / "run.json").read_bytes())
    ((status, printed, _),) = without_libraries([["verify", str(tmp_path)]])
    assert status == 1 and f"damaged: {tmp_path / 'run.json'} " in printed


def test_the_first_line_is_printed_before_the_libraries_load(narrow):
    sweep = ["sweep", "configs/tables/adam.yaml", "--model", "configs"]
    recover = ["recover", "configs", "--tokens", "1k", "--source", "pydoc"]
    commands = [["prune", "configs"], ["evaluate", "configs"], recover, ["plan", "--model", "configs"], sweep]
    for words, (ended, printed, errors) in zip(commands, without_libraries(commands), strict=True):
        assert printed.startswith("starting     optima-tpu ") and printed.endswith(", then opens configs\n"), (words, errors)
        assert printed.count("\n") == 1 and ended.endswith(" is imported"), (words, errors)


def test_a_module_run_by_its_name_refuses_before_the_libraries_load(narrow):
    commands = {words[0]: words[1:] for words in REFUSED}
    # Python imports the package of a module before the module, and that of optima_tpu.data.build reads arrays and Parquet files.
    few, data = ("jax", "jaxlib", "transformers", "torch", "matplotlib"), {"data": commands.pop("data")}
    for each, results in ((commands, refused_by_modules(commands)), (data, refused_by_modules(data, few))):
        for name, (status, _, errors) in zip(each, results, strict=True):
            assert status == 2 and errors.startswith("error: "), (name, errors)


def refused_by_modules(commands: dict[str, list[str]], libraries: tuple[str, ...] | None = None) -> list[list]:
    """:func:`without_libraries` for modules of commands, run by name."""
    modules = [COMMANDS[name].module + (".__main__" if name in ("evaluate", "report") else "") for name in commands]
    return without_libraries([*commands.values()], modules, libraries)


def test_processes_of_a_job_print_no_first_line(capsys):
    announce(RunConfig("org/name"))
    assert capsys.readouterr().out.endswith(", then opens org/name\n")
    announce(RunConfig("org/name", coordinator="here:80"))
    assert capsys.readouterr().out == ""


@pytest.fixture(scope="module")
def light_parse():
    return light._Modules().load("optima_tpu.config.parse").parse


@pytest.mark.parametrize("setting", CHOICES)
def test_every_option_is_checked_without_libraries_as_with_them(setting, light_parse, capsys):
    for name, cls in CHOICES[setting].items():
        changes = [[]] + [
            [f"--{setting}.{option}", value]
            for option, kind in (fields(cls) if cls else {}).items()
            if {int, float} & {*alternatives(kind)}
            for value in ("-1", "0")
        ]
        for change in changes:
            words = ["--preset", "fast", f"--{setting}", name, *change, "--print_config"]
            assert _outcome(light_parse, words, capsys) == _outcome(parse, words, capsys)


def _outcome(read, words, capsys) -> tuple[str, str]:
    try:
        read(words)
    except UserError as error:
        return str(error), ""
    except SystemExit:
        return "", capsys.readouterr().out
    raise AssertionError(words)


@pytest.mark.parametrize(
    "words",
    [
        ["--selector", "my_lab:Mask"],
        ["--solver", "my_lab:Solver"],
        ["--target", "my_lab:Target"],
        ["--pattern", "my_lab:Comb"],
        ["--layers", "mlp.*=my_lab:Comb"],
        ["--config", "mine.yaml"],
    ],
    ids=" ".join,
)
def test_a_class_of_the_user_is_imported_by_the_real_modules_alone(words, light_parse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())  # the working directory is added to it
    monkeypatch.delitem(sys.modules, "my_lab", raising=False)  # as a page of the documentation has one, too
    (tmp_path / "my_lab.py").write_text("raise SystemExit('imported')")
    (tmp_path / "mine.yaml").write_text("selector: my_lab:Mask")
    with pytest.raises(light.NeedsLibraries):
        light_parse(words)
    assert "my_lab" not in sys.modules


def test_what_needs_a_library_is_left_to_the_real_function(monkeypatch):
    digest, ids = "optima_tpu.data.source:token_digest", np.ones((1, 2))
    with pytest.raises(light.NeedsLibraries):
        light.without_libraries(digest, ids)
    monkeypatch.delitem(sys.modules, "jax")
    assert light.lightly(digest, ids) == light.rehearsed(digest, ids) == token_digest(ids)


def test_help_says_how_ones_own_classes_are_named(narrow):
    ((_, help_text, _),) = without_libraries([["prune", "--help"]])
    words = " ".join(help_text.split())
    for each in ("my_lab.masks:MySelector", "my_lab.masks:MySolver", "my_lab.masks:MyTarget", "my_lab.patterns:Comb?every=3"):
        assert each in words
    assert words.count("the import path of a class of your own") == 4


def test_a_clash_of_files_is_refused_from_the_arguments(narrow, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    texts = ["--calibration.source", f"file:{tmp_path}/a.txt", "--evaluation.source", f"file:{tmp_path}/../{tmp_path.name}/a.txt"]
    for given, without in ((texts, ""), (texts[:2], "without --evaluation.source ")):
        ((status, _, message),) = without_libraries([["prune", "configs", *given]])
        refusal = f"error: {without}calibration and evaluation would both read {tmp_path}/a.txt: expected two different texts"
        assert status == 2 and refusal in message
