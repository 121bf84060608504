"""What a method holds on a device."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What a solver holds on a device.

    Attributes:
      hessians: float32 matrices of the Hessian's size, itself included.
      vectors: float32 vectors of a row's size, for each row that is solved at once.
      split: the solver has ``prepare`` and takes the Hessian by columns.
    """

    hessians: float
    vectors: float
    split: bool = False


_NO_SOLVER = Footprint(hessians=1, vectors=4, split=True)

_UNKNOWN = Footprint(hessians=8, vectors=40)

_UNKNOWN_SELECTOR = 6


def footprint_of(solver: Any, selector: Any) -> Footprint:
    """What pruning with both of them holds; of a None nothing."""
    footprint = _NO_SOLVER if solver is None else getattr(solver, "footprint", _UNKNOWN)
    chooser = 0 if selector is None else getattr(selector, "hessians", _UNKNOWN_SELECTOR)
    return Footprint(max(footprint.hessians, chooser), footprint.vectors, footprint.split and not chooser)
