"""Folders that a user may not read or write give one line, before any work."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.support.processes import python
from tests.support.runs import only_error

# Prints status and stderr of several commands, each in the place of a user without privileges.
AS_ORDINARY_USER = """
import contextlib, importlib, io, json, os, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import datasets, optima_tpu.data, optima_tpu.models.checkpoints.export, optima_tpu.pipeline.run, optima_tpu.report.page  # what commands import later may lie where this user sees nothing
from optima_tpu import cli, export, launch, report, verify
import optima_tpu.report.__main__

if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
said = []
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        status = cli.main(command)
    said.append((status, err.getvalue()))
print(json.dumps(said))
"""


@pytest.fixture
def public(finished):
    """A folder that everybody may read, with a model and a run."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copytree(finished.model, root / "model")
        shutil.copytree(finished.directory, root / "run")
        for path in (root, *root.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield root
        for path in (root, *root.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)


def test_what_a_user_may_not_read_or_write_is_named_in_one_line(finished, public):
    def locked(copy: str, inside: str = ".", mode: int = 0) -> Path:
        """A copy whose ``inside`` has ``mode``: 0 unreadable, 555 readonly."""
        name = copy + inside.replace("/", "-")
        folder = Path(shutil.copytree(public / copy, public / name))
        (folder / inside).chmod(mode)
        return folder

    (public / "sealed-folder").mkdir(mode=0o555)
    (public / "own").mkdir()
    (public / "own").chmod(0o777)

    def prune(model: Path, output: Path) -> list[str]:
        arguments = [str(model) if word == str(finished.model) else word for word in finished.arguments]
        return ["prune", *arguments, "--output", str(output)]

    cases = [
        (prune(locked("model"), public / "own/new"), "/model."),
        (prune(locked("model", "tokenizer.json"), public / "own/new"), "tokenizer.json"),
        (prune(locked("model", "model-00001-of-00002.safetensors"), public / "own/new"), "model-00001-of-00002.safetensors"),
        (prune(public / "model", public / "sealed-folder/new"), "sealed-folder/new"),
        (prune(public / "model", locked("run")), "run."),
        (["verify", str(locked("run", "journal"))], "journal"),
        (["export", str(locked("run", "checkpoint")), str(public / "own/out")], "checkpoint"),
        (["verify", str(locked("run", "hf/model.safetensors"))], "model.safetensors"),
        (["report", str(locked("run", "report.json"))], "report.json"),
        (["report", str(public / "run"), "-o", str(public / "sealed-folder/page.html")], "page.html"),
        (["export", str(locked("run", "assets")), str(public / "own/out")], "assets"),
        (["export", str(public / "run"), str(public / "sealed-folder/out")], "sealed-folder/out"),
    ]
    done = python("-W", "ignore", "-c", AS_ORDINARY_USER, json.dumps([command for command, _ in cases]))
    assert done.returncode == 0, done.stderr
    wrong = [
        (command, status, printed)
        for (command, named), (status, printed) in zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True)
        if status != 2 or only_error(printed).count(os.strerror(13)) != 1 or named not in printed
    ]
    assert not wrong
