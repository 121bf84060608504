"""Which weights of a layer stay. One file a method; a selector is a frozen dataclass with a ``__call__``."""

from typing import ClassVar, Protocol

from optima_tpu.method.patterns import Pattern
from optima_tpu.method.problem import LayerProblem, Pruned
from optima_tpu.method.selectors.admm import ADMM
from optima_tpu.method.selectors.imported import Imported
from optima_tpu.method.selectors.magnitude import Magnitude
from optima_tpu.method.selectors.sparsegpt import SparseGPT
from optima_tpu.method.selectors.thanos import Thanos
from optima_tpu.method.selectors.wanda import Wanda

__all__ = ["ADMM", "Imported", "Magnitude", "MaskSelector", "SparseGPT", "Thanos", "Wanda"]


class MaskSelector(Protocol):
    """Chooses which weights of one layer stay, and may move the ones that do.

    ``problem`` holds the rows of exactly one matrix, so that a pattern may compare over all of it.

    Attributes:
      hessians: how many matrices of the Hessian's size it holds, for ``memory.layout``; 0 where it reads the diagonal alone.
      group: what the published method compares, "row" or "layer": what a plain "0.5" means on the command line.
    """

    hessians: ClassVar[int]
    group: ClassVar[str]

    def __call__(self, problem: LayerProblem, pattern: Pattern) -> Pruned: ...
