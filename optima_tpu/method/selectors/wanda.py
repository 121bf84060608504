"""Wanda: weights and activations (Sun et al., 2023, equation 1)."""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from optima_tpu.method.patterns import Pattern
from optima_tpu.method.problem import LayerProblem, Pruned
from optima_tpu.method.selectors.base import Selector


@dataclasses.dataclass(frozen=True)
class Wanda(Selector):
    """Keeps the largest weights by ``|w_ij| * ||x_j||``, and moves none.

    ``||x_j||`` is read off the Hessian, ``sqrt(H_jj)``: Wanda's norm divided by ``sqrt(n_tokens)``, which scales every score
    alike. A dead input (``H_jj = 0``) scores zero and is pruned first, its weights in the order of their index.

    Attributes:
      shift_zero: score with ``sqrt(H_jj + min positive H_jj)``, as the scripts of OPTIMA and SLiM do (shift_zero_metrics), to
        rank the weights of dead inputs by size. It changes the other scores too, so it is off here, as in Wanda's paper.
    """

    group: ClassVar[Literal["row", "layer"]] = "row"
    hessians: ClassVar[int] = 0

    shift_zero: bool = False

    def __call__(self, problem: LayerProblem, pattern: Pattern) -> Pruned:
        energy = jnp.maximum(jnp.diagonal(problem.hessian), 0.0)
        if self.shift_zero:
            smallest = jnp.min(jnp.where(energy > 0, energy, jnp.inf))
            energy = energy + jnp.where(jnp.isfinite(smallest), smallest, 1.0)
        keep = pattern.keep_mask(jnp.abs(problem.weight) * jnp.sqrt(energy))
        return Pruned(jnp.where(keep, problem.weight, 0.0), keep)
