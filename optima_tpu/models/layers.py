"""Modules that families share: Linear, norms, gated MLP, attention."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike

from optima_tpu.models import splash
from optima_tpu.models.family import Positions
from optima_tpu.models.splash import Scores


class Known(nnx.Variable):
    """A layer's input from an earlier pass of the tokens through its block."""


class Linear(nnx.Module):
    """``y = x W' + b`` with ``W`` [out, in] as Hugging Face stores it.

    Parameters, exported tensors and problem rows correspond one to one.

    Sows its input as an ``nnx.Intermediate`` named ``x``; layers that read one array sow the same tracer. If a :class:`Known`
    input is set as its attribute ``known``, the layer reads this one, and the compiler drops what computed the other.
    """

    def __init__(self, d_in: int, d_out: int, *, bias: bool = False):
        self.weight = nnx.Param(jnp.zeros((d_out, d_in)))
        if bias:
            self.bias = nnx.Param(jnp.zeros((d_out,)))

    def __call__(self, x: Array) -> Array:
        if hasattr(self, "known"):
            x = self.known[...]
        self.sow(nnx.Intermediate, "x", x)
        y = project(x, self.weight[...])
        return y + self.bias[...].astype(y.dtype) if hasattr(self, "bias") else y


def project(x: Array | np.ndarray, weight: Array | np.ndarray, dtype: DTypeLike | None = None) -> Array:
    """``x W'`` accumulated in float32, in ``dtype`` (x's by default)."""
    # The precision matters for float32 models only.
    return jax.lax.dot_general(
        x,
        weight.astype(x.dtype),
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    ).astype(dtype or x.dtype)


def scaled(x: Array | np.ndarray, factor: float) -> Array | np.ndarray:
    """``factor x``, multiplied in float32 and rounded once."""
    # JAX would round the factor to x's dtype first.
    return x if factor == 1 else (x.astype(np.float32) * factor).astype(x.dtype)


def over_rms(x: Array, eps: float) -> Array:
    """``x / rms(x)`` over the last axis, float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """``x / rms(x) * w``, normalised in float32 and scaled in x's dtype.

    As the reference does, over the last axis. Where ``d`` is larger, it is the width of all heads, and x
    [batch, length, heads, head_dim] is normalised over all of them together.

    Args:
      wide: whether it is scaled in float32 too, by ``shift + w``, and rounded once.
    """

    def __init__(self, d: int, *, eps: float, wide: bool = False, shift: float = 0.0):
        self.weight = nnx.Param(jnp.full((d,), 1 - shift))
        self.eps, self.wide, self.shift = eps, wide, shift

    def __call__(self, x: Array) -> Array:
        weight, shape = self.weight[...], x.shape
        x = x if len(weight) == shape[-1] else x.reshape(*shape[:2], -1)
        normed = over_rms(x, self.eps)
        if self.wide:
            return (normed * (self.shift + weight.astype(jnp.float32))).astype(x.dtype).reshape(shape)
        return (weight.astype(x.dtype) * normed.astype(x.dtype)).reshape(shape)


WideRMSNorm = functools.partial(RMSNorm, wide=True)
"""The norm of OLMo 2."""
ShiftedRMSNorm = functools.partial(RMSNorm, wide=True, shift=1.0)
"""The norm of the Gemma family."""


class LayerNorm(nnx.Module):
    """``(x - mean(x)) / std(x) * w + b`` in float32, rounded once.

    Over the last axis; without ``w`` and ``b`` if not ``affine``, without ``b`` if not ``bias``. Where ``d`` is a shape, ``w``
    and ``b`` have it.

    Args:
      shifted: whether ``1 + w``, rounded to x's dtype, stands in the place of ``w``.
    """

    def __init__(
        self, d: int | tuple[int, ...], *, eps: float = 1e-5, affine: bool = True, bias: bool = True, shifted: bool = False
    ):
        if affine:
            self.weight = nnx.Param(jnp.ones(d))
        if affine and bias:
            self.bias = nnx.Param(jnp.zeros(d))
        self.eps, self.shifted = eps, shifted

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        normed = over_rms(wide - jnp.mean(wide, axis=-1, keepdims=True), self.eps)
        if hasattr(self, "weight"):
            weight = 1 + self.weight[...].astype(x.dtype) if self.shifted else self.weight[...]
            normed = normed * weight.astype(jnp.float32)
        if hasattr(self, "bias"):
            normed = normed + self.bias[...].astype(jnp.float32)
        return normed.astype(x.dtype)


UnbiasedLayerNorm = functools.partial(LayerNorm, bias=False)
"""The norm of Command R."""
ShiftedLayerNorm = functools.partial(LayerNorm, shifted=True)
"""The norm of Nemotron."""


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
"""Activation functions, by the names that config.json uses."""


class GatedMLP(nnx.Module):
    """``down(activation(gate(x)) * up(x))``."""

    def __init__(self, d_model: int, d_ff: int, *, activation: str, bias: bool = False):
        self.gate_proj = Linear(d_model, d_ff, bias=bias)
        self.up_proj = Linear(d_model, d_ff, bias=bias)
        self.down_proj = Linear(d_ff, d_model, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def __call__(self, x: Array) -> Array:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class MLP(nnx.Module):
    """``down(activation(up(x)))``; ``up`` and ``down`` name the two layers."""

    def __init__(self, d_model: int, d_ff: int, *, activation: str, bias: bool = False, up: str, down: str):
        self.up, self.down = up, down
        setattr(self, up, Linear(d_model, d_ff, bias=bias))
        setattr(self, down, Linear(d_ff, d_model, bias=bias))
        self.activation = ACTIVATIONS[activation]

    def __call__(self, x: Array) -> Array:
        output: Array = getattr(self, self.down)(self.activation(getattr(self, self.up)(x)))
        return output


def split_heads(x: Array, head_dim: int) -> Array:
    """Splits [batch, length, heads * head_dim] to [..., heads, head_dim]."""
    return x.reshape(*x.shape[:2], -1, head_dim)


def attention(q: Array, k: Array, v: Array, positions: Positions, scores: Scores = Scores(), mesh: Mesh | None = None) -> Array:
    """Causal softmax attention, [batch, length, heads, width of the values].

    Products and softmax are computed in float32, for a stretch of queries at a time with the keys that these can see: half the
    products of the full square, and no array of [length, length]. On TPUs a kernel computes it, where :func:`splash.takes` says
    so.

    Args:
      q: queries.
      k, v: keys and values, with as many heads as q, or with a divisor of this number (GQA).
      positions: holds the window, and the cache, to which ``k`` and ``v`` are added. Queries also see the cache's earlier
        positions.
      mesh: the mesh that the block runs on; None for one device.
    """
    if mesh is not None and splash.takes(mesh, q, k, positions):
        return splash.attention(mesh, q, k, v, positions.window, scores)
    (scale, cap, sinks), cache = scores, positions.cache
    first, (k, v) = (0, (k, v)) if cache is None else (cache.first, cache.extended(k, v))
    batch, length, heads, size = q.shape
    groups = (batch, length, k.shape[2], heads // k.shape[2], size)  # axis 2: the head of keys and values that queries share
    queries, keys, values = (jnp.moveaxis(array, 1, -2) for array in (q.reshape(groups), k, v))
    stretch = max(_STRETCH, -(-length // _STRETCHES))
    mixed = []
    for start in range(0, length, stretch):
        stop = min(start + stretch, length)
        end = stop if cache is None else k.shape[1]
        query_positions, key_positions = first + jnp.arange(start, stop)[:, None], jnp.arange(end)
        seen = query_positions >= key_positions
        if positions.window is not None:
            seen &= query_positions - key_positions < positions.window[start:stop, None]
        products = einsum("bkgqd,bksd->bkgqs", queries[..., start:stop, :], keys[..., :end, :])
        products = products * (size**-0.5 if scale is None else scale)
        if cap is not None:
            products = cap * jnp.tanh(products / cap)
        products = jnp.where(seen, products, -jnp.inf)
        # Divide the output by the sum: it is a far smaller array than the shares.
        largest = jnp.max(products, axis=-1, keepdims=True)
        if sinks is not None:
            sink = sinks.astype(jnp.float32).reshape(*groups[2:4], 1, 1)
            largest = jnp.maximum(largest, sink)
        shares = jnp.exp(products - largest)
        total = jnp.sum(shares, axis=-1, keepdims=True) + (0 if sinks is None else jnp.exp(sink - largest))
        mixed.append(einsum("bkgqs,bksd->bkgqd", shares.astype(v.dtype), values[..., :end, :]) / total)
    return jnp.moveaxis(jnp.concatenate(mixed, axis=-2), -2, 1).reshape(batch, length, heads, -1).astype(q.dtype)


def einsum(formula: str, a: Array, b: Array) -> Array:
    """``jnp.einsum`` accumulated in float32."""
    # The precision matters for float32 models only.
    return jnp.einsum(formula, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


# Queries in one stretch: their products with the keys stay in a CPU's cache. Longer texts have longer stretches, which limits the
# size of the program.
_STRETCH = 128
_STRETCHES = 16
