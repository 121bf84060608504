"""The command line of an evaluation: ``python -m optima_tpu.evaluate MODEL``."""

import logging
import os
import sys
from collections.abc import Sequence

from optima_tpu import processes
from optima_tpu.evaluate.config import parse
from optima_tpu.launch import guarded
from optima_tpu.sharding import simulate_devices


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status, as ``optima_tpu.launch`` does."""
    return guarded(lambda: _evaluate(sys.argv[1:] if argv is None else argv), "the same command does it again")


def _evaluate(argv: Sequence[str]) -> None:
    config = parse(argv)
    simulate_devices(config.cpu_devices)
    processes.start(config.coordinator, config.num_processes, config.process_id, config.join_timeout)
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when it is imported; our progress stands for the harness's
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # the harness's: a process that has devices is not to be forked
    # Only now: what these import asks for the devices.
    import datasets

    from optima_tpu.checkpoint import quiet_orbax
    from optima_tpu.evaluate.run import evaluate

    quiet_orbax()
    datasets.disable_progress_bars()
    for library in ("lm_eval", "huggingface_hub", "datasets"):  # of task files that go over others, and of every try to connect
        logging.getLogger(library).setLevel(logging.ERROR)
    evaluate(config)


if __name__ == "__main__":
    sys.exit(main())
