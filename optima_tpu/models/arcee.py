"""AFM (``arcee``): Llama with an MLP without a gate, whose activation is the square of ReLU."""

import dataclasses
import functools
from typing import Any

from optima_tpu.models import llama
from optima_tpu.models.layers import MLP
from optima_tpu.models.rope import Rope


def read_config(config: Any) -> llama.LlamaConfig:
    """From ``transformers.ArceeConfig``."""
    return llama.LlamaConfig(
        **llama.read_sizes(config, "relu2"),
        rope=Rope.from_hf(config.rope_parameters),
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
    )


def block(config: llama.LlamaConfig) -> llama.PreNormBlock:
    """One decoder block."""
    mlp = MLP(config.d_model, config.d_ff, activation="relu2", bias=config.mlp_bias)
    return llama.PreNormBlock(config, llama.rotary_attention(config), mlp)


FAMILY = dataclasses.replace(
    llama.FAMILY,
    read_config=read_config,
    block=block,
    linears=tuple(name for name in llama.LINEARS if name != "mlp.gate_proj"),
    cuts={**llama.FAMILY.cuts, "neuron": (functools.partial(llama.neurons, made_by=("up_proj",)),)},
)
