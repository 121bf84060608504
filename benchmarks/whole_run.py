"""Times whole runs: by default Wanda alone, and Wanda with ``cg``.

    python -m benchmarks.whole_run
    python -m benchmarks.whole_run --repeats 3 -- --calibration.source c4 --mesh 2x1
    python -m benchmarks.whole_run --variant="--preset fast" --variant="--preset best" -- --pattern 0.5/row

Each run has its own process. Takes further settings of ``optima_tpu.launch`` after ``--``. Runs alternate; times are medians
and ratios are ratios of medians. "pruning" is a stage of the run: calibration, masks, solver, the pruned block's outputs, the
journal, and all compilation.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from optima_tpu.config.run_config import EMBEDDED

VARIANTS = ("--solver null", "--preset fast")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.whole_run",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--windows", type=int, default=32, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens in each")
    parser.add_argument("--measured", type=int, default=40, help="windows for measuring perplexity")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each")
    parser.add_argument(
        "--variant",
        action="append",
        metavar="SETTINGS",
        help=f"settings of one run; ratios are relative to the first variant (default: {' and '.join(VARIANTS)})",
    )
    parser.add_argument("settings", nargs="*", help="further settings of optima_tpu.launch, after --")
    arguments = parser.parse_args(argv)
    command = [
        sys.executable,
        "-m",
        "optima_tpu.launch",
        "--model",
        EMBEDDED.model,
        "--calibration.source",
        EMBEDDED.calibration.source,
        "--calibration.windows",
        str(arguments.windows),
        "--calibration.length",
        str(arguments.length),
        "--evaluation.windows",
        str(arguments.measured),
        *arguments.settings,
    ]
    variants = arguments.variant or VARIANTS
    runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for _ in range(arguments.repeats):
        for variant in variants:
            runs[variant].append(timed([*command, *shlex.split(variant)]))
            print(variant, runs[variant][-1], f"load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    print(f"{' '.join(command[1:])}, medians of {arguments.repeats}.\n")
    print("| stage |", *(f"{variant}, s |" for variant in variants), *(f"{variant}, ratio |" for variant in variants[1:]))
    print("|---" * 2 * len(variants) + "|")
    for stage in runs[variants[0]][0]:
        medians = [statistics.median(run[stage] for run in runs[variant]) for variant in variants]
        print(f"| {stage} |", *(f"{value:.1f} |" for value in medians), *(f"{value / medians[0]:.2f} |" for value in medians[1:]))


def timed(command: list[str]) -> dict[str, float]:
    """Returns the elapsed seconds of a run's stages and of its process."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        subprocess.run([*command, "--output", folder], check=True, stdout=subprocess.DEVNULL)
        elapsed = time.perf_counter() - started
        with open(os.path.join(folder, "report.json"), encoding="utf-8") as file:
            return json.load(file)["seconds"] | {"whole process": elapsed}


if __name__ == "__main__":
    main()
