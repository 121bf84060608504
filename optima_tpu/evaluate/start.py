"""An evaluation with the libraries below it kept quiet."""

import logging
import os
from typing import Any

from rich.console import Console

from optima_tpu.evaluate.config import EvaluateConfig


def start(config: EvaluateConfig, console: Console | None = None) -> dict[str, Any]:
    """Measures as :func:`optima_tpu.evaluate.run.evaluate`, to be called once the devices are taken."""
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
    return evaluate(config, console)
