"""Gemma 4: heads of two widths, keys as values, experts beside MLPs.

Of multimodal models this is the text half. A block without a window has wider heads, and its key projection may give its
values. Values are normalised as keys are, without a weight. In a mixture every block adds the outputs of an MLP and of experts,
whose router reads the residual stream.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import transformers
from flax import nnx
from jax import Array

from optima_tpu.errors import UserError
from optima_tpu.models import experts, gemma, llama
from optima_tpu.models.family import Cut, Positions, text_half
from optima_tpu.models.layers import ACTIVATIONS, GatedMLP, Linear, WideRMSNorm, over_rms, scaled
from optima_tpu.models.rope import TYPES, RopeByBlock
from optima_tpu.models.settings import supported


class HeadSizes(NamedTuple):
    """The heads of a block.

    Attributes:
      width: the width of a query, a key or a value.
      kv: number of keys and of values.
      keys_are_values: whether the key projection gives the values too.
    """

    width: int
    kv: int
    keys_are_values: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma4Config(experts.MixtureConfig):
    """The settings of the blocks.

    ``d_ff`` is the width of an expert; ``head_dim`` and ``kv_heads`` are those of the last block.

    Attributes:
      all_heads: the heads of every block.
    """

    all_heads: tuple[HeadSizes, ...]

    @property
    def block_layers(self) -> Sequence[object]:
        return self.all_heads

    def positions(self, index: int, length: int) -> Positions:
        tables = self.rope.of(index).tables(length, self.all_heads[index].width)
        return Positions(*tables, llama.window_at(self.windows, index, length))


def read_config(config: Any) -> Gemma4Config:
    """Reads a Gemma4TextConfig; raises UserError for unsupported settings."""
    _check(config)
    activation, windowed = supported(config, "hidden_activation", *ACTIVATIONS), llama.windows_by_type(config)
    sizes = [llama.read_sizes(layer, None) for layer in config.per_layer_config]
    shared = llama.by_type(config, {"full_attention": config.attention_k_eq_v, "sliding_attention": False})
    mixture: dict[str, Any] = dict(experts=0, experts_per_token=0)
    if getattr(config, "enable_moe_block", False):  # 12B (gemma4_unified) has no such setting
        experts.check_given(config, "num_experts", "top_k_experts", "moe_intermediate_size")
        mixture = dict(experts=config.num_experts, experts_per_token=config.top_k_experts, d_ff=config.moe_intermediate_size)
    return Gemma4Config(
        **sizes[-1] | mixture,
        all_heads=tuple(HeadSizes(each["head_dim"], each["kv_heads"], both) for each, both in zip(sizes, shared, strict=True)),
        rope=RopeByBlock.from_hf(config.rope_parameters, config.layer_types, (*TYPES, "proportional")),
        activation=activation,
        neurons=experts.Gated(activation),
        windows=windowed,
        **llama.attention_bias(config),
        norm=WideRMSNorm,
        norms=gemma.NORMS,
        qk_norm=llama.each_head,
        scale=1.0,
        logit_cap=config.final_logit_softcapping,
        mlp_width=config.intermediate_size,
        normalise=True,
        router=Gemma4Router,
    )


def _check(config: Any) -> None:
    """Raises UserError for old ``transformers`` or blocks that do not fit."""
    if getattr(config, "per_layer_config", None) is None:  # 5.14 has the name, and does not use it here
        raise UserError(
            f"expected transformers 5.15 or newer for a Gemma 4, got {transformers.__version__}: pip install -U transformers"
        )
    embedding, sharing = getattr(config, "hidden_size_per_layer_input", 0), config.num_kv_shared_layers
    if embedding or sharing:
        raise UserError(
            "expected hidden_size_per_layer_input 0 and num_kv_shared_layers 0, as in Gemma 4 12B, 26B-A4B and 31B, got "
            f"{embedding} and {sharing}, as in E2B and E4B, whose blocks read more than the residual stream: not supported"
        )


class Gemma4Attention(llama.RotaryAttention):
    """Attention that normalises values as keys, without a weight."""

    def __init__(self, config: Gemma4Config):
        width, kv_heads, keys_are_values = config.all_heads[config.kind]
        super().__init__(dataclasses.replace(config, head_dim=width, kv_heads=kv_heads))
        self.eps = config.eps
        if keys_are_values:
            del self.v_proj

    def values(self, x: Array, k: Array) -> Array:
        v = super().values(x, k) if hasattr(self, "v_proj") else k
        return over_rms(v, self.eps).astype(v.dtype)


class Gemma4Router(nnx.Module):
    """The experts with the largest softmax, each with a factor of its own.

    The softmax of these experts is scaled to a sum of one, then multiplied by their factors. The router reads the residual
    stream, normalised, times a factor of each channel. It rounds where the reference rounds.
    """

    def __init__(self, config: experts.MixtureConfig):
        self.proj = Linear(config.d_model, config.experts)
        self.scale, self.per_expert_scale = nnx.Param(jnp.ones((config.d_model,))), nnx.Param(jnp.ones((config.experts,)))
        self.few, self.eps = config.experts_per_token, config.eps

    def __call__(self, x: Array) -> tuple[Array, Array]:
        normed = over_rms(x, self.eps).astype(x.dtype) * self.scale[...].astype(x.dtype)
        logits = self.proj(jnp.asarray(scaled(normed, x.shape[-1] ** -0.5)))
        values, chosen = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), self.few)
        shares = values / jnp.sum(values, axis=-1, keepdims=True)
        return chosen, shares * self.per_expert_scale[...].astype(jnp.float32)[chosen]


LAYOUT = experts.MixtureNames(mlp="", router="router", rows=("proj.weight", "per_expert_scale"))


class Gemma4Block(llama.DecoderBlock):
    """A Gemma 2 block with Gemma 4's attention, and a factor of its output."""

    def __init__(self, config: Gemma4Config):
        super().__init__(
            config, Gemma4Attention(config), GatedMLP(config.d_model, config.mlp_width, activation=config.activation)
        )
        self.layer_scalar = nnx.Param(jnp.ones((1,)))

    def __call__(self, x: Array, positions: Positions) -> Array:
        return super().__call__(x, positions) * self.layer_scalar[...].astype(x.dtype)


class MixedBlock(Gemma4Block, experts.Experts):
    """A block that adds up the outputs of its MLP and of its experts."""

    def __init__(self, config: Gemma4Config):
        Gemma4Block.__init__(self, config)
        experts.Experts.__init__(self, config, LAYOUT)
        norm = functools.partial(config.norm, config.d_model, eps=config.eps)
        self.post_feedforward_layernorm_1, self.post_feedforward_layernorm_2 = norm(), norm()
        self.pre_feedforward_layernorm_2 = norm()

    def behind_attention(self, x: Array) -> Array:
        routed = self.routed_output(self.pre_feedforward_layernorm_2(x), routed_by=x)
        return self.post_feedforward_layernorm_1(super().behind_attention(x)) + self.post_feedforward_layernorm_2(routed)


def block(config: Gemma4Config) -> Gemma4Block:
    """One decoder block."""
    return MixedBlock(config) if config.experts else Gemma4Block(config)


def mlp_neurons(config: Gemma4Config) -> Cut:
    """As Llama's; ``d_ff`` is the width of an expert."""
    return llama.neurons(config)._replace(total=config.mlp_width)


def heads(config: Gemma4Config) -> Cut:
    """The heads in groups of which all blocks have the same number.

    A group has one key-value head in some blocks and several in the others, with as many queries in each block.
    """
    last = config.all_heads[-1]
    first = next((each for each in config.all_heads if each.kv != last.kv), last)
    # config.json counts the key-value heads of two kinds of blocks.
    total = math.gcd(first.kv, last.kv) if {each.kv for each in config.all_heads} == {first.kv, last.kv} else 1
    each = last.kv // total
    settings = {"num_attention_heads": config.heads // total, "num_key_value_heads": first.kv // total}
    for_all = {"num_global_key_value_heads": each, "per_layer_config.*.num_key_value_heads": each}
    made_by = dict.fromkeys(("q_proj", "k_proj", "v_proj"), ())
    called = "key-value heads" if first.kv == last.kv else "groups of heads"
    return Cut(called, total, config.heads // total * last.width, ("self_attn.o_proj",), made_by, settings | for_all)


*_WIDE, _NARROW = LAYOUT.layers
FAMILY = dataclasses.replace(
    gemma.GEMMA2,
    read_config=read_config,
    block=block,
    by_block=frozenset({"head_dim", "num_key_value_heads"}),
    cuts={"neuron": (mlp_neurons, functools.partial(experts.expert_neurons, layout=LAYOUT)), "head": (heads,)},
    linears=(*llama.LINEARS, *LAYOUT.layers),
    narrow=(*llama.FAMILY.narrow, _NARROW),
    experts=LAYOUT.experts,
    shared=tuple(_WIDE),
    stacks=LAYOUT.stacks(turned=False),
)
MULTIMODAL = text_half(
    FAMILY, ("model.language_model.",), r"model\.(vision_|audio_|embed_vision|embed_audio).*", "for images and sound"
)
