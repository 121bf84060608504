"""Estimates the time left from the steps that are done. Nothing here reads a clock."""

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

_RECENT = 5
"""Steps of a kind whose median is its rate: a machine that became slower or faster is noticed after three of them."""
_SMALL = 0.25
"""Steps that were never measured count like the others of their stage up to this share of the measured ones."""


class Step(NamedTuple):
    """A part of the work.

    Attributes:
      kind: steps of one kind run the same programs, in whatever stage they are.
      work: how much it is, compared with other steps of its kind, and of the kind ``like``; 0 for a short step at the end of a run,
        which the time left leaves out.
      like: the kind whose rate stands in while no step of ``kind`` was measured; empty if none does.
    """

    kind: str
    work: float = 1.0
    like: str = ""


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds for a unit of work of every kind, by its last steps but the first.

    The rate of a kind is the median of its last few steps. Its first step compiles programs and says nothing of the others, so
    nothing is known before the second one.
    """

    kinds: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)

    def after(self, step: Step, seconds: float) -> "Pace":
        """The pace with one more step, which took ``seconds``."""
        measured = self.kinds.get(step.kind, ())
        if step.kind in self.kinds and step.work > 0:
            measured = (*measured, seconds / step.work)[-_RECENT:]
        return Pace({**self.kinds, step.kind: measured})

    def is_new(self, kind: str) -> bool:
        """Whether no step of this kind was measured, so that the next one compiles programs."""
        return kind not in self.kinds

    def seconds(self, step: Step) -> float | None:
        """The seconds that work of one kind will take; None if that is not known."""
        known = self.kinds.get(step.kind) or self.kinds.get(step.like)
        return statistics.median(known) * step.work if known else None

    def left(self, steps: Iterable[Step], into: float = 0.0) -> float | None:
        """The seconds that the steps of one stage will take; None if that is not known.

        Args:
          into: seconds since the first of them began.
        """
        steps = list(steps)
        work = defaultdict[Step, float](float)
        for step in steps:
            work[step._replace(work=1.0)] += step.work
        found = {step: self.seconds(step._replace(work=total)) for step, total in work.items()}
        measured = [step for step in steps if found[step._replace(work=1.0)] is not None]
        seconds, unknown = sum((each or 0.0 for each in found.values()), 0.0), len(steps) - len(measured)
        if unknown > _SMALL * len(measured):
            return None
        expected = (steps and self.seconds(steps[0])) or 0.0
        return seconds * (1 + unknown / max(1, len(measured))) - min(into, expected)


class Remaining(NamedTuple):
    """The time left.

    Attributes:
      stage: seconds of the stage that goes on; None if they are not known.
      run: seconds of this stage and of those after it; None if those of one of them are not known.
      whole: whether no stage is left out because it is short.
    """

    stage: float | None
    run: float | None
    whole: bool


def remaining(pace: Pace, stage: Sequence[Step], ahead: Iterable[Sequence[Step]], into: float = 0.0) -> Remaining:
    """The time left of a stage, and of this stage with those that come after it.

    Args:
      stage: the steps that are left of it, the one that goes on first.
      ahead: the steps of the later stages.
      into: seconds since the step that goes on began.
    """
    stages = list(ahead)
    counted = [steps for steps in stages if any(step.work for step in steps)]
    current, *later = pace.left(stage, into), *map(pace.left, counted)
    seconds = [each for each in (current, *later) if each is not None]
    return Remaining(current, sum(seconds) if len(seconds) == 1 + len(later) else None, len(counted) == len(stages))
