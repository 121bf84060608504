"""Mixtral: Mistral's attention, and a mixture in the place of its MLP."""

from typing import Any

from optima_tpu.models import experts, llama
from optima_tpu.models.rope import Rope


def read_config(config: Any) -> experts.MixtureConfig:
    """From ``transformers.MixtralConfig``; every block has the same window, or none."""
    return experts.MixtureConfig(
        **llama.read_sizes(config),
        rope=Rope.from_hf(config.rope_parameters),
        windows=llama.same_windows(config),
        experts=config.num_local_experts,
        experts_per_token=config.num_experts_per_tok,
        # The softmax over the chosen experts' logits is the softmax over all, scaled to a sum of one.
        normalise=True,
    )


LAYOUT = experts.MixtureNames("block_sparse_moe", wide=("w1", "w3"), narrow="w2", width="intermediate_size")
"""transformers holds the experts of a block in two arrays, and stores them under these names."""
FAMILY = experts.family(read_config, LAYOUT)
