"""What the decoder families share: Linear in HF layout, RMSNorm, rotary embedding, causal attention."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from optima_tpu.errors import UserError


class Linear(nnx.Module):
    """``y = x W' + b`` with ``W`` [out, in] as Hugging Face stores it: names, export and problem rows are all one to one.

    Sows its input as an ``nnx.Intermediate`` named ``x``; layers that read one array sow the same tracer.
    """

    def __init__(self, d_in: int, d_out: int, *, bias: bool = False):
        self.weight = nnx.Param(jnp.zeros((d_out, d_in)))
        if bias:
            self.bias = nnx.Param(jnp.zeros((d_out,)))

    def __call__(self, x: Array) -> Array:
        self.sow(nnx.Intermediate, "x", x)
        y = project(x, self.weight[...])
        return y + self.bias[...].astype(y.dtype) if hasattr(self, "bias") else y


def project(x: Array, weight: Array, dtype=None) -> Array:
    """``x W'`` accumulated in float32, in ``dtype`` (x's by default). The precision matters for float32 models only."""
    return jax.lax.dot_general(
        x, weight.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32).astype(dtype or x.dtype)


class RMSNorm(nnx.Module):
    """``x / rms(x) * w``, normalised in float32 and scaled in x's dtype, as the reference does."""

    def __init__(self, d: int, *, eps: float):
        self.weight = nnx.Param(jnp.ones((d,)))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.weight[...].astype(x.dtype) * normed.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretch of the slow rotary frequencies (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding.

    Attributes:
      theta: base of the geometric sequence of frequencies.
      factor: positions are divided by it (``rope_type: linear``); 1 for none.
      llama3: the scaling of Llama 3.1 and later, or None.
    """

    theta: float
    factor: float = 1.0
    llama3: Llama3Scaling | None = None

    @classmethod
    def from_hf(cls, parameters: Mapping) -> "Rope":
        """From ``config.rope_parameters``. Raises UserError for a rope type that is not supported here."""
        kind = parameters.get("rope_type", "default")
        theta = float(parameters["rope_theta"])
        if kind == "default":
            return cls(theta)
        if kind == "linear":
            return cls(theta, factor=float(parameters["factor"]))
        if kind == "llama3":
            return cls(theta, llama3=Llama3Scaling(
                float(parameters["factor"]), float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"]),
                int(parameters["original_max_position_embeddings"])))
        raise UserError(f"expected rope_type default, linear or llama3, got {kind!r}: this model is not supported yet")

    def tables(self, length: int, head_dim: int) -> tuple[Array, Array]:
        """(cos, sin), each [length, head_dim] float32."""
        frequencies = 1.0 / self.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.llama3:
            s = self.llama3
            # Fast frequencies stay, slow ones are divided by the factor, those between are blended by their wavelength.
            turns = s.original_length * frequencies / (2 * math.pi)
            blend = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
            frequencies = frequencies * (blend + (1 - blend) / s.factor)
        angles = np.outer(np.arange(length) / self.factor, frequencies)
        angles = np.concatenate([angles, angles], axis=1)
        return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Applies the rotary embedding to x [batch, length, heads, head_dim]; pairs are (j, j + head_dim / 2)."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return x * cos[None, :, None, :].astype(x.dtype) + turned * sin[None, :, None, :].astype(x.dtype)


def causal_attention(q: Array, k: Array, v: Array) -> Array:
    """Causal softmax attention, q [batch, length, heads, head_dim], k and v with as many or fewer heads (GQA)."""
    if q.dtype == jnp.float16:  # for which jax asks for an algorithm that the CPU and the TPU do not have
        wide = (array.astype(jnp.float32) for array in (q, k, v))
        return jax.nn.dot_product_attention(*wide, is_causal=True).astype(q.dtype)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)
