"""The command line of an evaluation: ``python -m optima_tpu.evaluate MODEL``."""

import logging
import os
import sys
from collections.abc import Sequence

from optima_tpu.evaluate.config import parse
from optima_tpu.runtime.command import guarded, take_devices


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status, see :func:`guarded`."""
    return guarded(lambda: _evaluate(sys.argv[1:] if argv is None else argv), "the same command does it again")


def _evaluate(argv: Sequence[str]) -> None:
    config = parse(argv)
    take_devices(config)
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when it is imported; our progress stands for the harness's
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # the harness's: a process that has devices is not to be forked
    # Only now: what these import asks for the devices.
    import datasets

    from optima_tpu.evaluate.run import evaluate
    from optima_tpu.models.checkpoints.orbax import quiet_orbax

    quiet_orbax()
    datasets.disable_progress_bars()
    for library in ("lm_eval", "huggingface_hub", "datasets"):  # of task files that go over others, and of every try to connect
        logging.getLogger(library).setLevel(logging.ERROR)
    evaluate(config)


if __name__ == "__main__":
    sys.exit(main())
