"""Selects the lowest entries of a row, or of a matrix, by counting.

Counting determines, bit by bit, the threshold below which the wanted number of entries is. Devices exchange only counts; a sort
would gather the rows of all devices, and on a CPU it takes at least sixteen times as long. Each pass over the entries makes three
counts and determines two bits. One bit per pass takes three times as long on a CPU.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int32, UInt32

PASSES = 16
"""Passes over the entries to determine a threshold."""


def lowest(
    scores: Float[Array, "rows columns"], count: Int32[Array, "#rows 1"] | Int32[Array, ""] | int, group: str
) -> Bool[Array, "rows columns"]:
    """True at the ``count`` lowest entries of every row, or of the matrix.

    Exactly ``count`` entries are True: of equal entries the lower index counts first.

    Args:
      scores: [rows, columns] float32; NaN counts as the smallest of all.
      count: int32, [rows, 1] or [] for the group "row", [1, 1] or [] for "layer", where the index runs row by row.
    """
    order = order_of(scores)
    axes = (1,) if group == "row" else (0, 1)
    value = _largest(
        order[:, :1] if group == "row" else order[:1, :1],
        lambda values: [below < count for below in _counts([order < value for value in values], axes)],
    )
    below, ties = order < value, order == value
    fewer, equal = _counts([below, ties], axes)

    def by_index() -> Array:
        rank = jnp.cumsum(ties, axis=1, dtype=jnp.int32)
        if group == "layer":
            in_row = rank[:, -1:]
            rank = rank + jnp.cumsum(in_row, axis=0, dtype=jnp.int32) - in_row
        return below | (ties & (rank <= count - fewer))

    # Ranks take as long as everything else. They are only needed if some entries equal to the threshold are not selected.
    return jax.lax.cond(jnp.any(equal > count - fewer), by_index, lambda: below | ties)


def totals(scores: Float[Array, "rows columns"]) -> Float[Array, "1 columns"]:
    """The sum of every column, times one power of two, [1, columns] float32.

    A column with a NaN has the sum NaN. The sums are the same to the bit however rows are sharded over devices. The rounding of
    a sum of floats depends on their order, so whole numbers are added: of each score, as a share of the largest, a high and a
    low part that leave room for all rows in int32. Together the parts have at least 28 bits for up to 65,000 rows.
    """
    unknown = jnp.isnan(scores)
    scores = jnp.clip(jnp.where(unknown, 0.0, scores), -jnp.finfo(jnp.float32).max, jnp.finfo(jnp.float32).max)
    bits = 30 - scores.shape[0].bit_length()
    _, exponent = jnp.frexp(jnp.max(jnp.abs(scores)))
    scaled = jnp.ldexp(scores, bits - exponent)
    high = jnp.floor(scaled)
    low = jnp.floor(jnp.ldexp(scaled - high, bits))
    high, low = (jnp.sum(part.astype(jnp.int32), axis=0, keepdims=True) for part in (high, low))
    high, low = high + (low >> bits), low & ((1 << bits) - 1)
    total = high.astype(jnp.float32) + jnp.ldexp(low.astype(jnp.float32), -bits)
    return jnp.where(jnp.any(unknown, axis=0, keepdims=True), jnp.nan, total)


def pairs_that_pay(win: Float[Array, "rows columns"], cost: Float[Array, "rows columns"]) -> Int32[Array, " rows"]:
    """How many pairs of each row's largest wins and smallest costs pay off.

    This is the largest ``k`` for which the ``k``-th largest win exceeds the ``k``-th smallest cost; 0 if there is none. It is
    the maximum of ``min(wins above x, costs up to x)`` over all values ``x``, reached where the second count overtakes the
    first.

    Args:
      win, cost: [rows, columns] float32.

    Returns:
      [rows] int32.
    """
    win, cost = order_of(win), order_of(cost)

    def numbers(values: list[Array]) -> list[tuple[Array, Array]]:
        """For each value, the number of wins above and of costs up to it."""
        counts = _counts([mask for value in values for mask in (win > value, cost <= value)], (1,))
        return list(zip(counts[::2], counts[1::2]))

    value = _largest(win[:, :1], lambda values: [costs <= wins for wins, costs in numbers(values)])
    (_, before), (after, _) = numbers([value, value + 1])
    return jnp.maximum(before, after)[:, 0]


def _largest(like: Array, holds: Callable[[list[Array]], list[Array]]) -> Array:
    """The largest uint32 up to which ``holds`` is true; 0 if it never is.

    Args:
      like: an array of the result's shape.
      holds: takes several values at once, each in the shape of ``like``.
    """

    def two_bits(index: int | Array, value: Array) -> Array:
        step = jnp.left_shift(jnp.uint32(1), jnp.uint32(30 - 2 * index))
        return value + step * sum(true.astype(jnp.uint32) for true in holds([value + times * step for times in (1, 2, 3)]))

    return jax.lax.fori_loop(0, PASSES, two_bits, jnp.zeros_like(like))


def _counts(masks: list[Array], axes: tuple[int, ...]) -> list[Array]:
    """Counts the True entries of each mask along axes, in one pass for all.

    The axes stay, with size 1.
    """
    counts = jax.lax.reduce(
        [mask.astype(jnp.int32) for mask in masks],
        [jnp.int32(0)] * len(masks),
        lambda one, other: [a + b for a, b in zip(one, other)],
        axes,
    )
    return [jnp.expand_dims(count, axes) for count in counts]


def order_of(scores: Float[Array, "rows columns"]) -> UInt32[Array, "rows columns"]:
    """uint32 numbers, at least 1, in the scores' order; NaN is smallest."""
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, jnp.where(scores == 0, 0.0, scores))  # one zero, without a sign
    # The bits of positive floats are in the order of the floats, the bits of negative floats in the opposite order.
    bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
