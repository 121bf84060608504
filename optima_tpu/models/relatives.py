"""The relatives of Llama: families of Llama's blocks with other settings.

Each is a row of what is its own. A row says what no configuration says: that Qwen 2 has biases, that ``attention_bias`` leaves
out ``o_proj`` in a GLM. So it names what it reads: a model that has a setting of a relative beside its own does not obey it.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from optima_tpu.errors import UserError
from optima_tpu.models import llama, phi3
from optima_tpu.models.family import Cut, Family, ReadTensor
from optima_tpu.models.layers import MLP, LayerNorm, ShiftedLayerNorm, UnbiasedLayerNorm, WideRMSNorm, scaled
from optima_tpu.models.llama import (
    NO_HEAD_DIM,
    LlamaConfig,
    Norms,
    Settings,
    all_biases,
    attention_bias,
    each_head,
    partial_rope_of,
    relative,
    rope_by_type,
    rope_of,
    same_windows,
    windows_by_type,
)
from optima_tpu.models.rope import RopeByBlock, rotate_neighbours, rotate_neighbours_wide, rotate_wide
from optima_tpu.models.settings import supported


def _use_bias(config: Any) -> Settings:
    return dict(qkv_bias=config.use_bias, o_bias=config.use_bias, mlp_bias=config.use_bias)


def _ungated(up: str, down: str) -> dict[str, Any]:
    """What a family declares whose MLP has no gate."""

    def mlp(config: LlamaConfig) -> MLP:
        return MLP(config.d_model, config.d_ff, activation=config.activation, bias=config.mlp_bias, up=up, down=down)

    return llama.with_mlp(mlp, {up: ()}, down)


def _rotated_smollm3(config: Any) -> RopeByBlock:
    rotated, blocks = config.no_rope_layers, config.num_hidden_layers
    if len(rotated) < blocks:
        raise UserError(f"expected {blocks} no_rope_layers in config.json, got {len(rotated)}")
    return RopeByBlock.where(map(bool, rotated[:blocks]), rope_of(config))


def _scaled_embeddings(
    config: LlamaConfig, read: ReadTensor, tokens: Array | np.ndarray, positions: Array | np.ndarray
) -> Array | np.ndarray:
    return scaled(read(llama.FAMILY.embedding)[tokens], config.embedding_scale)


_BESIDE = Norms(before_mlp="")
"""Attention and MLP side by side."""


def _stablelm(config: Any) -> Settings:
    supported(config, "qk_layernorm", False)  # true is a norm for each head of queries and keys
    return dict(qkv_bias=config.use_qkv_bias, norm=LayerNorm, norms=_BESIDE if config.use_parallel_residual else Norms())


def _rotate_cohere(x: Array, cos: Array | np.ndarray, sin: Array | np.ndarray) -> Array:
    """Rotates neighbours in float32, by tables rounded to x's dtype."""
    return rotate_neighbours(x.astype(jnp.float32), cos.astype(x.dtype), sin.astype(x.dtype)).astype(x.dtype)


def _cohere(config: Any) -> Settings:
    return dict(
        **attention_bias(config), rotation=_rotate_cohere, norm=UnbiasedLayerNorm, logit_scale=config.logit_scale, norms=_BESIDE
    )


def _weights_of_each_head(heads: int, head_dim: int) -> tuple[int, int]:
    return heads, head_dim


def _cohere_heads(config: LlamaConfig) -> Cut:
    """As Llama's, with the weights that their norms have for every head."""
    cut = llama.heads(config)
    norms = {f"{letter}_norm": (rows // config.head_dim,) for letter in "qk" for rows in cut.made_by.get(f"{letter}_proj", ())}
    return cut._replace(made_by={**cut.made_by, **norms})


def _rotated_in_windows(config: Any) -> RopeByBlock:
    windows = windows_by_type(config) or (None,) * config.num_hidden_layers
    return RopeByBlock.where((window is not None for window in windows), rope_of(config))


_BEHIND = Norms("", "post_attention_layernorm", "", "post_feedforward_layernorm")
"""A norm behind each sublayer alone. What a layer puts out does not add to the residual stream then."""


def all_heads(heads: int, head_dim: int) -> int:
    """``LlamaConfig.qk_norm`` over all heads together."""
    return heads * head_dim


ALL_HEADS = {"head": "are normalised all together"}
"""``Family.cuts`` of a model with such norms."""


def _olmo2(config: Any) -> Settings:
    return dict(**attention_bias(config), rotation=rotate_wide, norm=WideRMSNorm, norms=_BEHIND, qk_norm=all_heads)


def _rotated_exaone4(config: Any) -> RopeByBlock:
    rotated = (config.sliding_window is None or kind == "sliding_attention" for kind in config.layer_types)
    return RopeByBlock.where(rotated, rope_of(config))


def _glm(config: Any) -> Settings:
    return dict(rotation=rotate_neighbours, qkv_bias=config.attention_bias)


_MINISTRAL = relative(lambda config: dict(windows=windows_by_type(config)))

FAMILIES: Mapping[tuple[str, str], Family] = {
    # Mistral has no biases, and one window for every block, or none. In a Ministral some blocks have the window.
    # transformers reads a Mistral's config.json that has layer_types as a Ministral's.
    ("MistralForCausalLM", "mistral"): relative(lambda config: dict(windows=same_windows(config))),
    ("MistralForCausalLM", "ministral"): _MINISTRAL,
    ("MinistralForCausalLM", "ministral"): _MINISTRAL,
    # Qwen 2 and 2.5 have biases on q, k, v, which are not a setting. Qwen 3 normalises queries and keys.
    ("Qwen2ForCausalLM", "qwen2"): relative(lambda config: dict(windows=windows_by_type(config), qkv_bias=True)),
    ("Qwen3ForCausalLM", "qwen3"): relative(
        lambda config: dict(windows=windows_by_type(config), **attention_bias(config), qk_norm=each_head)
    ),
    # Seed-OSS: a setting of its own for the bias behind attention.
    ("SeedOssForCausalLM", "seed_oss"): relative(lambda config: {**all_biases(config), "o_bias": config.attention_out_bias}),
    # ERNIE 4.5, the dense one: neighbouring dimensions are rotated as pairs, in float32.
    ("Ernie4_5ForCausalLM", "ernie4_5"): relative(lambda config: dict(rotation=rotate_neighbours_wide, **_use_bias(config))),
    # AFM (arcee): an MLP without a gate, whose activation is the square of ReLU. Nemotron and Minitron have it with LayerNorms
    # shifted by 1, and a part of each head still.
    ("ArceeForCausalLM", "arcee"): relative(all_biases, activation="relu2", **_ungated("up_proj", "down_proj")),
    ("NemotronForCausalLM", "nemotron"): relative(
        lambda config: dict(**all_biases(config), norm=ShiftedLayerNorm),
        activation="relu2",
        eps="norm_eps",
        rope=partial_rope_of,
        **_ungated("up_proj", "down_proj"),
    ),
    # StarCoder 2: LayerNorm, biases, and an MLP without a gate; otherwise a Mistral.
    ("Starcoder2ForCausalLM", "starcoder2"): relative(
        lambda config: dict(windows=same_windows(config), **_use_bias(config), norm=LayerNorm),
        activation="gelu_pytorch_tanh",
        eps="norm_epsilon",
        **_ungated("c_fc", "c_proj"),
    ),
    # SmolLM 3: some blocks do not rotate queries and keys (NoPE), and may have a window.
    ("SmolLM3ForCausalLM", "smollm3"): relative(
        lambda config: dict(**all_biases(config), windows=windows_by_type(config)), rope=_rotated_smollm3
    ),
    # Granite 3: factors at the embedding, the products of queries and keys, the residual additions and the logits.
    ("GraniteForCausalLM", "granite"): relative(
        lambda config: dict(
            **all_biases(config),
            scale=config.attention_multiplier,
            branch_scale=config.residual_multiplier,
            logit_scale=1 / config.logits_scaling,
            embedding_scale=config.embedding_multiplier,
        ),
        embed=_scaled_embeddings,
    ),
    # StableLM 2 and 3B-4E1T: LayerNorm, and a part of each head still; some have attention and MLP side by side.
    ("StableLmForCausalLM", "stablelm"): relative(
        _stablelm, eps="layer_norm_eps", rope=partial_rope_of, cuts={**llama.FAMILY.cuts, "head": NO_HEAD_DIM}
    ),
    # Command R and Aya (cohere), Command R7B and Command A (cohere2): attention and MLP side by side, reading one norm, which has
    # no bias. In cohere2 most blocks have a window, and those without one do not rotate (NoPE).
    ("CohereForCausalLM", "cohere"): relative(
        lambda config: dict(**_cohere(config), qk_norm=_weights_of_each_head if config.use_qk_norm else None),
        eps="layer_norm_eps",
        cuts={**llama.FAMILY.cuts, "head": (_cohere_heads,)},
    ),
    ("Cohere2ForCausalLM", "cohere2"): relative(
        lambda config: dict(**_cohere(config), windows=windows_by_type(config)),
        eps="layer_norm_eps",
        rope=_rotated_in_windows,
        cuts={**llama.FAMILY.cuts, "head": NO_HEAD_DIM},
    ),
    # OLMo 2 and 3: norms and rotary embedding are computed in float32 and rounded once. In OLMo 3 most blocks have a window, and
    # blocks with and without one may have rotary embeddings of their own.
    ("Olmo2ForCausalLM", "olmo2"): relative(_olmo2, residuals={}, cuts={**llama.FAMILY.cuts, **ALL_HEADS}),
    ("Olmo3ForCausalLM", "olmo3"): relative(
        lambda config: dict(**_olmo2(config), windows=windows_by_type(config)),
        rope=rope_by_type,
        residuals={},
        cuts={**llama.FAMILY.cuts, **ALL_HEADS},
    ),
    # EXAONE 4: in the 32B most blocks have a window, and those without one do not rotate queries and keys (NoPE).
    ("Exaone4ForCausalLM", "exaone4"): relative(
        lambda config: dict(windows=windows_by_type(config), norms=_BEHIND, qk_norm=each_head),
        rope=_rotated_exaone4,
        residuals={},
    ),
    # GLM-4: neighbouring dimensions are rotated as pairs, a part of each head is still, gate and up are one matrix. The first
    # release (glm) has Llama's norms, the second (glm4, GLM-4-0414) also a norm behind each sublayer.
    ("GlmForCausalLM", "glm"): relative(_glm, rope=partial_rope_of, **phi3.JOINED),
    ("Glm4ForCausalLM", "glm4"): relative(
        lambda config: dict(
            **_glm(config),
            norms=Norms("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
        ),
        rope=partial_rope_of,
        **{**phi3.JOINED, "residuals": {}},
    ),
}
"""By the architecture and the model type, as ``optima_tpu.models.FAMILIES``."""
