"""Several processes give the result of one; they join and fail together."""

import shutil
import signal
import sys

import numpy as np
import pytest

from optima_tpu.launch import main
from optima_tpu.models.activations import Activations
from optima_tpu.models.checkpoints.export import read_masks
from optima_tpu.pipeline import walk
from optima_tpu.pipeline.distill.outcome import read_outcome
from optima_tpu.pipeline.journal import finished_blocks
from optima_tpu.recover import main as recover
from optima_tpu.runtime import processes
from optima_tpu.runtime.command import LOST, guarded
from optima_tpu.runtime.signals import RESUME
from tests.support.meshes import mesh
from tests.support.processes import COUNTING, at_once, free_port, several, without_gloo
from tests.support.runs import assert_close_weights, assert_same_weights, folder_tensors


def assert_shared(results, run, finished) -> None:
    """Two processes gave the weights of one, and each read its share."""
    (_, first, _), (_, second, _) = results
    assert [status for status, *_ in results] == [0, 0], [error for *_, error in results]
    assert_close_weights(run, finished.directory)
    assert "in 2 processes" in first and "in 2 processes" not in second
    read = [int(printed.rpartition("bytes read: ")[2]) for printed in (first, second)]
    assert 0.9 < read[0] / read[1] < 1.1


@pytest.mark.slow  # below such a run is in processes that have joined, and processes join by arguments in runtime/test_command.py
def test_two_processes_give_the_weights_of_one_and_each_reads_its_share(finished, tmp_path):
    results = several([*finished.arguments, "--output", str(tmp_path / "run")])
    assert_shared(results, tmp_path / "run", finished)
    assert [line.partition(":")[0] for line in without_gloo(results[1][1])] == [
        "bytes read"
    ]  # the second process says nothing else


# A program that has joined the processes before it prunes, and that calls from a thread, as Ray does.
JOINED = f"""
import sys, threading, jax
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(sys.argv.pop(1), 2, int(sys.argv.pop(1)))
folders = [sys.argv.pop(1), sys.argv.pop(1)]
{COUNTING}
found = []
thread = threading.Thread(target=lambda: found.extend(launch.main([*arguments, "--output", folder]) for folder in folders))
thread.start()
thread.join()
print("went on after", *found, "joined", jax.distributed.is_initialized())
print("bytes read:", count)
jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_a_program_that_has_joined_the_processes_goes_on_after_a_run_that_is_refused_and_prunes_in_them(finished, tmp_path):
    """The run gives one process's weights; each process reads its share."""
    (tmp_path / "notes").touch()
    address, run = f"localhost:{free_port()}", tmp_path / "run"
    results = at_once(["-c", JOINED, address, number, tmp_path, run, "", *finished.arguments] for number in range(2))
    for _, printed, error in results:
        assert "went on after 2 0 joined True" in printed, error
    assert [f"{tmp_path} holds files that are not a run" in error for *_, error in results] == [True, False]
    assert_shared(results, run, finished)


@pytest.mark.slow
def test_training_in_two_processes_gives_the_weights_of_one_and_keeps_every_zero(finished, tmp_path):
    command = [*finished.arguments, "--distill", "kl", "--distill.windows", "16", "--distill.learning_rate", "1e-3"]
    assert main([*command, "--output", str(tmp_path / "one")]) == 0
    for status, _, error in several([*command, "--output", str(tmp_path / "two")]):
        assert status == 0, error
    assert_close_weights(tmp_path / "two", tmp_path / "one")
    weights, pruned = (folder_tensors(path / "hf") for path in (tmp_path / "two", finished.directory))
    for name, keep in read_masks(tmp_path / "two/hf").items():
        assert (weights[name][~keep] == 0).all() and (weights[name] != pruned[name]).any(), name
    one, two = (read_outcome(tmp_path / name) for name in ("one", "two"))
    assert two.kept == one.kept > 0 and two.after == pytest.approx(one.after, rel=1e-4)


@pytest.mark.slow
def test_a_run_is_recovered_in_two_processes_as_in_one(finished, tmp_path):
    """Orbax counts each process's reads, and a save waits for equal counts."""
    command = [str(finished.directory), "--tokens", "512", "--source", "random", "--length", "32", "--held_out", "4"]
    command += ["--evaluation", "random", "--windows", "2", "--mesh", "4x2"]
    assert recover([*command, "--output", str(tmp_path / "one")]) == 0
    start = ["--cpu-devices", "4", "--coordinator", f"localhost:{free_port()}", "--num-processes", "2"]
    command += [*start, "--output", str(tmp_path / "two")]
    for status, _, error in at_once(["-m", "optima_tpu.recover", *command, "--process-id", number] for number in range(2)):
        assert status == 0, error
    assert_close_weights(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_two_processes_lose_nothing_when_one_is_killed_and_give_the_weights_of_one(finished, tmp_path, capsys):
    command = [*finished.arguments, "--output", str(tmp_path / "run")]
    first, second = several(command, killed_at="2")
    assert second[0] == -signal.SIGKILL
    # jax aborts a process that waits for another to connect.
    assert first[0] == -signal.SIGABRT or (first[0] == LOST and "another process has ended" in first[2]), first[2]
    assert finished_blocks(tmp_path / "run") == [0, 1]
    shutil.copytree(tmp_path / "run", tmp_path / "other")

    first, second = several(command)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert_close_weights(tmp_path / "run", finished.directory)
    assert "2 of 3 blocks done" in first[1]
    assert main([*finished.arguments, "--output", str(tmp_path / "other")]) == 0
    assert "2 of 3 blocks done" in capsys.readouterr().out
    assert_close_weights(tmp_path / "other", finished.directory)


def test_what_looks_like_the_end_of_a_peer_is_told_as_well(monkeypatch, capsys):
    """The error may be this process's own, which no other process prints."""

    def command():
        raise RuntimeError("NCCL operation failed:\nno socket interface found")

    monkeypatch.setattr(processes, "alone", lambda: False)
    assert guarded(command, "the same command goes on") == LOST
    error = capsys.readouterr().err
    assert "(here: RuntimeError: NCCL operation failed: no socket interface found); the same" in error and error.count("\n") == 1


@pytest.mark.slow  # its two halves, that processes disagree and that one of them says so, are in runtime/test_command.py
def test_processes_with_other_settings_are_refused_in_one_message(finished, tmp_path):
    first, second = several([*finished.arguments, "--output", str(tmp_path / "run")], own=((), ("--solver.damping", "0.5")))
    assert (first[0], second[0]) == (2, 2)
    assert "solver.damping: 0.01 in process 0, 0.5 in process 1" in first[2]
    assert "error:" not in second[2]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("inside", [True, False], ids=["in a save", "in a block"])
def test_sigterm_ends_a_run_with_its_own_status_and_a_save_is_finished_first(finished, tmp_path, monkeypatch, capsys, inside):
    prune_block = walk.prune_block

    def told_while_pruning(of, index, *rest):
        if index == 1 and not inside:
            signal.raise_signal(signal.SIGTERM)
        return prune_block(of, index, *rest)

    write_states = sys.modules["optima_tpu.pipeline.journal"]._write_states

    def told_while_writing(folder, *streams):
        if inside and folder.name.startswith("block_0001"):
            signal.raise_signal(signal.SIGTERM)
        write_states(folder, *streams)

    command = [*finished.arguments, "--recompute", "0", "--output", str(tmp_path / "run")]
    monkeypatch.setattr("optima_tpu.pipeline.walk.prune_block", told_while_pruning)
    monkeypatch.setattr("optima_tpu.pipeline.journal._write_states", told_while_writing)
    before = signal.getsignal(signal.SIGTERM)
    assert main(command) == RESUME
    assert "SIGTERM; the same command goes on" in capsys.readouterr().err
    assert finished_blocks(tmp_path / "run") == ([0, 1] if inside else [0])
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("harmed", ["block", "last"])
def test_what_was_damaged_is_done_again_to_the_same_bits(finished, tmp_path, capsys, harmed):
    copy = tmp_path / "run"
    shutil.copytree(finished.directory, copy, ignore=shutil.ignore_patterns("checkpoint", "hf", "report.json"))
    if harmed == "block":
        file = max((copy / "journal" / "block_0001").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
        file.write_bytes(file.read_bytes()[:-3])
    else:
        shutil.rmtree(copy / "journal" / "block_0002")
    assert main([*finished.arguments, "--output", str(copy)]) == 0
    printed = capsys.readouterr().out
    assert ("block 1 was damaged since it was saved" in printed) == (harmed == "block")
    assert f"are computed again, through {'block 0' if harmed == 'block' else 'blocks 0 to 1'} as pruned" in printed
    assert_same_weights(copy, finished.directory)


def test_windows_are_spread_evenly_and_come_back_in_order():
    states = np.arange(11 * 2 * 3, dtype=np.float32).reshape(11, 2, 3)
    for shape in ((1, 1), (4, 2), (2, 4)):
        hidden = Activations.of(mesh(*shape), states.copy()).part(3, 11)
        seen = []
        for batch in hidden.batches(2):
            seen.extend(batch.rows[batch.filled])
            expected = np.where(batch.filled[:, None, None], states[np.minimum(batch.rows, 10)], 0)
            assert (np.asarray(batch.hidden) == expected).all()
            assert (np.asarray(batch.valid) == batch.filled).all()
            assert (np.asarray(batch.place(np.arange(11)))[batch.filled] == batch.rows[batch.filled]).all()
            hidden.put(batch.rows, batch.hidden + 1)
        assert sorted(seen) == list(range(3, 11))
        assert (hidden.values == states[3:] + 1).all()
