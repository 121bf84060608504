"""Qwen mixtures of experts: the attention of Qwen 2 or 3, and a mixture in the place of some or all MLPs.

Qwen 2 has a shared expert too, whose output is multiplied by a share of its own for each token.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from optima_tpu.models import experts, llama
from optima_tpu.models.layers import project
from optima_tpu.models.rope import Rope


def read_qwen2(config: Any) -> experts.MixtureConfig:
    """From ``transformers.Qwen2MoeConfig``."""
    settings = _read(config, windows=llama.windows_by_type(config), qkv_bias=config.qkv_bias)
    return dataclasses.replace(settings, shared_width=config.shared_expert_intermediate_size)


def read_qwen3(config: Any) -> experts.MixtureConfig:
    """From ``transformers.Qwen3MoeConfig``; every block has the same window, or none."""
    biases = dict(qkv_bias=config.attention_bias, o_bias=config.attention_bias)
    return _read(config, windows=llama.same_windows(config), qk_norm=True, **biases)


def _read(config: Any, **attention: Any) -> experts.MixtureConfig:
    return experts.MixtureConfig(
        **llama.read_sizes(config) | read_mixture(config) | read_mixed(config),
        rope=Rope.from_hf(config.rope_parameters),
        normalise=config.norm_topk_prob,
        **attention,
    )


def read_mixture(config: Any) -> dict[str, Any]:
    """The sizes of the mixtures, as arguments of :class:`~optima_tpu.models.experts.MixtureConfig`."""
    experts.check_given(config, "num_experts", "moe_intermediate_size")
    return dict(d_ff=config.moe_intermediate_size, experts=config.num_experts, experts_per_token=config.num_experts_per_tok)


def read_mixed(config: Any) -> dict[str, Any]:
    """Which blocks have a mixture, and the width of the MLP in the others, in the same way."""
    step, plain, blocks = config.decoder_sparse_step, config.mlp_only_layers, range(config.num_hidden_layers)
    mixed = tuple(index not in plain and (index + 1) % step == 0 for index in blocks)
    return dict(mixed=mixed, mlp_width=config.intermediate_size)


class Gate(nnx.Module):
    """The share of the shared expert in a token's output, [batch, length, 1]."""

    def __init__(self, d_model: int):
        self.weight = nnx.Param(jnp.zeros((1, d_model)))

    def __call__(self, x: Array) -> Array:
        return jax.nn.sigmoid(project(x, self.weight[...]))


class QwenMixture(experts.Mixture):
    """A mixture whose shared expert has a share."""

    def __init__(self, config: experts.MixtureConfig, layout: experts.MixtureNames):
        super().__init__(config, layout)
        self.shared_expert_gate = Gate(config.d_model)

    def shared_output(self, x: Array) -> Array:
        return self.shared_expert_gate(x) * super().shared_output(x)


LAYOUT = experts.MixtureNames(shared="shared_expert", shared_width="shared_expert_intermediate_size")
QWEN2 = dataclasses.replace(
    experts.family(read_qwen2, LAYOUT, mixture=QwenMixture),
    residuals=llama.FAMILY.residuals,  # the shared expert adds its share only
)
QWEN3 = experts.family(read_qwen3)
