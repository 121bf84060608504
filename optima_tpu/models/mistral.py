"""Mistral: a Llama without biases, whose positions see a sliding window."""

import dataclasses
from typing import Any

from optima_tpu.models import llama
from optima_tpu.models.rope import Rope


def read_config(config: Any) -> llama.Config:
    """From ``transformers.MistralConfig``; every block has the same window, or none."""
    return llama.Config(**llama.read_sizes(config), rope=Rope.from_hf(config.rope_parameters),
                        windows=llama.same_windows(config))


FAMILY = dataclasses.replace(llama.FAMILY, read_config=read_config)
