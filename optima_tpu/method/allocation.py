"""How much of each block goes: the same share of all, or more where less is lost.

Every layer that no rule of ``--layers`` names has the sparsity ``s + k g`` of its block: ``s`` is the pattern's, ``k`` a whole
number, and with the grain ``g`` every row of every layer loses a whole number of weights more. Over the blocks ``k`` adds up to
0. So the model loses exactly as many weights as with one sparsity for all, and few programs are compiled.

N:M fixes what each block loses, and masks from elsewhere have been allocated: neither is combined with this.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from optima_tpu.errors import UserError

# Wished-for size of the grain; the grain itself is a multiple of 1 / gcd of the numbers of inputs.
_GRAIN = 0.02


class Steps(NamedTuple):
    """The sparsities that a block may have.

    Attributes:
      size: from one to the next, the grain ``g``.
      most: how many of them a measured block may be from the pattern's.
    """

    size: float
    most: int


class Allocation:
    """How the pattern's sparsity is shared out among the blocks.

    Attributes:
      measures: whether blocks differ, by what is measured of them.
    """

    measures: ClassVar[bool] = True
    limit: float = 0.0

    @property
    def reach(self) -> float:
        """How far a block's sparsity may be from the pattern's."""
        return self.limit

    def wanted(self, scores: np.ndarray, steps: Steps) -> np.ndarray:
        """How many steps the blocks' sparsities should be from the pattern's, [blocks] float64 with the mean 0.

        Args:
          scores: [blocks, n], what was measured of every block.
        """
        return np.zeros(len(scores))


@dataclasses.dataclass(frozen=True)
class Uniform(Allocation):
    """Every block loses the pattern's share."""

    measures: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class OWL(Allocation):
    """Blocks with more outliers keep more (Yin et al., 2024, section 3).

    A block's outliers are the weights whose ``|w_ij| ||x_j||`` is more than ``outlier`` times the block's mean, with the dense
    model's inputs ``x``. From the least to the largest share of outliers the density rises by ``2 * limit``. It costs a pass of
    the calibration samples through the dense model. The published code gives every block its own share, to the weight, and all
    blocks one mean; here it is rounded to the steps of this module, and only blocks of one size trade.

    Attributes:
      outlier: how many times the mean; the paper's M.
      limit: half of what densities may differ by; the paper's lambda.
    """

    outlier: float = 5.0
    limit: float = 0.08

    def __post_init__(self) -> None:
        if not self.outlier > 0:
            raise UserError(f"expected allocation.outlier above 0, got {self.outlier}")
        _check_limit(self.limit)

    @property
    def reach(self) -> float:
        """A block's sparsity is less than this from the pattern's."""
        return 2 * self.limit

    def wanted(self, scores: np.ndarray, steps: Steps) -> np.ndarray:
        """How many steps the blocks' sparsities should be from the pattern's, [blocks] float64 with the mean 0.

        Args:
          scores: [blocks, 1], shares of outliers.
        """
        shares = scores[:, 0]
        spread = np.ptp(shares)
        density = (shares - shares.min()) / spread if spread else np.zeros_like(shares)
        return self.reach / steps.size * (density.mean() - density)


@dataclasses.dataclass(frozen=True)
class Measured(Allocation):
    """Each block loses as much as makes the sum of the losses smallest, by what two trials of it have cost the model.

    Block by block, the dense model runs with this block alone pruned, once below and once above the pattern's sparsity, by
    Wanda's masks and ``cg`` whatever the run's own methods are: it costs little, and runs that compare methods have the same
    sparsities. Its loss ``L_b`` is the divergence ``KL(dense || pruned)`` of the next-token distribution on the held-out
    sequences. Between both trials ``log L_b`` is taken for linear in the sparsity, and the losses for additive:

        minimise  sum_b L_b(s_b)     subject to     mean s_b = s,   |s_b - s| <= limit

    It costs two prunings of every block and some ``blocks^2`` runs of a block over the held-out sequences, whose hidden states
    (two streams for each block) are held on the hosts.

    Attributes:
      limit: how far a block's sparsity may be from the pattern's.
    """

    limit: float = 0.16

    def __post_init__(self) -> None:
        _check_limit(self.limit)

    @property
    def reach(self) -> float:
        """A block's sparsity is at most this from the pattern's."""
        return self.limit

    def wanted(self, scores: np.ndarray, steps: Steps) -> np.ndarray:
        """How many steps the blocks' sparsities should be from the pattern's, [blocks] float64 with the mean 0.

        Args:
          scores: [blocks, 2], losses at ``-steps.most`` and at ``steps.most``.
        """
        # Of no loss at all the logarithm does not exist; one that does not rise with the sparsity is noise around a flat one.
        low, high = np.log(np.maximum(scores.T, 1e-9))
        slope = np.maximum((high - low) / (2 * steps.most), 1e-3 / steps.most)
        middle = (high + low) / 2

        def at(price: float) -> np.ndarray:
            """Where one step more costs ``exp(price)`` everywhere, as far as the limit allows."""
            return np.clip((price - middle - np.log(slope)) / slope, -steps.most, steps.most)

        # The mean rises with the price: between these two it crosses 0.
        ends = middle + np.log(slope)
        lowest, highest = float(np.min(ends - slope * steps.most)), float(np.max(ends + slope * steps.most))
        for _ in range(100):
            price = (lowest + highest) / 2
            lowest, highest = (price, highest) if at(price).sum() < 0 else (lowest, price)
        found = at((lowest + highest) / 2)
        return found - found.mean()


def grain(inputs: Sequence[int]) -> float:
    """The step between sparsities, near 2%: with it every row of so many inputs loses a whole number of weights more."""
    divisor = math.gcd(*inputs)
    return max(1, round(_GRAIN * divisor)) / divisor


def steps_of(allocation: Allocation, sparsity: float, inputs: Iterable[int]) -> Steps:
    """The steps that an allocation may take from the pattern's sparsity.

    Args:
      inputs: how many inputs each layer has.

    Raises:
      UserError: the limit allows not even one, or sparsities below 0 or above 1; no limit would, with these inputs.
    """
    inputs = tuple(inputs)
    size = grain(inputs)
    steps = Steps(size, math.floor(allocation.limit / size + 1e-9))
    if size >= 0.5:
        raise UserError(
            "expected layers whose numbers of inputs have a large common divisor, so that all of them can lose the "
            f"same share of whole weights more, got {', '.join(map(str, sorted(set(inputs))))}: take --allocation "
            "uniform"
        )
    if not steps.most:
        raise UserError(
            f"expected allocation.limit of at least {size:.3g}, the least by which rows of this model lose "
            f"whole weights more, got {allocation.limit:g}"
        )
    room = min(sparsity, 1 - sparsity)
    if room <= allocation.reach + size:
        raise UserError(
            f"expected a sparsity that is more than {allocation.reach + size:.3g} from 0 and 1, which is what "
            f"allocation.limit {allocation.limit:g} may change, got {sparsity:g}"
        )
    return steps


def allocate(allocation: Allocation, scores: np.ndarray, weights: Sequence[int], steps: Steps) -> np.ndarray:
    """How many steps each block's sparsity is from the pattern's, [blocks] int.

    Blocks trade with those that have as many weights: among these the numbers add up to 0, and so no weight more or less goes.

    Args:
      scores: [blocks, trials], what ``allocation.wanted`` takes.
      weights: how many weights of each block take part; blocks with none stay at 0.
    """
    counts, found = np.asarray(weights), np.zeros(len(weights), int)
    for count in set(weights) - {0}:
        mine = counts == count
        found[mine] = rounded(allocation.wanted(scores[mine], steps))
    return found


def rounded(wanted: np.ndarray) -> np.ndarray:
    """Whole numbers with the sum 0, each less than 1 from the one that is wanted; for numbers with the sum 0.

    All are rounded down, then those with the largest remainders up; of equals the first.
    """
    # Sums of rounded numbers are not quite whole: 2.9999999 is 3.
    wanted = np.round(wanted, 9)
    down = np.floor(wanted)
    most = np.argsort(down - wanted, kind="stable")[: int(-down.sum())]
    down[most] += 1
    return down.astype(int)


def _check_limit(limit: float) -> None:
    if not 0 < limit < 0.5:
        raise UserError(f"expected allocation.limit above 0 and below 0.5, got {limit}")
