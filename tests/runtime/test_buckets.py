"""Run directories in Google Cloud Storage, on a local server that can fail."""

import importlib.util
import itertools
import os
import signal
import types
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from fsspec.config import conf
from orbax.checkpoint._src.serialization import tensorstore_utils

from optima_tpu import export, verify
from optima_tpu.errors import UserError
from optima_tpu.launch import main
from optima_tpu.models.checkpoints.orbax import load_group, read_metadata, save_tree
from optima_tpu.pipeline.journal import finished_blocks
from optima_tpu.pipeline.sweep.grid import read_grid
from optima_tpu.runtime import checksums, files
from optima_tpu.runtime.buckets import BucketError, as_path, in_bucket
from optima_tpu.runtime.files import LOCK, files_in, only_program, still_only_program
from tests.support.bucket import BUCKET, now_and_then, serving
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
def served():
    """A storage server, also for subprocesses; clients retry without delay."""
    if importlib.util.find_spec("gcsfs") is None:
        pytest.skip("needs the package gcsfs")
    as_path(f"gs://{BUCKET}/any")  # sets what gcsfs reads when it is imported
    import gcsfs.retry

    quick = {"gcs_request_retries": {"initial_delay": "1ms", "max_delay": "1ms", "max_retries": 8}}
    with serving() as (bucket, url), pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "1")
        for name in ("_BASE_TS_CONTEXT", "_DEFAULT_OCDBT_TS_CONTEXT"):
            patch.setattr(tensorstore_utils, name, getattr(tensorstore_utils, name) | quick)
        bucket.naps = []

        async def nap(seconds):
            bucket.naps.append(seconds)

        patch.setattr(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=nap))
        yield bucket


@pytest.fixture
def bucket(served):
    """gs://BUCKET, empty."""
    served.objects.clear()
    return f"gs://{BUCKET}"


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
    assert main(["--model", str(tmp_path), "--output", output]) == 2
    assert only_error(capsys.readouterr().err).startswith(f"error: {said}")
    assert export.main([output, "out"]) == 2
    assert said in capsys.readouterr().err
    with pytest.raises(UserError, match=said):
        read_grid(write_sweep(tmp_path / "sweep.yaml"), output=output)
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_one_line(bucket, tmp_path, capsys):
    assert main(["--model", str(tmp_path), "--output", "gs://another/run"]) == 2
    assert only_error(capsys.readouterr().err).startswith("error: could not write gs://another/run: ")


@pytest.mark.slow
def test_a_run_in_a_bucket_that_is_killed_anywhere_goes_on_to_the_bits_of_one_in_a_folder(bucket, finished, tmp_path, capsys):
    directory = as_path(f"{bucket}/runs/killed")
    command = [*finished.arguments, "--output", str(directory)]
    kills = [
        ("pipeline.journal", "save_tree", 2, [0]),  # nothing of the second block's entry is written yet
        ("runtime.kept", "write_sums", 1, [0]),  # the whole of it but its checksums
        ("runtime.kept", "commit", 1, [0]),  # all of it, and it does not count yet
        ("runtime.kept", "commit", 3, [0, 1, 2]),  # two blocks, and all of the checkpoint
        ("runtime.files", "commit", 1, [0, 1, 2]),  # all of the export
    ]
    for module, name, call, blocks in kills:
        killed = python("-c", KILLED, module, name, call, *command)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert finished_blocks(directory) == blocks, name
        assert "is damaged" not in killed.stdout
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "resuming     3 of 3 blocks done" in printed and f"{directory}/hf" in printed
    assert not [path for path in files_in(directory) if "partial" in path.name]
    assert_same_weights(fetched(directory, tmp_path / "run"), finished.directory)
    before = {str(path): path.stat().mtime for path in files_in(directory)}
    assert main(command) == 0
    assert {str(path): path.stat().mtime for path in files_in(directory)} == before

    assert export.main([str(directory), str(tmp_path / "hf")]) == 0
    for name in ("model.safetensors", "pruning_masks.npz"):
        assert (tmp_path / "hf" / name).read_bytes() == (finished.directory / "hf" / name).read_bytes()
    assert export.main([str(finished.directory), f"{directory}/hf"]) == 0
    assert "holds this export already" in capsys.readouterr().out
    assert export.main([str(finished.directory), f"{directory}/journal"]) == 2
    assert "which is not empty" in capsys.readouterr().err

    assert main([*command, "--pattern", "0.6"]) == 2
    assert (
        f"error: {directory} holds another run: pattern is 0.5/row there, 0.6/row here. To resume it, type "
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_two_processes_share_a_bucket_and_lose_nothing_when_one_is_killed(bucket, finished, tmp_path):
    directory = as_path(f"{bucket}/runs/two")
    command = [*finished.arguments, "--output", str(directory)]
    _, second = several(command, killed_at="2")
    assert second[0] == -signal.SIGKILL and finished_blocks(directory) == [0, 1]
    first, second = several(command)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "2 of 3 blocks done" in first[1]
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


def works(directory: Path) -> None:
    """Everything that a run does with a bucket, but for Orbax."""
    (directory / "a.json").write_text("{}")
    files.write_bytes(directory / "b", b"x" * 1000)
    assert (directory / "b").read_bytes() == b"x" * 1000 and (directory / "b").stat().st_size == 1000
    assert directory.is_dir() and (directory / "b").is_file() and not (directory / "b").is_dir()
    assert (directory / "a.json").exists() and not (directory / "c").exists()
    assert sorted(path.name for path in directory.iterdir()) == ["a.json", "b"]
    assert [path.name for path in directory.glob("*.json")] == ["a.json"]
    partial = files.begin(folder := directory / "folder")
    (partial / "sub/one").write_bytes(b"1")
    checksums.write_sums(partial)
    assert not files.complete(folder)
    files.commit(partial, folder)
    assert files.complete(folder) and not checksums.damage(folder)
    checksums.keep(directory, {"k.json": b"{}"})
    assert checksums.intact(directory, "k.json")
    large = os.urandom(6 << 20)  # uploaded in parts
    with files.written_here(directory / "large") as here:
        here.write_bytes(large)
    with files.read_here(directory / "large") as here:
        assert here.read_bytes() == large
    files.remove(folder)
    assert not folder.exists()
    files.remove(directory)
    assert not list(files_in(directory))


@pytest.mark.parametrize("faults", [(503, 429), ("reset", "lost"), ("cut", 500, 502, 504)], ids=str)
def test_what_fails_now_and_then_is_tried_again(bucket, served, faults):
    served.naps.clear()
    with served.failing(now_and_then(served, faults)):
        works(as_path(f"{bucket}/run"))
    assert len(served.refused) > 20
    assert served.naps and max(served.naps) < 60  # what gcsfs would have waited before it tried again


def test_a_bucket_that_goes_on_failing_is_one_line_and_never_an_answer(bucket, served):
    directory = as_path(f"{bucket}/run")
    (directory / "a").write_bytes(b"12345678")
    checksums.keep(directory, {"k.json": b"{}"})
    partial = files.begin(directory / "folder")
    (partial / "one").write_bytes(b"1")
    works = {
        "a": [
            (directory / "a").exists, (directory / "a").is_dir, (directory / "a").is_file, (directory / "a").read_bytes,
            lambda: (directory / "a").write_bytes(b"1"), lambda: files.digest(directory / "a"), lambda: files.remove(directory / "a"),
        ],
        "run": [directory.is_dir, lambda: list(directory.iterdir()), lambda: list(directory.glob("*")), lambda: list(files_in(directory))],
        "folder": [lambda: files.complete(directory / "folder"), lambda: files.begin(directory / "folder")],
        "sha256-all.json": [lambda: checksums.known(directory), lambda: checksums.intact(directory, "k.json")],
    }  # fmt: skip
    messages = {
        503: "HTTP status 503: ",
        403: "HTTP status 403: Forbidden",
        502: "HTTP status 502: ",
        "reset": "Connection reset",
        "short": "",
    }
    for (fault, words), (name, each) in itertools.product(messages.items(), works.items()):
        for work in each:
            before = len(served.asked)
            with served.failing(lambda request, fault=fault: fault), pytest.raises(BucketError) as raised:
                work()
            assert f"{BUCKET}/run" in str(raised.value) and name in str(raised.value) and words in str(raised.value)
            assert "\n" not in str(raised.value) and len(served.asked) - before < 40
    assert (directory / "a").read_bytes() in (b"12345678", b"1") and not files.complete(directory / "folder")


def test_an_object_that_arrives_shorter_or_changed_is_not_believed(bucket, served):
    path = as_path(f"{bucket}/run/a")
    path.write_bytes(b"12345678")
    for fault in ("short", "flipped"):
        with served.failing(now_and_then(served, [fault])):
            assert [path.read_bytes() for _ in range(6)] == [b"12345678"] * 6 and served.refused
    with served.failing(lambda request: "flipped"), pytest.raises(BucketError, match="gs://bucket/run/a: ChecksumError"):
        path.read_bytes()
    served.joined.add("run/a")
    with served.failing(now_and_then(served, ["cut"])):
        assert [path.read_bytes() for _ in range(3)] == [b"12345678"] * 3


def test_checkpoints_in_a_bucket_that_fails_are_read_whole_or_not_at_all(bucket, served):
    path, tree = as_path(f"{bucket}/run/entry"), {"weights": {"a": np.arange(12, dtype=np.float32).reshape(3, 4)}}
    with served.failing(now_and_then(served, [503, 429, "reset"])):
        save_tree(path, tree, {"report": {"a": 1}})
        assert read_metadata(path).custom_metadata == {"report": {"a": 1}}
        np.testing.assert_array_equal(load_group(path, "weights", tree["weights"])["a"], tree["weights"]["a"])
    assert len(served.refused) > 5
    for fault, words in ((403, "HTTP status 403"), (503, ""), ("cut", "")):
        for work in (lambda: read_metadata(path), lambda: load_group(path, "weights", tree["weights"])):
            with served.failing(lambda request, fault=fault: fault), pytest.raises(BucketError) as raised:
                work()
            assert f"{bucket}/run/entry" in (message := str(raised.value)) and words in message and "\n" not in message


@pytest.mark.slow
def test_a_run_in_a_bucket_that_fails_now_and_then_ends_with_the_same_bits(bucket, served, finished, tmp_path, capsys):
    directory = as_path(f"{bucket}/run")
    command = [*finished.arguments, "--output", str(directory)]
    with served.failing(now_and_then(served, [503, "cut", 429, "reset"], every=5)):
        for _ in range(9):
            if not (status := main(command)):
                break
            assert status == 2 and "gs://bucket/run" in only_error(capsys.readouterr().err)
    assert not status and len(served.refused) > 30
    assert_same_weights(fetched(directory, tmp_path / "run"), finished.directory)
    assert verify.main([str(directory)]) == 0
    for fault, words in ((403, "HTTP status 403"), (503, "HTTP status 503"), ("cut", "")):
        with served.failing(lambda request, fault=fault: fault):
            for run in (main, verify.main, export.main):
                arguments = {main: command, verify.main: [str(directory)], export.main: [str(directory), str(tmp_path / "out")]}[
                    run
                ]
                capsys.readouterr()
                assert run(arguments) == 2
                assert "gs://bucket/run" in (message := only_error(capsys.readouterr().err)) and words in message
    with served.failing(lambda request: 503 if "journal/" in request.name and request.kind == "media" else None):
        assert export.main([str(directory), str(tmp_path / "out")]) == 2
        assert "gs://bucket/run/" in (message := only_error(capsys.readouterr().err)) and "damaged" not in message
    assert not (tmp_path / "out").exists()


def test_a_request_without_an_answer_is_given_up(bucket, served, monkeypatch):
    path = as_path(f"{bucket}/run/a")
    path.write_bytes(b"1")
    assert 0 < conf["gcs"]["requests_timeout"].sock_read < 600
    monkeypatch.setitem(conf, "gcs", conf["gcs"] | {"requests_timeout": aiohttp.ClientTimeout(total=None, sock_read=0.1)})
    with served.failing(lambda request: "stall"), pytest.raises(BucketError, match="gs://bucket/run/a: .*Timeout"):
        path.read_bytes()
    stalled = iter(["stall"])
    with served.failing(lambda request: next(stalled, None)):
        assert path.read_bytes() == b"1"


@pytest.mark.slow
def test_arrays_that_do_not_arrive_are_asked_for_again(bucket, served, finished, tmp_path):
    directory = as_path(f"{bucket}/run")
    assert main([*finished.arguments, "--output", str(directory)]) == 0
    stalled = iter(["stall"])
    with served.failing(lambda request: next(stalled, None) if request.kind == "media" and "/d/" in request.name else None):
        assert export.main([str(directory), str(tmp_path / "hf")]) == 0
    assert len(served.refused) == 1
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (finished.directory / "hf/model.safetensors").read_bytes()
