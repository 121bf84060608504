"""Where the kept weights of a layer go. One file a method; a solver is a frozen dataclass with a ``__call__``."""

from typing import Protocol

from optima_tpu.method.problem import LayerProblem, Pruned, Solution
from optima_tpu.method.solvers.adam import Adam
from optima_tpu.method.solvers.cg import CG
from optima_tpu.method.solvers.exact import Exact
from optima_tpu.method.solvers.mpax import MPAX

__all__ = ["CG", "MPAX", "Adam", "Exact", "Solver", "damping_of"]


class Solver(Protocol):
    """Moves the kept weights to minimise every row's objective, from the pruned weights as they are.

    Rows are independent: a solver may be given any subset of a layer's rows, or rows of several layers with one input,
    and returns the same for each. It traces under ``jit`` and ``shard_map``.

    Optional: ``footprint``, what it holds on a device (``memory.Footprint``), ``damping`` (:func:`damping_of`), and
    ``prepare(hessian, features)``, which does once what depends on the Hessian alone, maybe from its columns, and returns the
    solver of any rows (``CG.prepare``).
    """

    def __call__(self, problem: LayerProblem, pruned: Pruned) -> Solution: ...


def damping_of(solver: Solver | None) -> float:
    """The ridge in a solver's objective that pulls toward the dense weights, as a share of the Hessian's diagonal."""
    return getattr(solver, "damping", 0.0)
