"""Estimates the time left from finished steps, without reading a clock."""

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
      work: how much it is, compared with other steps of its kind, and of the kind ``like``; 0 for a short step at the end of a
        run, which the time left leaves out.
      like: the kind whose rate stands in while no step of ``kind`` was measured; empty if none does.
    """

    kind: str
    work: float = 1.0
    like: str = ""


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds for a unit of work, by kind of step.

    The rate of a kind is the median of its last few steps. The first step of a kind compiles programs, so its time is no measure
    of the others, and the rate is unknown before the second step.
    """

    kinds: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)

    def after(self, step: Step, seconds: float) -> "Pace":
        """The pace with one more step, which took ``seconds``."""
        measured = self.kinds.get(step.kind, ())
        if step.kind in self.kinds and step.work > 0:
            measured = (*measured, seconds / step.work)[-_RECENT:]
        return Pace({**self.kinds, step.kind: measured})

    def is_new(self, kind: str) -> bool:
        """Whether the kind has no step yet, so that the next one compiles."""
        return kind not in self.kinds

    def seconds(self, step: Step) -> float | None:
        """The seconds that a step will take; None if they are unknown."""
        rates = self.kinds.get(step.kind) or self.kinds.get(step.like)
        return statistics.median(rates) * step.work if rates else None

    def left(self, steps: Iterable[Step], into: float = 0.0) -> float | None:
        """The seconds that the steps of a stage will take; None if unknown.

        Args:
          into: seconds since the first step began.
        """
        steps = list(steps)
        work = defaultdict[Step, float](float)
        for step in steps:
            work[step._replace(work=1.0)] += step.work
        estimates = {step: self.seconds(step._replace(work=total)) for step, total in work.items()}
        measured = [step for step in steps if estimates[step._replace(work=1.0)] is not None]
        seconds, unknown = sum((each or 0.0 for each in estimates.values()), 0.0), len(steps) - len(measured)
        if unknown > _SMALL * len(measured):
            return None
        expected = (steps and self.seconds(steps[0])) or 0.0
        return seconds * (1 + unknown / max(1, len(measured))) - min(into, expected)


class Remaining(NamedTuple):
    """The time left.

    Attributes:
      stage: seconds of the current stage; None if they are not known.
      run: seconds of this stage and of all later stages; None if the seconds of one stage are not known.
      whole: whether no stage is left out because it is short.
    """

    stage: float | None
    run: float | None
    whole: bool


def remaining(pace: Pace, stage: Sequence[Step], ahead: Iterable[Sequence[Step]], into: float = 0.0) -> Remaining:
    """The time left of a stage, and of the run with its later stages.

    Args:
      stage: the steps that are left of the stage, the current step first.
      ahead: the steps of the later stages.
      into: seconds since the current step began.
    """
    stages = list(ahead)
    counted = [steps for steps in stages if any(step.work for step in steps)]
    current, *later = pace.left(stage, into), *map(pace.left, counted)
    seconds = [each for each in (current, *later) if each is not None]
    return Remaining(current, sum(seconds) if len(seconds) == 1 + len(later) else None, len(counted) == len(stages))
