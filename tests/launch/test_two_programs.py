"""Of two commands that write one folder, one wins and the other says so."""

import subprocess
import sys

import pytest

from optima_tpu import export, unpack
from optima_tpu.evaluate.__main__ import main as evaluate
from optima_tpu.pipeline.repair import verified
from optima_tpu.runtime.files import only_program
from tests.support.fake_run import finished_run, small_model
from tests.support.processes import process_environment
from tests.support.runs import only_error, snapshot

# A command that waits for a line before what it has written gets its name.
WAITING = """
import importlib, sys
from optima_tpu.runtime import files

commit = files.commit

def waiting(partial, final):
    print("written", flush=True)
    sys.stdin.readline()
    commit(partial, final)

files.commit = waiting
sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished") / "run"
    finished_run(directory, small_model(), model="owner/small@v1.0")
    return directory


@pytest.fixture(scope="module")
def packed(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "out"
    assert export.main([str(run), str(out), "--packed"]) == 0
    return out


def test_the_first_of_two_commands_has_the_folder_and_the_other_leaves_nothing(run, packed, tmp_path, capsys):
    out = tmp_path / "both" / "out"
    words = [sys.executable, "-W", "ignore", "-c", WAITING, "optima_tpu.export", str(run), str(out)]
    with subprocess.Popen(
        words, env=process_environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as late:
        assert "writing and checking" in late.stdout.readline() and late.stdout.readline() == "written\n"
        assert unpack.main([str(packed), str(out)]) == 0
        before = snapshot(out)
        _, error = late.communicate("\n", timeout=120)
    assert late.returncode == 2 and "another program has written" in only_error(error) and str(out) in error
    assert [path.name for path in out.parent.iterdir()] == ["out"] and snapshot(out) == before
    checked = verified(out)
    assert not checked.damaged and not checked.unlisted


def test_an_evaluation_is_refused_before_its_work_where_another_program_is_at_work(finished, tmp_path, capsys):
    output = tmp_path / "numbers"
    output.mkdir()
    words = [str(finished.directory), "--perplexity", "random", "--length", "16", "--windows", "2", "--output", str(output)]
    with only_program(output):
        assert evaluate(words) == 2
    assert "another process is at work" in only_error(capsys.readouterr().err)
    assert [path.name for path in output.iterdir()] == ["run.lock"]


def test_an_export_into_a_run_is_refused_where_another_program_is_at_work(run, capsys):
    with only_program(run):
        assert export.main([str(run), str(run / "hf")]) == 2
    assert "another process is at work" in only_error(capsys.readouterr().err) and not (run / "hf").exists()
