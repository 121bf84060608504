"""What blocks keep of earlier tokens, for text written token by token."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array


class Cache:
    """Arrays of blocks that are alike.

    The block that is being traced reads and replaces its own entries. The object is mutable, unlike other values of a traced
    program. So blocks only pass their positions on to their attention and need not return a new cache. The object lives for the
    trace of one block; then the caller reads ``arrays`` from it.

    Attributes:
      arrays: by names that the attention chooses, each [blocks, batch, ...]. An array under a new name is that of a single
        block.
      block: the index of the block that is traced among those that are alike, int32 scalar.
      first: the position of the first new token, int32 scalar.
      end: the position of the first token that does not count, because it is read again later, int32 scalar; None if all count.
    """

    def __init__(
        self,
        arrays: Mapping[str, Array] | None = None,
        block: Array | int = 0,
        first: Array | int = 0,
        end: Array | int | None = None,
    ):
        self.arrays, self.block, self.first, self.end = dict(arrays or {}), block, first, end

    def extended(self, k: Array, v: Array) -> tuple[Array, Array]:
        """Adds the keys and values of new tokens; returns all of the block.

        They are [batch, new, heads, head_dim] and [batch, length, heads, head_dim]. Entries behind the new ones are arbitrary:
        the caller masks them, so tokens that do not count need no care.
        """
        return self._extended("keys", k), self._extended("values", v)

    def _extended(self, name: str, new: Array) -> Array:
        # Heads before positions, so that no product has to transpose them.
        new = jnp.swapaxes(new, 1, 2)[None]
        if name in self.arrays:
            new = jax.lax.dynamic_update_slice(self.arrays[name], new, (self.block, 0, 0, self.first, 0))
        self.arrays[name] = new
        return jnp.swapaxes(jax.lax.dynamic_index_in_dim(new, self.block, keepdims=False), 1, 2)

    def kept(self, name: str, empty: Array) -> Array:
        """What the block kept under a name, [batch, ...].

        Before the first token it is ``empty``, whatever an earlier text left.
        """
        if name not in self.arrays:
            return empty
        kept = jax.lax.dynamic_index_in_dim(self.arrays[name], self.block, keepdims=False)
        return jnp.where(self.first == 0, empty, kept)

    def keep(self, name: str, array: Array) -> None:
        """Replaces what the block kept under a name."""
        if name in self.arrays:
            self.arrays[name] = jax.lax.dynamic_update_index_in_dim(self.arrays[name], array, self.block, 0)
        else:
            self.arrays[name] = array[None]

    def counted(self, length: int) -> Array | int:
        """How many of ``length`` new tokens count."""
        return length if self.end is None else jnp.clip(self.end - self.first, 0, length)
