"""Llama 2, 3, 3.1, 3.2 and SmolLM2: RMSNorm, rotary GQA attention, SwiGLU.

Many families are the same block with other settings, which :class:`LlamaConfig` has: see their files.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from optima_tpu.errors import UserError
from optima_tpu.models.family import Cut, DecoderConfig, Family, Positions, Residual
from optima_tpu.models.layers import GatedMLP, Linear, RMSNorm, Scores, attention, scaled, split_heads
from optima_tpu.models.rope import Rope, RopeByBlock, Rotation, rotate
from optima_tpu.models.settings import of_every_block, supported

T = TypeVar("T")

Settings = dict[str, Any]
"""Arguments of :class:`LlamaConfig`."""

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def each_head(heads: int, head_dim: int) -> int:
    """``LlamaConfig.qk_norm`` head by head, with weights that all share."""
    return head_dim


class Norms(NamedTuple):
    """The names of the norms before and behind a block's two sublayers.

    A name is empty where there is no norm. Where the MLP has none, it stands beside attention: it reads what attention reads.
    """

    before_attention: str = "input_layernorm"
    behind_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    behind_mlp: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """The settings of a Llama block and of its relatives.

    Attributes:
      windows: for every block, how many tokens a position sees (None: all); empty if all blocks see everything.
      qk_norm: the size of a norm of queries or keys, from the number and the width of their heads; None where there is none.
      rope: the rotary embedding, of every block or block by block.
      rotation: rotates queries and keys.
      activation: the MLP's, by its name in ``ACTIVATIONS``.
      norm: ``norm(d, eps=eps)`` makes a norm.
      norms: which norms a block has.
      scale: factor of the products of queries and keys; None for ``head_dim ** -0.5``.
      score_cap: ``c`` where the scaled products become ``c tanh(p / c)``, or None.
      sinks: whether every head has a sink, which takes a share of each query.
      gated: whether the output of attention is multiplied by the sigmoid of a gate, which q_proj gives beside each query.
      branch_scale: factor of the outputs of attention and MLP, before they are added to the residual stream.
      embedding_scale: factor of the embeddings, where the family's ``embed`` takes it from here.
    """

    d_ff: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    windows: tuple[int | None, ...] = ()
    qk_norm: Callable[[int, int], int | tuple[int, int]] | None = None
    rope: Rope | RopeByBlock
    rotation: Rotation = rotate
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    norm: Callable[..., nnx.Module] = RMSNorm
    norms: Norms = Norms()
    scale: float | None = None
    score_cap: float | None = None
    sinks: bool = False
    gated: bool = False
    branch_scale: float = 1.0
    embedding_scale: float = 1.0

    @property
    def attention(self) -> str:
        """The name of the block's attention in the checkpoint."""
        return "self_attn"

    def positions(self, index: int, length: int) -> Positions:
        return Positions(*self.rope.of(index).tables(length, self.head_dim), window_at(self.windows, index, length))


def read_sizes(config: Any, activation: str | None = "silu", eps: str = "rms_norm_eps") -> Settings:
    """The settings with the same names in many ``transformers`` models.

    Args:
      activation: the only one that the family has; None leaves it out.
      eps: the name of the norms' ``eps``.

    Raises:
      UserError: the numbers of heads do not fit one another or the width, or the model has another activation.
    """
    heads = config.num_attention_heads
    kv_heads = heads if config.num_key_value_heads is None else config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if heads % kv_heads or head_dim < 2 or head_dim % 2:
        raise UserError(
            f"expected heads of an even width in equal groups, got {heads} heads of {head_dim}, and {kv_heads} key-value heads "
            "in config.json: check the file"
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
        **({} if activation is None else {"activation": supported(config, "hidden_act", activation)}),
    )


def rope_of(config: Any, partial: bool = False) -> Rope:
    """The rotary embedding of every block; see :meth:`Rope.from_hf`."""
    return Rope.from_hf(config.rope_parameters, partial=partial)


partial_rope_of = functools.partial(rope_of, partial=True)
"""The same of a family that may rotate a part of a head."""


def rope_by_type(config: Any) -> RopeByBlock:
    """The rotary embedding of each block, by its type in ``layer_types``."""
    return RopeByBlock.from_hf(config.rope_parameters, config.layer_types)


def attention_bias(config: Any) -> Settings:
    """The settings if ``attention_bias`` counts for all four projections."""
    return dict(qkv_bias=config.attention_bias, o_bias=config.attention_bias)


def all_biases(config: Any) -> Settings:
    """The same, and those of the MLP."""
    return dict(**attention_bias(config), mlp_bias=config.mlp_bias)


def same_windows(config: Any) -> tuple[int, ...]:
    """The one ``sliding_window`` for every block; empty if there is none."""
    return (config.sliding_window,) * config.num_hidden_layers if config.sliding_window else ()


def windows_by_type(config: Any) -> tuple[int | None, ...]:
    """The sliding window of each block, by ``layer_types``; empty if none.

    Raises:
      UserError: as :func:`by_type`.
    """
    windows = by_type(config, {"full_attention": None, "sliding_attention": config.sliding_window})
    return windows if any(windows) else ()


def by_type(config: Any, values: Mapping[str, T]) -> tuple[T, ...]:
    """The value that belongs to the type of each block in ``layer_types``.

    Raises:
      UserError: a block of another type, or another number of types than of blocks.
    """
    if strange := set(config.layer_types) - set(values):
        raise UserError(f"expected layer_types of {' and '.join(values)}, got {', '.join(sorted(strange))}: not supported")
    return tuple(values[kind] for kind in of_every_block(config, "layer_types"))


def window_at(windows: tuple[int | None, ...], index: int, length: int) -> np.ndarray | None:
    """A block's window for :class:`Positions`; the whole text without one."""
    return np.full(length, windows[index] or length, np.int32) if windows else None


class RotaryAttention(nnx.Module):
    """Causal attention with rotary positions and grouped key-value heads.

    Attributes:
      mesh: the mesh that the block runs on; None for one device.
    """

    def __init__(self, config: LlamaConfig):
        self.mesh: Mesh | None = None
        self.head_dim, self.rotation, self.gated = config.head_dim, config.rotation, config.gated
        self.scale, self.cap = config.scale, config.score_cap
        width, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = Linear(config.d_model, (1 + config.gated) * width, bias=config.qkv_bias)
        self.k_proj = Linear(config.d_model, keys, bias=config.qkv_bias)
        self.v_proj = Linear(config.d_model, keys, bias=config.qkv_bias)
        self.o_proj = Linear(width, config.d_model, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = config.norm(config.qk_norm(config.heads, config.head_dim), eps=config.eps)
            self.k_norm = config.norm(config.qk_norm(config.kv_heads, config.head_dim), eps=config.eps)
        if config.sinks:
            self.sinks = nnx.Param(jnp.zeros((config.heads,)))

    def __call__(self, x: Array, positions: Positions) -> Array:
        q, k = (split_heads(projection(x), self.head_dim) for projection in (self.q_proj, self.k_proj))
        v = self.values(x, k)
        if self.gated:
            q, gate = q[:, :, ::2], q[:, :, 1::2]
        q, k = self.turned(q, k, positions)
        sinks = self.sinks[...] if hasattr(self, "sinks") else None
        mixed = attention(q, k, v, positions, Scores(self.scale, self.cap, sinks), self.mesh)
        if self.gated:
            mixed = mixed * jax.nn.sigmoid(gate)
        return self.o_proj(mixed.reshape(*x.shape[:2], -1))

    def values(self, x: Array, k: Array) -> Array:
        """Values [batch, length, heads, head_dim]; ``k`` is as projected."""
        return split_heads(self.v_proj(x), self.head_dim)

    def turned(self, q: Array, k: Array, positions: Positions) -> tuple[Array, Array]:
        """Normalises and rotates q and k, [batch, length, heads, head_dim]."""
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (self.rotation(array, *positions.rotary) for array in (q, k))
        return q, k


class DecoderBlock(nnx.Module):
    """Adds attention, then the MLP, to x [batch, length, d_model].

    Each has a norm before or behind it. Where no norm is behind them, the block sows the residual stream, divided by their
    scale: then the outputs of layers add to it as they are.

    Args:
      name: the name of the MLP in the checkpoint.
    """

    def __init__(self, config: LlamaConfig, attention: nnx.Module, mlp: nnx.Module, name: str = "mlp"):
        self.branch_scale, self.attention, self.name, self.norms = config.branch_scale, config.attention, name, config.norms
        setattr(self, self.attention, attention)
        setattr(self, name, mlp)
        for norm in filter(None, config.norms):
            setattr(self, norm, config.norm(config.d_model, eps=config.eps))

    def __call__(self, x: Array, positions: Positions) -> Array:
        norms = self.norms
        self._sow("before_attention", x)
        normed = self._normed(norms.before_attention, x)
        mixed = getattr(self, self.attention)(normed, positions)
        x = x + scaled(self._normed(norms.behind_attention, mixed), self.branch_scale)
        self._sow("after_attention", x)
        added = self.behind_attention(x if norms.before_mlp or norms.behind_mlp else normed)
        x = x + scaled(self._normed(norms.behind_mlp, added), self.branch_scale)
        self._sow("after_mlp", x)
        return x

    def behind_attention(self, x: Array) -> Array:
        """The MLP's output, of the residual stream or of attention's input."""
        output: Array = getattr(self, self.name)(self._normed(self.norms.before_mlp, x))
        return output

    def _normed(self, norm: str, x: Array) -> Array:
        return getattr(self, norm)(x) if norm else x

    def _sow(self, name: str, x: Array) -> None:
        if not self.norms.behind_attention:
            self.sow(nnx.Intermediate, name, scaled(x, 1 / self.branch_scale))


def gated_mlp(config: LlamaConfig) -> nnx.Module:
    """The MLP of a block."""
    return GatedMLP(config.d_model, config.d_ff, activation=config.activation, bias=config.mlp_bias)


def block(config: LlamaConfig, mlp: Callable[[LlamaConfig], nnx.Module] = gated_mlp) -> DecoderBlock:
    """One decoder block.

    Args:
      mlp: makes its MLP.
    """
    return DecoderBlock(config, RotaryAttention(config), mlp(config))


class LlamaFinal(nnx.Module):
    """The norm before the head."""

    def __init__(self, config: LlamaConfig):
        self.norm = config.norm(config.d_model, eps=config.eps)

    def __call__(self, x: Array) -> Array:
        return self.norm(x)


_GATED: Mapping[str, tuple[int, ...]] = {"gate_proj": (), "up_proj": ()}


def neurons(config: LlamaConfig, made_by: Mapping[str, tuple[int, ...]] = _GATED, read_by: str = "down_proj") -> Cut:
    """The neurons of the MLP; ``made_by`` as in ``Cut``."""
    return Cut("neurons", config.d_ff, 1, (f"mlp.{read_by}",), made_by, {"intermediate_size": 1})


def heads(config: LlamaConfig) -> Cut:
    """Key-value heads with their queries; queries alone if all share one."""
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


_LLAMA: dict[str, Any] = dict(
    block=block,
    linears=LINEARS,
    narrow=("self_attn.o_proj", "mlp.down_proj"),
    final=LlamaFinal,
    residuals={
        "self_attn.o_proj": Residual("before_attention", "after_attention"),
        "mlp.down_proj": Residual("after_attention", "after_mlp"),
    },
    cuts={"neuron": (neurons,), "head": (heads,)},
)


def relative(
    settings: Callable[[Any], Settings],
    *,
    made: Callable[..., LlamaConfig] = LlamaConfig,
    activation: str | None = "silu",
    eps: str = "rms_norm_eps",
    rope: Callable[[Any], Rope | RopeByBlock] = rope_of,
    **declared: Any,
) -> Family:
    """A relative of Llama.

    Args:
      settings: what it reads of a ``transformers`` configuration beside the sizes.
      made: makes its configuration of all settings.
      activation, eps: see :func:`read_sizes`.
      rope: reads the rotary embedding.
      declared: what the family declares otherwise than Llama.
    """

    def read_config(config: Any) -> LlamaConfig:
        return made(**{**read_sizes(config, activation, eps), "rope": rope(config), **settings(config)})

    return Family(**{**_LLAMA, "read_config": read_config, **declared})


FAMILY = relative(all_biases)

NO_HEAD_DIM = "have the width of the model divided by their number"
"""Why the heads of a model cannot be cut whose configuration has no ``head_dim``."""


def with_mlp(mlp: Callable[[LlamaConfig], nnx.Module], wide: Mapping[str, tuple[int, ...]], narrow: str) -> dict[str, Any]:
    """What a family declares whose MLP is another one.

    Args:
      mlp: makes it.
      wide: the names of the layers that make its neurons -> the rows of a neuron, as in ``Cut.made_by``.
      narrow: the name of the layer that reads them.
    """
    names, narrow_name = [f"mlp.{name}" for name in wide], f"mlp.{narrow}"
    return dict(
        block=functools.partial(block, mlp=mlp),
        linears=(*LINEARS[:4], *names, narrow_name),
        narrow=("self_attn.o_proj", narrow_name),
        residuals={"self_attn.o_proj": FAMILY.residuals["self_attn.o_proj"], narrow_name: FAMILY.residuals["mlp.down_proj"]},
        cuts={**FAMILY.cuts, "neuron": (functools.partial(neurons, made_by=wide, read_by=narrow),)},
    )
