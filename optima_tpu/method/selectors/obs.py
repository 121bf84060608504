"""The base of sweeps over inputs, as in the optimal brain surgeon."""

import abc
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32

from optima_tpu.method.linalg.inverses import inverse_cholesky
from optima_tpu.method.linalg.scaling import live_features
from optima_tpu.method.patterns import Pattern
from optima_tpu.method.problem import LayerProblem, Pruned
from optima_tpu.method.selectors.base import Selector


class InputSweep(Selector):
    """A selector that sweeps over the inputs and chooses a row part by part.

    It goes from the first input to the last. Where the inputs of a comparison group lie apart, it goes over them group by
    group.
    """

    group: ClassVar[Literal["row", "layer"]] = "layer"

    def __call__(self, problem: LayerProblem, pattern: Pattern) -> Pruned:
        rows, columns = problem.weight.shape
        pattern.pruned_count((rows, columns))  # raises where the pattern does not fit the layer
        order = pattern.order(columns)
        if order is None:
            return self.sweep(problem, pattern)
        back = np.argsort(order)
        swept = self.sweep(problem.sorted(order), pattern.in_order())
        return Pruned(swept.weight[:, back], swept.keep[:, back])

    @abc.abstractmethod
    def sweep(self, problem: LayerProblem, pattern: Pattern) -> Pruned:
        """Prunes by a pattern whose comparison groups are consecutive."""

    def check(self, pattern: Pattern) -> None:
        if not pattern.span:
            pattern.pruned_in(1)  # raises where the pattern does not say how many weights a part loses


def inverse_factor(hessian: Float32[Array, "d_in d_in"], damping: float) -> Float32[Array, "d_in d_in"]:
    """The upper triangular ``U`` of ``U'U = (H + damping mean(diag H) I)^-1``.

    One factor holds every inverse that a sweep over the columns needs, after SparseGPT (Frantar and Alistarh, 2023,
    section 3.3): once the inputs before ``i`` are fixed, the inverse over the rest is ``U[i:, i:]' U[i:, i:]``.

    ``U`` is the inverse of one Cholesky factor. Factorising an explicit inverse of the matrix instead would add its rounding.

    Args:
      hessian: [d_in, d_in] float32. Dead inputs (``scaling.live_features``) are decoupled, with 1 on the diagonal.
      damping: share of the mean of the diagonal over all inputs, 0.01 in the published codes.
    """
    live = live_features(hessian)
    diagonal = jnp.where(live, jnp.diagonal(hessian), 0.0)
    damped = jnp.where(live[:, None] & live, hessian, 0.0)
    damped = damped + jnp.diag(jnp.where(live, damping * jnp.mean(diagonal), 1.0))
    # With J the reversal and J H J = L L':  H^-1 = (J L^-1 J)' (J L^-1 J), and J L^-1 J is upper triangular.
    return inverse_cholesky(damped[::-1, ::-1])[::-1, ::-1]
