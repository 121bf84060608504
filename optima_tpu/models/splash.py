"""Causal attention by the kernel for TPUs that JAX brings.

The kernel, ``jax.experimental.pallas.ops.tpu.splash_attention``, keeps the products of queries and keys on the chip, and skips
the blocks that no query sees. It reads a window from an array of [length, length] bool, and needs no array for the causal mask
alone. In float32 it computes what ``layers.attention`` computes, up to rounding. In bfloat16 it rounds in one more place:
queries are scaled before they are multiplied, not after.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from optima_tpu.models.family import Positions
from optima_tpu.runtime.loops import usual_turns
from optima_tpu.runtime.mesh import DATA, MODEL, divisible, on_tpu, padded

# Queries, and keys, of a block in each dtype that the kernel takes. Float32 blocks of 512 did not fit a v5e for heads of 256.
_BLOCKS = {jnp.dtype(jnp.bfloat16): 512, jnp.dtype(jnp.float32): 256}
_LANES = 128


class Scores(NamedTuple):
    """What attention makes of the products of queries and keys.

    Attributes:
      scale: their factor; None for ``head_dim ** -0.5``.
      cap: ``c`` where scaled products become ``c tanh(p / c)``; None for none.
      sinks: [heads] the product of each head with a key whose value is zero, which takes a share of every query; None for none.
    """

    scale: float | None = None
    cap: float | None = None
    sinks: Array | None = None


def takes(mesh: Mesh, q: Array, k: Array, positions: Positions) -> bool:
    """Whether the kernel computes this attention.

    It does on TPUs, for whole texts in bfloat16 or float32 whose heads of keys the model axis divides. It refuses float16.
    """
    return on_tpu(mesh) and positions.cache is None and q.dtype in _BLOCKS and k.shape[2] % mesh.shape[MODEL] == 0


def attention(
    mesh: Mesh,
    q: Array,
    k: Array,
    v: Array,
    window: Array | np.ndarray | None,
    scores: Scores = Scores(),
    *,
    interpret: bool = False,
) -> Array:
    """Causal softmax attention, [batch, length, heads, width of the values].

    Each device computes its own sequences and its own heads. The products of bfloat16 models have the kernel's default precision,
    forward and backward, and those of float32 models have full precision.

    Args:
      q: queries [batch, length, heads, head_dim].
      k, v: keys and values, with as many heads as q, or with a divisor of this number (GQA).
      window: see ``Positions``.
      interpret: run the kernel without a TPU, slowly.
    """
    (batch, length, _, size), (scale, cap, sinks) = q.shape, scores
    q = (q.astype(jnp.float32) * (size**-0.5 if scale is None else scale)).astype(q.dtype)
    spec = P(*divisible(mesh, (batch, length, k.shape[2]), P(DATA, None, MODEL)))
    attend, specs = _Kernel(length, cap, interpret).attend, (spec, spec, spec, P(), P(spec[2]))
    return jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)(q, k, v, window, sinks)


class _Kernel(NamedTuple):
    """The attention of one device.

    Attributes:
      length: tokens of a sequence. The kernel takes whole blocks; no query sees the keys that are added behind the last.
      cap: see :class:`Scores`.
      interpret: see :func:`attention`.
    """

    length: int
    cap: float | None
    interpret: bool

    def attend(self, q: Array, k: Array, v: Array, window: Array | np.ndarray | None, sinks: Array | None) -> Array:
        more = ((0, 0), (0, 0), (0, padded(self.length, _LANES) - self.length), (0, 0))
        queries, keys, values = (jnp.pad(jnp.moveaxis(array, 1, 2), more) for array in (q, k, v))
        kernel = self._made(q.dtype, window)
        each = jax.vmap(lambda sinks, *arrays: kernel(*arrays, sinks=sinks), in_axes=(None, 0, 0, 0))
        blocks = queries.shape[2] // self._block(q.dtype)
        with usual_turns((blocks + 1) / (2 * blocks)):  # the blocks that a query sees
            mixed = _at("highest" if q.dtype == jnp.float32 else "default", each)(sinks, queries, keys, values)
        return jnp.moveaxis(mixed[:, :, : self.length], 2, 1)

    def _block(self, dtype: jnp.dtype) -> int:
        """Queries, and keys, of a block."""
        return math.gcd(padded(self.length, _LANES), _BLOCKS[jnp.dtype(dtype)])

    def _made(self, dtype: jnp.dtype, window: Array | np.ndarray | None) -> Any:
        """Makes a ``SplashAttentionKernel`` for the heads of one sequence."""
        from jax.experimental.pallas.ops.tpu import splash_attention  # takes a tenth of a second, which only TPUs wait for

        size, block = padded(self.length, _LANES), self._block(dtype)
        names = [f"block_{part}{of}" for of in ("", "_dkv", "_dq") for part in ("q", "kv")]
        blocks: dict[str, Any] = dict.fromkeys([*names, "block_kv_compute", "block_kv_dkv_compute"], block)
        mask: Any = splash_attention.MultiHeadMask([splash_attention.CausalMask((size, size))])  # one head stands for all
        if window is not None:
            before = jnp.arange(size)[:, None] - jnp.arange(size)
            mask = ((before >= 0) & (before < jnp.pad(window, (0, size - self.length), constant_values=1)[:, None]))[None]
        kernel = splash_attention.make_splash_mha(
            mask,
            block_sizes=splash_attention.BlockSizes(**blocks),
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=self.cap,
            interpret=self.interpret,
        )
        if window is not None:  # jax 0.10 to 0.12 make an array of this flag, which they can't read while they trace
            kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
        return kernel


def _at(precision: str, function: Callable[..., Array]) -> Callable[..., Array]:
    """The function, and its gradient, with products at this precision.

    The precision around the function does not matter. The gradient is traced later than the function. The kernel is not
    compiled for bfloat16 at "highest".
    """

    def forward(*arguments: Array) -> tuple[Array, Any]:
        with jax.default_matmul_precision(precision):
            return jax.vjp(function, *arguments)

    def backward(pull: Any, cotangent: Array) -> tuple[Array, ...]:
        with jax.default_matmul_precision(precision):
            return pull(cotangent)

    @jax.custom_vjp
    def run(*arguments: Array) -> Array:
        with jax.default_matmul_precision(precision):
            return function(*arguments)

    run.defvjp(forward, backward)
    return run
