"""Shows the progress of a run on the terminal."""

import time
from collections.abc import Callable, Iterable
from typing import Any, Self

import jax
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from optima_tpu.errors import legible
from optima_tpu.report.numbers import duration, hms, percent
from optima_tpu.report.records import LayerReport
from optima_tpu.report.summary import fitted_errors, sparsity
from optima_tpu.runtime.processes import check_signals

_QUIET = 60.0
"""Seconds after which a stage prints another line where no bar shows that it goes on, as in the log of a job."""


class Terminal(Console):
    """A console for texts from files and command lines: brackets are no markup, and control characters are visible escapes."""

    def render_str(self, text: str, **options: Any) -> Text:
        lines = (legible(line, len(line)) for line in text.split("\n"))
        return super().render_str("\n".join(lines), **options | {"markup": False, "emoji": False})


def say(console: Console, text: str) -> None:
    """Prints text unchanged: does not wrap or colour paths, and does not read brackets as markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def show(console: Console, table: Table) -> None:
    """Prints a table with all digits: full width into a file or a pipe, folded cells on a narrow terminal."""
    if not console.is_terminal:
        console.width = max(console.width, Measurement.get(console, console.options.update(max_width=1000), table).maximum)
    for column in table.columns:
        column.no_wrap, column.overflow = False, "fold"
    console.print(table, highlight=False)


class Progress:
    """Shows how far a run is. A run is a sequence of stages, a stage is a sequence of steps; a step of the walk is a block.

        with Progress() as progress:
            progress.stage("dense perplexity", total=31)
            ...                                             # progress.advance() after every step
            progress.stage("pruning", total=30)
            for index in range(first, 30):
                progress.block(index, 30)
                ...                                         # progress.layer(report) for every layer
                progress.advance()

    Prints one line for every stage and every finished block. On a terminal, a bar below these lines shows the step, the last
    layer and the time left in the stage; elsewhere a stage that prints nothing for a minute prints a line with its step and the
    time left. Only process 0 prints. Create it after the devices are initialised, because it asks JAX for the process index.

    The end of a step or a layer is also where SIGTERM and Ctrl-C end the run, in all processes at once: ``stage``, ``layer`` and
    ``advance`` call :func:`optima_tpu.runtime.processes.check_signals`. Every process therefore makes the same calls.

    Attributes:
      seconds: elapsed time of every finished stage, by name.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic):
        self.seconds: dict[str, float] = {}
        self._console = console or Terminal()
        self._clock = clock
        self._speaks = jax.process_index() == 0
        self._start = clock()
        self._stage: str | None = None
        self._block: int | None = None
        self._stage_start = self._first_end = self._block_start = self._said_at = self._start
        self._total = self._skipped = self._done = 0
        self._layers: list[LayerReport] = []
        self._bars = _Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            console=self._console,
            transient=True,
            disable=not (self._speaks and self._console.is_terminal),
        )
        self._task = self._bars.add_task("", total=None, visible=False, left="")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.end_stage()
        self._bars.stop()

    def stage(self, name: str, total: int) -> None:
        """Starts a stage of ``total`` steps and ends the previous stage."""
        self.end_stage()
        self._stage, self._stage_start = name, self._clock()
        self._total, self._skipped, self._done = total, 0, 0
        self._say(name)
        self._bars.reset(self._task, total=total, description=name, visible=True, left="")
        check_signals()

    def note(self, text: str) -> None:
        """Prints a line about something unusual."""
        self._say(text)

    def block(self, index: int, count: int) -> None:
        """Starts block ``index`` of ``count``, counted from 0. A resumed walk starts with a later block."""
        if self._done == 0:
            self._skipped = index
        self._total, self._block, self._block_start, self._layers = count, index, self._clock(), []
        self._bars.update(self._task, total=count, completed=index)

    def layer(self, report: LayerReport) -> None:
        """Shows a finished layer of the current block."""
        self._layers.append(report)
        self._bars.last_layer = f"block {report.block} {report.name}: {_outcome([report])}"
        check_signals()

    def advance(self) -> None:
        """Counts a finished step of the stage; in the walk, a block."""
        self._done += 1
        if self._done == 1:
            self._first_end = self._clock()
        left = self._left()
        self._bars.update(self._task, completed=self._skipped + self._done, left=left)
        if self._block is not None:
            parts = [_outcome(self._layers)] if self._layers else []
            parts += [f"{self._clock() - self._block_start:.1f} s", *([left] if left else [])]
            self._say(f"block {self._block} ({self._block + 1} of {self._total}): {', '.join(parts)}")
            self._block = None
        elif left and not self._console.is_terminal and self._clock() - self._said_at >= _QUIET:
            self._say(f"{self._done} of {self._total}, {left}")
        check_signals()

    def _left(self) -> str:
        """The time left in the stage, from the mean time of its steps after the first, in which its programs are compiled.

        Blocks that a resumed run skips do not count.
        """
        remaining, timed = self._total - self._skipped - self._done, self._done - 1
        if remaining <= 0 or not timed:
            return ""
        return f"about {duration((self._clock() - self._first_end) / timed * remaining)} left for {self._stage}"

    def end_stage(self) -> None:
        """Ends the current stage and records its elapsed time."""
        if self._stage is not None:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + self._clock() - self._stage_start
        self._stage = self._block = None
        self._bars.last_layer = ""
        self._bars.update(self._task, visible=False)

    def _say(self, text: str) -> None:
        self._said_at = self._clock()
        if self._speaks:
            say(self._console, f"{hms(self._said_at - self._start):>7}  {text}")


class _Bars(Bars):
    """A progress bar with a line about the last layer below it."""

    last_layer = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.last_layer, no_wrap=True, overflow="ellipsis")


def _outcome(layers: list[LayerReport]) -> str:
    before, after = fitted_errors(layers)
    return f"error {percent(before)} -> {percent(after)}, sparsity {percent(sparsity(layers))}"
