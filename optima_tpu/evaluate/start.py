"""Starts an evaluation and silences the libraries that it uses."""

import logging
import os
from typing import TYPE_CHECKING

from rich.console import Console

from optima_tpu.evaluate.config import EvaluateConfig
from optima_tpu.runtime import command


def run(config: EvaluateConfig) -> None:
    """Evaluates, as the command does."""
    command.take_devices(config)
    start(config)


if TYPE_CHECKING:
    from optima_tpu.report.evaluation import EvaluationRecord


def start(config: EvaluateConfig, console: Console | None = None) -> "EvaluationRecord":
    """Runs ``evaluate``. Call it after the devices are initialised."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it on import; our progress replaces the harness's bars
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # read by the harness: a process that holds devices must not fork
    # Imported here and not above, because these imports initialise the devices.
    import datasets

    from optima_tpu.evaluate.run import evaluate
    from optima_tpu.models.checkpoints.orbax import quiet_orbax

    quiet_orbax()
    datasets.disable_progress_bars()
    for library in ("lm_eval", "huggingface_hub", "datasets"):  # they warn of replaced task files and of every connection attempt
        logging.getLogger(library).setLevel(logging.ERROR)
    return evaluate(config, console)
