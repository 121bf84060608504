"""GLM-4 mixtures of experts: GLM-4.5 to 4.7 (``glm4_moe``), and 4.7 Flash (``glm4_moe_lite``), which attends as DeepSeek does."""

import dataclasses
from typing import Any

from optima_tpu.errors import UserError
from optima_tpu.models import deepseek, experts, llama
from optima_tpu.models.rope import Rope


def read_config(config: Any) -> experts.MixtureConfig:
    """From ``transformers.Glm4MoeConfig``; a part of each head turns."""
    return experts.MixtureConfig(
        **llama.read_sizes(config) | deepseek.read_mixture(config, deepseek.dense_first(config)),
        rope=Rope.from_hf(config.rope_parameters, partial=True),
        qkv_bias=config.attention_bias,
        qk_norm=llama.each_head if config.use_qk_norm else None,
    )


def read_lite(config: Any) -> deepseek.DeepseekConfig:
    """From ``transformers.Glm4MoeLiteConfig``. Raises UserError for MLPs that are neither dense nor sparse."""
    found, blocks = config.mlp_layer_types, config.num_hidden_layers
    if len(found) != blocks or set(found) - {"dense", "sparse"}:
        raise UserError(
            f"expected {blocks} mlp_layer_types, dense or sparse, in config.json, got {', '.join(found)}: check the file"
        )
    return deepseek.read_latent(config, tuple(kind == "sparse" for kind in found))


GLM4_MOE = dataclasses.replace(experts.family(read_config), exact=deepseek.ROUTER, ignored=deepseek.further_tokens(46, 92))
GLM4_MOE_LITE = dataclasses.replace(deepseek.V3, read_config=read_lite, ignored=deepseek.further_tokens(47))
