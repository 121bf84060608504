"""Gemma 1, 2 and 3: norms shifted by 1, scaled embeddings, tanh GELU.

Of multimodal models this is the text half. Gemma 1 is otherwise a Llama. Gemma 2 and 3 have four norms a block, and windows.
Gemma 2 caps attention scores and logits; Gemma 3 normalises queries and keys instead, and blocks with a window have a rotary
base of their own.
"""

import functools
from typing import Any

import numpy as np
from jax import Array

from optima_tpu.models import llama
from optima_tpu.models.family import ReadTensor, text_half
from optima_tpu.models.layers import ACTIVATIONS, ShiftedRMSNorm
from optima_tpu.models.settings import supported

NORMS = llama.Norms("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
"""Those of Gemma 2 and later."""


def _gemma(config: Any, setting: str = "hidden_activation") -> llama.Settings:
    """The settings that all share; ``setting`` names the activation."""
    activation = supported(config, setting, *ACTIVATIONS)
    supported(config, "use_bidirectional_attention", False, None)  # only causal models
    return dict(activation=activation, **llama.attention_bias(config), norm=ShiftedRMSNorm)


def _capped(config: Any) -> llama.Settings:
    """What Gemma 2 and 3 have beyond Gemma 1."""
    return _gemma(config) | dict(
        logit_cap=config.final_logit_softcapping,
        scale=config.query_pre_attn_scalar**-0.5,
        windows=llama.windows_by_type(config),
        norms=NORMS,
    )


def _gemma3(config: Any) -> llama.Settings:
    supported(config, "attn_logit_softcapping", None, 0)  # transformers reads it and does not use it: no reference exists
    return _capped(config) | dict(qk_norm=llama.each_head)


def embed(
    config: llama.LlamaConfig, read: ReadTensor, tokens: Array | np.ndarray, positions: Array | np.ndarray
) -> Array | np.ndarray:
    """Embeddings times ``sqrt(d_model)`` rounded to the embeddings' dtype."""
    table = read(llama.FAMILY.embedding)
    # The factor is rounded first, as the model was trained.
    return table[tokens] * np.asarray(config.d_model**0.5).astype(table.dtype)


_relative = functools.partial(llama.relative, activation=None, embed=embed, needs_bos=True)
_later = functools.partial(_relative, residuals={})  # a norm follows each sublayer
GEMMA = _relative(lambda config: _gemma(config, "hidden_act"))
GEMMA2 = _later(lambda config: _capped(config) | dict(score_cap=config.attn_logit_softcapping))
GEMMA3 = _later(_gemma3, rope=llama.rope_by_type)
GEMMA3_MULTIMODAL = text_half(
    # The cap of its logits is never applied (transformers 5.24).
    _later(lambda config: _gemma3(config) | dict(logit_cap=None), rope=llama.rope_by_type),
    # The names as published, and as later versions of transformers write them.
    ("language_model.model.", "model.language_model."),
    r"(model\.)?(vision_tower|multi_modal_projector)\..*",
)
