"""Mixtures of experts that are Llama's, OLMo's or Qwen's blocks with a mixture in the place of some or all MLPs."""

import dataclasses
from typing import Any

from optima_tpu.models import experts, llama, relatives
from optima_tpu.models.rope import Rope, rotate_wide
from optima_tpu.models.settings import supported


def _read(config: Any, **settings: Any) -> experts.MixtureConfig:
    sizes = llama.read_sizes(config)
    return experts.MixtureConfig(**{**sizes, "rope": Rope.from_hf(config.rope_parameters), **settings})


def read_mixtral(config: Any) -> experts.MixtureConfig:
    """From ``transformers.MixtralConfig``; every block has the same window, or none."""
    return _read(
        config,
        windows=llama.same_windows(config),
        experts=config.num_local_experts,
        experts_per_token=config.num_experts_per_tok,
        # The softmax over the chosen experts' logits is the softmax over all, scaled to a sum of one.
        normalise=True,
    )


MIXTRAL_NAMES = experts.MixtureNames("block_sparse_moe", wide=("w1", "w3"), narrow="w2", width="intermediate_size")
"""transformers holds the experts of a block in two arrays, and stores them under these names."""
MIXTRAL = experts.family(read_mixtral, MIXTRAL_NAMES)


def read_olmoe(config: Any) -> experts.MixtureConfig:
    """From ``transformers.OlmoeConfig``. Raises UserError for a model that clips queries, keys and values."""
    supported(config, "clip_qkv", None)
    experts.check_given(config, "num_experts")
    return _read(
        config,
        rotation=rotate_wide,
        **llama.attention_bias(config),
        qk_norm=relatives.all_heads,
        experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        normalise=config.norm_topk_prob,
    )


_OLMOE = experts.family(read_olmoe, experts.MixtureNames(width="intermediate_size"))
OLMOE = dataclasses.replace(_OLMOE, cuts={**_OLMOE.cuts, **relatives.ALL_HEADS})


def _read_qwen(config: Any, **settings: Any) -> experts.MixtureConfig:
    return _read(config, **qwen_mixture(config), **qwen_mixed(config), normalise=config.norm_topk_prob, **settings)


def read_qwen2(config: Any) -> experts.MixtureConfig:
    """From ``transformers.Qwen2MoeConfig``."""
    windows, shared_width = llama.windows_by_type(config), config.shared_expert_intermediate_size
    return _read_qwen(config, windows=windows, qkv_bias=config.qkv_bias, shared_width=shared_width)


def read_qwen3(config: Any) -> experts.MixtureConfig:
    """From ``transformers.Qwen3MoeConfig``; every block has the same window, or none."""
    return _read_qwen(config, windows=llama.same_windows(config), **llama.attention_bias(config), qk_norm=llama.each_head)


def qwen_mixture(config: Any) -> dict[str, Any]:
    """The sizes of the mixtures, as arguments of :class:`~optima_tpu.models.experts.MixtureConfig`."""
    experts.check_given(config, "num_experts", "moe_intermediate_size")
    return dict(d_ff=config.moe_intermediate_size, experts=config.num_experts, experts_per_token=config.num_experts_per_tok)


def qwen_mixed(config: Any) -> dict[str, Any]:
    """Which blocks have a mixture, and the width of the MLP in the others, in the same way."""
    step, plain, blocks = config.decoder_sparse_step, config.mlp_only_layers, range(config.num_hidden_layers)
    mixed = tuple(index not in plain and (index + 1) % step == 0 for index in blocks)
    return dict(mixed=mixed, mlp_width=config.intermediate_size)


QWEN_NAMES = experts.MixtureNames(
    shared="shared_expert", shared_gate="shared_expert_gate", shared_width="shared_expert_intermediate_size"
)
"""Qwen 2 has a shared expert too, whose output is multiplied by a share of its own for each token."""
QWEN2 = experts.family(read_qwen2, QWEN_NAMES)
QWEN3 = experts.family(read_qwen3)
