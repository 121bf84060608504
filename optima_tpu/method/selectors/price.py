"""Price: what a layer's output loses with a part of its inputs, when the other inputs compensate."""

import dataclasses
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Float32

from optima_tpu.method.linalg.features import rough_matmul
from optima_tpu.method.linalg.inverses import inverse, inverse_cholesky
from optima_tpu.method.linalg.scaling import unit_diagonal
from optima_tpu.method.linalg.smallest import lowest, totals
from optima_tpu.method.patterns import Pattern, WholeInputs
from optima_tpu.method.problem import LayerProblem, Pruned, pull_of
from optima_tpu.method.selectors.base import Selector
from optima_tpu.runtime.bounds import Bound


@dataclasses.dataclass(frozen=True)
class Price(Selector):
    """Prunes what costs least when the weights that stay are moved to the optimum; the kept ones do not move here.

    With ``A = H + d diag H`` over the inputs that are left, and ``v`` the optimum of a row over them, a part ``G`` of the inputs costs
    the row

        v_G ([A^-1]_GG)^-1 v_G'

    as in the optimal brain surgeon (Hassibi and Stork, 1993), for groups in ZipLM (Kurtic et al., 2023) and OSSCAR (Meng et al., 2024,
    arXiv:2403.12983).

    A pattern of whole inputs, neurons or heads loses its parts backward: the cheapest leave, the others compensate, and the rest is
    priced again, ``steps`` times. The price of a part is summed over all rows, each as a share of the energy ``w H w'`` of the row's
    output. Without that, the few rows that feed channels with massive activations decide alone. Other patterns take the price of
    each weight alone, in one step.

    Dead inputs (``scaling.live_features``) cost 0. Of equal prices the lower index goes first. ``problem.pull`` is read.

    Attributes:
      damping: ``d``, a ridge around the dense weights, as a share of the Hessian's diagonal. With little of it, the prices of
        correlated inputs are those of the calibration tokens alone.
      steps: how often the parts that are left are priced. Each takes an inverse of the Hessian.
    """

    group: ClassVar[Literal["row", "layer"]] = "row"
    hessians: ClassVar[int] = 5

    damping: Annotated[float, Bound(above=0)] = 0.1
    steps: Annotated[int, Bound(1)] = 4

    def __call__(self, problem: LayerProblem, pattern: Pattern) -> Pruned:
        priced = _Priced.of(problem, self.damping)
        if isinstance(pattern, WholeInputs):
            keep = jnp.broadcast_to(self._left(priced, pattern, problem.energy()), problem.weight.shape)
        else:
            keep = pattern.keep_mask(priced.prices(jnp.ones(problem.weight.shape[1], bool), 1))
        return Pruned(jnp.where(keep, problem.weight, 0.0), keep)

    def _left(self, priced: "_Priced", pattern: WholeInputs, energy: Array) -> Array:
        """The inputs that are left, [d_in] bool."""
        share = jnp.where(energy > 0, 1 / jnp.where(energy > 0, energy, 1.0), 0.0)[:, None]
        parts = priced.weight.shape[1] // pattern.width
        leaving = np.diff(np.linspace(0, parts - pattern.kept(parts), self.steps + 1).round().astype(np.int32))

        def without_cheapest(left: Array, count: Array) -> tuple[Array, None]:
            prices = totals(share * priced.prices(jnp.repeat(left, pattern.width), pattern.width))
            return left & ~lowest(jnp.where(left, prices, jnp.inf), count, "row")[0], None

        left, _ = jax.lax.scan(without_cheapest, jnp.ones(parts, bool), jnp.asarray(leaving))
        return jnp.repeat(left, pattern.width)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Priced:
    """The rows in variables that give the Hessian a unit diagonal.

    Attributes:
      weight: [d_out, d_in], ``w``; 0 for dead inputs.
      pull: [d_out, d_in], ``e``.
      matrix: [d_in, d_in], ``A``.
      damping: no eigenvalue of it is smaller.
    """

    weight: Float32[Array, "rows d_in"]
    pull: Float32[Array, "rows d_in"]
    matrix: Float32[Array, "d_in d_in"]
    damping: float = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, problem: LayerProblem, damping: float) -> "_Priced":
        unit, scale, live = unit_diagonal(problem.hessian)
        weight, pull = (jnp.where(live, each, 0.0) for each in (problem.weight * scale, pull_of(problem) / scale))
        return cls(weight, pull, unit + damping * jnp.eye(len(scale), dtype=unit.dtype), damping)

    def prices(self, left: Bool[Array, " d_in"], width: int) -> Float[Array, "rows parts"]:
        """What each row loses with each part of the inputs.

        Args:
          left: the inputs that are left; the prices of the others say nothing.
          width: of a part.
        """
        inside = jnp.where(left[:, None] & left, self.matrix, 0.0)
        made = inverse(jnp.where(left, inside, jnp.eye(len(left), dtype=inside.dtype)), min(self.damping, 1.0))
        # From the dense weights, so that rounding moves none where nothing asks for it.
        asked = jnp.where(left, rough_matmul(jnp.where(left, 0.0, self.weight), self.matrix) + self.pull, 0.0)
        solved = jnp.where(left, self.weight + rough_matmul(asked, made), 0.0)
        if width == 1:
            return solved**2 / jnp.diagonal(made)
        parts = np.arange(len(left) // width)
        blocks = made.reshape(len(parts), width, len(parts), width)[parts, :, parts, :]
        roots = jax.lax.map(inverse_cholesky, blocks)  # one after the other: see scaling.rows_at_once
        lost = jnp.einsum("rgw,gvw->rgv", solved.reshape(-1, len(parts), width), roots, precision="highest")
        return jnp.sum(lost**2, axis=-1)
