"""Sends records of layers to TensorBoard or Weights & Biases during a run.

A sink gets one step for every block and one for the perplexities. Every start of the command starts the sink again, and sends the
blocks in the journal first. So a sink has every block of a resumed run exactly once.
"""

import contextlib
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from optima_tpu.config.run_config import Sinks
from optima_tpu.errors import UserError, one_line
from optima_tpu.report.records import BlockReport
from optima_tpu.report.run_record import read_run
from optima_tpu.runtime.processes import is_first, together

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
_MEASURES = (
    "error_before",
    "error_after",
    "held_out_before",
    "held_out_after",
    "sparsity",
    "gap_median",
    "gap_max",
    "steps_median",
    "steps_max",
    "rows_refused",
)


class TensorBoard:
    """Event files in a folder, written without TensorFlow."""

    def __init__(self, folder: Path):
        from tensorboardX import SummaryWriter

        if folder.exists():
            shutil.rmtree(folder)
        self._writer = SummaryWriter(str(folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which a resumed run continues.

    ``WANDB_MODE=offline`` keeps the run on the disk.
    """

    def __init__(self, project: str, directory: Path, configuration: Mapping[str, Any]):
        import wandb

        folder = directory / "wandb"
        if folder.exists():  # files of an earlier start; all of its steps are written again
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        # The id includes the manifest, because another run may have used the same directory before.
        which = f"{directory.resolve()}\n{json.dumps(read_run(directory).manifest, sort_keys=True)}"
        try:
            self._run = wandb.init(
                project=project,
                name=directory.name,
                id=hashlib.sha256(which.encode()).hexdigest()[:16],
                dir=str(directory),
                config=dict(configuration),
                resume="allow",
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise UserError(
                f"Weights & Biases does not start: {one_line(error)} Log in with 'wandb login', or set WANDB_MODE=offline"
            ) from None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._run.step:  # a resumed run has the earlier steps already
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


Sink = TensorBoard | WeightsAndBiases
"""Takes named numbers, each step once and in ascending order."""


def check_sinks(sinks: Sinks) -> None:
    """Raises UserError if a sink's package is not installed."""
    for name, package in _PACKAGES.items():
        if not getattr(sinks, name):
            continue
        spec = find_spec(package)
        if spec is None or spec.origin is None:  # a plain folder named wandb in the working directory has no origin
            raise UserError(
                f"expected the package {package} for sinks.{name}, but it is not installed: pip install '.[{name}]' "
                "in the directory of the repository"
            )


@contextlib.contextmanager
def _closing(name: str, sink: Sink) -> Iterator[Sink]:
    """Closes a sink at the end, and prints an error instead of raising it.

    The run is finished then, and its directory has the records.
    """
    try:
        yield sink
    finally:
        try:
            sink.close()
        except Exception as error:  # whatever the sink's library raises, such as of a network that is gone
            print(f"\nsinks.{name} may lack the last records: {one_line(error)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def open_sinks(sinks: Sinks, directory: Path, configuration: Mapping[str, Any]) -> Iterator[tuple[Sink, ...]]:
    """Opens a run's sinks, for process 0 alone. Every process must call it.

    Args:
      directory: the run directory; each sink writes to its own folder in it.
      configuration: settings of the run, for sinks that store them.

    Raises:
      UserError: a sink does not start.
    """
    with contextlib.ExitStack() as stack:

        def start() -> tuple[Sink, ...]:
            chosen: list[Sink] = []
            if sinks.tensorboard:
                chosen.append(stack.enter_context(_closing("tensorboard", TensorBoard(directory / "tensorboard"))))
            if sinks.wandb:
                chosen.append(stack.enter_context(_closing("wandb", WeightsAndBiases(sinks.wandb, directory, configuration))))
            return tuple(chosen)

        yield together(lambda: start() if is_first() else ())


class Steps:
    """Sends the finished blocks of a journal to sinks, each once and in order.

    Args:
      finished: the indices of the finished blocks; the journal adds to them.
      report: the record of a finished block.
    """

    def __init__(self, sinks: Sequence[Sink], finished: Collection[int], report: Callable[[int], BlockReport]):
        self._sinks, self._finished, self._report, self._next = sinks, finished, report, 0

    def follow(self) -> None:
        """Sends the newly finished blocks, up to the first unfinished block.

        A block is a step with the measures of every layer, such as "error_after/self_attn.q_proj".
        """
        while self._sinks and self._next in self._finished:
            block = self._report(self._next)
            values: dict[str, float | None] = {"seconds": block.seconds}
            for layer in block.layers:
                values |= {f"{measure}/{layer.name}": getattr(layer, measure) for measure in _MEASURES}
                values[f"rows_not_converged/{layer.name}"] = layer.rows - layer.rows_converged
            self.write(block.index, values)
            self._next += 1

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Sends a step; values that are None or not finite are left out."""
        finite = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        for sink in self._sinks:
            sink.write(step, finite)
