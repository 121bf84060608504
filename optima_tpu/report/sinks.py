"""The records of layers, sent elsewhere too while a run goes on: TensorBoard, Weights & Biases.

A sink gets a step for every block and one for the perplexities. It begins anew with every start of the command and is given the
blocks that the journal holds first, so that a run that was stopped has every block in it once.
"""

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

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


class Sink(Protocol):
    """Somewhere that takes numbers by their names, step after step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the values of a step; steps come in order, each once."""

    def close(self) -> None:
        """Whatever was written is on the disk or sent."""


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
    """A run of Weights & Biases, the same one when this run goes on. ``WANDB_MODE=offline`` keeps it on the disk."""

    def __init__(self, project: str, directory: Path, configuration: Mapping[str, Any]):
        import wandb

        folder = directory / "wandb"
        if folder.exists():  # of an earlier start; all of its steps come again
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        # The place alone would be that of any run that was there before.
        which = f"{directory.resolve()}\n{json.dumps(read_run(directory)['manifest'], sort_keys=True)}"
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
                f"Weights & Biases does not start: {one_line(error)} Log in by 'wandb login', or set WANDB_MODE=offline"
            ) from None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._run.step:  # a run that went on has the others already
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def check_sinks(sinks: Sinks) -> None:
    """Raises UserError where a sink's package is not installed."""
    for name, package in _PACKAGES.items():
        if not getattr(sinks, name):
            continue
        spec = find_spec(package)
        if spec is None or spec.origin is None:  # a mere folder called wandb in the working directory has no file
            raise UserError(
                f"expected the package {package} for sinks.{name}, it is not installed: pip install 'optima-tpu[{name}]'"
            )


@contextlib.contextmanager
def opened(sinks: Sinks, directory: Path, configuration: Mapping[str, Any]) -> Iterator[tuple[Sink, ...]]:
    """The sinks that a run was asked to write to. Every process calls it, only process 0 has any.

    Args:
      directory: of the run; files of sinks are in folders of it.
      configuration: told to those that keep it.

    Raises:
      UserError: one of them does not start.
    """
    with contextlib.ExitStack() as stack:

        def start() -> tuple[Sink, ...]:
            chosen: list[Sink] = []
            if sinks.tensorboard:
                chosen.append(stack.enter_context(contextlib.closing(TensorBoard(directory / "tensorboard"))))
            if sinks.wandb:
                chosen.append(stack.enter_context(contextlib.closing(WeightsAndBiases(sinks.wandb, directory, configuration))))
            return tuple(chosen)

        yield together(lambda: start() if is_first() else ())


class FinishedBlocks(Protocol):
    """What knows the finished blocks of a run: its journal."""

    @property
    def finished(self) -> Collection[int]: ...

    def report(self, index: int) -> Mapping[str, Any]:
        """The record of a finished block."""


class Steps:
    """Sends the finished blocks of a journal to sinks, in order, each once."""

    def __init__(self, sinks: Sequence[Sink], journal: FinishedBlocks):
        self._sinks, self._journal, self._next = sinks, journal, 0

    def follow(self) -> None:
        """Sends what was finished since the last call, up to the first block that is not."""
        while self._sinks and self._next in self._journal.finished:
            write_block(self._sinks, BlockReport.from_json(self._journal.report(self._next)))
            self._next += 1


def write_block(sinks: Iterable[Sink], block: BlockReport) -> None:
    """A step: what happened to every layer of a block, as "error_after/self_attn.q_proj". What is not finite is left out."""
    values: dict[str, float | None] = {"seconds": block.seconds}
    for layer in block.layers:
        values |= {f"{measure}/{layer.name}": getattr(layer, measure) for measure in _MEASURES}
        values[f"rows_not_converged/{layer.name}"] = layer.rows - layer.rows_converged
    write(sinks, block.index, values)


def write(sinks: Iterable[Sink], step: int, values: Mapping[str, float | None]) -> None:
    """A step, without what is not a finite number."""
    finite = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
    for sink in sinks:
        sink.write(step, finite)
