"""ERNIE 4.5, the dense one: Llama with neighbouring dimensions rotated as pairs, in float32."""

import dataclasses
from typing import Any

from optima_tpu.models import llama
from optima_tpu.models.rope import Rope, rotate_neighbours_wide


def read_config(config: Any) -> llama.LlamaConfig:
    """From ``transformers.Ernie4_5Config``."""
    return llama.LlamaConfig(
        **llama.read_sizes(config),
        rope=Rope.from_hf(config.rope_parameters),
        rotation=rotate_neighbours_wide,
        qkv_bias=config.use_bias,
        o_bias=config.use_bias,
        mlp_bias=config.use_bias,
    )


FAMILY = dataclasses.replace(llama.FAMILY, read_config=read_config)
