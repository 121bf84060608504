"""Configurations of tiny models that MaxText, Tunix and this program know."""

from typing import Any

import transformers
from transformers import PretrainedConfig

SIZES = dict(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    max_position_embeddings=128,
)
BASE = SIZES | dict(head_dim=16, tie_word_embeddings=False)
GEMMA = BASE | dict(query_pre_attn_scalar=20, sliding_window=7, tie_word_embeddings=True)
LLAMA31 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
GEMMA3_ROPES = dict(
    full_attention=dict(rope_type="linear", rope_theta=1000000.0, factor=8.0),
    sliding_attention=dict(rope_type="default", rope_theta=10000.0),
)

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", BASE),
    "llama-tied": (
        "LlamaForCausalLM",
        BASE | dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0)),
    ),
    "llama-3.1": ("LlamaForCausalLM", BASE | dict(rope_parameters=LLAMA31)),
    "mistral": ("MistralForCausalLM", BASE | dict(sliding_window=40)),
    "mixtral": ("MixtralForCausalLM", BASE | dict(num_local_experts=5, num_experts_per_tok=2)),
    "qwen2": ("Qwen2ForCausalLM", BASE | dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3ForCausalLM", BASE),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        BASE | dict(moe_intermediate_size=80, num_experts=5, num_experts_per_tok=2, norm_topk_prob=True),
    ),
    "gemma": ("GemmaForCausalLM", BASE | dict(tie_word_embeddings=True)),
    "gemma2": ("Gemma2ForCausalLM", GEMMA | dict(num_hidden_layers=4, attn_logit_softcapping=1.5, final_logit_softcapping=2.5)),
    # One cycle of six blocks and one block more.
    "gemma3": (
        "Gemma3ForCausalLM",
        GEMMA | dict(num_hidden_layers=7, final_logit_softcapping=None, rope_parameters=GEMMA3_ROPES),
    ),
}
"""The architecture and the settings of each model."""
_CONFIGS = {"Gemma3ForCausalLM": "Gemma3TextConfig"}


def configured(name: str, **changed: Any) -> PretrainedConfig:
    """The configuration of one of MODELS, with some settings changed."""
    architecture, settings = MODELS[name]
    cls = getattr(transformers, _CONFIGS.get(architecture, architecture.replace("ForCausalLM", "Config")))
    config = cls(**(settings | changed))
    config.architectures = [architecture]
    return config
