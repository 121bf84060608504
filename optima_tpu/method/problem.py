"""The row problem: its arrays and its objective.

For one output row ``w`` of a linear layer, with kept inputs ``K`` and Hessian ``H``:

    minimise over v   1/2 v H v' - v g'     subject to   v[j] = 0  for j not in K          (optimality: H_KK v_K = g_K)

With ``g = w H`` this is equation 6 of OPTIMA (2025): minimise ``(v - w) H (v - w)'``, the squared change of the layer's
output over the calibration tokens. Rows of a layer share ``H``; no two rows share ``K``. Damping ``d`` adds
``d sum_j H_jj (v_j - w_j)^2``, which holds a row near its dense weights.

Everything here works on the difference ``v - w`` and on the pull ``e = g - w H``, never on ``g - v H``: the change of a layer's
output is a small difference of large numbers, and float32 would lose it otherwise. So a problem holds ``e``, and not ``g``.
"""

import dataclasses
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float32, Int32

from optima_tpu.method.linalg.features import WHOLE, Features

Matrix = TypeVar("Matrix", Array, np.ndarray)


class Given(NamedTuple, Generic[Matrix]):
    """An imported mask of one matrix, and maybe its weights.

    Attributes:
      keep: [d_out, d_in] bool.
      weight: [d_out, d_in], read where ``keep`` is True; None stands for the dense weights.
    """

    keep: Matrix
    weight: Matrix | None = None


ReadGiven = Callable[[str, tuple[int, int]], Given[np.ndarray]]
"""Name of a weight ("model.layers.0.mlp.up_proj.weight") and its shape -> its imported mask."""


class Errors(NamedTuple):
    """What a change of weights does to a layer's rows, each [rows] float32.

    Attributes:
      output: ``(v - w) H (v - w)'``, the mean squared change of the output.
      displacement: ``sum_j H_jj (v_j - w_j)^2``, what the objective adds for each unit of damping.
    """

    output: Float32[Array, " rows"]
    displacement: Float32[Array, " rows"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerProblem:
    """The objective of the rows of layers with one input, on one token set.

    The objective of a row, counted so that the dense weights have the value ``offset``, is

        f(v) = (v - w) H (v - w)' + d sum_j H_jj (v_j - w_j)^2 - 2 e (v - w)' + offset

    With ``e = 0`` and no damping it is the mean squared change of the row's output over the tokens.

    Attributes:
      weight: [d_out, d_in] float32, the dense weights; a row is one output.
      hessian: [d_in, d_in] float32, ``X'X / n_tokens`` of the inputs the pruned layer will see; undamped.
      pull: [d_out, d_in] float32, ``e = g - w H``: what the target asks for beyond the layer's own outputs. None if it asks for
        the layer's own outputs, as the paper does.
      damping: ``d``, a ridge around the *dense* weights, as a share of the Hessian's diagonal. Static, since solvers branch on
        it. Without any, a nearly singular layer fits the calibration set with huge weights and ruins the model.
      offset: [d_out] float32, a constant of each row; None for 0. With the mean of ``(D w')^2`` (:mod:`targets`) the value is the
        error against the dense model's outputs.
    """

    weight: Float32[Array, "rows d"]
    hessian: Float32[Array, "d_in d"]
    pull: Float32[Array, "rows d"] | None = None
    damping: float = dataclasses.field(default=0.0, metadata={"static": True})
    offset: Float32[Array, " rows"] | None = None

    def sorted(self, order: np.ndarray) -> "LayerProblem":
        """The problem with its inputs in another order, [d_in] int."""
        pull = None if self.pull is None else self.pull[:, order]
        return dataclasses.replace(self, weight=self.weight[:, order], hessian=self.hessian[order][:, order], pull=pull)

    def energy(self, features: Features = WHOLE) -> Float32[Array, " rows"]:
        """Each row's ``w H w'``: the mean square of its output, [d_out]."""
        return features.sums(self.weight * features.product(self.weight, self.hessian))[0]

    def errors(self, weight: Float32[Array, "rows d"], features: Features = WHOLE) -> Errors:
        """The errors of weights ``v``, by one product with the Hessian."""
        change = weight - self.weight
        return Errors(
            features.sums(change * features.product(change, self.hessian))[0],
            features.sums(change**2 * features.diagonal(self.hessian))[0],
        )

    def value(self, weight: Float32[Array, "rows d_in"], errors: Errors | None = None) -> Float32[Array, " rows"]:
        """``f(v)``, [d_out] float32.

        Args:
          weight: [d_out, d_in] float32, the ``v`` of each row.
          errors: the errors of these weights, if computed before: the value then takes no product with the Hessian.
        """
        if errors is None:
            return self.endpoint(weight).value + (0.0 if self.offset is None else self.offset)
        value = errors.output + self.damping * errors.displacement
        if self.pull is not None:
            value = value - 2 * jnp.sum(self.pull * (weight - self.weight), axis=1)
        return value if self.offset is None else value + self.offset

    def endpoint(self, weight: Float32[Array, "rows d"], features: Features = WHOLE) -> "Endpoint":
        """Value without offset, and residual, by one product with ``H``."""
        change = weight - self.weight
        image = features.product(change, self.hessian)
        if self.damping:
            image = image + self.damping * features.diagonal(self.hessian) * change
        if self.pull is None:
            return Endpoint(features.sums(change * image)[0], -image)
        return Endpoint(features.sums(change * (image - 2 * self.pull))[0], self.pull - image)


class Pruned(NamedTuple):
    """A selector's mask, and the weights that it leaves.

    Attributes:
      weight: [d_out, d_in] float32, zero wherever ``keep`` is False.
      keep: [d_out, d_in] bool.
    """

    weight: Float32[Array, "rows d"]
    keep: Bool[Array, "rows d"]


class Endpoint(NamedTuple):
    """The objective where a solver ended, for methods that go on from there.

    Attributes:
      value: [d_out] float32, the objective of :class:`LayerProblem` without its offset.
      residual: [d_out, d_in] float32, of *all* inputs: minus half the gradient of the value, ``e - (v - w)(H + d diag H)``.
    """

    value: Float32[Array, " rows"]
    residual: Float32[Array, "rows d"]


class Solution(NamedTuple):
    """A solver's weights, and how near to the optimum they are.

    Attributes:
      weight: [d_out, d_in] float32, zero wherever the mask is False.
      gap: [d_out] float32, the solver's own measure of suboptimality of the row, 0 at the optimum. ``CG`` certifies an upper
        bound on ``(f - f*) / f*`` of the damped problem; each solver's docstring says what its number is.
      steps: [d_out] int32, iterations spent on the row.
      converged: [d_out] bool, whether the solver's own test passed.
      keep: [d_out, d_in] bool, the new mask if the solver changes masks; else None.
      end: objective and residual at ``weight``, from a solver that has them without further products; else None.
    """

    weight: Float32[Array, "rows d"]
    gap: Float32[Array, " rows"]
    steps: Int32[Array, " rows"]
    converged: Bool[Array, " rows"]
    keep: Bool[Array, "rows d"] | None = None
    end: Endpoint | None = None


def pull_of(problem: LayerProblem) -> Float32[Array, "rows d"]:
    """The pull ``e`` [d_out, d_in] float32; zeros if the problem has none."""
    return jnp.zeros_like(problem.weight) if problem.pull is None else problem.pull


def optimality_residual(problem: LayerProblem, pruned: Pruned, weight: Float32[Array, "rows d_in"]) -> Float32[Array, " rows"]:
    """Each row's relative residual of ``H_KK v_K = g_K``, [d_out] float32.

    In unit-diagonal variables, ``max_K |r_j| / sqrt(H_jj)  /  sqrt(w H w')`` with ``r = g - v H``: dimensionless, unchanged
    when ``H`` or any single feature is rescaled. Rows with no output energy, or with nothing kept, have residual 0.
    """
    residual = problem.endpoint(weight).residual
    diagonal = jnp.diagonal(problem.hessian)
    alive = diagonal > 0
    scaled = jnp.where(pruned.keep & alive, jnp.abs(residual) * jax.lax.rsqrt(jnp.where(alive, diagonal, 1.0)), 0.0)
    energy = problem.energy()
    return jnp.where(energy > 0, jnp.max(scaled, axis=1) * jax.lax.rsqrt(jnp.where(energy > 0, energy, 1.0)), 0.0)
