"""A whole Wanda + cg run against a Wanda run that keeps the selector's weights, each in a process of its own.

    python -m benchmarks.whole_run
    python -m benchmarks.whole_run --repeats 3 -- --calibration.source c4 --mesh 2x1

Takes further settings of ``optima_tpu.launch`` after ``--``. Runs alternate; times are medians and ratios those of medians.
"pruning" is that stage of the run: calibration, masks, solver, the pruned block's outputs, the journal, and what compiles.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from optima_tpu.config import EMBEDDED

SOLVERS = ("null", "cg")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whole_run", description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens in each")
    parser.add_argument("--windows", type=int, default=40, help="on which perplexity is measured")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each")
    parser.add_argument("settings", nargs="*", help="further settings of optima_tpu.launch, after --")
    arguments = parser.parse_args(argv)
    command = [sys.executable, "-m", "optima_tpu.launch", "--model", EMBEDDED.model, "--calibration.source",
               EMBEDDED.calibration.source, "--calibration.samples", str(arguments.samples), "--calibration.length",
               str(arguments.length), "--evaluation.windows", str(arguments.windows), *arguments.settings]
    found: dict[str, list[dict[str, float]]] = {solver: [] for solver in SOLVERS}
    for _ in range(arguments.repeats):
        for solver in SOLVERS:
            found[solver].append(timed([*command, "--solver", solver]))
            print(solver, found[solver][-1], f"load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    print(f"{' '.join(command[1:])}, medians of {arguments.repeats}.\n")
    print("| stage | Wanda, s | Wanda + cg, s | ratio |\n|---|---|---|---|")
    for stage in found["null"][0]:
        wanda, both = (statistics.median(run[stage] for run in found[solver]) for solver in SOLVERS)
        print(f"| {stage} | {wanda:.1f} | {both:.1f} | {both / wanda:.2f} |")


def timed(command: list[str]) -> dict[str, float]:
    """Seconds by stage of a run into a folder of its own, and of the whole process."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        subprocess.run([*command, "--output", folder], check=True, stdout=subprocess.DEVNULL)
        whole = time.perf_counter() - started
        with open(os.path.join(folder, "report.json"), encoding="utf-8") as file:
            return json.load(file)["seconds"] | {"whole process": whole}


if __name__ == "__main__":
    main()
