"""Llama 2, 3, 3.1, 3.2 and what shares their architecture (SmolLM2): RMSNorm, rotary GQA attention, SwiGLU."""

import dataclasses
from collections.abc import Mapping

import jax
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from optima_tpu.errors import UserError
from optima_tpu.models.layers import Linear, RMSNorm, Rope, causal_attention, rotate
from optima_tpu.sharding import MODEL

PREFIX = "model.layers.{}."
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

# The linear layers of a block in the order of the forward pass.
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

# Projections into heads or neurons split their outputs over the model axis, those out of them their inputs: one all-reduce a
# sublayer. Everything else (norms, biases of the second kind) is replicated.
SHARDING: Mapping[str, P] = {
    **{f"self_attn.{name}_proj.weight": P(MODEL, None) for name in "qkv"},
    **{f"self_attn.{name}_proj.bias": P(MODEL) for name in "qkv"},
    "self_attn.o_proj.weight": P(None, MODEL),
    **{f"mlp.{name}_proj.weight": P(MODEL, None) for name in ("gate", "up")},
    **{f"mlp.{name}_proj.bias": P(MODEL) for name in ("gate", "up")},
    "mlp.down_proj.weight": P(None, MODEL),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The numbers that shape a Llama block."""

    d_model: int
    d_ff: int
    heads: int
    kv_heads: int
    head_dim: int
    blocks: int
    vocab: int
    eps: float
    rope: Rope
    tied: bool
    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def from_hf(cls, config) -> "Config":
        """From ``transformers.LlamaConfig``. Raises UserError, by name, for a setting that is not supported."""
        if config.hidden_act != "silu":
            raise UserError(f"expected hidden_act silu in a Llama model, got {config.hidden_act!r}: not supported")
        return cls(
            d_model=config.hidden_size, d_ff=config.intermediate_size, heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            blocks=config.num_hidden_layers, vocab=config.vocab_size, eps=config.rms_norm_eps,
            rope=Rope.from_hf(config.rope_parameters), tied=config.tie_word_embeddings,
            attention_bias=config.attention_bias, mlp_bias=config.mlp_bias)


class Attention(nnx.Module):
    def __init__(self, config: Config):
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        bias = config.attention_bias
        self.q_proj = Linear(config.d_model, config.heads * config.head_dim, bias=bias)
        self.k_proj = Linear(config.d_model, config.kv_heads * config.head_dim, bias=bias)
        self.v_proj = Linear(config.d_model, config.kv_heads * config.head_dim, bias=bias)
        self.o_proj = Linear(config.heads * config.head_dim, config.d_model, bias=bias)

    def __call__(self, x: Array, cos: Array, sin: Array) -> Array:
        batch, length, _ = x.shape
        q = self.q_proj(x).reshape(batch, length, self.heads, self.head_dim)
        k = self.k_proj(x).reshape(batch, length, self.kv_heads, self.head_dim)
        v = self.v_proj(x).reshape(batch, length, self.kv_heads, self.head_dim)
        mixed = causal_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(mixed.reshape(batch, length, -1))


class MLP(nnx.Module):
    def __init__(self, config: Config):
        self.gate_proj = Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.up_proj = Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down_proj = Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """One decoder block: x [batch, length, d_model] to the same, given the rotary tables of its positions."""

    def __init__(self, config: Config):
        self.input_layernorm = RMSNorm(config.d_model, eps=config.eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.d_model, eps=config.eps)
        self.mlp = MLP(config)

    def __call__(self, x: Array, cos: Array, sin: Array) -> Array:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))
