"""OLMo 2 and 3: Llama's sublayers with the norms after them, and queries and keys normalised over all heads together.

Their norms and their rotary embedding are computed in float32 and rounded once. In OLMo 3 most blocks have a window, and blocks
with and without one may have rotary embeddings of their own.
"""

import dataclasses
from typing import Any

from flax import nnx
from jax import Array

from optima_tpu.models import llama
from optima_tpu.models.family import Positions
from optima_tpu.models.layers import GatedMLP, RMSNorm, RotaryAttention, WideRMSNorm
from optima_tpu.models.rope import Rope, RopeByBlock, rotate_wide


def read_olmo2(config: Any) -> llama.LlamaConfig:
    """From ``transformers.Olmo2Config``."""
    return _read(config, Rope.from_hf(config.rope_parameters))


def read_olmo3(config: Any) -> llama.LlamaConfig:
    """From ``transformers.Olmo3Config``."""
    ropes = RopeByBlock.from_hf(config.rope_parameters, config.layer_types)
    return dataclasses.replace(_read(config, ropes), windows=llama.windows_by_type(config))


def _read(config: Any, rope: Rope | RopeByBlock) -> llama.LlamaConfig:
    return llama.LlamaConfig(
        **llama.read_sizes(config),
        rope=rope,
        rotation=rotate_wide,
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        norm=WideRMSNorm,
    )


class _OverHeads:
    """Makes a norm of one that normalises [batch, length, heads, head_dim] over the last two axes."""

    def __call__(self, x: Array) -> Array:
        return super().__call__(x.reshape(*x.shape[:2], -1)).reshape(x.shape)  # type: ignore[misc]


class WideNormOverHeads(_OverHeads, WideRMSNorm):
    """``WideRMSNorm`` over all heads together."""


class NormOverHeads(_OverHeads, RMSNorm):
    """``RMSNorm`` over all heads together."""


def attention(
    config: llama.LlamaConfig, norm: type[WideNormOverHeads] | type[NormOverHeads] = WideNormOverHeads
) -> RotaryAttention:
    """Llama's attention with queries and keys normalised over all heads together."""
    found = llama.rotary_attention(config)
    found.q_norm = norm(config.heads * config.head_dim, eps=config.eps)
    found.k_norm = norm(config.kv_heads * config.head_dim, eps=config.eps)
    return found


class PostNormBlock(nnx.Module):
    """x [batch, length, d_model] to the same shape: adds norm(attention(x)) to x, then norm(MLP(x))."""

    def __init__(self, config: llama.LlamaConfig, self_attn: RotaryAttention):
        self.self_attn = self_attn
        self.post_attention_layernorm = config.norm(config.d_model, eps=config.eps)
        self.mlp = GatedMLP(config.d_model, config.d_ff, activation="silu")
        self.post_feedforward_layernorm = config.norm(config.d_model, eps=config.eps)

    def __call__(self, x: Array, positions: Positions) -> Array:
        x = x + self.post_attention_layernorm(self.self_attn(x, positions))
        return x + self.post_feedforward_layernorm(self.mlp(x))


def block(config: llama.LlamaConfig) -> PostNormBlock:
    """One decoder block."""
    return PostNormBlock(config, attention(config))


HEADS = {"head": "are normalised all together"}
"""``Family.cuts`` of a model with such attention."""
# No residuals: a norm follows each sublayer.
OLMO2 = dataclasses.replace(llama.FAMILY, read_config=read_olmo2, block=block, residuals={}, cuts={**llama.FAMILY.cuts, **HEADS})
OLMO3 = dataclasses.replace(OLMO2, read_config=read_olmo3)
