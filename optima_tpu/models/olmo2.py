"""OLMo 2: Llama's sublayers with the norms after them, and queries and keys normalised over all heads together.

Its norms and its rotary embedding are computed in float32 and rounded once.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from optima_tpu.models import llama
from optima_tpu.models.family import Positions
from optima_tpu.models.layers import GatedMLP, Linear, WideRMSNorm, attention, split_heads
from optima_tpu.models.rope import Rope, rotate


def read_config(config: Any) -> llama.Config:
    """From ``transformers.Olmo2Config``."""
    return llama.Config(
        **llama.read_sizes(config),
        rope=Rope.from_hf(config.rope_parameters),
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
    )


class Attention(nnx.Module):
    def __init__(self, config: llama.Config):
        self.head_dim = config.head_dim
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = Linear(config.d_model, queries, bias=config.qkv_bias)
        self.k_proj = Linear(config.d_model, keys, bias=config.qkv_bias)
        self.v_proj = Linear(config.d_model, keys, bias=config.qkv_bias)
        self.o_proj = Linear(queries, config.d_model, bias=config.o_bias)
        self.q_norm, self.k_norm = WideRMSNorm(queries, eps=config.eps), WideRMSNorm(keys, eps=config.eps)

    def __call__(self, x: Array, positions: Positions) -> Array:
        q, k = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x))
        q, k, v = (split_heads(array, self.head_dim) for array in (q, k, self.v_proj(x)))
        q, k = (rotate(array.astype(jnp.float32), *positions.rotary).astype(x.dtype) for array in (q, k))
        mixed = attention(q, k, v, positions)
        return self.o_proj(mixed.reshape(*x.shape[:2], -1))


class Block(nnx.Module):
    """One decoder block: x [batch, length, d_model] to the same."""

    def __init__(self, config: llama.Config):
        self.self_attn = Attention(config)
        self.post_attention_layernorm = WideRMSNorm(config.d_model, eps=config.eps)
        self.mlp = GatedMLP(config.d_model, config.d_ff, activation="silu")
        self.post_feedforward_layernorm = WideRMSNorm(config.d_model, eps=config.eps)

    def __call__(self, x: Array, positions: Positions) -> Array:
        x = x + self.post_attention_layernorm(self.self_attn(x, positions))
        return x + self.post_feedforward_layernorm(self.mlp(x))


FAMILY = dataclasses.replace(
    llama.FAMILY, read_config=read_config, block=Block, final=functools.partial(llama.Final, norm=WideRMSNorm), residuals={}
)  # no residuals: a norm follows each sublayer
