"""Scores of next-token predictions, in chunks that need less memory."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

Tree = TypeVar("Tree")
STRETCH = 128
"""Positions of each window whose logits are computed at once."""

_MOST = 1 << 25


def stretch_of(windows: int, vocabulary: int) -> int:
    """Returns how many positions of each window to take at once.

    At most :data:`STRETCH`, fewer for a large vocabulary, and a power of two. Logits then take at most 128 MiB of a device in
    float32. A model is measured before and after its blocks are pruned: otherwise, with 262,144 words, its head would need more
    memory than any block.

    Args:
      windows: of a batch, in each slice of the data axis.
    """
    return min(STRETCH, 1 << max(1, _MOST // (windows * vocabulary)).bit_length() - 1)


def sum_over_windows(score: Callable[..., Tree], tokens: Array, *streams: Array, stretch: int = STRETCH) -> Tree:
    """Sums ``score`` over all positions of each window but the last.

    Args:
      score, tokens, streams, stretch: see :func:`per_token`.

    Returns:
      The tree that ``score`` returns, with leaves [windows] float32.
    """
    return jax.tree.map(lambda sums: jnp.sum(sums, axis=0), _by_stretch(_summed(score), tokens, stretch, *streams))


def per_token(score: Callable[..., Tree], tokens: Array, *streams: Array, stretch: int = STRETCH) -> Tree:
    """Computes ``score`` at all positions of each window but the last.

    Works on one chunk of positions at a time: the logits of a whole batch would be the largest array of the program.

    Args:
      score: (targets [windows, chunk] int32, *states [windows, chunk, d_model]) -> a tree of numbers or booleans
        [windows, chunk, ...]. The target of a position is the next token.
      tokens: [windows, length] int32.
      streams: hidden states [windows, length, d_model].
      stretch: positions of a chunk.

    Returns:
      The tree that ``score`` returns, with leaves [windows, length - 1, ...].
    """
    windows, positions = tokens.shape[0], tokens.shape[1] - 1

    def joined(values: Array) -> Array:
        return values.swapaxes(0, 1).reshape(windows, -1, *values.shape[3:])[:, :positions]

    return jax.tree.map(joined, _by_stretch(lambda valid, *inputs: score(*inputs), tokens, stretch, *streams))


def _summed(score: Callable[..., Tree]) -> Callable[..., Tree]:
    def summed(valid: Array, *inputs: Array) -> Tree:
        return jax.tree.map(lambda values: jnp.sum(jnp.where(valid, values.astype(jnp.float32), 0.0), axis=1), score(*inputs))

    return summed


def _by_stretch(work: Callable[..., Tree], tokens: Array, stretch: int, *streams: Array) -> Tree:
    """Applies ``work(valid, targets, *states)`` to each chunk of positions.

    The results are stacked. ``valid`` is False at padding.
    """
    windows, positions = tokens.shape[0], tokens.shape[1] - 1
    count = -(-positions // stretch)

    def cut(array: Array) -> Array:
        filled = jnp.pad(array, ((0, 0), (0, count * stretch - positions), *[(0, 0)] * (array.ndim - 2)))
        return filled.reshape(windows, count, stretch, *array.shape[2:]).swapaxes(0, 1)

    parts = jax.tree.map(cut, (jnp.ones((windows, positions), bool), tokens[:, 1:], *(stream[:, :-1] for stream in streams)))
    return jax.lax.map(lambda inputs: work(*inputs), parts)


def picked(values: Array, targets: Array) -> Array:
    """The entries of ``values`` [..., vocab] at indices ``targets`` [...]."""
    return jnp.take_along_axis(values, targets[..., None], axis=-1)[..., 0]
