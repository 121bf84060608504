"""Phi-3, 3.5 and 4: Llama's block with fused matrices and LongRoPE.

One matrix has q, k and v, another gate and up. A part of each head may be rotated. The rows of a fused matrix are independent
problems too, so it is pruned as one layer.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from optima_tpu.models import llama
from optima_tpu.models.family import Cut, Positions
from optima_tpu.models.layers import Linear, attention, split_heads
from optima_tpu.models.rope import Rope, rotate


def _rope(config: Any) -> Rope:
    parameters = dict(config.rope_parameters)
    # The original length may be an attribute of the configuration only, and the factor may be missing: it is then the ratio of
    # the two lengths.
    original = parameters.setdefault("original_max_position_embeddings", config.original_max_position_embeddings)
    if parameters.get("factor") is None:
        parameters["factor"] = config.max_position_embeddings / original
    return Rope.from_hf(parameters, ("default", "longrope"), partial=True)


class Phi3Attention(nnx.Module):
    def __init__(self, config: llama.LlamaConfig):
        self.head_dim, self.mesh = config.head_dim, None
        self.cuts = (config.heads * config.head_dim, (config.heads + config.kv_heads) * config.head_dim)
        self.qkv_proj = Linear(config.d_model, (config.heads + 2 * config.kv_heads) * config.head_dim)
        self.o_proj = Linear(config.heads * config.head_dim, config.d_model)

    def __call__(self, x: Array, positions: Positions) -> Array:
        q, k, v = (split_heads(part, self.head_dim) for part in jnp.split(self.qkv_proj(x), self.cuts, axis=-1))
        q, k = (rotate(array, *positions.rotary) for array in (q, k))
        return self.o_proj(attention(q, k, v, positions, mesh=self.mesh).reshape(*x.shape[:2], -1))


class Phi3MLP(nnx.Module):
    def __init__(self, config: llama.LlamaConfig):
        self.gate_up_proj = Linear(config.d_model, 2 * config.d_ff)
        self.down_proj = Linear(config.d_ff, config.d_model)

    def __call__(self, x: Array) -> Array:
        gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(jax.nn.silu(gate) * up)


def block(config: llama.LlamaConfig) -> llama.DecoderBlock:
    """One decoder block."""
    return llama.DecoderBlock(config, Phi3Attention(config), Phi3MLP(config))


def heads(config: llama.LlamaConfig) -> Cut:
    """As Llama's, with q, k and v in one matrix."""
    cut = llama.heads(config)
    rows = (cut.made_by.get(f"{letter}_proj", ()) for letter in "qkv")
    return cut._replace(made_by={"qkv_proj": tuple(itertools.chain(*rows))})


JOINED = llama.with_mlp(Phi3MLP, {"gate_up_proj": (1, 1)}, "down_proj")
"""What a family declares with such an MLP."""
FAMILY = llama.relative(
    lambda config: dict(windows=llama.same_windows(config)),
    rope=_rope,
    **JOINED
    | dict(
        block=block,
        # Slices of the model axis do not end at the borders of q, k and v; XLA moves the rows.
        linears=("self_attn.qkv_proj", "self_attn.o_proj", *JOINED["linears"][4:]),
        cuts={**JOINED["cuts"], "head": (heads,)},
    ),
)
