"""SIGTERM and Ctrl-C at any moment give a status, one line, no traceback."""

import os
import signal
import subprocess
import sys
import time

import pytest

from optima_tpu.runtime.signals import INTERRUPTED, RESUME
from tests.support.processes import CHILDREN, hearing_ctrl_c, process_environment
from tests.support.runs import SMALL
from tests.support.tiny_models import tiny_folder

# Sends the process a signal when it begins to import a module. Python imports a sitecustomize before the program.
AT_IMPORT = """
import os, sys

def watch(event, arguments):
    if event == "import" and arguments[0] == os.environ["SIGNAL_AT"]:
        os.environ["SIGNAL_AT"] = ""
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))

sys.addaudithook(watch)
"""
ENDS = {signal.SIGTERM: (RESUME, "stopped by SIGTERM"), signal.SIGINT: (INTERRUPTED, "stopped")}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("whole") / "model")


def start(*command, folder, **environment):
    with hearing_ctrl_c():
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", *map(str, command)],
            env=process_environment() | environment,
            cwd=folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )


@pytest.mark.parametrize(
    ("module", "at", "sent"),
    [
        ("launch", "optima_tpu.config.parse", signal.SIGINT),
        ("cli", "jax", signal.SIGTERM),
        ("evaluate", "numpy", signal.SIGINT),
        ("data.build", "pyarrow", signal.SIGTERM),
        ("launch", "orbax.checkpoint", signal.SIGTERM),
        ("cli data", "pyarrow", signal.SIGTERM),  # its arguments are read before
    ],
)
def test_a_signal_while_a_command_imports_its_modules(model, tmp_path, module, at, sent):
    (tmp_path / "sitecustomize.py").write_text((CHILDREN / "sitecustomize.py").read_text() + AT_IMPORT)
    run = ["--model", model, *SMALL, "--output", "run"]
    build = ["a@data", "a.txt"]
    words = {"launch": run, "cli": ["prune", *run], "evaluate": [model], "data.build": build, "cli data": ["data", *build]}[
        module
    ]
    (tmp_path / "a.txt").write_text("text")
    path = f"{tmp_path}{os.pathsep}{process_environment()['PYTHONPATH']}"
    process = start(
        "-m", f"optima_tpu.{module.split()[0]}", *words, folder=tmp_path, PYTHONPATH=path, SIGNAL_AT=at, SIGNAL=str(int(sent))
    )
    error = process.communicate(timeout=120)[1]
    status, line = ENDS[sent]
    assert process.returncode == status and error.startswith(line) and error.count("\n") == 1, error
    assert not (tmp_path / "run").exists()


def test_a_command_ends_behind_pythons_exit_handlers(tmp_path):
    program = """
import atexit, sys
from optima_tpu import cli

class Kept:
    def __del__(self):
        print("freed")

kept = Kept()
sys.argv = ["optima", "verify", "missing"]
status = cli.main()
atexit.register(print, "handled")
sys.exit(status)
"""
    process = start("-c", program, folder=tmp_path)
    assert process.communicate(timeout=120)[0] == "handled\n" and process.returncode == 2


def test_an_error_behind_the_work_of_a_command_decides_its_status(tmp_path):
    program = """
from optima_tpu.runtime import command, signals

def work():
    signals.ended(0)
    raise ValueError("broken")

signals.listen()
command.guarded(work, "again")
"""
    process = start("-c", program, folder=tmp_path)
    assert "ValueError: broken" in process.communicate(timeout=120)[1] and process.returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize("sent", ENDS)
@pytest.mark.parametrize("moment", range(0, 5001, 50))
def test_a_signal_at_every_moment_of_the_start(model, tmp_path, moment, sent):
    process = start("-m", "optima_tpu.launch", "--model", model, *SMALL, "--output", "run", folder=tmp_path)
    time.sleep(moment / 1000)
    process.send_signal(sent)
    error = process.communicate(timeout=120)[1]
    status, line = ENDS[sent]
    if moment < 200 and (process.returncode == -sent or "Fatal Python error: init" in error):  # Python itself was not up yet
        return
    assert process.returncode == status and error.startswith(line) and error.count("\n") == 1, error
