"""Granite 3: Llama with factors at the embedding, the products of queries and keys, the residual additions and the logits."""

import dataclasses
from typing import Any

import numpy as np
from jax import Array

from optima_tpu.models import llama
from optima_tpu.models.family import ReadTensor
from optima_tpu.models.layers import scaled


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraniteConfig(llama.LlamaConfig):
    """The settings of a Llama, and the factor of its embeddings."""

    embedding_scale: float


def read_config(config: Any) -> GraniteConfig:
    """From ``transformers.GraniteConfig``."""
    settings = dataclasses.replace(
        llama.read_config(config),
        scale=config.attention_multiplier,
        branch_scale=config.residual_multiplier,
        logit_scale=1 / config.logits_scaling,
    )
    return GraniteConfig(**vars(settings), embedding_scale=config.embedding_multiplier)


def embed(config: GraniteConfig, read: ReadTensor, tokens: Array | np.ndarray, places: Array | np.ndarray) -> Array | np.ndarray:
    """Embeddings times their factor."""
    return scaled(read(llama.FAMILY.embedding)[tokens], config.embedding_scale)


FAMILY = dataclasses.replace(llama.FAMILY, read_config=read_config, embed=embed)
