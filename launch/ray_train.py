"""Starts one run on a Ray cluster, a process for each TPU host or GPU.

Ray's JaxTrainer starts and joins the processes, and each of them calls optima_tpu.launch.

    python launch/ray_train.py --tpu 4x4 --accelerator TPU-V6E --workers 4 -- --model meta-llama/Llama-3.1-8B --output gs://BUCKET/run
    python launch/ray_train.py --gpu --workers 8 -- --model meta-llama/Llama-3.1-8B --mesh 4x2 --output /shared/run
    python launch/ray_train.py --workers 2 -- --model ./tiny --output /tmp/run          CPU devices, to try it

Needs: ray[train] 2.60 or newer (pip install "ray[train]") and this package on all nodes, with its extra tpu or gpu, and gcs for a
bucket; an --output that every node can access, as a whole path or gs://BUCKET/FOLDER. Behind -- come the arguments of
optima_tpu.launch. Ray replaces lost nodes and starts the processes again, as often as --restarts allows: the run goes on after
its last finished block. An error that you must correct (exit status 2) ends the job at once. Exit status: the run's.
"""

import argparse
import os
import sys
from typing import Any

AGAIN = (1, 69, 75)
"""Statuses of a run after which Ray starts the processes again: a fault, a lost process, SIGTERM."""


def prune(config: dict[str, Any]) -> int:
    """Runs optima_tpu.launch in one process. Ray has joined the processes."""
    from optima_tpu.launch import main

    status = main(config["arguments"])
    if status in AGAIN:
        raise RuntimeError(f"the run ended with status {status}; started again, it goes on after its last finished block")
    return status


def parser() -> argparse.ArgumentParser:
    command_line = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], usage="%(prog)s [options] -- [settings of a run]"
    )
    command_line.add_argument("--workers", type=int, default=1, help="processes: TPU hosts, or GPUs")
    command_line.add_argument("--tpu", metavar="TOPOLOGY", help="a TPU slice, such as 4x4")
    command_line.add_argument("--accelerator", help="Ray's name of the chips, such as TPU-V6E; needed with --tpu")
    command_line.add_argument("--chips", type=int, default=4, help="chips of a TPU host")
    command_line.add_argument("--gpu", action="store_true", help="one GPU in each process")
    command_line.add_argument("--restarts", type=int, default=-1, help="restarts after lost nodes and faults; -1: without limit")
    command_line.add_argument("--name", default="optima", help="of the job")
    command_line.add_argument("arguments", nargs="*", help="settings of the run, behind --")
    return command_line


def trainer(options: argparse.Namespace) -> Any:
    """The JaxTrainer of the options."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.jax import JaxConfig, JaxTrainer

    platform = "tpu" if options.tpu else "cuda" if options.gpu else "cpu"
    scaling = {"num_workers": options.workers, "use_gpu": options.gpu}
    if options.tpu:
        scaling |= {"use_tpu": True, "topology": options.tpu, "accelerator_type": options.accelerator}
        scaling["resources_per_worker"] = {"TPU": options.chips}
    return JaxTrainer(
        prune,
        train_loop_config={"arguments": options.arguments},
        # Without a kind of accelerator Ray joins no processes, also of CPU devices.
        jax_config=JaxConfig(use_tpu=not options.gpu, use_gpu=options.gpu),
        scaling_config=ScalingConfig(**scaling),
        run_config=RunConfig(
            name=options.name,
            failure_config=FailureConfig(max_failures=options.restarts),
            worker_runtime_env={"env_vars": {"JAX_PLATFORMS": platform}},
        ),
    )


def main() -> int:
    options = parser().parse_args()
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    import ray

    ray.init()
    return int(trainer(options).fit().return_value or 0)


if __name__ == "__main__":
    sys.exit(main())
