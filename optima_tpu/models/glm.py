"""GLM-4: Llama with neighbouring dimensions rotated as pairs, a part of each head still, gate and up in one matrix.

The first release (``glm``) has Llama's norms, the second (``glm4``, GLM-4-0414) also a norm behind each sublayer.
"""

import dataclasses
import functools
from typing import Any

from flax import nnx
from jax import Array

from optima_tpu.models import llama, phi3
from optima_tpu.models.family import Positions
from optima_tpu.models.rope import Rope, rotate_neighbours


def read_config(config: Any) -> llama.LlamaConfig:
    """From ``transformers.GlmConfig`` or ``transformers.Glm4Config``."""
    return llama.LlamaConfig(
        **llama.read_sizes(config),
        rope=Rope.from_hf(config.rope_parameters, partial=True),
        rotation=rotate_neighbours,
        qkv_bias=config.attention_bias,
    )


def block(config: llama.LlamaConfig) -> llama.PreNormBlock:
    """One decoder block of the first release."""
    return llama.PreNormBlock(config, llama.rotary_attention(config), phi3.Phi3MLP(config))


class GLMBlock(nnx.Module):
    """One decoder block of the second release: x [batch, length, d_model] to the same."""

    def __init__(self, config: llama.LlamaConfig):
        norm = functools.partial(config.norm, config.d_model, eps=config.eps)
        self.input_layernorm, self.post_self_attn_layernorm = norm(), norm()
        self.self_attn = llama.rotary_attention(config)
        self.post_attention_layernorm, self.post_mlp_layernorm = norm(), norm()
        self.mlp = phi3.Phi3MLP(config)

    def __call__(self, x: Array, positions: Positions) -> Array:
        x = x + self.post_self_attn_layernorm(self.self_attn(self.input_layernorm(x), positions))
        return x + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(x)))


GLM = dataclasses.replace(
    llama.FAMILY,
    read_config=read_config,
    block=block,
    linears=(*llama.LINEARS[:4], *phi3.FAMILY.linears[2:]),
    cuts={**llama.FAMILY.cuts, "neuron": (phi3.neurons,)},
    sharding={**llama.SHARDING, **phi3.FAMILY.sharding},
)
GLM4 = dataclasses.replace(GLM, block=GLMBlock, residuals={})  # a norm follows each sublayer
