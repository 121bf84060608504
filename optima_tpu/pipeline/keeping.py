"""The stages of a run, each a function whose result the run directory keeps.

A run is a plain function of a ``keep``, which gives it the result of one stage after the other::

    dense = keep(DENSE_PERPLEXITY)
    journal = keep(JOURNAL, dense)
    blocks = keep(PRUNING, journal)

``keep`` reads what an earlier start of the same run kept, or does the stage. So a resumed run does what is left, and no function
asks what was done. Before a run begins, the same function is traced: called with a ``keep`` that only lists the stages, to know
what lies ahead. It may therefore branch on settings, and not on results.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Concatenate, Generic, NamedTuple, ParamSpec, Protocol, TypeVar, cast

from optima_tpu.pipeline.opened import Opened
from optima_tpu.report.pace import Step
from optima_tpu.report.progress import Progress
from optima_tpu.runtime.host_memory import give_back_freed_memory

P = ParamSpec("P")
T = TypeVar("T")


class StageWork(NamedTuple):
    """What every stage gets before its inputs.

    Attributes:
      resources: closed at the end of the run.
    """

    opened: Opened
    progress: Progress
    resources: contextlib.ExitStack


def not_kept(work: StageWork, *inputs: Any, **named: Any) -> None:
    """The ``read`` of a stage that every start does again."""


@dataclasses.dataclass(frozen=True)
class Stage(Generic[P, T]):
    """A part of a run, and its result.

    Attributes:
      name: the name in the progress, and the key of its seconds in the report.
      make: does the stage, keeps the result in the run directory, and returns it. Every process calls it.
      read: the result that an earlier start kept; None if none is there, or if it is damaged. Every process calls it.
      steps: what ``make`` will do, by what is in the run directory, for the time left; empty where it takes no time.
      count: the number of its progress steps, where these have parts.
      counted: the kind of its steps that the progress counts; empty for all.
      done: how many of ``count`` an earlier start did, which ``steps`` leaves out.
    """

    name: str
    make: Callable[Concatenate[StageWork, P], T]
    read: Callable[Concatenate[StageWork, P], T | None] = not_kept
    steps: Callable[[Opened], list[Step]] = lambda opened: []
    count: Callable[[Opened], int] | None = None
    counted: str = ""
    done: Callable[[Opened], int] = lambda opened: 0


class Keep(Protocol):
    """Gives the result of a stage."""

    def __call__(self, stage: Stage[P, T], /, *inputs: P.args, **named: P.kwargs) -> T:
        """The result of a stage, from the results of earlier stages."""


def traced(run: Callable[[Keep], object]) -> list[Stage]:
    """The stages of a run in their order. Does none of them."""
    stages: list[Stage] = []

    def keep(stage: Stage[P, T], /, *inputs: P.args, **named: P.kwargs) -> T:
        stages.append(stage)
        return cast(T, None)

    run(keep)
    return stages


class Keeper:
    """The :class:`Keep` of a run at work.

    Args:
      stages: from :func:`traced`.
    """

    def __init__(self, work: StageWork, stages: Iterable[Stage]):
        self._work = work
        self._ahead = {stage.name: stage.steps(work.opened) for stage in stages}

    @property
    def names(self) -> list[str]:
        """The names of the stages that take time and are not done yet."""
        return [name for name, steps in self._ahead.items() if steps]

    def __call__(self, stage: Stage[P, T], /, *inputs: P.args, **named: P.kwargs) -> T:
        del self._ahead[stage.name]
        kept = stage.read(self._work, *inputs, **named)
        if kept is not None:
            return kept
        opened, progress = self._work.opened, self._work.progress
        if steps := stage.steps(opened):
            progress.ahead = list(filter(None, self._ahead.values()))
            count = stage.count(opened) if stage.count else sum(stage.counted in ("", step.kind) for step in steps)
            progress.stage(stage.name, count, steps, stage.counted, stage.done(opened))
        made = stage.make(self._work, *inputs, **named)
        give_back_freed_memory()  # else the next stage's arrays lie between the holes of this one's
        return made
