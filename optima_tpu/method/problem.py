"""The row problem: its arrays and its objective, once.

For one output row ``w`` of a linear layer, with kept inputs ``K`` and Hessian ``H``:

    minimise over v   1/2 v H v' - v g'     subject to   v[j] = 0  for j not in K          (optimality: H_KK v_K = g_K)

With ``g = w H`` this is equation 6 of OPTIMA (2025): minimise ``(v - w) H (v - w)'``, the squared change of the layer's
output over the calibration tokens. Rows of a layer share ``H``; no two rows share ``K``.

Everything here works on the difference ``v - w`` and on ``e = g - w H``, never on ``g - v H``: the change of a layer's
output is a small difference of large numbers, and float32 would lose it otherwise.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optima_tpu.method.linalg.features import WHOLE, Features, matmul


class Given(NamedTuple):
    """What was chosen elsewhere for one matrix.

    Attributes:
      keep: [d_out, d_in] bool.
      weight: [d_out, d_in], read where ``keep`` is True; None stands for the dense weights.
    """

    keep: Array | np.ndarray
    weight: Array | np.ndarray | None = None


ReadGiven = Callable[[str, tuple[int, int]], Given]
"""Name of a weight ("model.layers.0.mlp.up_proj.weight") and its shape -> what was chosen elsewhere for it."""


class LayerProblem(NamedTuple):
    """The rows of one linear layer, or of several that read the same input.

    Attributes:
      weight: [d_out, d_in] float32, the dense weights; a row is one output.
      hessian: [d_in, d_in] float32, ``X'X / n_tokens`` of the inputs the pruned layer will see; undamped.
      linear: [d_out, d_in] float32, ``g``: ``weight @ hessian`` reproduces the layer's own outputs.
    """

    weight: Array
    hessian: Array
    linear: Array


class Pruned(NamedTuple):
    """What a mask selector leaves.

    Attributes:
      weight: [d_out, d_in] float32, zero wherever ``keep`` is False.
      keep: [d_out, d_in] bool.
    """

    weight: Array
    keep: Array


class Solution(NamedTuple):
    """What a solver found, and what it can say about it.

    Attributes:
      weight: [d_out, d_in] float32, zero wherever the mask is.
      gap: [d_out] float32, the solver's own measure of suboptimality of the row, 0 at the optimum. ``CG`` certifies an upper
        bound on ``(f - f*) / f*`` of the damped problem; each solver's docstring says what its number is.
      steps: [d_out] int32, iterations spent on the row.
      converged: [d_out] bool, the solver's own test was met.
    """

    weight: Array
    gap: Array
    steps: Array
    converged: Array


def self_target(weight: Array, hessian: Array, features: Features = WHOLE) -> LayerProblem:
    """The problem of the paper: reproduce the layer's own outputs on its own inputs, ``g = W H``."""
    return LayerProblem(weight, hessian, features.product(weight, hessian))


def pull_of(problem: LayerProblem, features: Features = WHOLE) -> Array:
    """The pull ``e = g - W H``, [d_out, d_in]: what the target asks for beyond the layer's own outputs.

    Zero for :func:`self_target`. Computed by the same product as ``g`` there, so that it is then exactly zero.
    """
    return problem.linear - features.product(problem.weight, problem.hessian)


def objective(problem: LayerProblem, weight: Array, features: Features = WHOLE) -> Array:
    """Each row's ``(v - w) H (v - w)' - 2 e (v - w)'``, [d_out] float32.

    Twice the objective of the module docstring plus a constant of the row, chosen so that the dense weights have value
    zero; with ``e = 0`` it is the mean squared change of the row's output over the calibration tokens.

    Args:
      weight: [d_out, d_in] float32, the ``v`` of each row.
    """
    change = weight - problem.weight
    return features.sums(change * (features.product(change, problem.hessian) - 2 * pull_of(problem, features)))[0]


def displacement(problem: LayerProblem, weight: Array, features: Features = WHOLE) -> Array:
    """Each row's ``sum_j H_jj (v_j - w_j)^2``, [d_out] float32: what a solver's damping adds to the objective, a share of it."""
    return features.sums((weight - problem.weight) ** 2 * features.diagonal(problem.hessian))[0]


def output_energy(problem: LayerProblem, features: Features = WHOLE) -> Array:
    """Each row's ``w H w'``, [d_out] float32: the mean square of its output, the scale of a relative layer error."""
    return features.sums(problem.weight * features.product(problem.weight, problem.hessian))[0]


def optimality_residual(problem: LayerProblem, pruned: Pruned, weight: Array) -> Array:
    """Each row's relative residual of ``H_KK v_K = g_K`` in unit-diagonal variables, [d_out] float32.

    ``max_K |r_j| / sqrt(H_jj)  /  sqrt(w H w')`` with ``r = g - v H``: dimensionless, unchanged when ``H`` or any single
    feature is rescaled. Rows with no output energy, or with nothing kept, have residual 0.
    """
    residual = matmul(problem.weight - weight, problem.hessian) + pull_of(problem)
    diagonal = jnp.diagonal(problem.hessian)
    alive = diagonal > 0
    scaled = jnp.where(pruned.keep & alive, jnp.abs(residual) * jax.lax.rsqrt(jnp.where(alive, diagonal, 1.0)), 0.0)
    energy = output_energy(problem)
    return jnp.where(energy > 0, jnp.max(scaled, axis=1) * jax.lax.rsqrt(jnp.where(energy > 0, energy, 1.0)), 0.0)
