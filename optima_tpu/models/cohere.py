"""Command R and Aya (``cohere``) and Command R7B and Command A (``cohere2``): attention and MLP side by side, reading one norm.

The norms are LayerNorms without bias, neighbouring dimensions are rotated as pairs, and logits have a factor. In ``cohere2`` most
blocks have a window, and those without one do not rotate (NoPE).
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from optima_tpu.models import llama
from optima_tpu.models.family import Cut, Positions
from optima_tpu.models.layers import GatedMLP, LayerNorm
from optima_tpu.models.rope import Rope, RopeByBlock, rotate_neighbours

NORM = functools.partial(LayerNorm, bias=False)


def rotate(x: Array, cos: Array | np.ndarray, sin: Array | np.ndarray) -> Array:
    """In float32, with tables that were rounded to x's dtype."""
    return rotate_neighbours(x.astype(jnp.float32), cos.astype(x.dtype), sin.astype(x.dtype)).astype(x.dtype)


def read_cohere(config: Any) -> llama.LlamaConfig:
    """From ``transformers.CohereConfig``."""
    return dataclasses.replace(_read(config), qk_norm=bool(config.use_qk_norm))


def read_cohere2(config: Any) -> llama.LlamaConfig:
    """From ``transformers.Cohere2Config``."""
    settings, windows = _read(config), llama.windows_by_type(config)
    rotated = (window is not None for window in windows or (None,) * settings.blocks)
    return dataclasses.replace(settings, rope=RopeByBlock.where(rotated, Rope.from_hf(config.rope_parameters)), windows=windows)


def _read(config: Any) -> llama.LlamaConfig:
    return llama.LlamaConfig(
        **llama.read_sizes(config, eps="layer_norm_eps"),
        rope=Rope.from_hf(config.rope_parameters),
        rotation=rotate,
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        norm=NORM,
        logit_scale=config.logit_scale,
    )


class ParallelBlock(nnx.Module):
    """x [batch, length, d_model] to the same shape: adds attention(norm(x)) and MLP(norm(x)) to x, with one norm.

    It sows the residual stream as if attention came first.
    """

    def __init__(self, config: llama.LlamaConfig):
        self.input_layernorm = config.norm(config.d_model, eps=config.eps)
        self.self_attn = llama.rotary_attention(config)
        self.mlp = GatedMLP(config.d_model, config.d_ff, activation=config.activation, bias=config.mlp_bias)

    def __call__(self, x: Array, positions: Positions) -> Array:
        normed = self.input_layernorm(x)
        self.sow(nnx.Intermediate, "before_attention", x)
        x = x + self.self_attn(normed, positions)
        self.sow(nnx.Intermediate, "after_attention", x)
        x = x + self.mlp(normed)
        self.sow(nnx.Intermediate, "after_mlp", x)
        return x


def block(config: llama.LlamaConfig) -> ParallelBlock:
    """One decoder block. Its norms of queries and keys, if it has them, have weights for every head."""
    made = ParallelBlock(config)
    if config.qk_norm:
        made.self_attn.q_norm = NORM((config.heads, config.head_dim), eps=config.eps)
        made.self_attn.k_norm = NORM((config.kv_heads, config.head_dim), eps=config.eps)
    return made


def heads(config: llama.LlamaConfig) -> Cut:
    """As Llama's, with the weights that their norms have for every head."""
    cut = llama.heads(config)
    norms = {f"{letter}_norm": (rows // config.head_dim,) for letter in "qk" for rows in cut.made_by.get(f"{letter}_proj", ())}
    return cut._replace(made_by={**cut.made_by, **norms})


COHERE = dataclasses.replace(llama.FAMILY, read_config=read_cohere, block=block, cuts={**llama.FAMILY.cuts, "head": (heads,)})
COHERE2 = dataclasses.replace(
    COHERE, read_config=read_cohere2, cuts={**llama.FAMILY.cuts, "head": "have the width of the model divided by their number"}
)
