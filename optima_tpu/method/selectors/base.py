"""What every selector is."""

import abc
from typing import ClassVar, Literal

from optima_tpu.method.patterns import Pattern
from optima_tpu.method.problem import LayerProblem, Pruned
from optima_tpu.method.resources import Cost


class Selector(abc.ABC):
    """Chooses which weights of one layer stay, and may move the ones that do.

    A selector is a frozen dataclass. It traces under ``jit``.

    Attributes:
      group: what the published method compares: what a plain "0.5" means on the command line.
      hessians: how many matrices of the Hessian's size it holds; 0 where it reads the diagonal alone. The default is a guess on
        the safe side.
    """

    group: ClassVar[Literal["row", "layer"]] = "row"
    hessians: ClassVar[int] = 6

    @abc.abstractmethod
    def __call__(self, problem: LayerProblem, pattern: Pattern) -> Pruned:
        """The mask, and the kept weights.

        Args:
          problem: the rows of exactly one matrix, so that a pattern may compare over all of it.
        """

    def check(self, pattern: Pattern) -> None:  # noqa: B027  # most selectors take every pattern
        """Raises UserError for a pattern by which this selector cannot choose."""

    def cost(self) -> Cost | None:
        """What the selector does beside its last mask, for plans; None where nobody has counted it."""
        return None
