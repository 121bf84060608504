"""Mistral and Ministral: Llama without biases, with sliding-window attention."""

import dataclasses
from typing import Any

from optima_tpu.models import llama
from optima_tpu.models.rope import Rope


def read_mistral(config: Any) -> llama.LlamaConfig:
    """From ``transformers.MistralConfig``; every block has the same window, or none."""
    return _read(config, llama.same_windows(config))


def read_ministral(config: Any) -> llama.LlamaConfig:
    """From ``transformers.MinistralConfig``; some blocks have the window. Raises UserError for another kind of attention."""
    return _read(config, llama.windows_by_type(config))


def _read(config: Any, windows: tuple[int | None, ...]) -> llama.LlamaConfig:
    return llama.LlamaConfig(**llama.read_sizes(config), rope=Rope.from_hf(config.rope_parameters), windows=windows)


MISTRAL = dataclasses.replace(llama.FAMILY, read_config=read_mistral)
MINISTRAL = dataclasses.replace(llama.FAMILY, read_config=read_ministral)
