"""Shows the progress of a run on the terminal."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import jax
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from optima_tpu.errors import legible, plural
from optima_tpu.report.layer_means import aimed_at_dense, mean, sparsity
from optima_tpu.report.numbers import duration, hms, percent
from optima_tpu.report.pace import Pace, Remaining, Step, remaining
from optima_tpu.report.records import LayerReport
from optima_tpu.runtime.processes import check_signals

_QUIET, _QUIETEST = 10.0, 60.0
"""Seconds after which a stage prints another line where no bar shows that it goes on, as in the log of a job. They double with
every such line of the stage, up to the second number: who looks on soon knows that it moves, and a long log stays short."""

_SHORT = 0.5
"""Seconds below which nothing is said of the time left."""
_SHORT_STAGES = 60.0
"""The same of the time left of a run that leaves out short stages: of a tiny model they take longer than what is counted."""


class Terminal(Console):
    """A console for texts from files and command lines.

    Brackets are no markup, and control characters become visible escapes.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        lines = (legible(line, len(line)) for line in text.split("\n"))
        return super().render_str("\n".join(lines), **options | {"markup": False, "emoji": False})


def say(console: Console, text: str) -> None:
    """Prints text unchanged: no wrapping, no colour for paths, no markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def plain_table(head: Iterable[str], rows: Iterable[Sequence[str]], names: int = 1, words: bool = False, gap: int = 2) -> Table:
    """A table without lines.

    Args:
      names: the number of cells at the start of a row that name it. They stand at the left, the numbers behind them at the right.
      words: the other cells are words, not numbers.
      gap: how far columns are apart.
    """
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    for index, name in enumerate(head):
        number = not words and index >= names
        table.add_column(name, justify="right" if number else "left", vertical="top" if words else "bottom", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def show(console: Console, table: Table) -> None:
    """Prints a table with all digits.

    A file or a pipe gets the full width. On a narrow terminal cells are folded.
    """
    if not console.is_terminal:
        console.width = max(console.width, Measurement.get(console, console.options.update(max_width=1000), table).maximum)
    for column in table.columns:
        column.no_wrap, column.overflow = False, "fold"
    console.print(table, highlight=False)


class Progress:
    """Shows how far a run is.

    A run is a sequence of stages, and a stage is a sequence of steps. A step of the walk is a block.

        with Progress() as progress:
            progress.stage("dense perplexity", total=31)
            ...                                             # progress.advance() after every step
            progress.stage("pruning", total=30)
            for index in range(first, 30):
                progress.block(index, 30)
                ...                                         # progress.begin() before each part, progress.layer() behind each
                layer progress.advance()

    Prints one line for every stage and every finished block. On a terminal, a bar below these lines shows the step, what is being
    done, and the time left of the stage and of the run. Elsewhere a stage that prints nothing for ten seconds prints a line with
    the same, in the middle of a step too; then after 20 and 40 seconds, and every minute. Only process 0 prints. Create it after
    the devices are initialised, because it asks JAX for the process index.

    All estimates come from one :class:`Pace`, which lasts as long as the run: a stage whose steps are of a kind that an earlier
    stage measured has a time left before it begins.

    The end of a step or a layer is also where SIGTERM and Ctrl-C end the run, in all processes at once: ``stage``, ``layer`` and
    ``advance`` call :func:`optima_tpu.runtime.processes.check_signals`. Every process therefore makes the same calls.

    Attributes:
      seconds: elapsed time of every finished stage, by name.
      ahead: the steps of every stage that comes after the one that goes on; empty if there is none, or if the caller set none.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic):
        self.seconds: dict[str, float] = {}
        self.ahead: Sequence[Sequence[Step]] = ()
        self._console = console or Terminal()
        self._clock = clock
        self._speaks = jax.process_index() == 0
        self._pace, self._steps, self._part, self._counted = Pace(), list[Step](), "", ""
        self._stage: str | None = None
        self._block: int | None = None
        self._start = self._stage_start = self._step_start = self._block_start = self._said_at = clock()
        self._total = self._done = 0
        self._quiet = _QUIET
        self._activity = self._last_layer = ""
        self._layers: list[LayerReport] = []
        self._shown = self._speaks and self._console.is_terminal
        self._bars = _Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            _Times(self._stage_times),
            console=self._console,
            transient=True,
            refresh_per_second=2,  # every time the time left is estimated again
            disable=not self._shown,
        )
        self._bars.below = self._below
        self._task = self._bars.add_task("", total=None, visible=False)
        self._watching, self._ended = self._speaks and not self._shown, threading.Event()

    def __enter__(self) -> Self:
        self._bars.start()
        if self._watching:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self.end_stage()
        self._bars.stop()

    def stage(self, name: str, total: int, steps: Sequence[Step] | None = None, counted: str = "", done: int = 0) -> None:
        """Starts a stage of ``total`` steps and ends the previous stage.

        Args:
          done: how many of the ``total`` steps an earlier start of the run did; ``steps`` leaves these steps out.
          steps: the steps in their order, or their parts where :meth:`begin` tells them apart; None for steps of one kind, which
            no other stage has.
          counted: the kind of the ``total`` steps where the stage has other steps beside them; empty if it has none.
        """
        self.end_stage()
        self._stage, self._stage_start = name, self._clock()
        self._step_start, self._part, self._quiet = self._stage_start, "", _QUIET
        self._steps = [Step(name)] * total if steps is None else list(steps)
        self._total, self._done, self._counted = total, done, counted
        left, words = self._remaining(), [name]
        if left.stage is not None and left.stage >= _SHORT:
            words += [f"about {duration(left.stage)}", *_of_run(left)]
        self._say(", ".join(words))
        self._bars.reset(self._task, total=total, completed=done, description=name, visible=True)
        check_signals()

    def note(self, text: str) -> None:
        """Prints a line about something unusual."""
        self._say(text)

    def block(self, index: int, count: int) -> None:
        """Starts block ``index`` of ``count``, counted from 0.

        The first block of a resumed walk has a larger index.
        """
        if self._steps and self._pace.is_new(self._steps[0].kind):
            self._say(
                f"block {index} ({index + 1} of {count}): its programs are compiled first, or read from an earlier run; blocks "
                "like it reuse them"
            )
        self._done, self._total, self._block, self._block_start, self._layers = index, count, index, self._clock(), []
        self._bars.update(self._task, total=count, completed=index)

    def begin(self, kind: str, words: str) -> None:
        """Starts a part of a step, and ends the part before it.

        ``words`` say what is being done, such as "solving mlp.up_proj".
        """
        if self._part:
            self._finish(self._part)
        self._part, self._activity = kind, words

    def layer(self, report: LayerReport) -> None:
        """Shows a finished layer of the current block."""
        self._layers.append(report)
        self._last_layer = f"block {report.block} {report.name}: {_outcome([report])}"
        check_signals()

    def advance(self) -> None:
        """Counts a finished step of the stage; in the walk, a block."""
        kind = self._part or (self._steps[0].kind if self._steps else "")
        self._done += self._counted in ("", kind)
        if kind:
            self._finish(kind)
        self._part = self._activity = ""
        left = self.left()
        self._bars.update(self._task, completed=self._done)
        if self._block is not None:
            parts = [_outcome(self._layers)] if self._layers else []
            parts += [f"{self._clock() - self._block_start:.1f} s", *([left] if left else [])]
            self._say(f"block {self._block} ({self._block + 1} of {self._total}): {', '.join(parts)}")
            self._block = None
        elif left:
            self._tell_if_quiet()
        check_signals()

    def skip(self, kinds: Iterable[str]) -> None:
        """Skips one step of each kind, which an earlier start has done."""
        for kind in kinds:
            self._done += self._counted in ("", kind)
            self._take(kind)
        self._step_start = self._clock()
        self._bars.update(self._task, completed=self._done)

    def left(self) -> str:
        """The time left of the stage and the run, in words; empty if unknown.

        The words are such as "about 20 s left for pruning, at least 1:05 min left for the run".
        """
        left = self._remaining()
        if left.stage is None or self._stage is None:
            return ""
        of_stage = [f"about {duration(left.stage)} left for {self._stage}"] if left.stage >= _SHORT else []
        return ", ".join([*of_stage, *_of_run(left)])

    def end_stage(self) -> None:
        """Ends the current stage and records its elapsed time."""
        if self._stage is not None:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + self._clock() - self._stage_start
        self._stage = self._block = None
        self._activity = self._last_layer = ""
        self._bars.update(self._task, visible=False)

    def _finish(self, kind: str) -> None:
        """Measures the current part and removes its step from those left."""
        now = self._clock()
        self._pace = self._pace.after(self._take(kind), now - self._step_start)
        self._step_start = now

    def _take(self, kind: str) -> Step:
        """Removes the next step of a kind from those that are left."""
        index = next((at for at, step in enumerate(self._steps) if step.kind == kind), None)
        return Step(kind) if index is None else self._steps.pop(index)

    def _remaining(self) -> Remaining:
        return remaining(self._pace, self._steps, self.ahead, self._clock() - self._step_start)

    def _stage_times(self) -> str:
        left = self._remaining().stage
        words = "time left not known yet" if left is None else f"about {duration(left)} left"
        return f"{hms(self._clock() - self._stage_start)} elapsed, {words}"

    def _below(self) -> str:
        """The line below the bar."""
        left = self._remaining()
        run = [f"the run: {hms(self._clock() - self._start)} elapsed", *_of_run(left, "")]
        return "; ".join(filter(None, [", ".join(run), self._doing(), self._last_layer]))

    def _doing(self) -> str:
        kind = self._part or (self._steps[0].kind if self._steps else "")
        if not self._pace.is_new(kind):
            return self._activity
        if self._activity:
            return f"{self._activity} (first time, slower)"
        return "the first step of its kind, slower than the others" if len(self._steps) > 1 else ""

    def _watch(self) -> None:
        """Runs in its own thread, because a step may take long."""
        while not self._ended.wait(1.0):
            self._tell_if_quiet()

    def _tell_if_quiet(self) -> None:
        """Prints how far the stage is after a silence, if there is no bar."""
        if self._shown or self._stage is None or self._clock() - self._said_at < self._quiet:
            return
        self._quiet = min(2 * self._quiet, _QUIETEST)
        unknown = "time left not known yet" if self._remaining().stage is None else ""
        if self._block is not None:
            at = f"block {self._block} ({self._block + 1} of {self._total})"
        elif self._total > 1:
            done = f"step {self._done} of {self._total}" if self._done else f"none of {plural(self._total, 'step')}"
            at = f"{self._stage}, {done} is done"
        else:
            at, unknown = f"{self._stage}, {hms(self._clock() - self._stage_start)} elapsed", ""
        self._say(", ".join(filter(None, [at, self._doing(), self.left() or unknown])))

    def _say(self, text: str) -> None:
        self._said_at = self._clock()
        if self._speaks:
            say(self._console, f"{hms(self._said_at - self._start):>7}  {text}")


def _of_run(left: Remaining, what: str = " for the run") -> list[str]:
    """The time left of the run in words; empty if it says nothing new.

    Short stages at the end of the run are left out.
    """
    if left.stage is None or left.run is None or left.run - left.stage < _SHORT:
        return []
    if not left.whole and left.run < _SHORT_STAGES:
        return []
    return [f"{'about' if left.whole else 'at least'} {duration(left.run)} left{what}"]


class _Bars(Bars):
    """A progress bar with a line of text below it."""

    below: Callable[[], str] = staticmethod(str)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.below() if any(task.visible for task in self.tasks) else "", no_wrap=True, overflow="ellipsis")


class _Times(ProgressColumn):
    """A text that is computed whenever the bar is drawn."""

    def __init__(self, text: Callable[[], str]):
        self._text = text
        super().__init__()

    def render(self, task: Task) -> Text:
        return Text(self._text())


def _outcome(layers: list[LayerReport]) -> str:
    """The error that the update minimises, and the sparsity."""
    own, dense = ("calibration error", "error_before", "error_after"), ("error against dense", "dense_before", "dense_after")
    label, *errors = own if mean(layers, "dense_after") is None else dense
    judged = layers if label == own[0] else aimed_at_dense(layers)
    means = dict.fromkeys(mean(judged, error) for error in errors)  # one where no update changed it
    return f"{label} {' -> '.join(map(percent, means))}, sparsity {percent(sparsity(layers))}"
