"""StarCoder 2: LayerNorm, biases, and an MLP without a gate; otherwise a Mistral."""

import dataclasses
import functools
from typing import Any

from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from optima_tpu.models import llama
from optima_tpu.models.family import Residual
from optima_tpu.models.layers import ACTIVATIONS, LayerNorm, Linear
from optima_tpu.models.rope import Rope
from optima_tpu.runtime.mesh import MODEL

ACTIVATION = "gelu_pytorch_tanh"


def read_config(config: Any) -> llama.LlamaConfig:
    """From ``transformers.Starcoder2Config``; every block has the same window, or none."""
    return llama.LlamaConfig(
        **llama.read_sizes(config, ACTIVATION, "norm_epsilon"),
        rope=Rope.from_hf(config.rope_parameters),
        windows=llama.same_windows(config),
        qkv_bias=config.use_bias,
        o_bias=config.use_bias,
        mlp_bias=config.use_bias,
        norm=LayerNorm,
    )


class Starcoder2MLP(nnx.Module):
    def __init__(self, config: llama.LlamaConfig):
        self.c_fc = Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.c_proj = Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def __call__(self, x: Array) -> Array:
        return self.c_proj(ACTIVATIONS[ACTIVATION](self.c_fc(x)))


def block(config: llama.LlamaConfig) -> llama.PreNormBlock:
    """One decoder block."""
    return llama.PreNormBlock(config, llama.rotary_attention(config), Starcoder2MLP(config))


FAMILY = dataclasses.replace(
    llama.FAMILY,
    read_config=read_config,
    block=block,
    linears=(*llama.LINEARS[:4], "mlp.c_fc", "mlp.c_proj"),
    sharding={
        **llama.SHARDING,
        "mlp.c_fc.weight": P(MODEL, None),
        "mlp.c_fc.bias": P(MODEL),
        "mlp.c_proj.weight": P(None, MODEL),
    },
    residuals={
        "self_attn.o_proj": Residual("before_attention", "after_attention"),
        "mlp.c_proj": Residual("after_attention", "after_mlp"),
    },
    cuts={**llama.FAMILY.cuts, "neuron": (functools.partial(llama.neurons, made_by=("c_fc",), read_by="c_proj"),)},
)
