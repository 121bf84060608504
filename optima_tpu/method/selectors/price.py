"""Price: the output error of losing inputs when the others compensate."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Float32, Int32

from optima_tpu.method.linalg.features import rough_matmul
from optima_tpu.method.linalg.inverses import inverse, inverse_cholesky
from optima_tpu.method.linalg.scaling import ridged, unit_diagonal
from optima_tpu.method.linalg.smallest import lowest, totals
from optima_tpu.method.patterns import Pattern, WholeInputs
from optima_tpu.method.problem import LayerProblem, Pruned, pull_of
from optima_tpu.method.selectors.base import Selector
from optima_tpu.runtime.bounds import Bound
from optima_tpu.runtime.loops import usual_turns

# An exchange that lowers the objective by less than this share of the rows' energy is taken for rounding.
_LEAST_GAIN = 1e-6


@dataclasses.dataclass(frozen=True)
class Price(Selector):
    """Prunes what costs least after the kept weights move to the optimum.

    The selector itself does not move the kept weights. With ``A = H + d diag H`` over the inputs that are left, and ``v`` the
    optimum of a row over them, a part ``G`` of the inputs costs the row

        v_G ([A^-1]_GG)^-1 v_G'

    as in the optimal brain surgeon (Hassibi and Stork, 1993), for groups in ZipLM (Kurtic et al., 2023) and OSSCAR (Meng et al.,
    2024, arXiv:2403.12983).

    A pattern of whole inputs, neurons or heads loses its parts backward: the cheapest leave, the others compensate, and the rest
    is priced again, ``steps`` times. The price of a part is summed over all rows, each as a share of the energy ``w H w'`` of the
    row's output. Without that, the few rows that feed channels with massive activations decide alone. Other patterns take the
    price of each weight alone, in one step.

    Then parts that left come in for others. Of one input ``i`` for another ``j``, with ``K`` the inputs that are left, the
    residual ``r_i = e_i - (v - w) A_i``, ``u = -A_KK^-1 A_Ki`` and ``s = A_ii + A_iK u``, the objective of a row changes by

        (v_j + r_i u_j / s)^2 / ([A_KK^-1]_jj + u_j^2 / s)  -  r_i^2 / s

    Parts of several inputs are priced beside each part that may come in. A round makes all exchanges at once of two parts that
    are each other's best. The objective at the optimum over the new inputs decides: if it has not fallen, the next round makes
    the better half of them. The change by one exchange alone is exact, so the rounds end where none lowers the objective.

    Dead inputs (``scaling.live_features``) cost 0. Of equal prices the lower index goes first. ``problem.pull`` is read.

    Attributes:
      damping: ``d``, a ridge around the dense weights, as a share of the Hessian's diagonal. With little of it, the prices of
        correlated inputs are those of the calibration tokens alone.
      steps: how often the parts that are left are priced. Each takes an inverse of the Hessian.
      exchanges: the most rounds in which parts that left come in for others, as long as the objective falls. Each takes an
        inverse and two more products of its size; with heads, an inverse for each head that left. Patterns of single weights make
        none.
    """

    group: ClassVar[Literal["row", "layer"]] = "row"
    hessians: ClassVar[int] = 7

    damping: Annotated[float, Bound(above=0)] = 0.1
    steps: Annotated[int, Bound(1)] = 4
    exchanges: Annotated[int, Bound(0)] = 0

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
        parts = pattern.parts_in(len(priced.matrix))
        width = len(priced.matrix) // parts
        leaving = np.diff(np.linspace(0, parts - pattern.kept(parts), self.steps + 1).round().astype(np.int32))

        def without_cheapest(left: Array, count: Array) -> tuple[Array, None]:
            prices = totals(share * priced.prices(jnp.repeat(left, width), width))
            return left & ~lowest(jnp.where(left, prices, jnp.inf), count, "row")[0], None

        left, _ = jax.lax.scan(without_cheapest, jnp.ones(parts, bool), jnp.asarray(leaving))
        if self.exchanges and leaving.any():
            left = self._exchanged(left, lambda left: priced.exchanged(left, width, share))
        return jnp.repeat(left, width)

    def _exchanged(self, left: Array, compared: Callable[[Array], tuple[Array, Array]]) -> Array:
        """The parts left after all rounds of exchanges, [parts] bool.

        Args:
          compared: what :meth:`_Priced.exchanged` returns for parts that are left.
        """

        def one_round(state: tuple[Array, _Exchanges]) -> tuple[Array, _Exchanges]:
            turn, before = state
            tried = before.made()
            after = _Exchanges.best(tried, *compared(tried))
            better = after.value < before.value
            taken: _Exchanges = jax.tree.map(lambda new, old: jnp.where(better, new, old), after, before)
            most = jnp.where(better, jnp.minimum(after.most, before.most), before.most // 2)
            return turn + 1, taken._replace(most=most)

        # The first turn exchanges nothing and finds the first exchanges.
        start = _Exchanges(
            left, jnp.float32(jnp.inf), jnp.zeros(len(left), jnp.int32), jnp.full(len(left), jnp.inf), jnp.int32(len(left))
        )
        with usual_turns(self.exchanges + 1):
            _, final = jax.lax.while_loop(
                lambda state: (state[0] <= self.exchanges) & (state[1].most > 0), one_round, (jnp.int32(0), start)
            )
        return final.left


class _Exchanges(NamedTuple):
    """The exchanges of two parts that are each other's best.

    Attributes:
      left: the parts that are left.
      value: the objective of these.
      goes: for each part the one that would leave for it.
      change: what its exchange alone would add to the objective; inf where there is none.
      most: how many exchanges to make.
    """

    left: Bool[Array, " parts"]
    value: Float[Array, ""]
    goes: Int32[Array, " parts"]
    change: Float[Array, " parts"]
    most: Int32[Array, ""]

    @classmethod
    def best(cls, left: Bool[Array, " parts"], value: Float[Array, ""], changes: Float[Array, "parts parts"]) -> "_Exchanges":
        """All exchanges, from the results of :meth:`_Priced.exchanged`."""
        goes = jnp.argmin(changes, axis=0).astype(jnp.int32)
        mutual = jnp.argmin(changes, axis=1)[goes] == jnp.arange(len(left))
        change = jnp.where(mutual, jnp.min(changes, axis=0), jnp.inf)
        return cls(left, value, goes, change, jnp.sum(change < 0, dtype=jnp.int32))

    def made(self) -> Bool[Array, " parts"]:
        """The parts that are left after the best ``most`` exchanges."""
        comes = lowest(self.change[None], self.most, "row")[0] & (self.change < 0)
        gone = jnp.zeros_like(self.left).at[jnp.where(comes, self.goes, len(self.left))].set(True, mode="drop")
        return (self.left | comes) & ~gone


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
        return cls(weight, pull, ridged(unit, damping), damping)

    def prices(self, left: Bool[Array, " d_in"], width: int) -> Float[Array, "rows parts"]:
        """What each row loses with each part of the inputs.

        Args:
          left: the inputs that are left; the prices of the others say nothing.
          width: of a part.
        """
        made, solved = self._solved(left)
        if width == 1:
            return solved**2 / jnp.diagonal(made)
        parts = np.arange(len(left) // width)
        blocks = made.reshape(len(parts), width, len(parts), width)[parts, :, parts, :]
        roots = jax.lax.map(inverse_cholesky, blocks)  # one after the other: see scaling.rows_at_once
        lost = jnp.einsum("rgw,gvw->rgv", solved.reshape(-1, len(parts), width), roots, precision="highest")
        return jnp.sum(lost**2, axis=-1)

    def exchanged(
        self, left: Bool[Array, " parts"], width: int, share: Float[Array, "rows 1"]
    ) -> tuple[Float[Array, ""], Float[Array, "parts parts"]]:
        """The objective, and what an exchange of two parts adds to it.

        Args:
          left: the parts that are left.
          width: of a part.
          share: the weight of each row in the objective.

        Returns:
          ([], [parts that leave, parts that come in], inf where there is no exchange or it lowers nothing)
        """
        inside = jnp.repeat(left, width)
        made, solved = self._solved(inside)
        move = solved - self.weight
        residual = jnp.where(inside, 0.0, self.pull - rough_matmul(move, self.matrix))
        value = -jnp.sum(share * move * (self.pull + residual))

        def beside(part: Array) -> Array:
            """The changes if ``part`` comes in; its own price is its win."""
            prices = jnp.sum(share * self.prices(inside | (jnp.arange(len(inside)) // width == part), width), axis=0)
            return prices - prices[part]

        if width > 1:
            parts = jnp.arange(len(left))
            changes = jax.lax.map(lambda part: jax.lax.cond(left[part], lambda _: jnp.zeros(len(left)), beside, part), parts).T
        else:
            along = -rough_matmul(jnp.where(inside, made, 0.0), jnp.where(inside[:, None], self.matrix, 0.0))
            schur = jnp.diagonal(self.matrix) + jnp.sum(jnp.where(inside[:, None], self.matrix * along, 0.0), axis=0)
            step, wins = along / schur, jnp.sum(share * residual**2, axis=0)
            costs = jnp.sum(share * solved**2, axis=0)[:, None] + step * (
                2 * rough_matmul((share * solved).T, residual) + step * wins
            )
            changes = costs / (jnp.diagonal(made)[:, None] + along * step) - wins / schur
        lower = changes < -_LEAST_GAIN * len(share)
        return value, jnp.where(left[:, None] & ~left & lower, changes, jnp.inf)

    def _solved(self, left: Bool[Array, " d_in"]) -> tuple[Float[Array, "d_in d_in"], Float[Array, "rows d_in"]]:
        """The inverse over the inputs left, and the optimum of every row.

        Elsewhere the inverse has a unit diagonal.
        """
        inside = jnp.where(left[:, None] & left, self.matrix, 0.0)
        made = inverse(jnp.where(left, inside, jnp.eye(len(left), dtype=inside.dtype)), min(self.damping, 1.0))
        # From the dense weights, so that rounding moves none where nothing asks for it.
        right_side = jnp.where(left, rough_matmul(jnp.where(left, 0.0, self.weight), self.matrix) + self.pull, 0.0)
        return made, jnp.where(left, self.weight + rough_matmul(right_side, made), 0.0)
