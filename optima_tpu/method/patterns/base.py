"""Patterns: which sets of weights may stay, and the choice of the best one.

A pattern says how many weights are pruned and inside which comparison group; a score says which. Ties are broken by
index: of two weights of one group with equal scores the one with the lower index is pruned first. The rule is part of
the result (4-bit checkpoints tie often), and it makes the mask independent of the mesh.
"""

import abc
import math
from typing import ClassVar

import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int32

from optima_tpu.errors import UserError
from optima_tpu.runtime.own_classes import import_path, write_options

Scores = Float[Array, "rows d_in"]
"""A number for every weight of a matrix."""
Mask = Bool[Array, "rows d_in"]
"""True where a weight stays."""
Counts = Int32[Array, " rows"]
"""A number of weights of every row."""
MOST_INPUTS = 1 << 24
"""The most inputs of a layer that a pattern is for. The widest layers that anybody has have a hundredth of them."""


class Pattern(abc.ABC):
    """How many weights of a matrix are pruned, in which comparison groups.

    A pattern is a frozen dataclass.

    Attributes:
      group: "row" where weights of different rows never compete, else "layer".
      span: number of inputs in a comparison group, consecutive in :meth:`order`, must divide d_in; None if the group is a whole
        row or matrix.
      free: whether the pruned weights may be anywhere in a comparison group, so that sparsities can be allocated to blocks.
      cuts: whether what is pruned leaves the exported model, so that no zeros and no mask stay.
      sparsity: the share of weights that are pruned.
      damping: the least damping of the objective where the person names none and the solver has some of its own.
    """

    group: str = "row"
    free: ClassVar[bool] = False
    cuts: ClassVar[bool] = False
    damping: ClassVar[float] = 0.0
    sparsity: float = math.nan

    @property
    def span(self) -> int | None:
        return None

    def of(self, name: str) -> "Pattern | None":
        """The pattern for a block's layer ``name``; None leaves it alone."""
        return self

    def order(self, columns: int) -> np.ndarray | None:
        """Input indices [columns] int in which each group is consecutive.

        None if the groups are consecutive already.
        """
        return None

    def in_order(self) -> "Pattern":
        """The pattern of a matrix whose inputs are sorted by :meth:`order`."""
        return self

    def at(self, sparsity: float) -> "Pattern":
        """This pattern with another sparsity; raises if it is not ``free``."""
        raise ValueError(f"the sparsity of {self} is fixed")

    def __str__(self) -> str:
        return self.text()

    @abc.abstractmethod
    def pruned_count(self, shape: tuple[int, int]) -> int:
        """The number of weights that a [d_out, d_in] matrix loses.

        Raises:
          UserError: the pattern does not fit the shape.
        """

    def prunes(self, shape: tuple[int, ...]) -> bool:
        """Whether a matrix loses weights; raises as :meth:`pruned_count`."""
        d_out, d_in = shape
        return self.pruned_count((d_out, d_in)) > 0

    @abc.abstractmethod
    def keep_mask(self, scores: Scores) -> Mask:
        """The mask with the largest total score.

        Args:
          scores: [d_out, d_in] float32, larger is more worth keeping; NaN counts as the smallest of all.

        Returns:
          [d_out, d_in] bool with exactly ``pruned_count(shape)`` False entries.
        """

    def pruned_in(self, size: int) -> int:
        """The number of weights that a comparison group of ``size`` loses.

        For methods that choose a row part by part.

        Raises:
          UserError: the pattern fixes no such number.
        """
        raise UserError(f"expected a pattern that says how many weights a part of a row loses, got {self}; take --selector wanda")

    @property
    def exchanges(self) -> bool:
        """Whether the pattern implements :meth:`exchange`."""
        return type(self).exchange is not Pattern.exchange

    def exchange(self, win: Scores, cost: Scores, keep: Mask, limit: Counts) -> tuple[Mask, Counts]:
        """Exchanges each row's best pairs that pay off, at most ``limit``.

        A pair pays off if it wins more than it costs. The largest win is paired with the smallest cost, the second with the
        second, and so on. Of equal values the lower index comes first.

        Args:
          win: [rows, d_in] float32, at least 0, read where a weight is pruned.
          cost: [rows, d_in] float32, at least 0, read where a weight is kept.
          keep: [rows, d_in] bool.
          limit: [rows] int32, at least 0.

        Returns:
          The new mask [rows, d_in] bool and the number of pairs [rows] int32.
        """
        raise NotImplementedError

    def holds(self, zero: np.ndarray) -> bool:
        """Whether each comparison group has enough zeros, True in ``zero``."""
        return bool(zero.sum() >= self.pruned_count(zero.shape))

    def violation(self, keep: np.ndarray, or_fewer: bool = False) -> str | None:
        """How an imported mask violates the pattern, in words, or None.

        Args:
          keep: the mask [d_out, d_in] bool.
          or_fewer: whether fewer weights may be kept. Masks made from a checkpoint's zeros need this, as a kept weight may be
            zero.
        """
        expected, pruned = self.pruned_count(keep.shape), keep.size - np.count_nonzero(keep)
        if pruned == expected or (or_fewer and pruned > expected):
            return None
        return f"expected {expected:,} of {keep.size:,} weights pruned, got {pruned:,}"

    def text(self, group: str | None = None) -> str:
        """The text that :func:`parse_pattern` reads back.

        Args:
          group: the default comparison group, which the text leaves out.
        """
        return import_path(type(self)) + write_options(self)


def refuse_share(sparsity: float, what: str) -> None:
    if not 0 <= sparsity < 1:
        half = f"; 0.5 prunes half of the {what}" if sparsity >= 1 else ""
        raise UserError(f"expected a sparsity in [0, 1), got {sparsity}{half}")


def share_of(size: int, sparsity: float) -> int:
    """``floor(size * sparsity)`` in exact arithmetic, but fewer than ``size``.

    Decimal sparsities are not exact in binary (100 * 0.29 is 28.999...), so the product is rounded first. At least one stays,
    because the sparsity is below 1.
    """
    return min(math.floor(round(size * sparsity, 6)), max(size - 1, 0))
