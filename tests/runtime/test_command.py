"""How a command ends, and what it takes of the machine."""

import contextlib
import errno
import importlib.metadata
import os
import signal
import subprocess
import sys
import time

import jax
import pytest
from rich.console import Console

from optima_tpu import cli
from optima_tpu.config.run_config import RunConfig
from optima_tpu.runtime import processes, signals
from optima_tpu.runtime.command import guarded, take_devices
from optima_tpu.runtime.program import COMMANDS
from optima_tpu.runtime.signals import INTERRUPTED, RESUME, SAVING
from optima_tpu.runtime.xla_flags import raise_collective_timeouts
from tests.support.processes import at_once, free_port, hearing_ctrl_c, process_environment, python, without_gloo
from tests.support.runs import only_error

# A loop on the device that never ends, in which Python hears no signal; a save that takes longer than the grace; and callbacks of
# the garbage collector, in which an exception is lost.
WORKING = """
import gc, os, signal, sys, threading, time
from optima_tpu.runtime import command, signals
from optima_tpu.runtime.signals import uninterrupted

signals._GRACE = dict.fromkeys(signals._GRACE, 0.2 if sys.argv[1] != "collecting" else 60)

def devices():
    import jax
    program = jax.jit(lambda x: jax.lax.while_loop(lambda x: x > 0, lambda x: 1 + jax.numpy.sin(x) ** 2, x)).lower(1.0).compile()
    threading.Timer(0.5, lambda: print("working", flush=True)).start()
    jax.block_until_ready(program(1.0))

def saving(seconds=1.5):
    with uninterrupted():
        print("working", flush=True)
        time.sleep(seconds)
        print("saved", flush=True)
    signals.check()

def saving_for_long():
    saving(60)

def compiling():
    import jax
    def program(x):
        for turn in range(1500):
            x = jax.numpy.linalg.cholesky(x @ x.T) if turn % 5 == 0 else jax.numpy.sort(jax.numpy.tanh(x) * turn, axis=turn % 2)
        return x
    lowered = jax.jit(program).lower(jax.numpy.ones((17, 17)))
    print("working", flush=True)
    lowered.compile()

def collecting():
    gc.callbacks.append(lambda *_: time.sleep(0.2))
    print("working", flush=True)
    for _ in range(100):
        gc.collect()
        signals.check()

def forking():
    if not (child := os.fork()):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    print(signal.Signals(os.WTERMSIG(os.waitpid(child, 0)[1])).name, flush=True)
    time.sleep(1)

def written():
    signals.ended(0)
    print("wrote out")

def starving():
    read, write = os.read, sys.stderr.write
    os.read = lambda *given: (time.sleep(0.3), read(*given))[1]
    sys.stderr.write = lambda text: (time.sleep(0.6), write(text))[1]
    signal.raise_signal(signal.SIGTERM)
    signals.check()

sys.exit(command.guarded(globals()[sys.argv[1]], "the same command goes on"))
"""


# A command in the middle of a folder, in a step that hears no signal for longer than any grace.
UNDONE = """
import pathlib, signal, sys, time
from optima_tpu.runtime import command, files, signals

signals._GRACE = {signal.SIGTERM: 600.0, signal.SIGINT: 0.2}

def work():
    with files.making(pathlib.Path(sys.argv[1])) as folder:
        (folder / "model.safetensors").write_bytes(b"half")
        signal.raise_signal(signal.SIGTERM)
        time.sleep(60)

sys.exit(command.guarded(work, "again"))
"""
TOGETHER = """
import signal, sys
from optima_tpu.config.run_config import RunConfig
from optima_tpu.runtime import command, processes

def work():
    address, number = sys.argv[1], int(sys.argv[2])
    command.take_devices(RunConfig(model="a", cpu_devices=1, coordinator=address, num_processes=2, process_id=number))
    processes.agree("settings", {"mesh": "2x1"})
    try:
        processes.agree("settings", {"mesh": "2x1", "solver.damping": number})
    except processes.SharedError as error:
        print(error, flush=True)
    processes.check_signals()
    if number == 1:
        signal.raise_signal(signal.SIGTERM)
    processes.check_signals()
    print("went on")

sys.exit(command.guarded(work, "the same command goes on"))
"""
SENT = [(signal.SIGTERM, " by SIGTERM", RESUME), (signal.SIGINT, "", INTERRUPTED)]


@contextlib.contextmanager
def working(work):
    """A process that has begun to work."""
    with hearing_ctrl_c():
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORKING, work],
            env=process_environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    try:
        assert process.stdout.readline() == "working\n"
        yield process
    finally:
        process.kill()


STEP = " in the middle of a step"


# Every kind of work and both signals, and the rest of the grid slow.
@pytest.mark.parametrize(
    "work, out, said, sent, name, status",
    [
        ("devices", "", STEP, *SENT[0]),
        ("compiling", "", STEP, *SENT[0]),
        ("saving", "saved\n", "", *SENT[1]),
        ("collecting", "", "", *SENT[0]),
        pytest.param("devices", "", STEP, *SENT[1], marks=pytest.mark.slow),
        pytest.param("compiling", "", STEP, *SENT[1], marks=pytest.mark.slow),
        pytest.param("saving", "saved\n", "", *SENT[0], marks=pytest.mark.slow),
        pytest.param("collecting", "", "", *SENT[1], marks=pytest.mark.slow),
    ],
)
def test_a_signal_is_heard_wherever_the_work_is_and_waits_for_a_save(work, out, said, sent, name, status):
    with working(work) as process:
        process.send_signal(sent)
        first = f"{SAVING}\n" if work == "saving" else ""  # 0.2 seconds after the signal, when nothing else would end it
        assert process.communicate(timeout=120) == (out, f"{first}stopped{name}{said}; the same command goes on\n")
        assert process.returncode == status


def test_a_process_ends_before_a_scheduler_kills_it():
    """Kubernetes and Slurm kill a process 30 seconds after SIGTERM.

    A tenth of these is for the last line and the end of the process.
    """
    assert max(signals._GRACE.values()) <= 27


@pytest.mark.parametrize("status", [0, 1])
def test_a_command_that_finished_keeps_its_status_though_a_signal_came(status, capsys):
    def command():
        signal.raise_signal(signal.SIGTERM)
        return status

    assert guarded(command, "the same command does it again") == status
    assert capsys.readouterr().err == ""


def test_what_a_signal_interrupts_is_removed_at_its_end(tmp_path):
    ended = python("-W", "ignore", "-c", UNDONE, tmp_path / "out")
    assert (ended.returncode, ended.stderr) == (RESUME, "stopped by SIGTERM in the middle of a step; again\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sent, name, status", SENT)
def test_a_second_signal_ends_the_work_at_once(sent, name, status):
    with working("saving_for_long") as process:
        process.send_signal(sent)
        time.sleep(1)  # a signal that comes again within half a second counts as the same
        process.send_signal(sent)
        assert process.communicate(timeout=120) == ("", f"{SAVING}\nstopped{name}; the same command goes on\n")
        assert process.returncode == status


def test_a_thread_that_hears_the_signal_late_lets_the_line_be_printed():
    ended = python("-W", "ignore", "-c", WORKING, "starving")
    assert (ended.returncode, ended.stderr) == (RESUME, "stopped by SIGTERM; the same command goes on\n")


def test_a_signal_to_one_process_ends_all_of_them_after_the_same_step():
    address = f"localhost:{free_port()}"
    for status, out, error in at_once(["-W", "ignore", "-c", TOGETHER, address, number] for number in range(2)):
        assert "(solver.damping: 0 in process 0, 1 in process 1): start all of them with one command" in out and "mesh" not in out
        assert status == RESUME and "went on" not in out
        assert "stopped by SIGTERM; the same command goes on" in without_gloo(error)


def test_an_error_that_all_processes_have_is_told_by_the_first(monkeypatch, capsys):
    def refused():
        raise processes.SharedError("expected the same settings")

    assert guarded(refused, "again") == 2 and capsys.readouterr().err == "error: expected the same settings\n"
    monkeypatch.setattr(processes, "is_first", lambda: False)
    assert guarded(refused, "again") == 2 and capsys.readouterr().err == ""


def test_sigterm_of_a_forked_child_is_its_own():
    done = python("-W", "ignore", "-c", WORKING, "forking")
    assert (done.returncode, done.stdout, done.stderr) == (0, "SIGTERM\n", "")


@pytest.mark.parametrize("status, expected", [(None, 0), (1, 1)])
def test_the_status_is_that_of_the_command(status, expected):
    assert guarded(lambda: status, "again") == expected


@pytest.fixture
def unread(monkeypatch):
    """A standard output that nobody reads."""
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        yield stream


@pytest.fixture
def full(monkeypatch):
    """A standard output on a disk without room."""
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        yield stream


@pytest.mark.parametrize("stream, why", [("unread", "Broken pipe"), ("full", "No space left on device")])
def test_a_command_that_has_written_all_does_not_fail_by_its_output(stream, why, request, capfd):
    request.getfixturevalue(stream)

    def command():
        signals.ended(0)
        print("wrote out")

    assert guarded(command, "the same command does it again") == 0
    assert capfd.readouterr().err == f"all is written, but the output could not be printed: {why}\n"


def test_what_python_prints_at_its_end_does_not_fail_a_command_that_has_written_all():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", WORKING, "written"]
        done = subprocess.run(command, env=process_environment(), text=True, stdout=full, stderr=subprocess.PIPE, timeout=120)
    assert (done.returncode, done.stderr) == (0, "all is written, but the output could not be printed: No space left on device\n")


def test_a_result_that_finds_no_room_is_an_error(request, capfd):
    request.getfixturevalue("full")
    assert guarded(lambda: print("a result"), "the same command does it again") == 2
    assert "could not be written: No space left on device; the same command does it again" in only_error(capfd.readouterr().err)


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_a_help_text_that_nobody_reads_is_no_error_and_one_without_room_is_one_line(words, request, capfd):
    for stream, status in (("unread", 0), ("full", 2)):
        request.getfixturevalue(stream)
        try:
            assert cli.main(words) == status
        except SystemExit as exits:  # argparse's way
            assert (exits.code or 0) == status
        message = capfd.readouterr().err
        assert (not status and not message) or message == "error: the output could not be written: No space left on device\n"


@pytest.mark.parametrize("write", [lambda text: Console(file=sys.stdout).print(text), lambda text: print(text, flush=True)])
def test_an_output_that_nobody_reads_any_more_is_one_line(write, monkeypatch, capfd):
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w", closefd=False) as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert guarded(lambda: write("a line"), "the same command does it again") == 2
        os.dup2(os.open(os.devnull, os.O_WRONLY), writes)  # what is still to be written
    assert "error: nobody reads the output any more" in only_error(capfd.readouterr().err)


def test_ctrl_c_is_one_line(capsys):
    def stopped():
        raise KeyboardInterrupt

    assert guarded(stopped, "the same command does it again") == 130
    assert capsys.readouterr().err == "stopped; the same command does it again\n"


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, {"XLA_CLIENT_MEM_FRACTION": "0.9"}),
        ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_CLIENT_MEM_FRACTION": "0.5"}),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}),
    ],
)
def test_the_share_of_a_gpu_is_left_to_who_names_one(given, expected, monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    take_devices(RunConfig(model="a"))
    assert {name: value for name, value in os.environ.items() if name.endswith("CLIENT_MEM_FRACTION")} == expected
    os.environ.pop("XLA_CLIENT_MEM_FRACTION", None)


UNEVEN = """
import sys, time, jax, jax.numpy as jnp
from optima_tpu.runtime import xla_flags as collective_timeouts
from optima_tpu.runtime.command import take_devices
from optima_tpu.config.run_config import RunConfig

for name in collective_timeouts._CPU:
    collective_timeouts._CPU[name] = int(sys.argv[1])
take_devices(RunConfig(model="a", cpu_devices=2))

def late():
    index = jax.lax.axis_index("data")
    return jax.lax.psum(jax.pure_callback(lambda i: (time.sleep(2.5 * int(i)), i)[1], index, index), "data")

everywhere = jax.shard_map(late, mesh=jax.make_mesh((2,), ("data",)), in_specs=(), out_specs=jax.sharding.PartitionSpec())
print(jax.jit(everywhere)())
"""


@pytest.mark.parametrize("seconds, status, out", [pytest.param(60, 0, "1\n", marks=pytest.mark.slow), (1, -signal.SIGABRT, "")])
def test_devices_wait_for_one_that_is_late_as_long_as_they_are_told(seconds, status, out):
    environment = process_environment()
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", UNEVEN, str(seconds)], env=environment, text=True, capture_output=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (status, out), done.stderr


def test_a_file_that_may_not_be_read_is_one_line(capsys):
    def command():
        raise PermissionError(errno.EACCES, "Permission denied", "runs/a/run.json")

    assert guarded(command, "again") == 2
    assert capsys.readouterr().err == (
        "error: runs/a/run.json: Permission denied; expected files that this user may read and write\n"
    )


DIVIDED, WAITS = (
    "--xla_force_host_platform_device_count=2",
    ("--xla_cpu_collective_call_warn_stuck_timeout_seconds=3600 --xla_cpu_collective_call_terminate_timeout_seconds=86400"),
)


@pytest.mark.parametrize(
    "simulated, plugins, given, kept",
    [
        (1, ["xla_cuda12"], None, None),
        (None, [], None, None),
        (2, [], "flags.txt", "flags.txt"),
        (2, [], None, WAITS),
        (None, [], DIVIDED, f"{DIVIDED} {WAITS}"),
        (1, [], DIVIDED, DIVIDED),
        (
            2,
            [],
            "--xla_cpu_collective_call_warn_stuck_timeout_seconds=5",
            "--xla_cpu_collective_call_warn_stuck_timeout_seconds=5 --xla_cpu_collective_call_terminate_timeout_seconds=86400",
        ),
        (
            None,
            ["xla_cuda13"],
            "--xla_gpu_first_collective_call_warn_stuck_timeout_seconds=5 --xla_gpu_executable_terminate_timeout=6",
            "--xla_gpu_first_collective_call_warn_stuck_timeout_seconds=5 --xla_gpu_executable_terminate_timeout=6 "
            "--xla_gpu_executable_warn_stuck_timeout=3600 --xla_gpu_first_collective_call_terminate_timeout_seconds=86400",
        ),
    ],
)
def test_timeouts_are_raised_where_several_devices_are_in_one_process(simulated, plugins, given, kept, monkeypatch):
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [importlib.metadata.EntryPoint(name, "a", group) for name in plugins]
    )
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if given is not None:
        monkeypatch.setenv("XLA_FLAGS", given)
    raise_collective_timeouts(simulated)
    assert os.environ.get("XLA_FLAGS") == kept


def test_timeouts_are_raised_where_the_environment_divides_the_cpu(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    raise_collective_timeouts(None)
    assert os.environ["XLA_FLAGS"] == WAITS


@pytest.mark.parametrize("platform, given, kept", [("tpu", None, "mine/xla"), ("gpu", "elsewhere", "elsewhere")])
def test_programs_of_accelerators_are_kept(platform, given, kept, compilation_cache, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    jax.config.update("jax_compilation_cache_dir", given)
    take_devices(RunConfig(model="a"))
    assert jax.config.jax_compilation_cache_dir == kept


def test_programs_of_a_cpu_are_kept_for_this_kind_of_cpu_alone(compilation_cache, tmp_path, monkeypatch):
    folders = []
    for flags in ("sse avx2", "sse avx2 avx512f", "sse avx2"):
        listed = tmp_path / "cpuinfo"
        listed.write_text(f"processor\t: 0\nmodel name\t: X\ncpu MHz\t: {len(folders)}\nflags\t\t: {flags}\n")
        monkeypatch.setattr("optima_tpu.runtime.compiled._PROCESSORS", listed)
        jax.config.update("jax_compilation_cache_dir", None)
        take_devices(RunConfig(model="a"))
        folders.append(jax.config.jax_compilation_cache_dir)
    first, other, again = folders
    assert first.startswith("mine/xla/cpu-")
    assert first == again != other


def test_quickly_compiled_programs_of_a_cpu_are_kept_unless_the_user_set_a_limit(compilation_cache):
    for given, kept in ((1.0, 0.0), (0.5, 0.5)):
        jax.config.update("jax_compilation_cache_dir", None)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", given)
        take_devices(RunConfig(model="a"))
        assert jax.config.jax_persistent_cache_min_compile_time_secs == kept


def test_the_programs_that_were_not_read_for_longest_are_removed_where_all_take_too_much(
    compilation_cache, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPTIMA_TPU_CACHE", str(tmp_path))
    monkeypatch.setattr("optima_tpu.runtime.compiled._MOST", 250)
    files = [tmp_path / "xla" / name for name in ("cpu-other/old", "read", "cpu-other/new")]
    for age, path in zip((3, 1, 2), files):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - 9))
    for given, left in ((str(tmp_path / "xla"), files), (None, files[1:])):
        jax.config.update("jax_compilation_cache_dir", given)  # a folder that the user chose is left as it is
        take_devices(RunConfig(model="a"))
        assert [path for path in files if path.exists()] == left


@pytest.fixture
def compilation_cache(monkeypatch):
    """Restores jax's cache settings; the user's cache folder is ``mine``."""
    monkeypatch.setenv("OPTIMA_TPU_CACHE", "mine")
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
