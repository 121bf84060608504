"""Measures what checksums cost a run, and how fast a finished run is verified.

    python -m benchmarks.checksums [--work FOLDER] -- --preset fast --calibration.windows 8 ...

Runs ``optima prune`` once with the settings after ``--``, and counts the CPU seconds of its threads while they compute checksums.
Prints the CPU seconds of the run as a ratio to those without its checksums. Then compares every file of the run directory with
its checksum, and reads the same files without doing so, in alternation; both read from the page cache.
"""

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from optima_tpu import launch
from optima_tpu.pipeline.repair import verified
from optima_tpu.runtime.files import files_in


class Clock:
    """Adds up the CPU seconds that threads spend inside a function."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **keywords: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **keywords)
            finally:
                self.seconds += time.thread_time() - start
                self.calls += 1

        return timed


def run_share(arguments: Sequence[str]) -> None:
    """Runs ``optima prune`` and prints the CPU seconds of its checksums."""
    clock = Clock()
    originals = hashlib.file_digest, hashlib.sha256
    hashlib.file_digest, hashlib.sha256 = map(clock.around, originals)  # type: ignore[assignment]
    start = time.process_time()
    try:
        if status := launch.main(list(arguments)):
            sys.exit(status)
    finally:
        hashlib.file_digest, hashlib.sha256 = originals
    total = time.process_time() - start
    print(f"run: {total:.1f} CPU s, of which checksums {clock.seconds:.2f} in {clock.calls} calls")
    print(f"ratio to a run without checksums: {total / (total - clock.seconds):.4f}")


def verify_speed(run: Path, repeats: int) -> None:
    """Prints how fast a run directory is verified, and how fast it is read."""
    size = sum(path.stat().st_size for path in files_in(run))
    best = {"verified": float("inf"), "read": float("inf")}
    for _ in range(repeats):
        for way, work in (("verified", lambda: verified(run)), ("read", lambda: read(run))):
            start = time.monotonic()
            work()
            best[way] = min(best[way], time.monotonic() - start)
    for way, seconds in best.items():
        print(f"{way}: {size / 1e9:.2f} GB in {seconds:.2f} s, {size / 1e9 / seconds:.2f} GB/s")


def read(run: Path) -> None:
    """Reads every file of a folder."""
    for path in files_in(run):
        with path.open("rb") as file:
            while file.read(1 << 20):
                pass


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checksums", description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, help="folder for the run, which stays there")
    parser.add_argument("--repeats", type=int, default=3, help="of the verification; the fastest counts")
    parser.add_argument("settings", nargs="*", help="settings of optima prune, after --")
    chosen = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        run = (chosen.work or Path(temporary)) / "run"
        run_share([*chosen.settings, "--output", str(run)])
        verify_speed(run, chosen.repeats)


if __name__ == "__main__":
    main()
