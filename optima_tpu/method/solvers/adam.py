"""Adam, the baseline of the paper (OPTIMA, 2025, table 7).

Published code: paramathic/optima, optima/weight_update.py: update_weights_learnable.

A row starts at the selector's weights ``u``. With ``s`` its change from there, every row minimises

    f(u + s) - f(u) = s H s' + 2 b s'   over its kept inputs,     b = (u - w) H - e     (e = g - w H; zero in the paper)

The loss is quadratic, so ``H`` represents the whole calibration set: a full-batch gradient is one product, ``b + s H``.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PyTree

from optima_tpu.errors import UserError
from optima_tpu.method.linalg.features import matmul
from optima_tpu.method.linalg.scaling import damped, live_features
from optima_tpu.method.problem import LayerProblem, Pruned, Solution, optimality_residual, pull_of
from optima_tpu.method.resources import Footprint
from optima_tpu.method.solvers.base import Solver
from optima_tpu.runtime.bounds import Bound


@dataclasses.dataclass(frozen=True)
class Adam(Solver):
    """The paper's baseline: full-batch Adam, best of several learning rates.

    Adam starts from the selector's weights, with betas 0.9 and 0.999 and a learning rate that falls linearly to 0, once for
    each of ``learning_rates``. A row takes the best point that any of the runs visited, its start included, so no row gets
    worse. The default number of steps is too small to reach the optimum. Differences from the published code:

    - A layer's bias is part of its output and of its target, so it cancels and the Hessian does not contain it. The published
      loss compares ``X V'`` with outputs that include the bias. If a layer has a bias, this pulls its weights away from the
      optimum.
    - The learning rate is chosen for each row; the published code chooses one for a matrix, by its total loss before the last
      step. Here rows of several matrices are solved together, on all devices without communication. A choice for each row, over
      every point visited, leaves at most the error of the published choice.
    - ``eps`` is 1e-8 of the row's largest gradient at its start. The published one is 1e-8 for a loss that sums over
      calibration windows and averages over tokens and outputs. Adam depends on the scale of the loss through ``eps`` alone:
      without ``eps``, its elementwise step is the same for any scale of the Hessian.
    - Weights and moments are float32. The published ones have the model's dtype, and bfloat16 rounds small steps away.

    Learning rates are in units of the weights. If they are too large for a layer, Adam diverges, and this is reported:
    ``converged`` is False if every learning rate ended above the row's start. (From a start close to the optimum every learning
    rate may end above it.) ``steps`` is the step at which the best point was visited, 0 if no step improved on the start. ``gap``
    is ``optimality_residual``, the relative KKT residual, dimensionless. Kept weights of dead inputs do not move. Rows whose data
    is not finite do not move either; they have an infinite gap and are not converged.

    Attributes:
      steps: number of steps with each learning rate.
      learning_rates: the initial learning rates, such as [1e-2, 1e-3]; each falls linearly to 0.
    """

    steps: Annotated[int, Bound(1)] = 20
    learning_rates: Annotated[tuple[float, ...], Bound(above=0)] = (1e-2, 1e-3, 1e-4, 1e-5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.learning_rates:
            raise UserError("expected one number or more in solver.learning_rates, got none")

    def footprint(self) -> Footprint:
        return Footprint(hessians=3, vectors=10)  # fitted 1.8 and 8.4

    def __call__(self, problem: LayerProblem, pruned: Pruned) -> Solution:
        import optax  # here, so that whoever takes another solver needs no optax

        live = live_features(problem.hessian)
        hessian = jnp.where(live[:, None] & live, problem.hessian, 0.0)
        pull, solved = pull_of(problem), problem
        if problem.damping:
            hessian = damped(hessian, problem.damping)
            solved = LayerProblem(problem.weight, hessian, problem.pull)
        free = pruned.keep & live
        sound = jnp.all(jnp.isfinite(pull) & jnp.isfinite(problem.weight), axis=1)
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
                with jax.numpy_dtype_promotion("standard"):  # optax's schedule divides its counter by a float
                    update, state = adam.update(jnp.where(free, slope + image, 0.0), state)
                return (optax.apply_updates(shift, update), state, best), value

            start = jnp.zeros_like(slope)
            # One iteration more than steps, to evaluate the result of the last step. Its learning rate is 0.
            carry, values = jax.lax.scan(step, (start, adam.init(start), best), jnp.arange(self.steps + 1))
            return carry[2], values[-1]

        nowhere = _Best(jnp.zeros_like(slope), jnp.zeros(slope.shape[0]), jnp.zeros(slope.shape[0], jnp.int32))
        # One learning rate after another: in parallel, each would need its own moments in memory.
        best, ends = jax.lax.scan(descend, nowhere, jnp.asarray(self.learning_rates, jnp.float32))
        moved = jnp.where(free, pruned.weight + best.shift, jnp.where(pruned.keep, pruned.weight, 0.0))
        residual = optimality_residual(solved, Pruned(moved, free), moved)
        gap = jnp.where(sound & jnp.isfinite(residual), residual, jnp.inf)
        return Solution(moved, gap, best.step, sound & jnp.any(ends <= 0, axis=0))


class _Best(NamedTuple):
    """The lowest point seen."""

    shift: Array  # [rows, d_in], s
    value: Array  # [rows], f(u + s) - f(u), in units of the row's largest gradient at its start
    step: Array  # [rows] int32
