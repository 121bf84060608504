"""Move the kept weights of a layer. One file per method; a solver is a frozen dataclass with a ``__call__``."""

from optima_tpu.method.solvers.adam import Adam
from optima_tpu.method.solvers.base import SolveMask, Solver, SolveRows, Unchanged
from optima_tpu.method.solvers.cg import CG
from optima_tpu.method.solvers.exact import Exact
from optima_tpu.method.solvers.mpax import MPAX

__all__ = ["CG", "MPAX", "Adam", "Exact", "SolveMask", "SolveRows", "Solver", "Unchanged"]
