"""EXAONE 4: the norms of OLMo 2 after the sublayers, and queries and keys normalised head by head.

In the 32B most blocks have a window, and those without one do not rotate queries and keys (NoPE).
"""

import dataclasses
from typing import Any

from optima_tpu.models import llama, olmo2
from optima_tpu.models.rope import Rope, RopeByBlock


def read_config(config: Any) -> llama.LlamaConfig:
    """From ``transformers.Exaone4Config``."""
    windows = llama.windows_by_type(config)
    rotated = (config.sliding_window is None or kind == "sliding_attention" for kind in config.layer_types)
    return llama.LlamaConfig(
        **llama.read_sizes(config),
        rope=RopeByBlock.where(rotated, Rope.from_hf(config.rope_parameters)),
        windows=windows,
        qk_norm=True,
    )


def block(config: llama.LlamaConfig) -> olmo2.PostNormBlock:
    """One decoder block."""
    return olmo2.PostNormBlock(config, llama.rotary_attention(config))


FAMILY = dataclasses.replace(llama.FAMILY, read_config=read_config, block=block, residuals={})  # a norm follows each sublayer
