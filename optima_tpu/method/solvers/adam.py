"""Adam, the baseline that the paper compares its solver with (OPTIMA, 2025, table 7; paramathic/optima,
optima/weight_update.py: update_weights_learnable).

With ``s`` the change of a row against its start, the selector's weights ``u``, every row minimises

    f(u + s) - f(u) = s H s' + 2 b s'   over its kept inputs,     b = (u - w) H - e     (e = g - w H; zero in the paper)

The loss is quadratic, so ``H`` holds all of the calibration set: a full-batch gradient is one product, ``b + s H``.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import PyTree

from optima_tpu.method.linalg.features import matmul
from optima_tpu.method.linalg.scaling import live_features, require
from optima_tpu.method.problem import LayerProblem, Pruned, Solution, optimality_residual, pull_of
from optima_tpu.method.resources import Cost, Footprint
from optima_tpu.method.solvers.base import Solver


@dataclasses.dataclass(frozen=True)
class Adam(Solver):
    """The paper's baseline: full-batch Adam from the selector's weights, the best of several learning rates.

    Adam with betas 0.9 and 0.999 and a learning rate that falls linearly to 0, once for each of ``learning_rates``. A row
    ends at the best point that any of them visited, its start included: it is never left worse than it came. It does
    not reach the optimum in this many steps. Departures from the published code:

    - A layer's bias is in its output and in its target, so it cancels, and the Hessian never sees it. The published loss
      compares ``X V'`` with outputs that hold the bias, and pulls the weights of a layer that has one off course.
    - The learning rate is chosen for each row; the published code takes one for a matrix, by its total loss before the
      last step. Here rows of several matrices are solved together, on all devices without communication. A choice for
      each row, over every point visited, leaves at most the error of the published choice.
    - ``eps`` is 1e-8 of the row's largest gradient at its start. The published one is 1e-8 for a loss that sums over
      calibration sequences and averages over tokens and outputs. Adam depends on the scale of the loss through ``eps``
      alone: without that it is the same elementwise step, in the plain variables, whatever the scale of the Hessian.
    - Weights and moments are float32. The published ones have the model's dtype, and bfloat16 rounds small steps away.

    Learning rates are in units of the weights. Where they are too large for a layer Adam diverges, and that is reported:
    ``converged`` is False where every learning rate ended above the row's start (a start close to the optimum is left
    upwards by any of them). ``steps`` is the step at which the best point was visited, 0 where none improved on the
    start. ``gap`` is ``optimality_residual``, the relative KKT residual, dimensionless. Kept weights of dead inputs stay
    as they are; so do rows whose data is not finite, with an infinite gap and not converged.

    Attributes:
      steps: steps for each learning rate.
      learning_rates: where the learning rates start, such as [1e-2, 1e-3].
    """

    steps: int = 20
    learning_rates: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-5)

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", "at least 1", self.steps)
        require(len(self.learning_rates) > 0, "learning_rates", "one number or more", self.learning_rates)
        for rate in self.learning_rates:
            require(0 < rate < float("inf"), "learning_rates", "finite numbers above 0", rate)

    def footprint(self, damping: float) -> Footprint:
        return Footprint(hessians=3, vectors=10)  # fitted 1.8 and 8.4

    def cost(self) -> Cost:
        products = len(self.learning_rates) * (self.steps + 1) + 2
        return Cost(products, passes=14 * products)

    def __call__(self, problem: LayerProblem, pruned: Pruned) -> Solution:
        live = live_features(problem.hessian)
        hessian = jnp.where(live[:, None] & live, problem.hessian, 0.0)
        pull, damped = pull_of(problem), problem
        if problem.damping:
            hessian = hessian + problem.damping * jnp.diag(jnp.diagonal(hessian))
            damped = LayerProblem(problem.weight, hessian, pull + matmul(problem.weight, hessian))
        free = pruned.keep & live
        sound = jnp.all(jnp.isfinite(pull), axis=1)
        slope = jnp.where(free & sound[:, None], matmul(pruned.weight - problem.weight, hessian) - pull, 0.0)
        largest = jnp.max(jnp.abs(slope), axis=1, keepdims=True)
        unit = jnp.where(largest > 0, largest, 1.0)
        slope = slope / unit

        def descend(best: _Best, rate: Array) -> tuple[_Best, Array]:
            adam = optax.adam(optax.linear_schedule(rate, 0.0, self.steps))

            def step(carry: tuple[Array, PyTree[Array], _Best], index: Array) -> tuple[tuple[Array, PyTree[Array], _Best], Array]:
                shift, state, best = carry
                image = matmul(shift, hessian) / unit
                value = jnp.sum(shift * (image + 2 * slope), axis=1)
                # A NaN is not lower: a row that is not finite stays at its start.
                lower = value < best.value
                best = _Best(
                    jnp.where(lower[:, None], shift, best.shift),
                    jnp.where(lower, value, best.value),
                    jnp.where(lower, index, best.step),
                )
                update, state = adam.update(jnp.where(free, slope + image, 0.0), state)
                return (optax.apply_updates(shift, update), state, best), value

            start = jnp.zeros_like(slope)
            # One pass more than steps, to see where the last one led. The learning rate is 0 there.
            carry, values = jax.lax.scan(step, (start, adam.init(start), best), jnp.arange(self.steps + 1))
            return carry[2], values[-1]

        nowhere = _Best(jnp.zeros_like(slope), jnp.zeros(slope.shape[0]), jnp.zeros(slope.shape[0], jnp.int32))
        # One learning rate after another: side by side each would need its own moments in memory.
        best, ends = jax.lax.scan(descend, nowhere, jnp.asarray(self.learning_rates, jnp.float32))
        moved = jnp.where(free, pruned.weight + best.shift, jnp.where(pruned.keep, pruned.weight, 0.0))
        residual = optimality_residual(damped, Pruned(moved, free), moved)
        gap = jnp.where(sound & jnp.isfinite(residual), residual, jnp.inf)
        return Solution(moved, gap, best.step, sound & jnp.any(ends <= 0, axis=0))


class _Best(NamedTuple):
    """The lowest point seen."""

    shift: Array  # [rows, d_in], s
    value: Array  # [rows], f(u + s) - f(u), in units of the row's largest gradient at its start
    step: Array  # [rows] int32
