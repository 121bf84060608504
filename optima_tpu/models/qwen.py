"""Qwen 2, 2.5 and 3: Llama's block with biases on q, k, v (2, 2.5) or norms over queries and keys (3)."""

import dataclasses
from typing import Any

from optima_tpu.models import llama
from optima_tpu.models.rope import Rope


def read_qwen2(config: Any) -> llama.LlamaConfig:
    """From ``transformers.Qwen2Config``; the biases are not a setting of it."""
    return llama.LlamaConfig(
        **llama.read_sizes(config),
        rope=Rope.from_hf(config.rope_parameters),
        windows=llama.windows_by_type(config),
        qkv_bias=True,
    )


def read_qwen3(config: Any) -> llama.LlamaConfig:
    """From ``transformers.Qwen3Config``."""
    return llama.LlamaConfig(
        **llama.read_sizes(config),
        rope=Rope.from_hf(config.rope_parameters),
        windows=llama.windows_by_type(config),
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        qk_norm=True,
    )


QWEN2 = dataclasses.replace(llama.FAMILY, read_config=read_qwen2)
QWEN3 = dataclasses.replace(llama.FAMILY, read_config=read_qwen3)
