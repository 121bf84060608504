"""gpt-oss: attention sinks, alternating windows, experts with biases.

One layer of an expert is both gate and up.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from optima_tpu.models import experts, llama
from optima_tpu.models.layers import WideRMSNorm
from optima_tpu.models.routers import Router, softmax


@dataclasses.dataclass(frozen=True)
class Clamped:
    """``(up + 1) gate sigmoid(alpha gate)`` of clamped values.

    Gates and ups alternate in the input.

    Attributes:
      alpha: steepness of the sigmoid.
      limit: the largest gate, and the largest up in absolute value.
    """

    alpha: float
    limit: float

    def __call__(self, both: Array) -> Array:
        gate, up = jnp.minimum(both[..., ::2], self.limit), jnp.clip(both[..., 1::2], -self.limit, self.limit)
        return (up + 1) * (gate * jax.nn.sigmoid(gate * self.alpha))


def _settings(config: Any) -> llama.Settings:
    return dict(
        windows=llama.windows_by_type(config),
        norm=WideRMSNorm,
        **llama.attention_bias(config),
        sinks=True,
        experts=config.num_local_experts,
        experts_per_token=config.num_experts_per_tok,
        normalise=True,
        router=router,
        neurons=Clamped(config.swiglu_alpha, config.swiglu_limit),
    )


def router(config: experts.MixtureConfig) -> Router:
    """The router of a mixture: a softmax of the largest logits with biases."""
    return Router(config.d_model, config.experts, config.experts_per_token, shares=softmax, bias=True)


_NAMES = experts.MixtureNames(router="router", wide=("gate_up_proj",), bias=True, width="intermediate_size")
FAMILY = experts.family(_settings, _NAMES, activation=None, stacks=_NAMES.stacks(turned=True))  # hidden_act is not used
