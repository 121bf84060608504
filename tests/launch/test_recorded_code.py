"""A run's record is data: no command imports a module that it names."""

import json
import shutil
import sys

import pytest

import optima_tpu
from optima_tpu.cli import main
from optima_tpu.errors import UserError
from optima_tpu.method.patterns import NamedPattern, parse_pattern
from optima_tpu.pipeline.sweep.grid import read_grid
from tests.launch.test_own_methods import OWN
from tests.support.runs import SMALL, stop_after_the_first_block
from tests.support.sweeps import write_sweep
from tests.support.tiny_models import tiny_folder

MODULE = "evilmod"
OWN_METHODS = ["--selector", f"{MODULE}:MyMask", "--selector.strength", "2", "--solver", f"{MODULE}:Lazy", "--solver.steps", "7"]
OWN_METHODS += ["--solver.damping", "0.125", "--target", f"{MODULE}:Far", "--recapture", "true"]
OWN_METHODS += ["--pattern", f"{MODULE}:Comb?every=3", "--layers", f"mlp.down_proj={MODULE}:Comb?every=4"]
PRUNE = ["prune", "model", "--preset", "fast", *SMALL, *OWN_METHODS]
SETTINGS = {"calibration": {"source": "random", "windows": 8, "length": 32}}
RECOVER = ["--tokens", "0.256k", "--source", "random", "--windows", "4", "--length", "32", "--distill.batch", "4"]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, one_device):
    """A working directory with runs that used ``evilmod``.

    One run is finished, one is stopped. ``evilmod`` now leaves a file where it is imported.
    """
    root = tmp_path_factory.mktemp("work")
    path = sys.path.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        tiny_folder(root / "model", num_hidden_layers=2)
        (root / f"{MODULE}.py").write_text(OWN)
        assert main([*PRUNE, "--output", "run"]) == 0
        assert main(["export", "run", "packed", "--packed"]) == 0
        with pytest.MonkeyPatch.context() as stop:
            stop_after_the_first_block(stop)
            assert main([*PRUNE, "--output", "stopped", "--recompute", "0"]) != 0
        (root / f"{MODULE}.py").write_text(f"open({str(root / 'imported')!r}, 'w').close()\n" + OWN)
        del sys.modules[MODULE]
        yield root
    sys.path[:] = path
    sys.modules.pop(MODULE, None)


@pytest.fixture
def work(pruned, monkeypatch):
    """The working directory; fails a test that imported the module."""
    monkeypatch.chdir(pruned)
    monkeypatch.syspath_prepend(str(pruned))  # as for python -m
    yield pruned
    imported = (pruned / "imported").exists() or MODULE in sys.modules
    (pruned / "imported").unlink(missing_ok=True)
    sys.modules.pop(MODULE, None)
    assert not imported


COMMANDS = [
    (["report", "run"], 0),
    (["report", "run", "run-again/report.json", "-o", "two.html"], 0),
    (["report", "stopped"], 2),
    (["evaluate", "run", "--against", "model", "--perplexity", "random", "--windows", "2", "--length", "32"], 0),
    (["evaluate", "run/hf", "--perplexity", "random", "--windows", "2", "--length", "32"], 0),
    (["evaluate", "packed", "--perplexity", "random", "--windows", "2", "--length", "32"], 0),
    (["evaluate", "stopped"], 2),
    (["recover", "run", *RECOVER, "--output", "recovered"], 0),
    pytest.param(["recover", "run/hf", *RECOVER, "--output", "recovered-hf"], 0, marks=pytest.mark.slow),
    (["recover", "stopped", *RECOVER], 2),
    (["prune", "model", "--preset", "fast", *SMALL, "--output", "run"], 2),
    (["prune", "model", "--preset", "fast", *SMALL, "--output", "stopped"], 2),
    (["prune", "run", "--preset", "fast", *SMALL, "--solver", "null", "--output", "pruned-again"], 2),
    (["plan", "run/hf", "--preset", "fast", "--topology", "v5e:2x2"], 0),
    (["verify", "run"], 0),
    (["verify", "run/hf"], 0),
    (["export", "run", "plain"], 0),
    (["export", "run", "gguf", "--format", "gguf"], 0),
    (["export", "stopped", "none"], 2),
    (["unpack", "packed", "unpacked"], 0),
    (["push", "run", "org/name", "--dry-run", "--include-private", "--include-report"], 0),
    (["figures", "layer-errors", "run", "-o", "layers.png"], 0),
]


@pytest.mark.parametrize(
    ("command", "status"), COMMANDS, ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else ""
)
def test_no_command_imports_what_a_record_names(work, command, status):
    if not (work / "run-again").exists():
        shutil.copytree(work / "run", work / "run-again")
    assert main(command) == status


def test_no_sweep_imports_what_the_record_of_a_cell_names(work):
    file = write_sweep(work / "one.yaml", run={"model": "model"}, patterns={"50%": {"pattern": 0.5}})
    for cell in read_grid(file, SMALL, "swept").cells:
        shutil.copytree(work / "run", cell.directory)
    assert main(["sweep", str(file), *SMALL, "--output", "swept", "--dry-run"]) == 2


def test_no_python_function_imports_what_a_record_names(work):
    result = optima_tpu.load("run")
    assert f"{MODULE}:MyMask + {MODULE}:Lazy, {MODULE}:Comb?every=3" in repr(result)
    result.report(work / "page.html")
    result.export(work / "exported")
    with pytest.raises(UserError, match="holds another run"):
        optima_tpu.prune("model", preset="fast", output="run", progress=False, evaluation={"windows": 4}, **SETTINGS)


def test_a_record_is_shown_with_its_methods_and_asks_for_them_by_name(work, capsys):
    assert main(["report", "run"]) == 0
    page = (work / "run/report.html").read_text()
    for words in (
        f"--selector {MODULE}:MyMask",
        "--solver.steps 7",
        "--solver.damping 0.125",
        f"--pattern &#39;{MODULE}:Comb?every=3&#39;",
    ):
        assert words in page, words
    assert f"name: {MODULE}:Lazy" in page and "strength: 2.0" in page
    capsys.readouterr()
    assert main(["report", "stopped"]) == 2
    error = capsys.readouterr().err
    assert "to finish it, repeat python -m optima_tpu.launch --model model --output stopped" in error
    assert f" --pattern '{MODULE}:Comb?every=3' --layers" in error and f" --selector {MODULE}:MyMask" in error
    assert main(["prune", "model", "--preset", "fast", *SMALL, "--output", "run"]) == 2
    assert f"selector is {MODULE}:MyMask there, wanda here" in capsys.readouterr().err


def test_a_recovery_records_the_methods_that_it_does_not_import(work):
    if not (work / "recovered").exists():
        assert main(["recover", "run", *RECOVER, "--output", "recovered"]) == 0
    recipes = [json.loads((work / name / "run.json").read_text())["manifest"]["recipe"] for name in ("run", "recovered")]
    for setting in ("selector", "solver", "target", "pattern", "layers"):
        assert recipes[0][setting] == recipes[1][setting], setting


@pytest.mark.parametrize(
    "damage",
    [
        {"selector": f"{MODULE}:MyMask"},
        {"selector": {"name": f"{MODULE}:MyMask", "group": 3, "__call__": [1]}},
        {"solver": {"name": f"{MODULE}:Lazy", "damping": "much"}},
        {"target": {"name": f"{MODULE}:Far", "alpha": "x"}},
        {"accept": {"name": f"{MODULE}:MyMask"}},
        {"layers": 5},
        {"pattern": {"name": f"{MODULE}:Comb"}},
        {"selector.name": f"{MODULE}:MyMask"},
        {"config": f"{MODULE}.yaml"},
        {"selector": {"strength": 1}},
    ],
    ids=str,
)
def test_a_record_that_somebody_wrote_by_hand_runs_nothing(work, tmp_path, capsys, damage):
    shutil.copytree(work / "run", tmp_path / "run")
    for name in ("run.json", "report.json"):
        record = json.loads((tmp_path / "run" / name).read_text())
        record["configuration"] |= damage
        del record["manifest"]["methods"]  # with another digest of the code, a refusal shows no command
        (tmp_path / "run" / name).write_text(json.dumps(record))
    (tmp_path / "run" / "checksums.json").unlink(missing_ok=True)
    for sums in (tmp_path / "run").glob("sha256*"):
        sums.unlink()
    assert main(["report", str(tmp_path / "run")]) in (0, 2)
    capsys.readouterr()
    assert main([*PRUNE[:4], *SMALL, "--output", str(tmp_path / "run")]) == 2
    assert "holds another run" in capsys.readouterr().err


def test_a_pattern_is_imported_only_where_the_reader_of_the_text_asks_for_it(work):
    named = parse_pattern(f"{MODULE}:Comb?every=3")
    assert named == NamedPattern(f"{MODULE}:Comb?every=3") and named.text() == f"{MODULE}:Comb?every=3"
    with pytest.raises(UserError, match="named by a record alone, which is never imported: name it yourself"):
        named.pruned_count((4, 12))
