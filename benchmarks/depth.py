"""Measures peak memory and compilations of runs over the number of blocks.

    python -m benchmarks.depth [FOLDER]

Neither may grow with the number of blocks.

Creates random Llamas of 4, 8 and 16 equal blocks (3.1 million parameters each, float32) and prunes each model in its own process
on 8 simulated CPU devices. Prints for each:

- the peak of the process's resident set, which includes the devices' memory and pages of the mapped checkpoint
- the largest resident set without files, sampled after every layer
- the most bytes of arrays on the devices, sampled after every layer
- the number of compiled programs

Linux only.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SETTINGS = [
    "--preset",
    "fast",
    "--mesh",
    "4x2",
    "--cpu-devices",
    "8",
    "--export",
    "false",
    "--calibration.source",
    "random",
    "--calibration.windows",
    "16",
    "--calibration.length",
    "256",
    "--evaluation.source",
    "random",
    "--evaluation.windows",
    "8",
]


def measure(model: Path, out: Path) -> None:
    """Prunes a model here and prints its memory and compilations as JSON."""
    import jax

    from optima_tpu import launch
    from optima_tpu.report.progress import Progress

    compiled, most, own, layer = [0], [0], [0], Progress.layer

    def heard(event, seconds, **more):
        compiled[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(heard)

    def counted(progress, report):
        device_bytes = sum(shard.data.nbytes for array in jax.live_arrays() for shard in array.addressable_shards)
        most[0] = max(most[0], device_bytes)
        own[0] = max(own[0], int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
        layer(progress, report)

    Progress.layer = counted
    assert launch.main(["--model", str(model), "--output", str(out), *SETTINGS]) == 0
    report = json.loads((out / "report.json").read_bytes())
    print(json.dumps({"host": report["memory"]["host_peak"], "own": own[0], "arrays": most[0], "compilations": compiled[0]}))


def main(folder: Path) -> None:
    from tests.support.tiny_models import tiny_folder

    print("blocks  peak of the process, MiB  without files, MiB  arrays on the devices, MiB  programs compiled")
    for blocks in (4, 8, 16):
        model = tiny_folder(
            folder / f"model{blocks}",
            hidden_size=512,
            intermediate_size=1536,
            num_attention_heads=8,
            num_key_value_heads=4,
            num_hidden_layers=blocks,
            max_position_embeddings=512,
        )
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.depth", str(model), str(folder / f"run{blocks}")],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        measured = json.loads(done.stdout.splitlines()[-1])
        sizes = [measured[key] / 2**20 for key in ("host", "own", "arrays")]
        print("{:>6}  {:>24.0f}  {:>18.0f}  {:>26.1f}".format(blocks, *sizes), f"{measured['compilations']:>18}", flush=True)


if __name__ == "__main__":
    if "-h" in sys.argv or "--help" in sys.argv:
        print(__doc__)
    elif len(sys.argv) == 3:
        measure(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(sys.argv[1] if len(sys.argv) == 2 else temporary))
