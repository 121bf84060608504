"""Llama 4: chunked attention, blocks without positions, and mixtures.

Most blocks have chunks of attention, the others no positions. The share of an expert multiplies its input.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from optima_tpu.models import experts, llama
from optima_tpu.models.family import Positions, text_half
from optima_tpu.models.layers import over_rms
from optima_tpu.models.rope import rotate_neighbours_wide
from optima_tpu.models.routers import Router, sigmoid
from optima_tpu.models.settings import of_every_block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama4Config(experts.MixtureConfig):
    """The settings of the blocks.

    Attributes:
      turning: for every block whether its queries and keys turn.
      chunks: for every block the length of a chunk, behind whose beginning a token sees nothing; None if it sees everything.
      normed: whether queries and keys that turn are then divided by their root mean square.
      temper: (step, strength) of the factor ``1 + strength log(1 + floor((t + 1) / step))`` of the queries at position t that
        do not turn; None for none.
    """

    turning: tuple[bool, ...]
    chunks: tuple[int | None, ...]
    normed: bool
    temper: tuple[float, float] | None

    @property
    def block_layers(self) -> Sequence[object]:
        return list(zip(self.turning, self.mixed, strict=True))

    def positions(self, index: int, length: int) -> Positions:
        """Where nothing turns, cos is the factor of the queries."""
        cos, sin = self.rope.of(index).tables(length, self.head_dim)
        position, chunk = np.arange(length), self.chunks[index] or length
        if not self.turning[index]:
            step, strength = self.temper or (1.0, 0.0)
            factor = 1 + strength * np.log1p(np.floor((position + 1) / step))
            cos, sin = np.repeat(factor.astype(np.float32)[:, None], cos.shape[1], axis=1), np.zeros_like(sin)
        return Positions(cos, sin, (position % chunk + 1).astype(np.int32))


def _settings(config: Any) -> llama.Settings:
    return dict(
        rotation=rotate_neighbours_wide,
        **llama.attention_bias(config),
        turning=tuple(map(bool, of_every_block(config, "no_rope_layers"))),
        chunks=llama.by_type(config, {"full_attention": None, "chunked_attention": config.attention_chunk_size}),
        normed=config.use_qk_norm,
        temper=(config.floor_scale, config.attn_scale) if config.attn_temperature_tuning else None,
        experts=config.num_local_experts,
        experts_per_token=config.num_experts_per_tok,
        normalise=False,
        router=router,
        share_first=True,
        shared_width=config.intermediate_size,
        mixed=tuple(index in config.moe_layers for index in range(config.num_hidden_layers)),
        mlp_width=config.intermediate_size_mlp,
    )


class Llama4Attention(llama.RotaryAttention):
    """Llama's attention, with its norms behind the rotation.

    Where nothing turns, a factor multiplies the queries instead.
    """

    def __init__(self, config: Llama4Config):
        super().__init__(config)
        self.turns, self.eps = config.turning[config.kind], config.eps if config.normed else None

    def turned(self, q: Array, k: Array, positions: Positions) -> tuple[Array, Array]:
        if not self.turns:
            factor, _ = positions.rotary
            return (q.astype(jnp.float32) * factor[:, None, :1]).astype(q.dtype), k
        q, k = super().turned(q, k, positions)
        if self.eps is None:
            return q, k
        return over_rms(q, self.eps).astype(q.dtype), over_rms(k, self.eps).astype(k.dtype)


def router(config: experts.MixtureConfig) -> Router:
    """The router of a mixture: the sigmoids of the largest logits."""
    return Router(config.d_model, config.experts, config.experts_per_token, shares=sigmoid)


_NAMES = experts.MixtureNames(
    "feed_forward", router="router", shared="shared_expert", width="intermediate_size", mlp_width="intermediate_size_mlp"
)
FAMILY = experts.family(_settings, _NAMES, made=Llama4Config, attention=Llama4Attention, stacks=_NAMES.stacks(turned=True))
MULTIMODAL = text_half(
    FAMILY, ("language_model.model.",), r"(vision_model|multi_modal_projector)\..*", head="language_model.lm_head.weight"
)
