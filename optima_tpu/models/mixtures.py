"""Families whose blocks are Llama's, OLMo's or Qwen's with mixtures.

A mixture is in the place of some or all MLPs. Each family is a row.
"""

import dataclasses
from typing import Any

from optima_tpu.models import experts, llama, relatives
from optima_tpu.models.rope import rotate_wide
from optima_tpu.models.settings import supported

MIXTRAL_NAMES = experts.MixtureNames("block_sparse_moe", wide=("w1", "w3"), narrow="w2", width="intermediate_size")
"""transformers holds the experts of a block in two arrays, and stores them under these names."""
MIXTRAL = experts.family(
    lambda config: dict(
        windows=llama.same_windows(config),
        experts=config.num_local_experts,
        experts_per_token=config.num_experts_per_tok,
        # The softmax over the chosen experts' logits is the softmax over all, scaled to a sum of one.
        normalise=True,
    ),
    MIXTRAL_NAMES,
)


def _olmoe(config: Any) -> llama.Settings:
    supported(config, "clip_qkv", None)
    experts.check_given(config, "num_experts")
    return dict(
        rotation=rotate_wide,
        **llama.attention_bias(config),
        qk_norm=relatives.all_heads,
        experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        normalise=config.norm_topk_prob,
    )


_OLMOE = experts.family(_olmoe, experts.MixtureNames(width="intermediate_size"))
OLMOE = dataclasses.replace(_OLMOE, cuts={**_OLMOE.cuts, **relatives.ALL_HEADS})


def qwen_mixture(config: Any) -> llama.Settings:
    """The sizes of the mixtures."""
    experts.check_given(config, "num_experts", "moe_intermediate_size")
    return dict(d_ff=config.moe_intermediate_size, experts=config.num_experts, experts_per_token=config.num_experts_per_tok)


def qwen_mixed(config: Any) -> llama.Settings:
    """The mixtures, which blocks have one, and the width of other MLPs."""
    step, plain, blocks = config.decoder_sparse_step, config.mlp_only_layers, range(config.num_hidden_layers)
    mixed = tuple(index not in plain and (index + 1) % step == 0 for index in blocks)
    return dict(**qwen_mixture(config), mixed=mixed, mlp_width=config.intermediate_size, normalise=config.norm_topk_prob)


QWEN_NAMES = experts.MixtureNames(
    shared="shared_expert", shared_gate="shared_expert_gate", shared_width="shared_expert_intermediate_size"
)
"""Qwen 2 has a shared expert too, whose output is multiplied by a share of its own for each token."""
QWEN2 = experts.family(
    lambda config: dict(
        **qwen_mixed(config),
        windows=llama.windows_by_type(config),
        qkv_bias=config.qkv_bias,
        shared_width=config.shared_expert_intermediate_size,
    ),
    QWEN_NAMES,
)
QWEN3 = experts.family(
    lambda config: dict(
        **qwen_mixed(config), windows=llama.same_windows(config), **llama.attention_bias(config), qk_norm=llama.each_head
    )
)
