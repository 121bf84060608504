"""Gemma 1, 2 and 3 (the text half of multimodal models): norms shifted by 1, scaled embeddings, tanh GELU.

Gemma 1 is otherwise a Llama. Gemma 2 and 3 have four norms a block, and windows. Gemma 2 caps attention scores and logits; Gemma 3
normalises queries and keys instead, and blocks with a window have a rotary base of their own.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from flax import nnx
from jax import Array

from optima_tpu.errors import UserError
from optima_tpu.models import llama
from optima_tpu.models.family import Positions, ReadTensor
from optima_tpu.models.layers import ACTIVATIONS, GatedMLP, ShiftedRMSNorm
from optima_tpu.models.rope import Rope, RopeByBlock


def read_activation(config: Any, setting: str = "hidden_activation") -> str:
    """The activation, a name in ``ACTIVATIONS``.

    Raises:
      UserError: it is another one.
    """
    activation: str = getattr(config, setting)
    if activation not in ACTIVATIONS:
        raise UserError(f"expected {setting} {', '.join(ACTIVATIONS)}, got {activation!r}: not supported")
    return activation


def _read(config: Any, setting: str, rope: Rope | RopeByBlock) -> llama.LlamaConfig:
    """``setting`` is the name of the activation."""
    activation = read_activation(config, setting)
    if getattr(config, "use_bidirectional_attention", None):
        raise UserError("expected use_bidirectional_attention false, got true: only causal models are supported")
    return llama.LlamaConfig(
        **llama.named_sizes(config),
        rope=rope,
        activation=activation,
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        norm=ShiftedRMSNorm,
    )


def _read_capped(config: Any, rope: Rope | RopeByBlock, **settings: Any) -> llama.LlamaConfig:
    """What Gemma 2 and 3 have beyond Gemma 1."""
    return dataclasses.replace(
        _read(config, "hidden_activation", rope),
        logit_cap=config.final_logit_softcapping,
        scale=config.query_pre_attn_scalar**-0.5,
        windows=llama.windows_by_type(config),
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
    if config.attn_logit_softcapping:  # transformers reads it and does not use it: no reference exists
        raise UserError(f"expected attn_logit_softcapping null in a Gemma 3, got {config.attn_logit_softcapping}: not supported")
    return _read_capped(config, RopeByBlock.from_hf(config.rope_parameters, config.layer_types), qk_norm=True)


def read_multimodal(config: Any) -> llama.LlamaConfig:
    """From ``transformers.Gemma3Config``, the text half. Raises UserError, by name, for a setting that is not supported."""
    # tie_word_embeddings is not among the text's settings. The cap of its logits is never applied (transformers 5.24).
    return dataclasses.replace(read_gemma3(config.get_text_config()), logit_cap=None, tied=config.tie_word_embeddings)


def embed(
    config: llama.LlamaConfig, read: ReadTensor, tokens: Array | np.ndarray, places: Array | np.ndarray
) -> Array | np.ndarray:
    """Embeddings times ``sqrt(d_model)``, which is rounded to their dtype first, as the model was trained."""
    table = read(llama.FAMILY.embedding)
    return table[tokens] * np.asarray(config.d_model**0.5).astype(table.dtype)


class GemmaBlock(nnx.Module):
    """A block with four norms: x [batch, length, d_model] to the same."""

    def __init__(self, config: llama.LlamaConfig, attention: nnx.Module, mlp: nnx.Module):
        norm = functools.partial(config.norm, eps=config.eps)
        self.input_layernorm = norm(config.d_model)
        self.self_attn = attention
        self.post_attention_layernorm = norm(config.d_model)
        self.pre_feedforward_layernorm = norm(config.d_model)
        self.mlp = mlp
        self.post_feedforward_layernorm = norm(config.d_model)

    def __call__(self, x: Array, positions: Positions) -> Array:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), positions))
        return x + self.post_feedforward_layernorm(self.behind_attention(x))

    def behind_attention(self, x: Array) -> Array:
        """What the last norm reads, from the residual stream x."""
        output: Array = self.mlp(self.pre_feedforward_layernorm(x))
        return output


def block(config: llama.LlamaConfig) -> GemmaBlock:
    """One decoder block of Gemma 2 or 3."""
    return GemmaBlock(config, llama.rotary_attention(config), GatedMLP(config.d_model, config.d_ff, activation=config.activation))


GEMMA = dataclasses.replace(llama.FAMILY, read_config=read_gemma, embed=embed, needs_bos=True)
GEMMA2 = dataclasses.replace(GEMMA, read_config=read_gemma2, block=block, residuals={})  # a norm follows each sublayer
GEMMA3 = dataclasses.replace(GEMMA2, read_config=read_gemma3)
GEMMA3_MULTIMODAL = dataclasses.replace(
    GEMMA3,
    read_config=read_multimodal,
    # The names as published, and as later versions of transformers write them.
    roots=("language_model.model.", "model.language_model."),
    ignored={r"(model\.)?(vision_tower|multi_modal_projector)\..*": "the half for images: text does not pass through it"},
)
"""The text half of the checkpoints that also read images; the other half is exported unchanged."""
