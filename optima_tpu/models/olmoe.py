"""OLMoE: Llama's block with the attention of OLMo 2, and a mixture in the place of its MLP."""

import dataclasses
import functools
from typing import Any

from optima_tpu.errors import UserError
from optima_tpu.models import experts, llama, olmo2
from optima_tpu.models.rope import Rope, rotate_wide


def read_config(config: Any) -> experts.MixtureConfig:
    """From ``transformers.OlmoeConfig``. Raises UserError for a model that clips queries, keys and values."""
    if config.clip_qkv is not None:
        raise UserError(f"expected clip_qkv null, got {config.clip_qkv}: not supported")
    experts.check_given(config, "num_experts")
    return experts.MixtureConfig(
        **llama.read_sizes(config),
        rope=Rope.from_hf(config.rope_parameters),
        rotation=rotate_wide,
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        normalise=config.norm_topk_prob,
    )


_FAMILY = experts.family(
    read_config, experts.MixtureNames(width="intermediate_size"), functools.partial(olmo2.attention, norm=olmo2.NormOverHeads)
)
FAMILY = dataclasses.replace(_FAMILY, cuts={**_FAMILY.cuts, **olmo2.HEADS})
