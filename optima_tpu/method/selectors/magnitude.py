"""Magnitude pruning: the oldest score, which needs no data."""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from optima_tpu.method.patterns import Pattern
from optima_tpu.method.problem import LayerProblem, Pruned
from optima_tpu.method.selectors.base import Selector


@dataclasses.dataclass(frozen=True)
class Magnitude(Selector):
    """Keeps the weights with the largest ``|w|``; the kept ones do not move.

    The published baseline compares over the whole matrix: ``Unstructured(sparsity, group="layer")``. Its code (locuslab/wanda
    ``lib/prune.py``) prunes one weight more, and every weight that is equal to the largest pruned one: clearly more than asked in
    a quantised model. Here the count is exact, and of equal weights the lower index is pruned first.
    """

    group: ClassVar[Literal["row", "layer"]] = "layer"
    hessians: ClassVar[int] = 0

    def __call__(self, problem: LayerProblem, pattern: Pattern) -> Pruned:
        keep = pattern.keep_mask(jnp.abs(problem.weight))
        return Pruned(jnp.where(keep, problem.weight, 0.0), keep)
