"""Gemma 2 and Gemma 3 (the text half of multimodal models): four norms a block, scaled embeddings, windows, tanh GELU.

Gemma 2 caps attention scores and logits; Gemma 3 normalises queries and keys instead, and blocks with a window have a rotary
base of their own.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from flax import nnx
from jax import Array

from optima_tpu.errors import UserError
from optima_tpu.models import llama
from optima_tpu.models.family import Family, Positions, ReadTensor
from optima_tpu.models.layers import ACTIVATIONS, GatedMLP, RotaryAttention, ShiftedRMSNorm
from optima_tpu.models.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(llama.Sizes):
    """The settings of a Gemma block in addition to its sizes.

    Attributes:
      scale: factor of the products of queries and keys.
      score_cap: ``c`` where the scaled products become ``c tanh(p / c)``, or None.
      ropes: the rotary embedding of every block.
    """

    activation: str
    scale: float
    score_cap: float | None
    ropes: tuple[Rope, ...]
    bias: bool

    def positions(self, index: int, length: int) -> Positions:
        return Positions(*self.ropes[index].tables(length, self.head_dim), llama.window_at(self.windows, index, length))


def _read(config: Any, *, score_cap: float | None, ropes: tuple[Rope, ...], qk_norm: bool) -> Config:
    if config.hidden_activation not in ACTIVATIONS:
        raise UserError(f"expected hidden_activation {', '.join(ACTIVATIONS)}, got {config.hidden_activation!r}: not supported")
    if getattr(config, "use_bidirectional_attention", None):
        raise UserError("expected use_bidirectional_attention false, got true: only causal models are supported")
    return Config(
        **llama.named_sizes(config),
        logit_cap=config.final_logit_softcapping,
        activation=config.hidden_activation,
        scale=config.query_pre_attn_scalar**-0.5,
        windows=llama.windows_by_type(config),
        bias=config.attention_bias,
        score_cap=score_cap,
        ropes=ropes,
        qk_norm=qk_norm,
    )


def read_gemma2(config: Any) -> Config:
    """From ``transformers.Gemma2Config``. Raises UserError, by name, for a setting that is not supported."""
    ropes = (Rope.from_hf(config.rope_parameters),) * config.num_hidden_layers
    return _read(config, score_cap=config.attn_logit_softcapping, ropes=ropes, qk_norm=False)


def read_gemma3(config: Any) -> Config:
    """From ``transformers.Gemma3TextConfig``. Raises UserError, by name, for a setting that is not supported."""
    if config.attn_logit_softcapping:  # transformers reads it and does not use it: no reference exists
        raise UserError(f"expected attn_logit_softcapping null in a Gemma 3, got {config.attn_logit_softcapping}: not supported")
    ropes = tuple(Rope.from_hf(config.rope_parameters[kind]) for kind in config.layer_types)
    return _read(config, score_cap=None, ropes=ropes, qk_norm=True)


def read_multimodal(config: Any) -> Config:
    """From ``transformers.Gemma3Config``, the text half. Raises UserError, by name, for a setting that is not supported."""
    # tie_word_embeddings is not among the text's settings. The cap of its logits is never applied (transformers 5.24).
    return dataclasses.replace(read_gemma3(config.get_text_config()), logit_cap=None, tied=config.tie_word_embeddings)


def embed(config: Config, read: ReadTensor, tokens: Array | np.ndarray, places: Array | np.ndarray) -> Array | np.ndarray:
    """Embeddings times ``sqrt(d_model)``, which is rounded to their dtype first, as the model was trained."""
    table = read(llama.FAMILY.embedding)
    return table[tokens] * np.asarray(config.d_model**0.5).astype(table.dtype)


class Block(nnx.Module):
    """One decoder block: x [batch, length, d_model] to the same."""

    def __init__(self, config: Config):
        norm = functools.partial(ShiftedRMSNorm, eps=config.eps)
        self.input_layernorm = norm(config.d_model)
        self.self_attn = RotaryAttention(
            config.d_model,
            config.heads,
            config.kv_heads,
            config.head_dim,
            qkv_bias=config.bias,
            o_bias=config.bias,
            norm=norm if config.qk_norm else None,
            scale=config.scale,
            cap=config.score_cap,
        )
        self.post_attention_layernorm = norm(config.d_model)
        self.pre_feedforward_layernorm = norm(config.d_model)
        self.mlp = GatedMLP(config.d_model, config.d_ff, activation=config.activation)
        self.post_feedforward_layernorm = norm(config.d_model)

    def __call__(self, x: Array, positions: Positions) -> Array:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), positions))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


GEMMA2 = Family(
    read_config=read_gemma2,
    block=Block,
    linears=llama.LINEARS,
    sharding=llama.SHARDING,
    embed=embed,
    final=functools.partial(llama.Final, norm=ShiftedRMSNorm),
    needs_bos=True,
)
GEMMA3 = dataclasses.replace(GEMMA2, read_config=read_gemma3)
GEMMA3_MULTIMODAL = dataclasses.replace(
    GEMMA3,
    read_config=read_multimodal,
    # The names as published, and as later versions of transformers write them.
    roots=("language_model.model.", "model.language_model."),
    ignored={r"(model\.)?(vision_tower|multi_modal_projector)\..*": "the half for images: text does not pass through it"},
)
"""The text half of the checkpoints that also read images; the other half is exported unchanged."""
