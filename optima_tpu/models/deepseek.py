"""DeepSeek V2 and V3, and GLM-4.7 Flash: latent attention and mixtures.

The mixtures have shared experts. The first few blocks have an ordinary MLP. GLM-4.5 to 4.7 have the mixtures alone.

Latent attention projects the hidden states to narrow vectors, and these to queries, keys and values. A part of each query turns
with the position, and one vector that turns is a part of the keys of all heads. The narrow projections are pruned as any layer.
Source: arXiv:2405.04434.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from optima_tpu.errors import UserError
from optima_tpu.models import experts, llama
from optima_tpu.models.family import FURTHER, Cut, Family, Positions
from optima_tpu.models.layers import Linear, RMSNorm, Scores, attention, split_heads
from optima_tpu.models.rope import rotate, rotate_neighbours, rotate_neighbours_wide
from optima_tpu.models.routers import Groups
from optima_tpu.models.settings import supported


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekConfig(experts.MixtureConfig):
    """The numbers that shape a block.

    ``head_dim`` is the width of the part of a head that turns.

    Attributes:
      q_rank: width of the latent vector of the queries; None if queries are projected at once.
      kv_rank: width of the latent vector of keys and values.
      still_dim: width of the part of a query or key that does not turn.
      value_dim: width of a value.
    """

    q_rank: int | None
    kv_rank: int
    still_dim: int
    value_dim: int


def _v2(config: Any) -> llama.Settings:
    supported(config, "mlp_bias", False)
    supported(config, "norm_topk_prob", False, None)
    methods = {"greedy": (1, 1), "group_limited_greedy": (config.n_group or 1, config.topk_group or 1)}
    total, chosen = methods[supported(config, "topk_method", *methods)]
    groups = Groups(total=total, chosen=chosen, best=1, sigmoid=False, scale=config.routed_scaling_factor)
    return _latent(config, dense_first(config)) | dict(groups=groups, rotation=rotate_neighbours_wide, normalise=False)


def _v3(config: Any) -> llama.Settings:
    return _latent(config, dense_first(config))


def _glm4_lite(config: Any) -> llama.Settings:
    """Raises UserError for MLPs that are neither dense nor sparse."""
    kinds, blocks = config.mlp_layer_types, config.num_hidden_layers
    if len(kinds) != blocks or set(kinds) - {"dense", "sparse"}:
        raise UserError(
            f"expected {blocks} mlp_layer_types, dense or sparse, in config.json, got {', '.join(kinds)}: check the file"
        )
    return _latent(config, tuple(kind == "sparse" for kind in kinds))


def _glm4(config: Any) -> llama.Settings:
    """Ordinary attention before the mixtures."""
    qk_norm = llama.each_head if config.use_qk_norm else None
    return _mixture(config, dense_first(config)) | dict(qkv_bias=config.attention_bias, qk_norm=qk_norm)


def _latent(config: Any, mixed: tuple[bool, ...]) -> llama.Settings:
    """The settings of a model with latent attention.

    ``mixed`` says for every block whether it has a mixture.
    """
    supported(config, "num_key_value_heads", config.num_attention_heads)
    parameters, scale = config.rope_parameters, (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    if parameters.get("rope_type", "default") != "default" and (share := parameters.get("mscale_all_dim")):
        scale *= (1 + 0.1 * share * math.log(max(parameters["factor"], 1.0))) ** 2
    return dict(
        **_mixture(config, mixed),
        head_dim=config.qk_rope_head_dim,
        rotation=rotate_neighbours if getattr(config, "rope_interleave", True) else rotate,
        **llama.attention_bias(config),
        scale=scale,
        q_rank=config.q_lora_rank,
        kv_rank=config.kv_lora_rank,
        still_dim=config.qk_nope_head_dim,
        value_dim=config.v_head_dim,
    )


def dense_first(config: Any) -> tuple[bool, ...]:
    """For every block whether it has a mixture: the first ones have none."""
    return tuple(index >= config.first_k_dense_replace for index in range(config.num_hidden_layers))


def _mixture(config: Any, mixed: tuple[bool, ...]) -> llama.Settings:
    """The settings of the mixtures."""
    experts.check_given(config, "num_experts_per_tok", "moe_intermediate_size")
    if not config.n_shared_experts:
        raise UserError(f"expected n_shared_experts of at least 1, got {config.n_shared_experts}: not supported")
    return dict(
        d_ff=config.moe_intermediate_size,
        experts=config.n_routed_experts,
        experts_per_token=config.num_experts_per_tok,
        normalise=config.norm_topk_prob,
        groups=Groups(total=config.n_group or 1, chosen=config.topk_group or 1, scale=config.routed_scaling_factor),
        shared_width=config.moe_intermediate_size * config.n_shared_experts,
        mixed=mixed,
        mlp_width=config.intermediate_size,
    )


def further_tokens(*blocks: int) -> Mapping[str, str]:
    """``Family.ignored`` for blocks behind the last one, by their numbers."""
    return {rf"model\.layers\.({'|'.join(map(str, blocks))})\..*": FURTHER}


class DeepseekAttention(nnx.Module):
    """Latent attention; the norms of its latent vectors use eps 1e-6."""

    def __init__(self, config: DeepseekConfig):
        self.config, self.width, self.mesh = config, config.still_dim + config.head_dim, None
        if config.q_rank is None:
            self.q_proj = Linear(config.d_model, config.heads * self.width)
        else:
            self.q_a_proj = Linear(config.d_model, config.q_rank, bias=config.qkv_bias)
            self.q_a_layernorm = RMSNorm(config.q_rank, eps=1e-6)
            self.q_b_proj = Linear(config.q_rank, config.heads * self.width)
        self.kv_a_proj_with_mqa = Linear(config.d_model, config.kv_rank + config.head_dim, bias=config.qkv_bias)
        self.kv_a_layernorm = RMSNorm(config.kv_rank, eps=1e-6)
        self.kv_b_proj = Linear(config.kv_rank, config.heads * (config.still_dim + config.value_dim))
        self.o_proj = Linear(config.heads * config.value_dim, config.d_model, bias=config.o_bias)

    def __call__(self, x: Array, positions: Positions) -> Array:
        config = self.config
        q = self.q_proj(x) if config.q_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        latent, turning = jnp.split(self.kv_a_proj_with_mqa(x), [config.kv_rank], axis=-1)
        kv = split_heads(self.kv_b_proj(self.kv_a_layernorm(latent)), config.still_dim + config.value_dim)
        (still, q_turning), (k_still, v) = (
            jnp.split(each, [config.still_dim], axis=-1) for each in (split_heads(q, self.width), kv)
        )
        q_turning, turning = (config.rotation(each, *positions.rotary) for each in (q_turning, turning[:, :, None]))
        turning = jnp.broadcast_to(turning, (*k_still.shape[:-1], config.head_dim))
        q, k = (jnp.concatenate(parts, axis=-1) for parts in ((still, q_turning), (k_still, turning)))
        return self.o_proj(attention(q, k, v, positions, Scores(config.scale), self.mesh).reshape(*x.shape[:2], -1))


def heads(config: DeepseekConfig) -> Cut:
    """The heads; the latent vectors that they read stay."""
    makers = dict.fromkeys(("q_proj", "q_b_proj", "kv_b_proj"), ())
    settings = {"num_attention_heads": 1, "num_key_value_heads": 1}
    return Cut("heads", config.heads, config.value_dim, ("self_attn.o_proj",), makers, settings)


ROUTER = ("mlp.gate.weight", "mlp.gate.e_score_correction_bias")
"""``Family.exact``: rounded, they would send tokens to other experts."""


def _family(settings: Callable[[Any], llama.Settings], **fields: Any) -> Family:
    made = experts.family(settings, made=DeepseekConfig, attention=DeepseekAttention, exact=ROUTER, **fields)
    projections = ("q_a_proj", "kv_a_proj_with_mqa", "q_proj", "q_b_proj", "kv_b_proj")
    wide = tuple(f"self_attn.{name}" for name in projections)
    return dataclasses.replace(made, linears=(*wide, "self_attn.o_proj", *made.linears[4:]), cuts={**made.cuts, "head": (heads,)})


V2 = _family(_v2)
V3 = _family(_v3, ignored=further_tokens(61))
GLM4_MOE = experts.family(_glm4, rope=llama.partial_rope_of, exact=ROUTER, ignored=further_tokens(46, 92))
GLM4_MOE_LITE = _family(_glm4_lite, ignored=further_tokens(47))
