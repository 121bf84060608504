"""How much of each block is pruned: equal shares, or more where it is cheap.

Every layer that no rule of ``--layers`` names has the sparsity ``s + k g`` of its block. ``s`` is the pattern's sparsity and
``k`` a whole number. The grain ``g`` is a step that removes a whole number of weights from every row of every layer. The sum of
``k`` over the blocks is 0. So the model loses exactly as many weights as with one sparsity for all blocks. The steps keep the
number of compiled programs small.

N:M fixes what each block loses, and imported masks are allocated already: neither can be combined with an allocation.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

import numpy as np

from optima_tpu.errors import UserError
from optima_tpu.method.choice import Method
from optima_tpu.runtime.bounds import Bound

if TYPE_CHECKING:
    from optima_tpu.method.recipe import Recipe

# Preferred size of the grain. The grain itself is a multiple of 1 / gcd of the layers' numbers of inputs.
_GRAIN = 0.02


class SparsitySteps(NamedTuple):
    """The sparsities that a block may have.

    Attributes:
      size: the difference between neighbouring sparsities, the grain ``g``.
      most: the largest number of steps between a block's sparsity and the pattern's, for :class:`Measured`.
    """

    size: float
    most: int


class Allocation(Method):
    """How the pattern's sparsity is distributed among the blocks.

    Attributes:
      measures: whether the sparsities of blocks depend on measurements of the blocks.
    """

    setting: ClassVar[str] = "allocation"
    measures: ClassVar[bool] = True
    limit: float = 0.0

    @property
    def reach(self) -> float:
        """The largest difference of a block's sparsity from the pattern's."""
        return self.limit

    def needs(self, recipe: "Recipe") -> None:
        """Raises UserError if pattern or masks fix what each block loses."""
        if self.measures and not recipe.pattern.free:
            raise UserError(
                f"expected a pattern such as 0.6/row where {self.in_words}, got {recipe.pattern}, which fixes "
                "what every row loses; take --allocation uniform"
            )
        if self.measures and not recipe.selector.chooses:
            raise UserError(
                f"expected a selector that chooses masks where {self.in_words}, got imported: such "
                "masks fix what each block loses; take --allocation uniform"
            )

    def wanted(self, scores: np.ndarray, steps: SparsitySteps) -> np.ndarray:
        """Wanted steps of blocks from the pattern's sparsity, of mean 0.

        Args:
          scores: [blocks, n], the measurements of every block.

        Returns:
          [blocks] float64.
        """
        return np.zeros(len(scores))


@dataclasses.dataclass(frozen=True)
class Uniform(Allocation):
    """Prunes every block to the pattern's sparsity."""

    measures: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class OWL(Allocation):
    """Keeps more weights in blocks with more outliers (Yin et al., 2024).

    As in section 3 of the paper, a block's outliers are the weights whose ``|w_ij| ||x_j||`` is more than ``outlier`` times the
    block's mean, with the dense model's inputs ``x``. The block with the largest share of outliers is denser by ``2 * limit``
    than the block with the smallest. This costs one pass of the calibration windows through the dense model. The published code
    uses each block's exact density and balances all blocks together. Here densities are rounded to the steps of this module,
    and sparsity moves only between blocks of equal size.

    Attributes:
      outlier: a weight is an outlier above this many times the block's mean; the paper's M.
      limit: half of the largest difference between the densities of two blocks; the paper's lambda.
    """

    outlier: Annotated[float, Bound(above=0)] = 5.0
    limit: Annotated[float, Bound(above=0, below=0.5)] = 0.08

    @property
    def reach(self) -> float:
        """A block's sparsity differs from the pattern's by less than this."""
        return 2 * self.limit

    def wanted(self, scores: np.ndarray, steps: SparsitySteps) -> np.ndarray:
        """Wanted steps of blocks from the pattern's sparsity, of mean 0.

        Args:
          scores: [blocks, 1], shares of outliers.
        """
        shares = scores[:, 0]
        spread = np.ptp(shares)
        density = (shares - shares.min()) / spread if spread else np.zeros_like(shares)
        return self.reach / steps.size * (density.mean() - density)


@dataclasses.dataclass(frozen=True)
class Measured(Allocation):
    """Chooses block sparsities to minimise the total loss, by two trials each.

    Block by block, the dense model runs with only this block pruned, once below and once above the pattern's sparsity. The trials
    always use Wanda's masks and ``cg``, not the run's own methods: they are cheap, and runs that compare methods get the same
    sparsities. The loss ``L_b`` is the divergence ``KL(dense || pruned)`` of the next-token distribution on the held-out
    windows. ``log L_b`` is assumed to be linear in the sparsity, and losses to be additive:

        minimise  sum_b L_b(s_b)     subject to     mean s_b = s,   |s_b - s| <= limit

    This costs two prunings of every block and about ``blocks^2`` runs of a block over the held-out windows. The hosts hold the
    hidden states of these windows (two streams for each block).

    Attributes:
      limit: the largest difference between a block's sparsity and the pattern's.
    """

    by_held_out: ClassVar[bool] = True

    limit: Annotated[float, Bound(above=0, below=0.5)] = 0.16

    @property
    def reach(self) -> float:
        """A block's sparsity differs from the pattern's by at most this."""
        return self.limit

    def wanted(self, scores: np.ndarray, steps: SparsitySteps) -> np.ndarray:
        """Wanted steps of blocks from the pattern's sparsity, of mean 0.

        Args:
          scores: [blocks, 2], losses at ``-steps.most`` and at ``steps.most``.
        """
        # A loss of 0 has no logarithm. A loss that does not rise with the sparsity is noise around a flat curve: assume a small
        # slope.
        low, high = np.log(np.maximum(scores.T, 1e-9))
        slope = np.maximum((high - low) / (2 * steps.most), 1e-3 / steps.most)
        middle = (high + low) / 2

        def at(price: float) -> np.ndarray:
            """Each block's steps at which one more costs ``exp(price)``."""
            return np.clip((price - middle - np.log(slope)) / slope, -steps.most, steps.most)

        # The mean rises with the price: between these two it crosses 0.
        ends = middle + np.log(slope)
        lowest, highest = float(np.min(ends - slope * steps.most)), float(np.max(ends + slope * steps.most))
        for _ in range(100):
            price = (lowest + highest) / 2
            lowest, highest = (price, highest) if at(price).sum() < 0 else (lowest, price)
        moves = at((lowest + highest) / 2)
        return moves - moves.mean()


def grain(inputs: Sequence[int]) -> float:
    """The step between sparsities, near 2%, in whole weights of every row."""
    divisor = math.gcd(*inputs)
    return max(1, round(_GRAIN * divisor)) / divisor


def steps_of(allocation: Allocation, sparsity: float, inputs: Iterable[int]) -> SparsitySteps:
    """The steps that an allocation may take from the pattern's sparsity.

    Args:
      inputs: how many inputs each layer has.

    Raises:
      UserError: the limit is smaller than one step, or it allows sparsities below 0 or above 1, or the inputs have no common
        divisor that gives a usable step.
    """
    inputs = tuple(inputs)
    size = grain(inputs)
    steps = SparsitySteps(size, math.floor(allocation.limit / size + 1e-9))
    if size >= 0.5:
        raise UserError(
            "expected layers whose numbers of inputs have a large common divisor, so that one step of sparsity is a "
            f"whole number of weights in each of them, got {', '.join(map(str, sorted(set(inputs))))}: take --allocation "
            "uniform"
        )
    if not steps.most:
        raise UserError(
            f"expected allocation.limit of at least {size:.3g}, the smallest step that is a whole number "
            f"of weights in every row of this model, got {allocation.limit:g}"
        )
    room = min(sparsity, 1 - sparsity)
    if room <= allocation.reach + size:
        raise UserError(
            f"expected a sparsity that is more than {allocation.reach + size:.3g} away from 0 and from 1, because "
            f"allocation.limit {allocation.limit:g} may change it by as much, got {sparsity:g}"
        )
    return steps


def allocate(allocation: Allocation, scores: np.ndarray, weights: Sequence[int], steps: SparsitySteps) -> np.ndarray:
    """Each block's steps from the pattern's sparsity, [blocks] int.

    Sparsity moves only between blocks with equally many weights. Among these the numbers sum to 0, so the total number of pruned
    weights does not change.

    Args:
      scores: [blocks, trials], what ``allocation.wanted`` takes.
      weights: how many weights of each block take part; blocks with none stay at 0.
    """
    counts, changes = np.asarray(weights), np.zeros(len(weights), int)
    for count in set(weights) - {0}:
        same_size = counts == count
        changes[same_size] = rounded(allocation.wanted(scores[same_size], steps))
    return changes


def rounded(wanted: np.ndarray) -> np.ndarray:
    """Rounds numbers with sum 0 to integers with sum 0, each by less than 1.

    All are rounded down; then those with the largest remainders are rounded up. Of equal remainders the first is rounded up.
    """
    # Sums of floating-point numbers are not quite whole: count 2.9999999 as 3.
    wanted = np.round(wanted, 9)
    down = np.floor(wanted)
    most = np.argsort(down - wanted, kind="stable")[: int(-down.sum())]
    down[most] += 1
    return down.astype(int)
