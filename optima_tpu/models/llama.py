"""Llama 2, 3, 3.1, 3.2 and models of the same architecture (SmolLM2): RMSNorm, rotary GQA attention, SwiGLU.

Many families are the same block with other settings, which :class:`LlamaConfig` has: see their files.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from optima_tpu.errors import UserError
from optima_tpu.models.family import Cut, DecoderConfig, Family, Positions, Residual
from optima_tpu.models.layers import GatedMLP, RMSNorm, RotaryAttention, scaled
from optima_tpu.models.rope import Rope, RopeByBlock, Rotation, rotate
from optima_tpu.runtime.mesh import MODEL

T = TypeVar("T")

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)

# Projections into heads or neurons shard their outputs over the model axis, projections out of them shard their inputs: one
# all-reduce per sublayer. Everything else (norms, biases of the second kind) is replicated.
SHARDING: dict[str, P] = {
    **{f"self_attn.{name}_proj.weight": P(MODEL, None) for name in "qkv"},
    **{f"self_attn.{name}_proj.bias": P(MODEL) for name in "qkv"},
    "self_attn.o_proj.weight": P(None, MODEL),
    **{f"mlp.{name}_proj.weight": P(MODEL, None) for name in ("gate", "up")},
    **{f"mlp.{name}_proj.bias": P(MODEL) for name in ("gate", "up")},
    "mlp.down_proj.weight": P(None, MODEL),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """The settings of a Llama block and of its relatives.

    Attributes:
      windows: for every block, how many tokens a position sees (None: all); empty if all blocks see everything.
      qk_norm: whether queries and keys are normalised, head by head.
      rope: the rotary embedding, of every block or block by block.
      rotation: rotates queries and keys.
      activation: the MLP's, by its name in ``ACTIVATIONS``.
      norm: ``norm(d, eps=eps)`` makes a norm.
      scale: factor of the products of queries and keys; None for ``head_dim ** -0.5``.
      score_cap: ``c`` where the scaled products become ``c tanh(p / c)``, or None.
      sinks: whether every head has a sink, which takes a share of each query.
      gated: whether the output of attention is multiplied by the sigmoid of a gate, which q_proj gives beside each query.
      branch_scale: factor of the outputs of attention and MLP, before they are added to the residual stream.
    """

    d_ff: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    windows: tuple[int | None, ...] = ()
    qk_norm: bool = False
    rope: Rope | RopeByBlock
    rotation: Rotation = rotate
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    norm: Callable[..., nnx.Module] = RMSNorm
    scale: float | None = None
    score_cap: float | None = None
    sinks: bool = False
    gated: bool = False
    branch_scale: float = 1.0

    @property
    def attention(self) -> str:
        """The name of the block's attention in the checkpoint."""
        return "self_attn"

    def positions(self, index: int, length: int) -> Positions:
        return Positions(*self.rope.of(index).tables(length, self.head_dim), window_at(self.windows, index, length))


def read_sizes(config: Any, activation: str = "silu", eps: str = "rms_norm_eps") -> dict[str, Any]:
    """As :func:`named_sizes`, for a model whose activation is known.

    Raises:
      UserError: the model has another activation.
    """
    if config.hidden_act != activation:
        raise UserError(
            f"expected hidden_act {activation} in a {config.model_type} model, got {config.hidden_act!r}: not supported"
        )
    return named_sizes(config, eps)


def named_sizes(config: Any, eps: str = "rms_norm_eps") -> dict[str, Any]:
    """The settings that have the same names in many transformers configurations, as arguments of :class:`LlamaConfig`.

    Args:
      eps: the name of the norms' ``eps``.

    Raises:
      UserError: the numbers of heads do not fit one another or the width.
    """
    heads = config.num_attention_heads
    kv_heads = heads if config.num_key_value_heads is None else config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if heads % kv_heads or head_dim < 2 or head_dim % 2:
        raise UserError(
            f"expected heads of an even width in equal groups, got {heads} heads of {head_dim}, and {kv_heads} key-value heads in "
            "config.json: check the file"
        )
    return dict(
        d_model=config.hidden_size,
        d_embedding=config.hidden_size,
        d_ff=getattr(config, "intermediate_size", 0),  # none where every block has a mixture
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        blocks=config.num_hidden_layers,
        vocab=config.vocab_size,
        eps=getattr(config, eps),
        tied=config.tie_word_embeddings,
    )


def read_config(config: Any) -> LlamaConfig:
    """From ``transformers.LlamaConfig``."""
    return LlamaConfig(
        **read_sizes(config),
        rope=Rope.from_hf(config.rope_parameters),
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
    )


def same_windows(config: Any) -> tuple[int, ...]:
    """The one ``sliding_window`` for every block; empty if there is none."""
    return (config.sliding_window,) * config.num_hidden_layers if config.sliding_window else ()


def windows_by_type(config: Any) -> tuple[int | None, ...]:
    """The sliding windows from ``layer_types`` and ``sliding_window``, block by block; empty if there are none.

    Raises:
      UserError: as :func:`by_type`.
    """
    found = by_type(config, {"full_attention": None, "sliding_attention": config.sliding_window})
    return found if any(found) else ()


def by_type(config: Any, values: Mapping[str, T]) -> tuple[T, ...]:
    """The value that belongs to the type of each block in ``layer_types``.

    Raises:
      UserError: a block of another type, or another number of types than of blocks.
    """
    if strange := set(config.layer_types) - set(values):
        raise UserError(f"expected layer_types of {' and '.join(values)}, got {', '.join(sorted(strange))}: not supported")
    if len(config.layer_types) != config.num_hidden_layers:
        raise UserError(f"expected {config.num_hidden_layers} layer_types in config.json, got {len(config.layer_types)}")
    return tuple(values[kind] for kind in config.layer_types)


def window_at(windows: tuple[int | None, ...], index: int, length: int) -> np.ndarray | None:
    """The window of a block for :class:`Positions`. A block that sees everything gets a window as wide as the text."""
    return np.full(length, windows[index] or length, np.int32) if windows else None


class PreNormBlock(nnx.Module):
    """x [batch, length, d_model] to the same shape: adds attention(norm(x)) to x, then MLP(norm(x)).

    Where these are scaled, it sows the residual stream divided by the scale: then the outputs of layers add to it as they are.

    Args:
      name: the name of the MLP in the checkpoint.
    """

    def __init__(self, config: LlamaConfig, attention: nnx.Module, mlp: nnx.Module, name: str = "mlp"):
        self.branch_scale, self.attention = config.branch_scale, config.attention
        self.input_layernorm = config.norm(config.d_model, eps=config.eps)
        setattr(self, self.attention, attention)
        self.post_attention_layernorm = config.norm(config.d_model, eps=config.eps)
        self.name = name
        setattr(self, name, mlp)

    def __call__(self, x: Array, positions: Positions) -> Array:
        scale = self.branch_scale
        self.sow(nnx.Intermediate, "before_attention", scaled(x, 1 / scale))
        x = x + scaled(getattr(self, self.attention)(self.input_layernorm(x), positions), scale)
        self.sow(nnx.Intermediate, "after_attention", scaled(x, 1 / scale))
        x = x + scaled(self.behind_attention(x), scale)
        self.sow(nnx.Intermediate, "after_mlp", scaled(x, 1 / scale))
        return x

    def behind_attention(self, x: Array) -> Array:
        """What the MLP adds to the residual stream x."""
        output: Array = getattr(self, self.name)(self.post_attention_layernorm(x))
        return output


def rotary_attention(config: LlamaConfig) -> RotaryAttention:
    """The attention of a block."""
    return RotaryAttention(
        config.d_model,
        config.heads,
        config.kv_heads,
        config.head_dim,
        qkv_bias=config.qkv_bias,
        o_bias=config.o_bias,
        norm=functools.partial(config.norm, eps=config.eps) if config.qk_norm else None,
        scale=config.scale,
        cap=config.score_cap,
        rotation=config.rotation,
        sinks=config.sinks,
        gated=config.gated,
    )


def block(config: LlamaConfig) -> PreNormBlock:
    """One decoder block."""
    mlp = GatedMLP(config.d_model, config.d_ff, activation=config.activation, bias=config.mlp_bias)
    return PreNormBlock(config, rotary_attention(config), mlp)


class LlamaFinal(nnx.Module):
    """The norm before the head."""

    def __init__(self, config: LlamaConfig):
        self.norm = config.norm(config.d_model, eps=config.eps)

    def __call__(self, x: Array) -> Array:
        return self.norm(x)


def neurons(config: LlamaConfig, made_by: tuple[str, ...] = ("gate_proj", "up_proj"), read_by: str = "down_proj") -> Cut:
    """The neurons of the MLP."""
    return Cut("neurons", config.d_ff, 1, (f"mlp.{read_by}",), dict.fromkeys(made_by, ()), {"intermediate_size": 1})


def heads(config: LlamaConfig) -> Cut:
    """The key-value heads, each with its queries; where all queries share one, the queries alone."""
    alone = config.kv_heads == 1 < config.heads
    total = config.heads if alone else config.kv_heads
    queries, size = config.heads // total, config.head_dim
    makers, settings = {"q_proj": (1 + config.gated) * queries * size, "sinks": queries}, {"num_attention_heads": queries}
    if not alone:
        makers |= {"k_proj": size, "v_proj": size}
        settings |= {"num_key_value_heads": 1}
    return Cut(
        "query heads" if alone else "key-value heads" if queries > 1 else "heads",
        total,
        queries * size,
        ("self_attn.o_proj",),
        {name: (rows,) for name, rows in makers.items()},
        settings,
        {"head_dim": size},
    )


FAMILY = Family(
    read_config=read_config,
    block=block,
    linears=LINEARS,
    sharding=SHARDING,
    final=LlamaFinal,
    residuals={
        "self_attn.o_proj": Residual("before_attention", "after_attention"),
        "mlp.down_proj": Residual("after_attention", "after_mlp"),
    },
    cuts={"neuron": (neurons,), "head": (heads,)},
)
