"""Qwen3-Next and Qwen 3.5: Gated DeltaNet, gated attention, mixtures.

Most blocks have a DeltaNet, the others attention. Behind both are mixtures as in Qwen 2, or MLPs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

from optima_tpu.errors import UserError
from optima_tpu.models import experts, llama, mixtures
from optima_tpu.models.delta_net import DeltaNet, Sizes
from optima_tpu.models.family import FURTHER, Cut, Family, text_half
from optima_tpu.models.layers import ShiftedRMSNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenNextConfig(experts.MixtureConfig):
    """The settings of the blocks.

    Attributes:
      linear: for every block whether its attention is linear.
      delta: the sizes of linear attention.
    """

    linear: tuple[bool, ...]
    delta: Sizes

    @property
    def attention(self) -> str:
        return "linear_attn" if self.linear[self.kind] else "self_attn"

    @property
    def block_layers(self) -> Sequence[object]:
        return list(zip(self.linear, self.mixed, strict=True))


def _next(config: Any) -> llama.Settings:
    return _settings(config, joined=True, shared_width=config.shared_expert_intermediate_size, **mixtures.qwen_mixed(config))


def _mixture(config: Any) -> llama.Settings:
    """A mixture in every block."""
    mixed, width = (True,) * config.num_hidden_layers, config.shared_expert_intermediate_size
    return _settings(config, normalise=True, mixed=mixed, shared_width=width, **mixtures.qwen_mixture(config))


def _dense(config: Any) -> llama.Settings:
    """No mixture in any block."""
    mixed, width = (False,) * config.num_hidden_layers, config.intermediate_size
    return _settings(config, experts=0, experts_per_token=0, normalise=False, mixed=mixed, mlp_width=width)


def _settings(config: Any, joined: bool = False, **mixture: Any) -> llama.Settings:
    heads, key_heads = config.linear_num_value_heads, config.linear_num_key_heads
    if heads % key_heads:
        raise UserError(
            f"expected linear_num_value_heads that linear_num_key_heads divides, got {heads} and {key_heads} in config.json: "
            "check the file"
        )
    return dict(
        **mixture,
        norm=ShiftedRMSNorm,
        **llama.attention_bias(config),
        qk_norm=llama.each_head,
        gated=True,
        linear=llama.by_type(config, {"linear_attention": True, "full_attention": False}),
        delta=Sizes(
            heads, key_heads, config.linear_key_head_dim, config.linear_value_head_dim, config.linear_conv_kernel_dim, joined
        ),
    )


def attention(config: QwenNextConfig) -> nnx.Module:
    """The attention of a block."""
    linear = config.linear[config.kind]
    return DeltaNet(config.d_model, config.delta, config.eps) if linear else llama.RotaryAttention(config)


def linear_heads(config: QwenNextConfig) -> Cut:
    """The key heads of linear attention, each with the values that read it."""
    sizes = config.delta
    keys, group = sizes.key_dim, sizes.heads // sizes.key_heads
    values = group * sizes.value_dim
    joined = dict.fromkeys(("in_proj_qkvz", "in_proj_ba", "in_proj_z", "in_proj_b", "in_proj_a", "dt_bias", "A_log"), ())
    makers = {**joined, "in_proj_qkv": (keys, keys, values), "conv1d": (keys, keys, values)}
    settings = {"linear_num_key_heads": 1, "linear_num_value_heads": group}
    return Cut("key heads of linear attention", sizes.key_heads, values, ("linear_attn.out_proj",), makers, settings)


def _family(settings: Callable[[Any], llama.Settings], **fields: Any) -> Family:
    made = experts.family(
        settings, mixtures.QWEN_NAMES, made=QwenNextConfig, attention=attention, rope=llama.partial_rope_of, **fields
    )
    wide = tuple(f"linear_attn.in_proj_{name}" for name in ("qkvz", "ba", "qkv", "z", "b", "a"))
    narrow = "linear_attn.out_proj"
    return dataclasses.replace(
        made,
        linears=(*wide, narrow, *made.linears),
        narrow=(narrow, *made.narrow),
        attended=(narrow, *made.attended),
        residuals={narrow: made.residuals["self_attn.o_proj"], **made.residuals},
        ignored={r"mtp\..*": FURTHER},
        cuts={**made.cuts, "head": (llama.heads, linear_heads)},
    )


NEXT = _family(_next)
DENSE = _family(_dense)
# As the mixtures are published; transformers writes each expert by itself.
MIXTURE = _family(_mixture, stacks=mixtures.QWEN_NAMES.stacks(turned=False))
_IMAGES = ("model.language_model.",), r"model\.visual\..*"
DENSE_MULTIMODAL = text_half(DENSE, *_IMAGES)
MIXTURE_MULTIMODAL = text_half(MIXTURE, *_IMAGES)
