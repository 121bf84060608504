"""The base class of all selectors."""

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from optima_tpu.method.choice import Method
from optima_tpu.method.patterns import Pattern
from optima_tpu.method.problem import LayerProblem, Pruned

if TYPE_CHECKING:
    from optima_tpu.method.recipe import Recipe


class Selector(Method, abc.ABC):
    """Chooses which weights of one layer stay, and may move the ones that do.

    A selector is a frozen dataclass. It traces under ``jit``.

    Attributes:
      group: the comparison group of the published method, which a plain "0.5" on the command line stands for.
      hessians: how many matrices of the Hessian's size it holds; 0 if it reads only the diagonal. The default is a cautious
        guess.
      chooses: whether it chooses the masks, and does not take them from outside.
    """

    setting: ClassVar[str] = "selector"
    group: ClassVar[Literal["row", "layer"]] = "row"
    hessians: ClassVar[int] = 6
    chooses: ClassVar[bool] = True

    @abc.abstractmethod
    def __call__(self, problem: LayerProblem, pattern: Pattern) -> Pruned:
        """Returns the mask and the kept weights.

        Args:
          problem: the rows of exactly one matrix, so that a pattern may compare over all of it.
        """

    def choose(self, problems: Sequence[LayerProblem], patterns: Sequence[Pattern]) -> tuple[Pruned, ...]:
        """Prunes all matrices that read one input, each as a call would.

        Their problems have one Hessian and one damping. A selector whose factorisations depend on the Hessian alone may make
        them once for all matrices.
        """
        return tuple(map(self, problems, patterns))

    def check(self, pattern: Pattern) -> None:  # most selectors take every pattern
        """Raises UserError for a pattern that the selector cannot take."""

    def needs(self, recipe: "Recipe") -> None:
        """Raises UserError if :meth:`check` refuses a recipe's pattern."""
        for pattern in recipe.patterns:
            self.check(pattern)
