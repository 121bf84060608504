"""What is read of a model's config.json, and within which bounds."""

from typing import Annotated, Any, TypedDict

import msgspec

_Width = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
_Heads = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
_Experts = Annotated[int, msgspec.Meta(ge=1, le=1 << 12)]
_Blocks = Annotated[int, msgspec.Meta(ge=1, le=1 << 11)]
_Tokens = Annotated[int, msgspec.Meta(ge=1, le=1 << 28)]
_Length = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_Small = Annotated[float, msgspec.Meta(ge=0, lt=1)]
_Number = Annotated[float, msgspec.Meta(gt=0, lt=1e12)]


class DeclaredKind(TypedDict, total=False):
    """The entries of config.json that name the kind of model."""

    architectures: list[str] | None
    model_type: str


class DeclaredStorage(DeclaredKind, total=False):
    """How the weights are stored."""

    dtype: str | None
    torch_dtype: str | None
    quantization_config: dict[str, Any] | None


class Declared(DeclaredStorage, total=False):
    """Entries of config.json that set computation and memory, with bounds."""

    num_hidden_layers: _Blocks
    layer_types: Annotated[list[str], msgspec.Meta(max_length=1 << 11)] | None
    hidden_size: _Width
    intermediate_size: _Width
    ffn_dim: _Width
    word_embed_proj_dim: _Width
    intermediate_size_mlp: _Width
    moe_intermediate_size: _Width | None
    shared_expert_intermediate_size: _Width
    q_lora_rank: _Width | None
    kv_lora_rank: _Width
    qk_nope_head_dim: _Heads
    qk_rope_head_dim: _Heads
    v_head_dim: _Heads
    num_attention_heads: _Heads
    num_key_value_heads: _Heads | None
    head_dim: _Heads | None
    global_head_dim: _Heads | None
    num_global_key_value_heads: _Heads | None
    attention_k_eq_v: bool
    hidden_size_per_layer_input: _Length | None
    num_kv_shared_layers: _Length
    linear_num_value_heads: _Heads
    linear_num_key_heads: _Heads
    linear_value_head_dim: _Heads
    linear_key_head_dim: _Heads
    linear_conv_kernel_dim: _Heads
    num_experts: _Experts | None
    enable_moe_block: bool
    top_k_experts: _Experts | None
    num_local_experts: _Experts
    n_routed_experts: _Experts
    n_shared_experts: _Length | None
    n_group: _Experts | None
    topk_group: _Experts | None
    topk_method: str | None
    routed_scaling_factor: _Number
    num_experts_per_tok: _Experts
    first_k_dense_replace: _Length
    mlp_layer_types: Annotated[list[str], msgspec.Meta(max_length=1 << 11)] | None
    decoder_sparse_step: _Heads
    mlp_only_layers: list[int] | None
    moe_layers: list[int] | None
    interleave_moe_layer_step: _Heads
    vocab_size: _Tokens
    max_position_embeddings: _Length
    original_max_position_embeddings: _Length | None
    sliding_window: _Length | None
    use_sliding_window: bool
    attention_chunk_size: _Tokens | None
    attn_temperature_tuning: bool
    attn_scale: _Number
    floor_scale: _Tokens
    rms_norm_eps: _Small
    layer_norm_eps: _Small
    norm_eps: _Small
    norm_epsilon: _Small
    rope_theta: _Number
    rope_local_base_freq: _Number
    rope_scaling: dict[str, Any] | None
    rope_parameters: dict[str, Any] | None
    partial_rotary_factor: _Number | None
    query_pre_attn_scalar: _Number
    attn_logit_softcapping: _Number | None
    final_logit_softcapping: _Number | None
    embedding_multiplier: _Number
    attention_multiplier: _Number
    residual_multiplier: _Number
    logits_scaling: _Number
    logit_scale: _Number
    clip_qkv: _Number | None
    tie_word_embeddings: bool
    attention_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    enable_bias: bool
    use_bias: bool
    use_qkv_bias: bool
    use_qk_norm: bool
    qkv_bias: bool
    rope_interleave: bool | None
    swiglu_alpha: _Number
    swiglu_limit: _Number
    qk_layernorm: bool
    use_parallel_residual: bool
    no_rope_layers: Annotated[list[int], msgspec.Meta(max_length=1 << 11)] | None
    no_rope_layer_interval: _Heads
    do_layer_norm_before: bool
    layer_norm_elementwise_affine: bool
    norm_topk_prob: bool | None
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None


DECIDING = tuple(set(Declared.__annotations__) - {"architectures", "dtype", "torch_dtype", "quantization_config"})
"""The entries that a configuration of transformers has as attributes of the same types."""
