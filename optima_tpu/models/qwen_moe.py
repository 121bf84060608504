"""Qwen 3 mixtures of experts: the attention of Qwen 3, and a router that sends every token to a few of many small MLPs.

Each expert reads the tokens that were routed to it, and zeros for all others: so the Hessians of its layers come from its own
tokens, and nothing outside this file knows of routing. The price is that every expert computes every token; a forward pass costs
experts / experts_per_token times the minimum.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from optima_tpu.errors import UserError
from optima_tpu.models import llama
from optima_tpu.models.layers import GatedMLP, RMSNorm, RotaryAttention, project
from optima_tpu.models.rope import Rope
from optima_tpu.runtime.mesh import MODEL


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """The numbers that shape a block; ``d_ff`` is the width of one expert.

    Attributes:
      experts: number of experts in every block.
      experts_per_token: number of experts that a token is sent to.
      normalise: whether the shares of these experts are scaled to sum to one.
    """

    experts: int
    experts_per_token: int
    normalise: bool


def read_config(config: Any) -> Config:
    """From ``transformers.Qwen3MoeConfig``. Raises UserError for a model in which some blocks have no experts."""
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise UserError(
            f"expected experts in every block (mlp_only_layers empty, decoder_sparse_step 1), got "
            f"{config.mlp_only_layers} and {config.decoder_sparse_step}: not supported"
        )
    if config.sliding_window:
        raise UserError(f"expected use_sliding_window false, got a window of {config.sliding_window}: not supported")
    if config.num_experts_per_tok > config.num_experts:
        raise UserError(
            f"expected num_experts_per_tok of at most num_experts, got {config.num_experts_per_tok} and {config.num_experts} in "
            "config.json: check the file"
        )
    sizes = llama.read_sizes(config) | dict(d_ff=config.moe_intermediate_size)
    return Config(
        **sizes,
        rope=Rope.from_hf(config.rope_parameters),
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        normalise=config.norm_topk_prob,
    )


class Router(nnx.Module):
    """Each token's share of every expert, [batch, length, experts]: zero except for the experts that the token is sent to."""

    def __init__(self, config: Config):
        self.weight = nnx.Param(jnp.zeros((config.experts, config.d_model)))
        self.few, self.normalise = config.experts_per_token, config.normalise

    def __call__(self, x: Array) -> Array:
        # Logits in x's dtype and softmax in float32, as the reference: another rounding would route some tokens to other experts.
        shares = jax.nn.softmax(project(x, self.weight[...]).astype(jnp.float32), axis=-1)
        values, chosen = jax.lax.top_k(shares, self.few)
        if self.normalise:
            values = values / jnp.sum(values, axis=-1, keepdims=True)
        return jnp.sum(jax.nn.one_hot(chosen, shares.shape[-1]) * values[..., None], axis=-2).astype(x.dtype)


class Mixture(nnx.Module):
    """The sum of the experts' outputs, weighted by their shares."""

    def __init__(self, config: Config):
        self.gate = Router(config)
        self.experts = nnx.List([GatedMLP(config.d_model, config.d_ff, activation="silu") for _ in range(config.experts)])

    def __call__(self, x: Array) -> Array:
        shares = jnp.split(self.gate(x), len(self.experts), axis=-1)
        outputs = (share * expert(jnp.where(share > 0, x, 0)) for share, expert in zip(shares, self.experts))
        return functools.reduce(jnp.add, outputs)


def block(config: Config) -> llama.PreNormBlock:
    """One decoder block."""
    attention = RotaryAttention(
        config.d_model,
        config.heads,
        config.kv_heads,
        config.head_dim,
        qkv_bias=config.qkv_bias,
        o_bias=config.o_bias,
        norm=functools.partial(RMSNorm, eps=config.eps),
    )
    return llama.PreNormBlock(config, attention, Mixture(config))


FAMILY = dataclasses.replace(
    llama.FAMILY,
    read_config=read_config,
    block=block,
    linears=(*llama.LINEARS[:4], "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj", "mlp.experts.*.down_proj"),
    sharding={
        **llama.SHARDING,
        "mlp.experts.*.gate_proj.weight": P(MODEL, None),
        "mlp.experts.*.up_proj.weight": P(MODEL, None),
        "mlp.experts.*.down_proj.weight": P(None, MODEL),
    },
)
