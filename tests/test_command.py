"""How a command ends, and what it takes of the machine."""

import os
import signal
import subprocess
import sys

import jax
import pytest

from optima_tpu.command import RESUME, guarded, take_devices
from optima_tpu.config import RunConfig
from tests.test_processes import process_environment

# A loop on the device that never ends, in which Python hears no signal; and a save that takes longer than the grace.
WORKING = """
import os, signal, sys, threading, time, jax
from optima_tpu import command
from optima_tpu.files import uninterrupted

command._GRACE = 0.2

def devices():
    program = jax.jit(lambda x: jax.lax.while_loop(lambda x: x > 0, lambda x: 1 + jax.numpy.sin(x) ** 2, x)).lower(1.0).compile()
    threading.Timer(0.5, lambda: print("working", flush=True)).start()
    jax.block_until_ready(program(1.0))

def saving():
    with uninterrupted():
        print("working", flush=True)
        time.sleep(3)
        print("saved", flush=True)

def forking():
    if not (child := os.fork()):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    print(signal.Signals(os.WTERMSIG(os.waitpid(child, 0)[1])).name, flush=True)
    time.sleep(5 * command._GRACE)

sys.exit(command.guarded(globals()[sys.argv[1]], "the same command goes on"))
"""


@pytest.mark.parametrize("work, out, said", [
    ("devices", "", "stopped by SIGTERM while the devices worked; the same command goes on"),
    ("saving", "saved\n", "stopped by SIGTERM; the same command goes on")])
def test_sigterm_is_heard_while_the_devices_work_and_waits_for_a_save(work, out, said):
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", WORKING, work], env=process_environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=120) == (out, said + "\n")
        assert process.returncode == RESUME
    finally:
        process.kill()


def test_sigterm_of_a_forked_child_is_its_own():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", WORKING, "forking"], env=process_environment(), text=True,
                          capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "SIGTERM\n", "")


@pytest.mark.parametrize("status, found", [(None, 0), (1, 1)])
def test_the_status_is_that_of_the_command(status, found):
    assert guarded(lambda: status, "again") == found


def test_ctrl_c_is_one_line(capsys):
    def stopped():
        raise KeyboardInterrupt

    assert guarded(stopped, "the same command does it again") == 130
    assert capsys.readouterr().err == "stopped; the same command does it again\n"


@pytest.mark.parametrize("given, found", [
    ({}, {"XLA_CLIENT_MEM_FRACTION": "0.9"}), ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_CLIENT_MEM_FRACTION": "0.5"}),
    ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"})])
def test_the_share_of_a_gpu_is_left_to_who_names_one(given, found, monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    take_devices(RunConfig(model="a"))
    assert {name: value for name, value in os.environ.items() if name.endswith("CLIENT_MEM_FRACTION")} == found
    os.environ.pop("XLA_CLIENT_MEM_FRACTION", None)


@pytest.mark.parametrize("platform, given, kept", [
    ("tpu", None, "mine/xla"), ("gpu", "elsewhere", "elsewhere"), ("cpu", None, None)])
def test_programs_of_accelerators_are_kept(platform, given, kept, monkeypatch):
    monkeypatch.setenv("OPTIMA_TPU_CACHE", "mine")
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", given)
    try:
        take_devices(RunConfig(model="a"))
        assert jax.config.jax_compilation_cache_dir == kept
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
