"""Tiny random models of transformers (torch): a reference for every family."""

import copy
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from optima_tpu.models import family_named
from optima_tpu.models.checkpoints.stacks import stacks_of, unstacked
from tests.support.ecosystem import SIZES as BASE
from tests.support.tiny_models import MemoryTensors, byte_tokenizer, tiny_llama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
revert_weight_conversion = pytest.importorskip("transformers.core_model_loading").revert_weight_conversion

LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=2.0)
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=64)
HALF_TURNED = dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5))
GEMMA = BASE | dict(
    head_dim=12, query_pre_attn_scalar=20, sliding_window=7, final_logit_softcapping=None, tie_word_embeddings=True
)
OPT = dict(
    vocab_size=64,
    hidden_size=48,
    ffn_dim=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    max_position_embeddings=128,
    word_embed_proj_dim=48,
)
LONG = dict(rope_type="longrope", rope_theta=10000.0, short_factor=[1.0, 1.1, 1.3, 1.6], long_factor=[1.0, 2.0, 4.0, 6.0])

EXPERTS = dict(moe_intermediate_size=24, num_experts_per_tok=2)
GROUPED = EXPERTS | dict(
    n_routed_experts=6,
    n_group=3,
    topk_group=2,
    n_shared_experts=2,
    first_k_dense_replace=1,
    routed_scaling_factor=1.7,
    pad_token_id=0,
)
LATENT = dict(
    num_key_value_heads=6,
    q_lora_rank=20,
    kv_lora_rank=12,
    qk_nope_head_dim=6,
    qk_rope_head_dim=8,
    v_head_dim=10,
    rope_parameters=YARN,
)
LLAMA4 = BASE | dict(
    intermediate_size=24,
    intermediate_size_mlp=80,
    head_dim=8,
    num_local_experts=5,
    num_experts_per_tok=2,
    moe_layers=[1],
    no_rope_layers=[1, 0],
    attention_chunk_size=16,
    floor_scale=10,
    rope_parameters=LLAMA3,
)
GEMMA4 = BASE | dict(
    num_attention_heads=10,
    num_key_value_heads=10,
    head_dim=12,
    global_head_dim=16,
    num_global_key_value_heads=5,
    attention_k_eq_v=True,
    hidden_size_per_layer_input=0,
    layer_types=["sliding_attention", "full_attention"],
    sliding_window=7,
    final_logit_softcapping=2.5,
    tie_word_embeddings=True,
)
GEMMA4_MIXTURE = dict(enable_moe_block=True, num_experts=5, top_k_experts=2, moe_intermediate_size=24)
DELTA = dict(
    head_dim=8,
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=12,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5),
)


class Reference(NamedTuple):
    """A class of transformers, its configuration, tiny sizes, and variants.

    Texts are 40 tokens long: longer than every window here.

    Attributes:
      relative: whether its layers are those of another family here, read in the same groups. A run of the other one then tells
        what a run of this one would.
    """

    model: str
    config: str
    base: dict
    variants: dict[str, dict]
    relative: bool = False

    @property
    def first(self) -> dict:
        """The settings of the first variant."""
        return next(iter(self.variants.values()))

    def configuration(self, settings: dict, **options):
        """Makes the configuration with these settings.

        It gets copies, because transformers writes into dictionaries that it is given.
        """
        made = getattr(transformers, self.config)(**copy.deepcopy(self.base | settings), **options)
        made.architectures = [self.model]
        return made


REFERENCES = [
    Reference(
        "LlamaForCausalLM",
        "LlamaConfig",
        BASE,
        {
            "gqa": {},
            "tied": dict(tie_word_embeddings=True),
            "multi-head": dict(num_key_value_heads=6),
            "biases": dict(attention_bias=True, mlp_bias=True),
            "head_dim": dict(head_dim=16),
            "llama3 rope": dict(rope_parameters=LLAMA3),
            "linear rope": dict(rope_parameters=LINEAR),
            "yarn rope": dict(rope_parameters=YARN),
            "yarn rope with a factor": dict(rope_parameters=YARN | dict(beta_fast=4.0, beta_slow=0.5, attention_factor=1.3)),
            "yarn rope with scales": dict(rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.4)),
            "nine heads": dict(hidden_size=36, num_attention_heads=9, num_key_value_heads=3),
        },
    ),
    Reference(
        "MistralForCausalLM",
        "MistralConfig",
        BASE,
        {
            "window": dict(sliding_window=7),
            "no window": dict(sliding_window=None),
            "head_dim": dict(head_dim=16),
            "tied": dict(tie_word_embeddings=True),
        },
        relative=True,
    ),
    Reference(
        "MinistralForCausalLM",
        "MinistralConfig",
        BASE | dict(head_dim=8),
        {"one window": dict(sliding_window=7, layer_types=["full_attention", "sliding_attention"])},
        relative=True,
    ),
    Reference(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        BASE,
        {
            "plain": {},
            "tied": dict(tie_word_embeddings=True),
            "linear rope": dict(rope_parameters=LINEAR),
            "window above": dict(use_sliding_window=True, sliding_window=7, max_window_layers=1),
        },
        relative=True,
    ),
    Reference(
        "Qwen3ForCausalLM",
        "Qwen3Config",
        BASE | dict(head_dim=16),
        {
            "plain": {},
            "biases": dict(attention_bias=True),
            "tied": dict(tie_word_embeddings=True),
            "window above": dict(use_sliding_window=True, sliding_window=7, max_window_layers=1),
        },
        relative=True,
    ),
    Reference(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        BASE | dict(head_dim=16, moe_intermediate_size=24, num_experts=5, num_experts_per_tok=2, norm_topk_prob=True),
        {
            "plain": {},
            "shares as they are": dict(norm_topk_prob=False),
            "biases": dict(attention_bias=True),
            "one expert": dict(num_experts_per_tok=1),
            "tied": dict(tie_word_embeddings=True),
            "windows, one mixture": dict(use_sliding_window=True, sliding_window=7, mlp_only_layers=[0]),
        },
    ),
    Reference(
        "MixtralForCausalLM",
        "MixtralConfig",
        BASE | dict(intermediate_size=24, num_local_experts=5, num_experts_per_tok=2),
        {
            "plain": {},
            "window": dict(sliding_window=7),
            "head_dim": dict(head_dim=16),
            "one expert": dict(num_experts_per_tok=1),
            "tied": dict(tie_word_embeddings=True),
        },
        relative=True,
    ),
    Reference(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        GEMMA,
        {
            "no caps": dict(attn_logit_softcapping=None),
            "caps": dict(attn_logit_softcapping=1.5, final_logit_softcapping=2.5),
            "untied": dict(tie_word_embeddings=False),
            "biases": dict(attention_bias=True),
            "exact gelu": dict(hidden_activation="gelu"),
            "linear rope": dict(rope_parameters=LINEAR),
        },
    ),
    Reference(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        GEMMA | dict(num_hidden_layers=3, sliding_window_pattern=3),
        {
            "two bases": {},
            "final cap": dict(final_logit_softcapping=2.5),
            "untied": dict(tie_word_embeddings=False),
            "stretched global base": dict(
                rope_parameters=dict(full_attention=LINEAR, sliding_attention=dict(rope_type="default", rope_theta=100.0))
            ),
            "no window": dict(layer_types=["full_attention"] * 3),
        },
        relative=True,
    ),
    Reference(
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        GEMMA4 | GEMMA4_MIXTURE,
        {
            "mixture": {},
            "dense": dict(enable_moe_block=False),
            "values, biases": dict(
                enable_moe_block=False, attention_k_eq_v=False, attention_bias=True, tie_word_embeddings=False
            ),
            "no window first": dict(
                num_hidden_layers=3,
                enable_moe_block=False,
                layer_types=["full_attention", "sliding_attention", "full_attention"],
                rope_parameters=dict(
                    full_attention=dict(rope_type="proportional", rope_theta=100.0, partial_rotary_factor=0.5, factor=2.0),
                    sliding_attention=LINEAR,
                ),
            ),
        },
    ),
    Reference(
        "Olmo2ForCausalLM",
        "Olmo2Config",
        BASE | dict(pad_token_id=0, eos_token_id=1),
        {
            "plain": {},
            "biases": dict(attention_bias=True),
            "tied": dict(tie_word_embeddings=True),
            "llama3 rope": dict(rope_parameters=LLAMA3),
        },
    ),
    Reference(
        "OlmoeForCausalLM",
        "OlmoeConfig",
        BASE | dict(intermediate_size=24, num_experts=5, num_experts_per_tok=2),
        {"plain": {}, "shares of sum one, biases": dict(norm_topk_prob=True, attention_bias=True)},
        relative=True,
    ),
    Reference(
        "OPTForCausalLM",
        "OPTConfig",
        OPT,
        {
            "125m": {},
            "350m": dict(do_layer_norm_before=False, word_embed_proj_dim=16),
            "projected, norm first": dict(word_embed_proj_dim=16),
            "no final norm": dict(_remove_final_layer_norm=True),
            "no biases": dict(enable_bias=False),
            "plain norms": dict(layer_norm_elementwise_affine=False),
            "untied": dict(tie_word_embeddings=False),
            "gelu": dict(activation_function="gelu"),
        },
    ),
    Reference(
        "Phi3ForCausalLM",
        "Phi3Config",
        BASE | dict(pad_token_id=0),
        {
            "plain": {},
            "window": dict(sliding_window=7),
            "tied": dict(tie_word_embeddings=True),
            "partial rotation": HALF_TURNED,
            "long text": dict(rope_parameters=LONG, original_max_position_embeddings=16),
            "short text": dict(rope_parameters=LONG, original_max_position_embeddings=64),
        },
    ),
    Reference(
        "GraniteForCausalLM",
        "GraniteConfig",
        BASE | dict(embedding_multiplier=3.3, attention_multiplier=0.2, residual_multiplier=0.22, logits_scaling=1.7),
        {"scaled": {}, "biases": dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)},
        relative=True,
    ),
    Reference(
        "SmolLM3ForCausalLM",
        "SmolLM3Config",
        BASE | dict(pad_token_id=0, tie_word_embeddings=False, no_rope_layers=[1, 0]),
        {
            "one still": {},
            "window where still": dict(use_sliding_window=True, sliding_window=7),
            "biases": dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rope_parameters=YARN),
        },
        relative=True,
    ),
    Reference(
        "Olmo3ForCausalLM",
        "Olmo3Config",
        BASE
        | dict(
            pad_token_id=0,
            eos_token_id=1,
            sliding_window=7,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters=dict(full_attention=YARN, sliding_attention=dict(rope_type="default", rope_theta=100.0)),
        ),
        {
            "two ropes": {},
            "biases": dict(attention_bias=True, tie_word_embeddings=True),
            "no window": dict(layer_types=["full_attention"] * 2),
        },
        relative=True,
    ),
    Reference(
        "GlmForCausalLM",
        "GlmConfig",
        BASE | HALF_TURNED | dict(head_dim=8, pad_token_id=0, eos_token_id=1),
        {"biases": {}, "stretched": dict(attention_bias=False, rope_parameters=YARN, tie_word_embeddings=True)},
        relative=True,
    ),
    Reference(
        "Glm4ForCausalLM",
        "Glm4Config",
        BASE | HALF_TURNED | dict(head_dim=8, pad_token_id=0, eos_token_id=1),
        {"biases": {}},
        relative=True,
    ),
    Reference(
        "GemmaForCausalLM",
        "GemmaConfig",
        BASE | dict(head_dim=12),
        {"tied": {}, "biases": dict(attention_bias=True, tie_word_embeddings=False, hidden_act="relu")},
        relative=True,
    ),
    Reference(
        "CohereForCausalLM",
        "CohereConfig",
        BASE | dict(logit_scale=0.3, eos_token_id=1),
        {"tied": {}, "norms of every head": dict(use_qk_norm=True, attention_bias=True, tie_word_embeddings=False)},
    ),
    Reference(
        "Cohere2ForCausalLM",
        "Cohere2Config",
        BASE | dict(logit_scale=0.3, eos_token_id=1, sliding_window=7, layer_types=["sliding_attention", "full_attention"]),
        {"one still": {}, "all still": dict(layer_types=["full_attention"] * 2, attention_bias=True)},
        relative=True,
    ),
    Reference(
        "Starcoder2ForCausalLM",
        "Starcoder2Config",
        BASE | dict(sliding_window=7),
        {"window": {}, "no biases": dict(use_bias=False, sliding_window=None, tie_word_embeddings=False)},
        relative=True,
    ),
    Reference(
        "StableLmForCausalLM",
        "StableLmConfig",
        BASE | HALF_TURNED,
        {"plain": {}, "side by side": dict(use_parallel_residual=True, use_qkv_bias=True, tie_word_embeddings=True)},
        relative=True,
    ),
    Reference(
        "NemotronForCausalLM",
        "NemotronConfig",
        BASE | HALF_TURNED | dict(head_dim=12),
        {"plain": {}, "biases": dict(attention_bias=True, mlp_bias=True)},
        relative=True,
    ),
    Reference(
        "ArceeForCausalLM",
        "ArceeConfig",
        BASE,
        {"plain": {}, "biases": dict(attention_bias=True, mlp_bias=True, rope_parameters=YARN)},
        relative=True,
    ),
    Reference(
        "SeedOssForCausalLM",
        "SeedOssConfig",
        BASE | dict(head_dim=16),
        {"biases of q, k, v": {}, "of the others": dict(attention_bias=False, attention_out_bias=True, mlp_bias=True)},
        relative=True,
    ),
    Reference(
        "Ernie4_5ForCausalLM",
        "Ernie4_5Config",
        BASE | dict(head_dim=12),
        {"tied": {}, "biases": dict(use_bias=True, tie_word_embeddings=False)},
        relative=True,
    ),
    Reference(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        BASE | EXPERTS | dict(num_experts=5, shared_expert_intermediate_size=32, decoder_sparse_step=2),
        {
            "one mixture": {},
            "windows": dict(
                qkv_bias=False,
                norm_topk_prob=True,
                use_sliding_window=True,
                sliding_window=7,
                max_window_layers=1,
                decoder_sparse_step=1,
            ),
        },
        relative=True,
    ),
    Reference(
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        BASE
        | EXPERTS
        | DELTA
        | dict(num_experts=5, shared_expert_intermediate_size=32, layer_types=["full_attention", "linear_attention"]),
        {"linear attention last": {}},
    ),
    Reference(
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        BASE | DELTA,
        {"tied": dict(tie_word_embeddings=True, attention_bias=True, linear_num_value_heads=2)},
        relative=True,
    ),
    Reference(
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        BASE | GROUPED | dict(head_dim=8),
        {
            "groups": {},
            "one group, plain shares": dict(
                n_group=1, topk_group=1, norm_topk_prob=False, attention_bias=True, use_qk_norm=True, tie_word_embeddings=True
            ),
        },
    ),
    Reference(
        "Glm4MoeLiteForCausalLM",
        "Glm4MoeLiteConfig",
        BASE | GROUPED | LATENT | dict(mlp_layer_types=["sparse", "dense"]),
        {"mixture first": dict(q_lora_rank=None, rope_interleave=False, attention_bias=True)},
        relative=True,
    ),
    Reference(
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        BASE | GROUPED | LATENT | dict(topk_method="group_limited_greedy", norm_topk_prob=False),
        {
            "groups": {},
            "greedy": dict(topk_method="greedy", n_group=4, q_lora_rank=None, attention_bias=True, tie_word_embeddings=True),
        },
        relative=True,
    ),
    Reference(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        BASE | GROUPED | LATENT,
        {"stretched": dict(rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.7))},
        relative=True,
    ),
    Reference(
        "GptOssForCausalLM",
        "GptOssConfig",
        BASE
        | dict(
            head_dim=8,
            intermediate_size=24,
            num_local_experts=5,
            num_experts_per_tok=2,
            sliding_window=7,
            swiglu_alpha=1.3,
            swiglu_limit=0.4,
            rope_parameters=YARN | dict(truncate=False),
        ),
        {"clamped": {}, "no biases of attention": dict(attention_bias=False, tie_word_embeddings=True)},
    ),
    Reference("Llama4ForCausalLM", "Llama4TextConfig", LLAMA4, {"one still": {}}, relative=True),
    Reference(
        "Exaone4ForCausalLM",
        "Exaone4Config",
        BASE | dict(sliding_window=7, layer_types=["sliding_attention", "full_attention"]),
        {"one still": {}, "all turned": dict(sliding_window=None, layer_types=["full_attention"] * 2)},
        relative=True,
    ),
]


WIDE = dict(vocab_size=64, hidden_size=48, num_hidden_layers=3, num_attention_heads=6)
BLOCKS = WIDE | dict(intermediate_size=80)
GPT = dict(vocab_size=64, n_embd=48, n_layer=3, n_head=6, n_positions=128)
GENERAL = [
    Reference("GPT2LMHeadModel", "GPT2Config", GPT, {"plain": {}, "by layer": dict(scale_attn_by_inverse_layer_idx=True)}),
    Reference("GPTNeoXForCausalLM", "GPTNeoXConfig", BLOCKS, {"parallel": {}, "sequential": dict(use_parallel_residual=False)}),
    Reference("GPTJForCausalLM", "GPTJConfig", GPT | dict(rotary_dim=4), {"plain": {}}),
    Reference("PhiForCausalLM", "PhiConfig", BLOCKS, {"plain": {}, "normed": dict(qk_layernorm=True)}),
    Reference(
        "FalconForCausalLM",
        "FalconConfig",
        WIDE,
        {"7b": {}, "alibi": dict(alibi=True, parallel_attn=False), "40b": dict(new_decoder_architecture=True, num_kv_heads=2)},
    ),
    Reference("BloomForCausalLM", "BloomConfig", dict(vocab_size=64, hidden_size=48, n_layer=3, n_head=6), {"plain": {}}),
    Reference(
        "MptForCausalLM",
        "MptConfig",
        dict(vocab_size=64, d_model=48, n_layers=3, n_heads=6, max_seq_len=128, expansion_ratio=2),
        {"plain": {}},
    ),
    Reference("OlmoForCausalLM", "OlmoConfig", BLOCKS, {"plain": {}, "clipped": dict(clip_qkv=0.5)}),
    Reference(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        dict(
            vocab_size=64,
            hidden_size=48,
            num_layers=4,
            num_heads=6,
            attention_types=[[["global", "local"], 2]],
            window_size=7,
            max_position_embeddings=128,
        ),
        {"windows": {}},
    ),
]
"""Models without a family of their own."""

MIXED = Reference(
    "Ernie4_5_MoeForCausalLM",
    "Ernie4_5_MoeConfig",
    BLOCKS | dict(moe_intermediate_size=24, moe_num_experts=8, moe_k=2, moe_num_shared_experts=1, num_key_value_heads=3),
    {"plain": {}},
)
"""A mixture of experts without a family of its own: the first block has an MLP."""


def apart(*own: str) -> list:
    """Returns the references as parameters of a test.

    Relatives are slow, except the ``own``, whose layers differ where the test looks.
    """
    return [
        pytest.param(each, id=each.model, marks=[pytest.mark.slow] * (each.relative and each.model not in own))
        for each in REFERENCES
    ]


MIXTURES = tuple(reference.model for reference in REFERENCES if {"num_experts_per_tok", "top_k_experts"} & set(reference.base))
"""The models of mixtures of experts."""


def far_from(model, logits: np.ndarray, tokens: np.ndarray, **options) -> np.ndarray:
    """Returns the largest relative difference from torch at every position."""
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(tokens).long(), **options).logits.float().numpy()
    return np.abs(logits - expected).max(axis=-1) / np.abs(expected).max()


def tiny(reference: Reference, settings: dict, dtype=torch.float32):
    """Returns (configuration, random model, its tensors as in a checkpoint).

    Noise on all parameters makes biases and norms matter.
    """
    torch.manual_seed(0)
    config = reference.configuration(settings, attn_implementation="eager")
    model = getattr(transformers, reference.model)(config).eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "layer_scalar")):
                buffer.add_(0.1 * torch.randn_like(buffer))
    declared = family_named(config.architectures) is not None
    state = model.state_dict() if declared else revert_weight_conversion(model, model.state_dict())
    tensors = {
        name: value.float().numpy().astype(jax.numpy.dtype(str(dtype).removeprefix("torch.")))
        for name, value in state.items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    stacks = stacks_of(config.architectures)
    if stacks:
        return config, model, unstacked(MemoryTensors(tensors), stacks)
    return config, model, MemoryTensors(as_saved(tensors, "Mixtral" in reference.model))


def as_saved(tensors: dict[str, np.ndarray], mixtral: bool = False) -> dict[str, np.ndarray]:
    """Splits the arrays of experts into matrices, as files store them.

    transformers keeps the experts of a block in one array.

    Args:
      mixtral: whether they are stored under the names of a Mixtral.
    """
    saved = {}
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    for name, array in tensors.items():
        stem, fused, part = name.replace(".mlp.", ".block_sparse_moe." if mixtral else ".mlp.").partition(".experts.")
        if not fused:
            saved[stem] = array
            continue
        for number, matrix in enumerate(array):
            pieces = dict(zip((gate, up), np.split(matrix, 2))) if part == "gate_up_proj" else {down: matrix}
            saved |= {f"{stem}.experts.{number}.{piece}.weight": values for piece, values in pieces.items()}
    return saved


# Two shapes of problems in all families together: the solver is compiled once for each.
SIZES = dict(vocab_size=258, intermediate_size=48, head_dim=8)
MULTIMODAL = Reference(
    "Gemma3ForConditionalGeneration",
    "Gemma3Config",
    dict(
        text_config=GEMMA | SIZES | dict(num_hidden_layers=3, sliding_window_pattern=3),
        mm_tokens_per_image=4,
        vision_config=dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        ),
    ),
    {"text half": {}},
)
QWEN_IMAGES = Reference(
    "Qwen3_5MoeForConditionalGeneration",
    "Qwen3_5MoeConfig",
    dict(
        text_config=BASE | EXPERTS | DELTA | dict(vocab_size=258, num_experts=3, shared_expert_intermediate_size=32),
        vision_config=dict(
            depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=48, num_position_embeddings=16
        ),
    ),
    {"text half": {}},
    relative=True,
)
GEMMA4_IMAGES = Reference(
    "Gemma4ForConditionalGeneration",
    "Gemma4Config",
    dict(
        text_config=GEMMA4 | dict(vocab_size=258, use_bidirectional_attention="vision"),
        vision_config=dict(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            patch_size=4,
            position_embedding_size=16,
        ),
    ),
    {"text half": {}},
    relative=True,
)
LLAMA_IMAGES = Reference(
    "Llama4ForConditionalGeneration",
    "Llama4Config",
    dict(
        text_config=LLAMA4 | dict(vocab_size=258, num_local_experts=3),
        vision_config=dict(
            hidden_size=16,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            vision_output_dim=16,
            projector_input_dim=16,
            projector_output_dim=16,
        ),
    ),
    {"text half": {}},
    relative=True,
)
GEMMA4_UNIFIED = Reference(
    "Gemma4UnifiedForConditionalGeneration",
    "Gemma4UnifiedConfig",
    dict(
        text_config={name: value for name, value in GEMMA4.items() if "per_layer" not in name} | dict(vocab_size=258),
        vision_config=dict(patch_size=4, mm_embed_dim=16, mm_posemb_size=16, output_proj_dims=16),
        audio_config=dict(audio_embed_dim=16),
    ),
    {"text half": {}},
    relative=True,
)
BESIDE_IMAGES = (MULTIMODAL, GEMMA4_IMAGES, GEMMA4_UNIFIED, QWEN_IMAGES, LLAMA_IMAGES)
"""Checkpoints of which the text half is pruned."""


BY_MODEL = {reference.model: reference for reference in (*REFERENCES, *BESIDE_IMAGES, *GENERAL, MIXED)}


def save(path: Path, reference: Reference, settings: dict, dtype=torch.float32, **options):
    """Saves a random model with a byte tokenizer. Returns the model."""
    _, model, _ = tiny(reference, settings, dtype)
    model.save_pretrained(path, **options)
    byte_tokenizer().save_pretrained(path)
    return model


def small(architecture: str, **settings):
    """Makes (configuration of transformers, tensors) of a tiny model.

    A Llama has sizes that divide no mesh.
    """
    if architecture == "Llama":
        return tiny_llama(**settings)
    config, _, tensors = tiny(next(reference for reference in REFERENCES if reference.model.startswith(architecture)), settings)
    return config, tensors
