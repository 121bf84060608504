"""What every solver is."""

import abc
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32

from optima_tpu.method.linalg.features import WHOLE, Features
from optima_tpu.method.problem import LayerProblem, Pruned, Solution
from optima_tpu.method.resources import Cost, Footprint

SolveRows = Callable[[LayerProblem, Pruned], Solution]


class Solver(abc.ABC):
    """Moves the kept weights to minimise every row's objective, from the pruned weights as they are.

    A solver is a frozen dataclass. Rows are independent: a solver may be given any subset of a layer's rows, or rows of several
    layers with one input, and returns the same for each. It traces under ``jit`` and ``shard_map``. The objective, damping
    included, is that of the problem.

    Attributes:
      default_damping: the damping of the objective where the user names none.
      changes_masks: whether solutions are on masks of their own, ``Solution.keep``.
    """

    default_damping: ClassVar[float] = 0.0
    changes_masks: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, problem: LayerProblem, pruned: Pruned) -> Solution:
        """The rows' new weights, on the mask of ``pruned`` or on one of their own."""

    def prepare(self, hessian: Float32[Array, "d_in d"], damping: float, features: Features = WHOLE) -> SolveRows:
        """The solver of any rows with this Hessian and damping, with what depends on these alone already done.

        Args:
          hessian: [d_in, d]: all of it, or a device's columns where ``footprint`` says ``split``.
          features: where the features are, those of the rows too.
        """
        return self

    def footprint(self, damping: float) -> Footprint:
        """What the solver holds on a device. This default is a guess on the safe side."""
        return Footprint(hessians=8, vectors=40)

    def cost(self) -> Cost | None:
        """What the solver does if all goes as assumed, for plans; None where nobody has counted it."""
        return None

    @property
    def title(self) -> str:
        """The solver's name in messages."""
        return type(self).__name__


class Unchanged(Solver):
    """Leaves the selector's weights as they are: the baseline of the paper's tables."""

    def __call__(self, problem: LayerProblem, pruned: Pruned) -> Solution:
        rows = pruned.weight.shape[0]
        return Solution(pruned.weight, jnp.zeros(rows), jnp.zeros(rows, jnp.int32), jnp.ones(rows, bool))

    def footprint(self, damping: float) -> Footprint:
        return Footprint(hessians=1, vectors=4, split=True)

    def cost(self) -> Cost:
        return Cost()
