"""Nemotron and Minitron: the blocks of AFM with LayerNorms shifted by 1, and a part of each head still."""

import dataclasses
from typing import Any

from optima_tpu.models import arcee, llama
from optima_tpu.models.layers import ShiftedLayerNorm
from optima_tpu.models.rope import Rope


def read_config(config: Any) -> llama.LlamaConfig:
    """From ``transformers.NemotronConfig``."""
    return llama.LlamaConfig(
        **llama.read_sizes(config, "relu2", "norm_eps"),
        rope=Rope.from_hf(config.rope_parameters, partial=True),
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        norm=ShiftedLayerNorm,
    )


FAMILY = dataclasses.replace(arcee.FAMILY, read_config=read_config)
