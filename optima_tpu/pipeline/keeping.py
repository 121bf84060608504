"""The stages of a run, each a function whose result the run directory keeps.

A run is a plain function of a ``keep``, which gives it the result of one stage after the other::

    dense = keep(DENSE_PERPLEXITY)
    journal = keep(JOURNAL, dense)
    blocks = keep(PRUNING, journal)

``keep`` reads what an earlier start of the same run kept, or does the stage. So a resumed run does what is left, and no function
asks what was done. Before a run begins, the same function is traced: called with a ``keep`` that only lists the stages, to know
what lies ahead. It may therefore branch on settings, and not on results. What is left of a run, whether it is finished, and the
seconds of each stage follow from the list. What is made again if a file is damaged follows from ``report.run_directory.FILES``.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Concatenate, Generic, NamedTuple, ParamSpec, Protocol, TypeVar, cast

from rich.console import Console

from optima_tpu.pipeline.inputs import token_digest
from optima_tpu.pipeline.opened import Opened
from optima_tpu.pipeline.repair import faults, mend
from optima_tpu.report.contents import Report
from optima_tpu.report.file import REPORT
from optima_tpu.report.pace import Step
from optima_tpu.report.progress import Progress, say
from optima_tpu.report.run_record import RUN
from optima_tpu.report.summary import print_summary
from optima_tpu.runtime.files import only_program
from optima_tpu.runtime.host_memory import give_back_freed_memory
from optima_tpu.runtime.kept import KeptRecord
from optima_tpu.runtime.processes import check_signals, from_first
from optima_tpu.runtime.records import known_record

P = ParamSpec("P")
T = TypeVar("T")
Summary = Callable[[Console, Report, Path], None]

_SECONDS = KeptRecord("seconds.json", dict[str, float])


class StageWork(NamedTuple):
    """What every stage gets before its inputs.

    Attributes:
      resources: closed at the end of the run.
    """

    opened: Opened
    progress: Progress
    resources: contextlib.ExitStack


@dataclasses.dataclass(frozen=True)
class KeptResult(Generic[T]):
    """How the run directory keeps the result of a stage.

    Every process calls both.

    Attributes:
      read: the result that an earlier start kept; None if none is there, or if it is damaged.
      write: keeps a new result, unless the stage itself does or it comes too early for a run directory.
    """

    read: Callable[[Opened], T | None] = lambda opened: None
    write: Callable[[Opened, T], object] = lambda opened, result: None


def in_record(record: KeptRecord[Any]) -> KeptResult[Any]:
    """A result that is a record of the run directory."""
    return KeptResult(lambda opened: record.read(opened.directory), lambda opened, result: record.write(opened.directory, result))


@dataclasses.dataclass(frozen=True)
class Stage(Generic[P, T]):
    """A part of a run, and its result.

    Attributes:
      name: the name in the progress, and the key of its seconds in the report.
      make: does the stage and returns the result. Every process calls it.
      kept: how the result outlives the program; by default every start makes it again, or what is left of it.
      steps: what ``make`` will do, by what is in the run directory, for the time left; empty where it takes no time. Not asked
        where the result is kept.
      count: the number of its progress steps, where these have parts.
      counted: the kind of its steps that the progress counts; empty for all.
      done: how many of ``count`` an earlier start did, which ``steps`` leaves out.
    """

    name: str
    make: Callable[Concatenate[StageWork, P], T]
    kept: KeptResult[T] = KeptResult()
    steps: Callable[[Opened], list[Step]] = lambda opened: []
    count: Callable[[Opened], int] | None = None
    counted: str = ""
    done: Callable[[Opened], int] = lambda opened: 0


class Keep(Protocol):
    """Gives the result of a stage."""

    def __call__(self, stage: Stage[P, T], /, *inputs: P.args, **named: P.kwargs) -> T:
        """The result of a stage, from the results of earlier stages."""


Body = Callable[[Keep], Report]
"""The stages of a run, as a function that ends with its report."""


def traced(body: Callable[[Keep], object]) -> list[Stage]:
    """The stages of a run in their order. Does none of them."""
    stages: list[Stage] = []

    def keep(stage: Stage[P, T], /, *inputs: P.args, **named: P.kwargs) -> T:
        stages.append(stage)
        return cast(T, None)

    body(keep)
    return stages


def work_ahead(opened: Opened, stages: Sequence[Stage]) -> dict[str, list[Step]]:
    """The steps that are left of each stage. Every process calls it."""
    return {stage.name: stage.steps(opened) if stage.kept.read(opened) is None else [] for stage in stages}


class Keeper:
    """The :class:`Keep` of a run at work.

    Args:
      stages: from :func:`traced`.
    """

    def __init__(self, work: StageWork, stages: Sequence[Stage]):
        self._work = work
        self._ahead = work_ahead(work.opened, stages)
        self._seconds = dict(work.progress.seconds)  # as they are kept

    @property
    def names(self) -> list[str]:
        """The names of the stages that take time and are not done yet."""
        return [name for name, steps in self._ahead.items() if steps]

    def __call__(self, stage: Stage[P, T], /, *inputs: P.args, **named: P.kwargs) -> T:
        del self._ahead[stage.name]
        opened, progress = self._work.opened, self._work.progress
        kept = stage.kept.read(opened)
        if kept is not None:
            return kept
        if steps := stage.steps(opened):
            progress.ahead = list(filter(None, self._ahead.values()))
            count = stage.count(opened) if stage.count else sum(stage.counted in ("", step.kind) for step in steps)
            progress.stage(stage.name, count, steps, stage.counted, stage.done(opened))
        made = stage.make(self._work, *inputs, **named)
        if made is not None:
            stage.kept.write(opened, made)
        if steps:
            progress.end_stage()
        self._keep_seconds()
        give_back_freed_memory()  # else the next stage's arrays lie between the holes of this one's
        return made

    def _keep_seconds(self) -> None:
        opened, progress = self._work.opened, self._work.progress
        # Those of the first stages wait for the run directory.
        if progress.seconds != self._seconds and from_first(lambda: (opened.directory / RUN).exists()):
            _SECONDS.write(opened.directory, progress.seconds)
            self._seconds = dict(progress.seconds)


def finished_report(opened: Opened, stages: Sequence[Stage]) -> Report | None:
    """The report of a run without anything left to do, else None.

    Every process calls it.
    """

    def known() -> Report | None:
        report = known_record(opened.directory / REPORT, Report)
        text = token_digest(opened.texts.evaluation.ids)
        same = report and (report.manifest, report.evaluation.digest) == (opened.manifest, text)
        return report if same and not faults(opened.directory) else None

    report: Report | None = from_first(known)
    # A sweep keeps the reports of finished cells, without their models.
    if report is None or not ("checkpoint" in report.files or opened.config.export):
        return report
    left = any(step.work for steps in work_ahead(opened, stages).values() for step in steps)
    return None if left else report


def finish(opened: Opened, body: Body, console: Console, summary: Summary = print_summary) -> Report:
    """Finishes an opened run, prints the summary and returns the report.

    Args:
      summary: prints the report, and the directory that it is in.
    """
    check_signals()
    if opened.checkpointed:
        say(console, "checking     the files that an earlier start of this run wrote, by their checksums")
    stages = traced(body)
    report = finished_report(opened, stages)
    if report is not None:
        say(console, "finished     nothing is left to do")
    console.print()
    if report is None:
        with only_program(opened.directory), Progress(console) as progress, contextlib.ExitStack() as resources:
            for line in from_first(lambda: mend(opened.directory, opened.config.export)):
                progress.note(line)
            progress.seconds.update(_SECONDS.read(opened.directory) or {})
            keep = Keeper(StageWork(opened, progress, resources), stages)
            progress.note(f"stages: {', '.join(keep.names)}")
            report = body(keep)
        console.print()
    summary(console, report, opened.directory)
    return report
