"""The base class of all solvers."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Annotated, ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32

from optima_tpu.method.choice import Method
from optima_tpu.method.linalg.features import WHOLE, Features
from optima_tpu.method.problem import LayerProblem, Pruned, Solution
from optima_tpu.method.resources import Footprint
from optima_tpu.runtime.bounds import Bound


@runtime_checkable
class SolveMask(Protocol):
    """Solves rows of a given problem, for a mask and starting weights."""

    def __call__(self, pruned: Pruned, rough: bool = False) -> Solution:
        """Returns the rows' new weights.

        Args:
          rough: whether the solution only has to tell a better mask from a worse one. A solver may then stop early, with a gap
            that is infinite.
        """


SolveRows = Callable[[LayerProblem], SolveMask]
"""Takes the rows' problem, then masks and weights to start from. What one problem's solves share is computed once."""


@dataclasses.dataclass(frozen=True)
class Solver(Method, abc.ABC):
    """Moves the kept weights to minimise every row's objective.

    A solver is a frozen dataclass, and starts from the pruned weights. Rows are independent: a solver may be given any subset
    of a layer's rows, or rows of several layers with one input, and returns the same result for each row. It traces under
    ``jit`` and ``shard_map``. The problem defines the objective: a recipe gives its solver's damping to every problem, and a
    solver reads the damping of the problem.

    Attributes:
      damping: ridge of the objective that pulls a row toward its *dense* weights, as a share of the Hessian's diagonal. With 0, a
        nearly singular layer fits the calibration set with huge weights and ruins the model. Where whole inputs, neurons or heads
        are pruned, a solver with damping of its own takes at least 0.3 unless you say otherwise.
      changes_masks: whether the solver returns new masks, ``Solution.keep``.
    """

    setting: ClassVar[str] = "solver"
    changes_masks: ClassVar[bool] = False

    damping: Annotated[float, Bound(0)] = dataclasses.field(default=0.0, kw_only=True)

    @abc.abstractmethod
    def __call__(self, problem: LayerProblem, pruned: Pruned) -> Solution:
        """Returns the rows' new weights, for the given mask or a new one."""

    def prepare(self, hessian: Float32[Array, "d_in d"], damping: float, features: Features = WHOLE) -> SolveRows:
        """Returns a function that solves rows with this Hessian and damping.

        Call it as ``prepare(...)(problem)(pruned)``. Work that depends only on Hessian and damping is done here, once for all
        rows. Work that depends on the rows' problem and not on their masks is done once for all solves of these rows.

        Args:
          hessian: [d_in, d]: all of it, or a device's columns if ``footprint`` allows ``split``.
          features: the sharding of the features, for the Hessian and for the rows.
        """
        return lambda problem: lambda pruned, rough=False: self(problem, pruned)

    def footprint(self) -> Footprint:
        """The device memory of the solver; by default a cautious guess."""
        return Footprint(hessians=8, vectors=40)

    @property
    def title(self) -> str:
        """The solver's name in messages."""
        return type(self).__name__


class Unchanged(Solver):
    """Leaves the selector's weights: the baseline of the paper's tables."""

    def __call__(self, problem: LayerProblem, pruned: Pruned) -> Solution:
        rows = pruned.weight.shape[0]
        return Solution(pruned.weight, jnp.zeros(rows), jnp.zeros(rows, jnp.int32), jnp.ones(rows, bool))

    def footprint(self) -> Footprint:
        return Footprint(hessians=1, vectors=4, split=True)
