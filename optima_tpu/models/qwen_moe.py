"""Qwen 3 mixtures of experts: the attention of Qwen 3, and a mixture in the place of its MLP."""

from typing import Any

from optima_tpu.errors import UserError
from optima_tpu.models import experts, llama
from optima_tpu.models.rope import Rope


def read_config(config: Any) -> experts.Config:
    """From ``transformers.Qwen3MoeConfig``. Raises UserError for a model in which some blocks have no experts."""
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise UserError(
            f"expected experts in every block (mlp_only_layers empty, decoder_sparse_step 1), got "
            f"{config.mlp_only_layers} and {config.decoder_sparse_step}: not supported"
        )
    if config.sliding_window:
        raise UserError(f"expected use_sliding_window false, got a window of {config.sliding_window}: not supported")
    return experts.Config(
        **llama.read_sizes(config) | dict(d_ff=config.moe_intermediate_size),
        rope=Rope.from_hf(config.rope_parameters),
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        qk_norm=True,
        experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        normalise=config.norm_topk_prob,
    )


FAMILY = experts.family(read_config)
