"""Rounds pruned rows to an integer grid by the objective that pruned them.

A quantised row is ``v_j = s_g(j) q_j`` with integers ``q_j`` of ``b`` bits and one scale ``s`` for each group of inputs. The
grid is symmetric: zero is an integer, so pruned weights stay zero. With ``A`` the damped Hessian, ``w`` the dense row and ``e``
the pull of the target, a row minimises the objective of the solver (``problem.LayerProblem``),

    f(v) = (v - w) A (v - w)' - 2 e (v - w)'      over the integers of the kept inputs, and over the scales

from the solved row ``x``, the minimum of ``f`` without the grid. So ``f(x)`` is a lower bound, and the quantisation costs
``f(v) - f(x)``. Three steps:

1. The scale of a group is the largest weight over the largest integer, or a smaller one. The candidate with the least
   ``sum_j A_jj (v_j - x_j)^2`` after rounding to nearest is taken.
2. Inputs are rounded one by one, and later inputs make up for each error. With ``U'U = A^-1`` (``selectors.obs``), once input
   ``j`` is fixed, ``x[j:] -= (x_j - v_j) / U_jj * U[j, j:]``. Pruned inputs take part: they are moved by the inputs before them
   and are set to zero in their turn, as SparseGPT does (Frantar and Alistarh, 2023, section 3.5; GPTQ, 2022, without masks). All
   rows share ``U``.
3. Cyclic coordinate descent. With ``g = (v - w) A - e``, half the gradient, the scale of a group and the integer of an input
   have the best values

       s_g += -(q_g g_g') / (q_g A_gg q_g')          v_j = s round((v_j - g_j / A_jj) / s)

   and each is taken only if the objective falls. (QuantEase, Behdin et al., 2023, descends over integers without masks and
   scales.)

A row starts step 3 from the result of step 2, or from the nearest integers where these have the lower objective. So no row is
worse than its nearest integers. Weights and scales are rounded to the dtype in which they are stored before they are compared.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32

from optima_tpu.errors import UserError
from optima_tpu.method.choice import Method
from optima_tpu.method.linalg.features import WHOLE, Features, matmul
from optima_tpu.method.linalg.scaling import damped
from optima_tpu.method.patterns import WholeInputs
from optima_tpu.method.problem import LayerProblem, Pruned, pull_of
from optima_tpu.method.resources import Footprint
from optima_tpu.method.selectors.obs import inverse_factor
from optima_tpu.runtime.bounds import Bound

if TYPE_CHECKING:
    from optima_tpu.method.recipe import Recipe

_COLUMNS = 128
"""Most inputs that are rounded between two products with the Hessian."""
_SCALES = 12
"""Scales that are tried for each group."""
_RIDGE = 0.01
"""What the factor ``U`` adds to the diagonal, as a share of its mean: the value of the published codes."""


class Quantized(NamedTuple):
    """Rows on an integer grid, with values exact in the stored dtype.

    Attributes:
      weight: [rows, d_in] float32, ``scale * integer`` rounded to that dtype; zero wherever the mask is False.
      nearest: [rows, d_in] float32, the solved rows rounded to the nearest integers, with the scales of step 1.
      scale: [rows, groups] float32, above 0; a group has ``d_in / groups`` consecutive inputs.
    """

    weight: Float32[Array, "rows d_in"]
    nearest: Float32[Array, "rows d_in"]
    scale: Float32[Array, "rows groups"]


QuantizeRows = Callable[[LayerProblem, Pruned], Quantized]


@dataclasses.dataclass(frozen=True)
class Quantizer(Method):
    """Stores kept weights as integers, with a scale for each row or group.

    Attributes:
      group: inputs of a row that share a scale, such as 32 or 128; null takes one scale for the row. Smaller groups are more
        precise, and store more scales. The number must divide the inputs of every pruned layer.
      clip: the smallest scale that is tried for a group, as a share of the scale at which the largest weight is still rounded and
        not clipped; 1 tries no other.
      compensate: whether the later weights of a row make up for the rounding of the earlier ones, in GPTQ's order; false rounds
        to the nearest integers.
      sweeps: rounds of coordinate descent over scales and integers after the rounding. More rounds cost time and give less each.
    """

    setting: ClassVar[str] = "quantize"
    bits: ClassVar[int]

    group: Annotated[int | None, Bound(1, hint="null takes one scale for a row")] = None
    clip: Annotated[float, Bound(above=0, most=1)] = 0.5
    compensate: bool = True
    sweeps: Annotated[int, Bound(0)] = 4

    def __str__(self) -> str:
        return f"int{self.bits} by {'row' if self.group is None else f'groups of {self.group}'}"

    def needs(self, recipe: "Recipe") -> None:
        """Raises UserError for groups of inputs that a pattern takes apart."""
        for pattern in recipe.patterns:
            if isinstance(pattern, WholeInputs) and self.group is not None:
                raise UserError(
                    f"expected one scale for a row where the pattern is {pattern.text()}, which takes groups of inputs apart, "
                    f"got groups of {self.group}; take --quantize.group null"
                )

    def check(self, d_in: int) -> None:
        """Raises UserError if the groups do not divide a layer's inputs."""
        if self.group is not None and d_in % self.group:
            fitting = [str(size) for size in (128, 64, 32, 16) if d_in % size == 0]
            raise UserError(
                f"expected quantize.group to divide the number of inputs, got {self.group} for a layer with {d_in}; "
                f"take {' or '.join([*fitting, 'null'])}"
            )

    def footprint(self) -> Footprint:
        """The device memory of quantising rows."""
        # H, A, U and what the factorisation of U needs. Of a row: dense, solved, pull, change, scales, and the result of each
        # step.
        return Footprint(hessians=5, vectors=9)

    def __call__(self, problem: LayerProblem, pruned: Pruned, dtype: np.dtype) -> Quantized:
        """As :meth:`prepare`, for rows at hand."""
        return self.prepare(problem.hessian, problem.damping, dtype=dtype)(problem, pruned)

    def prepare(
        self, hessian: Float32[Array, "d_in d_in"], damping: float, features: Features = WHOLE, *, dtype: np.dtype
    ) -> QuantizeRows:
        """Returns a function that quantises solved rows with this Hessian.

        It takes the rows' problem, with this Hessian and damping, and their solved weights and masks.

        Args:
          dtype: the dtype in which weights and scales are stored.
        """
        if features != WHOLE:
            raise ValueError("integers are chosen one input after the other: expected features that are not split over devices")
        d_in = len(hessian)
        self.check(d_in)
        matrix = damped(hessian, damping)
        factor = inverse_factor(matrix, _RIDGE) if self.compensate else None
        grid = _Grid(self.bits, self.group or d_in, dtype)
        return lambda problem, pruned: self._quantize(LayerProblem(problem.weight, matrix, problem.pull), pruned, grid, factor)

    def _quantize(self, problem: LayerProblem, pruned: Pruned, grid: "_Grid", factor: Array | None) -> Quantized:
        scale = grid.scales(pruned.weight, jnp.diagonal(problem.hessian), self.clip)
        nearest = start = grid.nearest(pruned.weight, grid.spread(scale))
        if factor is not None:
            compensated = _compensated(pruned, grid, grid.spread(scale), factor)
            # A factor that float32 could not compute is NaN, which is not lower.
            lower = problem.value(compensated) < problem.value(nearest)
            start = jnp.where(lower[:, None], compensated, nearest)

        def sweep(_: int | Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            weight, scale = _rescaled(*state, problem, grid)
            return _descended(weight, grid.spread(scale), pruned.keep, problem, grid), scale

        weight, scale = jax.lax.fori_loop(0, self.sweeps, sweep, (start, scale))
        return Quantized(weight, nearest, scale)


@dataclasses.dataclass(frozen=True)
class Int8(Quantizer):
    """Integers of 8 bits."""

    bits: ClassVar[int] = 8


@dataclasses.dataclass(frozen=True)
class Int4(Quantizer):
    """Integers of 4 bits."""

    bits: ClassVar[int] = 4

    group: Annotated[int | None, Bound(1, hint="null takes one scale for a row")] = 32


def _slope(problem: LayerProblem, weight: Array, first: Array, count: int) -> tuple[Array, Array]:
    """Half the gradient by ``count`` inputs, and their block of ``A``.

    They are [rows, count] and [count, count]. The gradient is computed from the weights each time: updates would add up their
    rounding.
    """
    columns = jax.lax.dynamic_slice_in_dim(problem.hessian, first, count, axis=1)
    pull = jax.lax.dynamic_slice_in_dim(pull_of(problem), first, count, axis=1)
    return matmul(weight - problem.weight, columns) - pull, jax.lax.dynamic_slice_in_dim(columns, first, count)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """The numbers ``scale * integer`` in the dtype in which they are stored.

    Attributes:
      bits: of an integer.
      group: inputs that share a scale.
      dtype: of scales and weights.
    """

    bits: int
    group: int
    dtype: np.dtype

    def stored(self, values: Array) -> Array:
        """Values rounded to the stored dtype, with 0.0 instead of -0.0."""
        back = values.astype(self.dtype).astype(jnp.float32)
        return jnp.where(back == 0, 0.0, back)  # XLA would drop the addition of 0.0

    def nearest(self, weight: Array, scale: Array) -> Array:
        """The numbers with the integers nearest to ``weight / scale``."""
        half = 2 ** (self.bits - 1)
        return self.stored(jnp.clip(jnp.round(weight / scale), -half, half - 1) * scale)

    def spread(self, scale: Array) -> Array:
        """Each input's scale, [rows, d_in], from each group's scale."""
        return jnp.repeat(scale, self.group, axis=1)

    def scales(self, weight: Array, diagonal: Array, clip: float) -> Array:
        """The scale of every group, [rows, groups]: step 1 of the module."""
        rows = len(weight)
        largest = jnp.max(jnp.abs(weight).reshape(rows, -1, self.group), axis=2)
        # Half a level beyond the largest integer, so that the largest weight is rounded like the others.
        full = largest / (2 ** (self.bits - 1) - 0.5)
        shares = jnp.linspace(1.0, clip, _SCALES if clip < 1 else 1)

        def trial(index: int | Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
            scale = self.stored(full * shares[index])
            scale = jnp.where(scale > 0, scale, 1.0)  # a group of zeros, or of weights too small for the dtype
            error = (self.nearest(weight, self.spread(scale)) - weight) ** 2 * diagonal
            error = jnp.sum(error.reshape(rows, -1, self.group), axis=2)
            better = error < best[0]
            return jnp.where(better, error, best[0]), jnp.where(better, scale, best[1])

        start = (jnp.full(largest.shape, jnp.inf), jnp.ones(largest.shape))
        return jax.lax.fori_loop(0, len(shares), trial, start)[1]


def _blocks(d_in: int) -> tuple[Array, int]:
    """The first inputs of equal blocks of inputs, and the size of a block."""
    size = max(size for size in range(1, min(_COLUMNS, d_in) + 1) if d_in % size == 0)
    return jnp.arange(0, d_in, size), size


def _compensated(pruned: Pruned, grid: _Grid, scale: Array, factor: Array) -> Array:
    """Step 2 of the module: [rows, d_in]."""
    starts, size = _blocks(len(factor))

    def block(weight: Array, first: Array) -> tuple[Array, Array]:
        block_weight, scales, keep = (
            jax.lax.dynamic_slice_in_dim(a, first, size, axis=1).T for a in (weight, scale, pruned.keep)
        )
        across = jax.lax.dynamic_slice_in_dim(factor, first, size)
        inside = jax.lax.dynamic_slice_in_dim(across, first, size, axis=1)

        def step(j: int | Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            # U is zero before its diagonal: only the inputs from j on move.
            block_weight, errors = carry
            fixed = jnp.where(keep[j], grid.nearest(block_weight[j], scales[j]), 0.0)
            error = (block_weight[j] - fixed) / inside[j, j]
            return (block_weight - inside[j][:, None] * error).at[j].set(fixed), errors.at[j].set(error)

        # Inputs are the first axis, so that the loop reads and writes contiguous memory.
        block_weight, errors = jax.lax.fori_loop(0, size, step, (block_weight, jnp.zeros_like(block_weight)))
        return weight - matmul(errors.T, across), block_weight.T

    blocks = jax.lax.scan(block, pruned.weight, starts)[1]
    return jnp.moveaxis(blocks, 0, 1).reshape(pruned.weight.shape)


def _rescaled(weight: Array, scale: Array, problem: LayerProblem, grid: _Grid) -> tuple[Array, Array]:
    """Step 3 for scales, group by group, integers fixed: (weight, scale)."""

    def group(weight: Array, part: tuple[Array, Array]) -> tuple[Array, Array]:
        first, old = part
        group_weight = jax.lax.dynamic_slice_in_dim(weight, first, grid.group, axis=1)
        slope, inside = _slope(problem, weight, first, grid.group)
        integers = jnp.round(group_weight / old[:, None])
        curvature = jnp.sum(matmul(integers, inside) * integers, axis=1)
        curved = curvature > 0
        step = jnp.where(curved, -jnp.sum(integers * slope, axis=1) / jnp.where(curved, curvature, 1.0), 0.0)
        new = grid.stored(jnp.maximum(old + step, old / 2))  # a scale stays above 0
        moved = grid.stored(integers * new[:, None])
        change = moved - group_weight
        fell = (jnp.sum(change * (2 * slope + matmul(change, inside)), axis=1) < 0) & (new > 0)
        group_weight = jnp.where(fell[:, None], moved, group_weight)
        return jax.lax.dynamic_update_slice_in_dim(weight, group_weight, first, axis=1), jnp.where(fell, new, old)

    starts = jnp.arange(0, weight.shape[1], grid.group)
    weight, scale = jax.lax.scan(group, weight, (starts, scale.T))
    return weight, scale.T


def _descended(weight: Array, scale: Array, keep: Array, problem: LayerProblem, grid: _Grid) -> Array:
    """Step 3 for integers, one input after the other, scales fixed."""
    starts, size = _blocks(weight.shape[1])

    def block(weight: Array, first: Array) -> tuple[Array, None]:
        slope, inside = _slope(problem, weight, first, size)
        block_weight, scales, kept = (jax.lax.dynamic_slice_in_dim(a, first, size, axis=1).T for a in (weight, scale, keep))

        def step(j: int | Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            block_weight, slope = carry
            curvature = inside[j, j]
            best = block_weight[j] - jnp.where(curvature > 0, slope[j] / jnp.where(curvature > 0, curvature, 1.0), 0.0)
            new = grid.nearest(best, scales[j])
            # Along one input the objective is a parabola around ``best``.
            closer = kept[j] & (jnp.abs(new - best) < jnp.abs(block_weight[j] - best))
            change = jnp.where(closer, new - block_weight[j], 0.0)
            return block_weight.at[j].set(jnp.where(closer, new, block_weight[j])), slope + inside[j][:, None] * change

        block_weight, _ = jax.lax.fori_loop(0, size, step, (block_weight, slope.T))
        return jax.lax.dynamic_update_slice_in_dim(weight, block_weight.T, first, axis=1), None

    return jax.lax.scan(block, weight, starts)[0]
