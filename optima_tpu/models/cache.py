"""The keys and values of the tokens before, for text that is generated token by token."""

import jax
import jax.numpy as jnp
from jax import Array


class KeyValueCache:
    """Keys and values of all blocks, of which the block that is traced reads and extends its own.

    An object that changes, in a program of values that don't: so the blocks, which hand their positions on to ``attention``,
    need not hand anything back. It lives for the trace of one block; what it holds then is read from it.

    Attributes:
      keys, values: [blocks, batch, heads, length, head_dim], heads before places, so that no product has to transpose them. A
        cache without them takes the first that it gets as those of the only block.
      block: which one is traced, int32 scalar.
      place: of the first token that is new, int32 scalar. Later ones hold anything: nothing sees them.
    """

    def __init__(self, keys: Array | None = None, values: Array | None = None, block: Array | int = 0, place: Array | int = 0):
        self.keys, self.values, self.block, self.place = keys, values, block, place

    def extended(self, k: Array, v: Array) -> tuple[Array, Array]:
        """Adds those of new tokens [batch, new, heads, head_dim]. Returns all of the block [batch, length, heads, head_dim]."""
        k, v = jnp.swapaxes(k, 1, 2)[None], jnp.swapaxes(v, 1, 2)[None]
        if self.keys is not None and self.values is not None:
            start = (self.block, 0, 0, self.place, 0)
            k, v = (jax.lax.dynamic_update_slice(old, new, start) for old, new in ((self.keys, k), (self.values, v)))
        self.keys, self.values = k, v
        k, v = (jnp.swapaxes(jax.lax.dynamic_index_in_dim(array, self.block, keepdims=False), 1, 2) for array in (k, v))
        return k, v
