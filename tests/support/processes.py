"""Processes of their own, alone and several of one run."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence

from tests.support import ROOT

CHILDREN = ROOT / "tests/support/children"
"""What the processes that tests start import first."""

# A process counts the bytes that it reads of the blocks, and may be killed while it works on one. Then comes the run.
COUNTING = """
import os, signal, sys
import numpy as np
from optima_tpu import launch
from optima_tpu.pipeline import walk as walks
from optima_tpu.models.decoder import Decoder

killed_at, *arguments = sys.argv[1:]
read_parts, walk, count = Decoder._read_parts, walks.prune_block, 0

def counted(decoder, name, *how):
    global count
    parts = read_parts(decoder, name, *how)
    count += sum(part.nbytes for part in parts.values())
    return parts

def killed(of, index, *rest):
    if index == int(killed_at):
        os.kill(os.getpid(), signal.SIGKILL)
    return walk(of, index, *rest)

Decoder._read_parts = counted
if killed_at:
    walks.prune_block = killed
"""
WATCHED = f"""{COUNTING}
status = launch.main(arguments)
print("bytes read:", count)
sys.exit(status)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def without_gloo(printed: str) -> list[str]:
    """Returns the lines of a process without those of gloo.

    Threads of gloo print their lines in pieces, between each other's.
    """
    pieces = r"\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : "
    return [line for line in re.sub(pieces, "", printed).splitlines() if line.strip("0123456789 ")]


def process_environment() -> dict[str, str]:
    """The environment of CPU processes: imports as here, but no torch."""
    path = [str(CHILDREN), str(ROOT), *sys.path]
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(path)}


@contextlib.contextmanager
def hearing_ctrl_c() -> Iterator[None]:
    """Lets processes that start meanwhile receive SIGINT.

    They would ignore SIGINT if this process does, as in the background of a shell.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def python(*arguments, **environment: str) -> subprocess.CompletedProcess:
    """Runs Python with its output piped; ``environment`` is added to ours."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=process_environment() | environment,
        text=True,
        capture_output=True,
        timeout=300,
    )


def at_once(commands: Iterable[Sequence], **environment: str) -> list[tuple[int, str, str]]:
    """Runs Python processes at once: (exit status, stdout, stderr) of each."""
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=process_environment() | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for command in commands
    ]
    outputs = [process.communicate(timeout=300) for process in started]
    return [(process.returncode, *output) for process, output in zip(started, outputs)]


def several(
    arguments: list[str], *, killed_at: str = "", own: tuple[tuple[str, ...], ...] = ((), ())
) -> list[tuple[int, str, str]]:
    """Runs the command in two processes of four devices.

    Args:
      killed_at: block before which the second process is killed.
      own: further arguments of each process.

    Returns:
      (exit status, stdout, stderr) of each.
    """
    start = ["--cpu-devices", "4", "--coordinator", f"localhost:{free_port()}", "--num-processes", str(len(own))]
    return at_once(
        ["-c", WATCHED, killed_at if number == 1 else "", *arguments, *start, "--process-id", number, *more]
        for number, more in enumerate(own)
    )
