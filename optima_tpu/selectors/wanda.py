"""Wanda: weights and activations (Sun et al., 2023, equation 1)."""

import dataclasses

import jax.numpy as jnp

from optima_tpu.patterns import Pattern, keep_mask
from optima_tpu.problem import LayerProblem, Pruned


@dataclasses.dataclass(frozen=True)
class Wanda:
    """Keeps the weights with the largest ``|w_ij| * ||x_j||``; the kept ones do not move.

    ``||x_j||`` is read off the Hessian, ``sqrt(H_jj)``: Wanda's norm divided by ``sqrt(n_tokens)``, which scales every score
    alike. A dead input (``H_jj = 0``) scores zero and is pruned first, its weights in the order of their index.
    """

    def __call__(self, problem: LayerProblem, pattern: Pattern) -> Pruned:
        norms = jnp.sqrt(jnp.maximum(jnp.diagonal(problem.hessian), 0.0))
        keep = keep_mask(jnp.abs(problem.weight) * norms, pattern)
        return Pruned(jnp.where(keep, problem.weight, 0.0), keep)
