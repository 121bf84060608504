"""Seed-OSS: Llama with biases on q, k, v, and a setting of its own for the bias behind attention."""

import dataclasses
from typing import Any

from optima_tpu.models import llama


def read_config(config: Any) -> llama.LlamaConfig:
    """From ``transformers.SeedOssConfig``."""
    return dataclasses.replace(llama.read_config(config), o_bias=config.attention_out_bias)


FAMILY = dataclasses.replace(llama.FAMILY, read_config=read_config)
