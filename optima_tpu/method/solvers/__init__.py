"""Solvers, which move the kept weights of a layer. One file per method."""

from collections.abc import Mapping
from types import MappingProxyType

from optima_tpu.method.solvers.adam import Adam
from optima_tpu.method.solvers.base import SolveMask, Solver, SolveRows, Unchanged
from optima_tpu.method.solvers.cg import CG
from optima_tpu.method.solvers.exact import Exact
from optima_tpu.method.solvers.mpax import MPAX

SOLVERS: Mapping[str, type[Solver] | None] = MappingProxyType(
    {"cg": CG, "mpax": MPAX, "exact": Exact, "adam": Adam, "null": None}
)
"""The solvers by their names in YAML files and on the command line; null leaves the selector's own weights."""

__all__ = ["CG", "MPAX", "SOLVERS", "Adam", "Exact", "SolveMask", "SolveRows", "Solver", "Unchanged"]
