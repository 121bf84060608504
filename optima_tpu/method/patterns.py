"""Which sets of weights may stay, and the choice of the best of them by a score.

A pattern says how many weights are pruned and inside which comparison group; a score says which. Ties are broken by
index: of two weights of one group with equal scores the one with the lower index is pruned first. The rule is part of
the result (4-bit checkpoints tie often), and it makes the mask independent of the mesh.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array

from optima_tpu.errors import UserError
from optima_tpu.method.linalg.smallest import lowest, order_of


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Prunes the given share of every comparison group, wherever the weights lie.

    Attributes:
      sparsity: share of weights pruned, in [0, 1). A group of ``n`` weights loses exactly ``floor(n * sparsity)``, as in
        Wanda's published code.
      group: "row" compares the weights of one output (Wanda), "layer" all weights of a matrix (magnitude pruning).
    """

    sparsity: float = 0.5
    group: str = "row"

    def __post_init__(self):
        if not 0 <= self.sparsity < 1:
            raise UserError(f"expected a sparsity in [0, 1), got {self.sparsity}")
        if self.group not in ("row", "layer"):
            raise UserError(f"expected comparison group 'row' or 'layer', got {self.group!r}")

    def __str__(self) -> str:
        return f"{self.sparsity:.4g} per {self.group}"

    def pruned_in(self, size: int) -> int:
        """How many weights a group of ``size`` loses: ``floor(size * sparsity)`` in exact arithmetic.

        Decimal sparsities are not exact in binary (100 * 0.29 is 28.999...), so the product is rounded first. One weight always
        stays, as a sparsity below 1 says.
        """
        return min(math.floor(round(size * self.sparsity, 6)), max(size - 1, 0))

    def pruned_count(self, shape: tuple[int, int]) -> int:
        """How many weights a [d_out, d_in] matrix loses."""
        rows, columns = shape
        return rows * self.pruned_in(columns) if self.group == "row" else self.pruned_in(rows * columns)

    def keep_mask(self, scores: Array) -> Array:
        """The mask with the largest total score.

        Args:
          scores: [d_out, d_in] float32, larger is more worth keeping; NaN counts as the smallest of all.

        Returns:
          [d_out, d_in] bool with exactly ``pruned_count(shape)`` False entries.
        """
        return ~lowest(scores, self.pruned_in(scores.shape[1] if self.group == "row" else scores.size), self.group)


@dataclasses.dataclass(frozen=True)
class NM:
    """Keeps ``n`` of every ``m`` consecutive inputs of a row, as 2:4 hardware reads them.

    Attributes:
      n: weights kept in a group, 0 < n < m.
      m: size of the group; must divide d_in.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self):
        if not 0 < self.n < self.m:
            raise UserError(f"expected a pattern N:M with 0 < N < M, got {self.n}:{self.m}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def pruned_count(self, shape: tuple[int, int]) -> int:
        """How many weights a [d_out, d_in] matrix loses. Raises UserError when ``m`` does not divide d_in."""
        rows, columns = shape
        if columns % self.m:
            raise UserError(
                f"pattern {self} needs a number of inputs divisible by {self.m}, got a layer with {columns}; "
                "choose an M that divides it"
            )
        return rows * (columns // self.m) * (self.m - self.n)

    def keep_mask(self, scores: Array) -> Array:
        """The mask with the largest total score, see ``Unstructured.keep_mask``. Raises UserError as :meth:`pruned_count`."""
        self.pruned_count(scores.shape)
        order, place = order_of(scores), jnp.arange(scores.shape[1]) % self.m

        # Not a view [groups, m]: a TPU would give its last axis 128 places.
        def count(shift: Array, before: Array) -> Array:
            """Adds those of the same group, ``shift`` places to the left and to the right, that go before a weight."""
            left, right = jnp.roll(order, shift, axis=1), jnp.roll(order, -shift, axis=1)
            return before + ((place >= shift) & (left <= order)) + ((place < self.m - shift) & (right < order))

        before = jax.lax.fori_loop(1, self.m, count, jnp.zeros(scores.shape, jnp.int32))
        return before >= self.m - self.n


Pattern = Unstructured | NM


def parse_pattern(text: str, group: str = "row") -> Pattern:
    """Reads "0.5/row" (half of every row), "0.5/layer" (half of every matrix), "0.5" or "2:4".

    Args:
      group: what "0.5" compares: the group of the method that chooses the mask, as published.

    Raises:
      UserError: the text is none of these.
    """
    text = str(text).strip()
    try:
        if ":" in text:
            n, m = text.split(":")
            return NM(int(n), int(m))
        sparsity, _, given = text.partition("/")
        return Unstructured(float(sparsity), given or group)
    except ValueError:
        raise UserError(f"expected a pattern such as 0.5, 0.5/layer or 2:4, got {text!r}") from None


def pattern_text(pattern: Pattern, group: str | None = None) -> str:
    """The text that ``parse_pattern`` reads back: "0.5/row", "2:4"; "0.5" where the pattern compares in ``group``."""
    if isinstance(pattern, NM):
        return str(pattern)
    return repr(float(pattern.sparsity)) + ("" if pattern.group == group else f"/{pattern.group}")
