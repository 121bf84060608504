"""OPT: learned positions, LayerNorm, biases, ReLU.

OPT-350m normalises after each sublayer and projects its embeddings.
"""

import dataclasses
from typing import Any

import numpy as np
from flax import nnx
from jax import Array

from optima_tpu.errors import UserError
from optima_tpu.models.family import Cut, DecoderConfig, Family, Positions, ReadTensor, Residual, Shape
from optima_tpu.models.layers import ACTIVATIONS, LayerNorm, Linear, Scores, attention, project, split_heads
from optima_tpu.models.settings import supported

EMBEDDING, POSITIONS, PROJECT_IN = "embed_tokens.weight", "embed_positions.weight", "project_in.weight"
OFFSET = 2
"""The first token's row in the table of positions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OPTConfig(DecoderConfig):
    """The numbers that shape a block.

    Attributes:
      length: the longest text, for which there are learned positions.
      norm_first: whether the norms come before their sublayers; OPT-350m has them after the residual sums.
      final_norm: whether there is a norm after the last block.
      affine: whether norms have weights and biases.
    """

    d_ff: int
    heads: int
    length: int
    activation: str
    bias: bool
    affine: bool
    norm_first: bool
    final_norm: bool

    def positions(self, index: int, length: int) -> Positions:
        return Positions()


def read_config(config: Any) -> OPTConfig:
    """Reads an OPTConfig; raises UserError for unsupported settings."""
    activation = supported(config, "activation_function", *ACTIVATIONS)
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"expected a hidden_size that num_attention_heads divides, got {config.hidden_size} and {config.num_attention_heads} "
            "in config.json: check the file"
        )
    return OPTConfig(
        d_model=config.hidden_size,
        d_embedding=config.word_embed_proj_dim,
        d_ff=config.ffn_dim,
        heads=config.num_attention_heads,
        blocks=config.num_hidden_layers,
        vocab=config.vocab_size,
        tied=config.tie_word_embeddings,
        length=config.max_position_embeddings,
        activation=activation,
        bias=config.enable_bias,
        affine=config.layer_norm_elementwise_affine,
        norm_first=config.do_layer_norm_before,
        final_norm=config.do_layer_norm_before and not config._remove_final_layer_norm,
    )


def embedding_extras(config: OPTConfig) -> dict[str, Shape]:
    """The table of positions, and the projection of narrow embeddings."""
    extras: dict[str, Shape] = {POSITIONS: (config.length + OFFSET, config.d_model)}
    if config.d_embedding != config.d_model:
        extras[PROJECT_IN] = (config.d_model, config.d_embedding)
    return extras


def embed(config: OPTConfig, read: ReadTensor, tokens: Array | np.ndarray, positions: Array | np.ndarray) -> Array | np.ndarray:
    """Token embedding (projected if narrow) + embedding of the position."""
    hidden = read(EMBEDDING)[tokens]
    if config.d_embedding != config.d_model:
        hidden = project(hidden, read(PROJECT_IN))
    return hidden + read(POSITIONS)[OFFSET + positions]


class OPTAttention(nnx.Module):
    """Causal attention without rotation; scales queries before the product."""

    def __init__(self, config: OPTConfig):
        self.head_dim, self.mesh = config.d_model // config.heads, None
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            Linear(config.d_model, config.d_model, bias=config.bias) for _ in range(4)
        )

    def __call__(self, x: Array, positions: Positions) -> Array:
        q, k, v = (split_heads(projection(x), self.head_dim) for projection in (self.q_proj, self.k_proj, self.v_proj))
        mixed = attention(q * self.head_dim**-0.5, k, v, positions, Scores(scale=1.0), self.mesh)
        return self.out_proj(mixed.reshape(x.shape))


class OPTBlock(nnx.Module):
    """One decoder block: x [batch, length, d_model] to the same."""

    def __init__(self, config: OPTConfig):
        self.norm_first, self.activation = config.norm_first, ACTIVATIONS[config.activation]
        self.self_attn = OPTAttention(config)
        self.self_attn_layer_norm = LayerNorm(config.d_model, affine=config.affine)
        self.fc1 = Linear(config.d_model, config.d_ff, bias=config.bias)
        self.fc2 = Linear(config.d_ff, config.d_model, bias=config.bias)
        self.final_layer_norm = LayerNorm(config.d_model, affine=config.affine)

    def __call__(self, x: Array, positions: Positions) -> Array:
        self.sow(nnx.Intermediate, "before_attention", x)
        x = x + self.self_attn(self.self_attn_layer_norm(x) if self.norm_first else x, positions)
        self.sow(nnx.Intermediate, "after_attention", x)
        x = x if self.norm_first else self.self_attn_layer_norm(x)
        self.sow(nnx.Intermediate, "before_mlp", x)
        x = x + self.fc2(self.activation(self.fc1(self.final_layer_norm(x) if self.norm_first else x)))
        self.sow(nnx.Intermediate, "after_mlp", x)
        return x if self.norm_first else self.final_layer_norm(x)


class OPTFinal(nnx.Module):
    """The norm before the head, if any, and the projection to its width."""

    def __init__(self, config: OPTConfig):
        if config.final_norm:
            self.final_layer_norm = LayerNorm(config.d_model, affine=config.affine)
        if config.d_embedding != config.d_model:
            self.project_out = Linear(config.d_model, config.d_embedding)

    def __call__(self, x: Array) -> Array:
        if hasattr(self, "final_layer_norm"):
            x = self.final_layer_norm(x)
        # Do not call the layer, which would sow its input: this layer is not pruned.
        return project(x, self.project_out.weight[...]) if hasattr(self, "project_out") else x


FAMILY = Family(
    read_config=read_config,
    block=OPTBlock,
    final=OPTFinal,
    linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"),
    narrow=("self_attn.out_proj", "fc2"),
    # The second root: checkpoints saved without the head, as some published ones are.
    roots=("model.decoder.", "decoder."),
    embedding=EMBEDDING,
    embedding_extras=embedding_extras,
    embed=embed,
    attended=("self_attn.out_proj",),
    residuals={"self_attn.out_proj": Residual("before_attention", "after_attention"), "fc2": Residual("before_mlp", "after_mlp")},
    cuts={
        "neuron": (lambda config: Cut("neurons", config.d_ff, 1, ("fc2",), {"fc1": ()}, {"ffn_dim": 1}),),
        "head": "have the width of the model divided by their number",
    },
)
