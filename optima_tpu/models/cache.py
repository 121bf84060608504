"""A key-value cache, for text that is generated token by token."""

import jax
import jax.numpy as jnp
from jax import Array


class KeyValueCache:
    """Keys and values of all blocks; the block that is being traced reads and extends its own.

    The object is mutable, unlike other values of a traced program. So blocks only pass their positions on to ``attention`` and
    need not return a new cache. The object lives for the trace of one block; then the caller reads ``keys`` and ``values`` from
    it.

    Attributes:
      keys, values: [blocks, batch, heads, length, head_dim], heads before positions, so that no product has to transpose them. If
        None, the first keys and values that arrive are those of the only block.
      block: the index of the block that is traced, int32 scalar.
      place: the position of the first new token, int32 scalar. Entries at later positions are arbitrary, and masked.
    """

    def __init__(self, keys: Array | None = None, values: Array | None = None, block: Array | int = 0, place: Array | int = 0):
        self.keys, self.values, self.block, self.place = keys, values, block, place

    def extended(self, k: Array, v: Array) -> tuple[Array, Array]:
        """Adds keys and values [batch, new, heads, head_dim]. Returns all of the block [batch, length, heads, head_dim]."""
        k, v = jnp.swapaxes(k, 1, 2)[None], jnp.swapaxes(v, 1, 2)[None]
        if self.keys is not None and self.values is not None:
            start = (self.block, 0, 0, self.place, 0)
            k, v = (jax.lax.dynamic_update_slice(old, new, start) for old, new in ((self.keys, k), (self.values, v)))
        self.keys, self.values = k, v
        k, v = (jnp.swapaxes(jax.lax.dynamic_index_in_dim(array, self.block, keepdims=False), 1, 2) for array in (k, v))
        return k, v
