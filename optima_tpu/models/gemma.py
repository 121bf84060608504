"""Gemma 1, 2 and 3 (the text half of multimodal models): norms shifted by 1, scaled embeddings, tanh GELU.

Gemma 1 is otherwise a Llama. Gemma 2 and 3 have four norms a block, and windows. Gemma 2 caps attention scores and logits; Gemma 3
normalises queries and keys instead, and blocks with a window have a rotary base of their own.
"""

import dataclasses
from typing import Any

import numpy as np
from jax import Array

from optima_tpu.models import llama
from optima_tpu.models.family import ReadTensor, text_half
from optima_tpu.models.layers import ACTIVATIONS, ShiftedRMSNorm
from optima_tpu.models.rope import Rope, RopeByBlock
from optima_tpu.models.settings import supported

NORMS = llama.Norms("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
"""Those of Gemma 2 and later."""


def _read(config: Any, setting: str, rope: Rope | RopeByBlock) -> llama.LlamaConfig:
    """``setting`` is the name of the activation."""
    activation = supported(config, setting, *ACTIVATIONS)
    supported(config, "use_bidirectional_attention", False, None)  # only causal models
    return llama.LlamaConfig(
        **llama.named_sizes(config), rope=rope, activation=activation, **llama.attention_bias(config), norm=ShiftedRMSNorm
    )


def _read_capped(config: Any, rope: Rope | RopeByBlock, **settings: Any) -> llama.LlamaConfig:
    """What Gemma 2 and 3 have beyond Gemma 1."""
    return dataclasses.replace(
        _read(config, "hidden_activation", rope),
        logit_cap=config.final_logit_softcapping,
        scale=config.query_pre_attn_scalar**-0.5,
        windows=llama.windows_by_type(config),
        norms=NORMS,
        **settings,
    )


def read_gemma(config: Any) -> llama.LlamaConfig:
    """From ``transformers.GemmaConfig``. Raises UserError, by name, for a setting that is not supported."""
    return _read(config, "hidden_act", Rope.from_hf(config.rope_parameters))


def read_gemma2(config: Any) -> llama.LlamaConfig:
    """From ``transformers.Gemma2Config``. Raises UserError, by name, for a setting that is not supported."""
    return _read_capped(config, Rope.from_hf(config.rope_parameters), score_cap=config.attn_logit_softcapping)


def read_gemma3(config: Any) -> llama.LlamaConfig:
    """From ``transformers.Gemma3TextConfig``. Raises UserError, by name, for a setting that is not supported."""
    supported(config, "attn_logit_softcapping", None, 0)  # transformers reads it and does not use it: no reference exists
    return _read_capped(config, RopeByBlock.from_hf(config.rope_parameters, config.layer_types), qk_norm=llama.each_head)


def read_uncapped(config: Any) -> llama.LlamaConfig:
    """As :func:`read_gemma3`, for a text half: the cap of its logits is never applied (transformers 5.24)."""
    return dataclasses.replace(read_gemma3(config), logit_cap=None)


def embed(
    config: llama.LlamaConfig, read: ReadTensor, tokens: Array | np.ndarray, places: Array | np.ndarray
) -> Array | np.ndarray:
    """Embeddings times ``sqrt(d_model)``, which is rounded to their dtype first, as the model was trained."""
    table = read(llama.FAMILY.embedding)
    return table[tokens] * np.asarray(config.d_model**0.5).astype(table.dtype)


GEMMA = dataclasses.replace(llama.FAMILY, read_config=read_gemma, embed=embed, needs_bos=True)
GEMMA2 = dataclasses.replace(GEMMA, read_config=read_gemma2, residuals={})  # a norm follows each sublayer
GEMMA3 = dataclasses.replace(GEMMA2, read_config=read_gemma3)
GEMMA3_MULTIMODAL = text_half(
    dataclasses.replace(GEMMA3, read_config=read_uncapped),
    # The names as published, and as later versions of transformers write them.
    ("language_model.model.", "model.language_model."),
    r"(model\.)?(vision_tower|multi_modal_projector)\..*",
)
