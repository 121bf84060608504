"""Compares the CPU seconds of a block in two checkouts, which run by turns.

    git worktree add ../before 671ae79
    taskset -c 0 python -m benchmarks.checkouts --before ../before --after . --variant="--preset fast" --variant="--preset best" -- \\
        --calibration.source file:c4.jsonl --calibration.windows 32 --calibration.length 512

Each run is a process of ``optima_tpu.launch`` of its checkout, on this machine. The CPU time of the process is read when it
prints the line of a block, and the process is ended behind the last block that counts. The first blocks of a run do not count:
they compile the programs.
"""

import argparse
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_BLOCK = re.compile(r"\bblock (\d+) \(")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkouts", description=__doc__.split("\n\n")[0])
    parser.add_argument("--before", type=Path, required=True, help="a folder of the program")
    parser.add_argument("--after", type=Path, required=True, help="another one")
    parser.add_argument("--variant", action="append", metavar="SETTINGS", help="settings of one run; may be given again")
    parser.add_argument("--skip", type=int, default=2, help="blocks that do not count")
    parser.add_argument("--blocks", type=int, default=4, help="blocks that count")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each")
    parser.add_argument("settings", nargs="*", help="further settings of optima_tpu.launch, after --")
    arguments = parser.parse_args(argv)
    folders = arguments.before.resolve(), arguments.after.resolve()
    for variant in arguments.variant or [""]:
        settings, ratios = [*shlex.split(variant), *arguments.settings], []
        for _ in range(arguments.repeats):
            before, after = (block_seconds(folder, settings, arguments.skip, arguments.blocks) for folder in folders)
            ratios.append(after / before)
            print(f"{variant}: {before:.2f} s a block before, {after:.2f} s after, {ratios[-1]:.2f} times", flush=True)
        print(f"{variant}: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}", flush=True)


def block_seconds(folder: Path, settings: Sequence[str], skip: int, blocks: int) -> float:
    """Returns the mean CPU seconds of a block by the code in ``folder``."""
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "optima_tpu.launch", *settings, "--output", str(Path(output) / "run")]
        # "safe": the folder that this is called in, where the texts are, may hold a third copy of the program.
        environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        at, printed = {-1: 0.0}, list[str]()
        try:
            for line in process.stdout:
                printed.append(line)
                if match := _BLOCK.search(line):
                    at[int(match[1])] = _cpu_seconds(process.pid)
                    if skip + blocks - 1 in at:
                        break
            else:
                sys.exit(f"the run of {folder} ended before block {skip + blocks - 1}:\n" + "".join(printed[-20:]))
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        return (at[skip + blocks - 1] - at[skip - 1]) / blocks


def _cpu_seconds(process: int) -> float:
    """User and system time of a process up to now."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
