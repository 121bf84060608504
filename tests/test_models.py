"""Our decoders against transformers' (torch), on tiny random models."""

import importlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from optima_tpu.errors import UserError
from optima_tpu.models import family_of
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.layers import RMSNorm, ShiftedRMSNorm, WideRMSNorm
from tests.helpers import MemoryTensors, mesh

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BASE = dict(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    max_position_embeddings=128,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=2.0)
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


class Reference(NamedTuple):
    """The class of transformers (and of its configuration), a tiny size, and the options of the family, each with its values.

    Texts are 40 tokens long: longer than every window here.
    """

    model: str
    config: str
    base: dict
    variants: dict[str, dict]


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
    ),
    Reference(
        "MinistralForCausalLM",
        "MinistralConfig",
        BASE | dict(head_dim=8),
        {"one window": dict(sliding_window=7, layer_types=["full_attention", "sliding_attention"])},
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
        },
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
            "partial rotation": dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5)),
            "long text": dict(rope_parameters=LONG, original_max_position_embeddings=16),
            "short text": dict(rope_parameters=LONG, original_max_position_embeddings=64),
        },
    ),
]
CASES = [
    pytest.param(reference, settings, id=f"{reference.model.removesuffix('ForCausalLM')}-{name}")
    for reference in REFERENCES
    for name, settings in reference.variants.items()
]


def tiny(reference: Reference, settings: dict, dtype=torch.float32):
    """A random model of transformers, with biases and norms that matter, and its tensors as a checkpoint has them."""
    torch.manual_seed(0)
    config = getattr(transformers, reference.config)(**(reference.base | settings), attn_implementation="eager")
    config.architectures = [reference.model]
    model = getattr(transformers, reference.model)(config).eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tensors = {
        name: value.float().numpy().astype(jax.numpy.dtype(str(dtype).removeprefix("torch.")))
        for name, value in model.state_dict().items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    return config, model, MemoryTensors(as_saved(tensors))


def as_saved(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """transformers keeps the experts of a block in one array, and stores each of their matrices by itself."""
    saved = {}
    for name, array in tensors.items():
        stem, fused, part = name.partition(".experts.")
        if not fused:
            saved[name] = array
            continue
        for number, matrix in enumerate(array):
            pieces = dict(zip(("gate_proj", "up_proj"), np.split(matrix, 2))) if part == "gate_up_proj" else {part: matrix}
            saved |= {f"{stem}.experts.{number}.{piece}.weight": values for piece, values in pieces.items()}
    return saved


def reference(**settings):
    return tiny(REFERENCES[0], settings)


def compared(reference: Reference, settings: dict, *, dtype=torch.float32, shape=(1, 1)) -> np.ndarray:
    """The largest difference between our logits and transformers', relative to the largest logit, at every position."""
    config, model, tensors = tiny(reference, settings, dtype)
    tokens = np.random.default_rng(0).integers(1, 64, (3, 40)).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()
    ours = Decoder.open(config, tensors, mesh(*shape), batch=2).logits(tokens)
    return np.abs(ours - expected).max(axis=-1) / np.abs(expected).max()


@pytest.mark.parametrize(("reference", "settings"), CASES)
def test_logits_agree_with_transformers(reference, settings):
    assert (compared(reference, settings) < 1e-4).all()


@pytest.mark.parametrize(
    ("reference", "shape"),
    [*((reference, (4, 2)) for reference in REFERENCES), (REFERENCES[0], (2, 4))],
    ids=lambda value: getattr(value, "model", str(value)),
)
def test_logits_do_not_depend_on_the_mesh(reference, shape):
    """Three key-value heads do not divide two or four slices of the model axis, six heads do not divide four."""
    assert (compared(reference, next(iter(reference.variants.values())), shape=shape) < 1e-4).all()


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda reference: reference.model)
def test_bfloat16_logits_agree_within_its_rounding(reference):
    """Measured: 0.008 to 0.018, some roundings of 2^-9 on both sides."""
    near = compared(reference, next(iter(reference.variants.values())), dtype=torch.bfloat16) < 16 * 2**-9
    # Rounding sends a token to another expert where two are nearly equal; the others must agree.
    assert near.mean() > 0.8 if "Moe" in reference.model else near.all()


@pytest.mark.parametrize(
    "norm, theirs",
    [
        (RMSNorm, "llama.modeling_llama.LlamaRMSNorm"),
        (WideRMSNorm, "olmo2.modeling_olmo2.Olmo2RMSNorm"),
        (ShiftedRMSNorm, "gemma2.modeling_gemma2.Gemma2RMSNorm"),
    ],
    ids=str,
)
def test_norms_round_where_the_reference_does(norm, theirs):
    """In bfloat16, bit for bit but where float32 sums in another order fall on the other side of a rounding."""
    module, _, name = theirs.rpartition(".")
    expected = getattr(importlib.import_module("transformers.models." + module), name)(64, eps=1e-5).to(torch.bfloat16)
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal(64).astype(ml_dtypes.bfloat16), rng.standard_normal((256, 64)).astype(ml_dtypes.bfloat16)
    ours = norm(64, eps=1e-5)
    ours.weight[...] = jnp.asarray(weight)
    with torch.no_grad():
        expected.weight.copy_(torch.from_numpy(weight.astype(np.float32)))
        wanted = expected(torch.from_numpy(x.astype(np.float32)).to(torch.bfloat16)).float().numpy()
    found = np.asarray(ours(jnp.asarray(x)).astype(jnp.float32))
    assert (found != wanted).mean() < 0.005


@pytest.mark.parametrize(("reference", "settings"), CASES)
def test_every_tensor_of_the_checkpoint_is_read_and_no_other(reference, settings):
    config, _, tensors = tiny(reference, settings)
    decoder = Decoder.open(config, tensors, mesh(1, 1))
    assert sorted(decoder.tensor_names()) == sorted(tensors.names())
    matrices = {name for name, shape in decoder.block_shapes.items() if len(shape) == 2}
    matrices -= {"mlp.gate.weight"}  # a router is no layer to prune
    assert {name + ".weight" for name in decoder.linears} == matrices
    assert all(decoder.sharding(name) != P() for name in matrices)


def test_an_unsupported_rope_type_is_refused_by_name():
    config, _, _ = reference()
    config.rope_parameters = dict(rope_type="yarn", rope_theta=1e4, factor=2.0)
    with pytest.raises(UserError, match="yarn"):
        family_of(config).read_config(config)


@pytest.mark.parametrize(
    ("model", "setting", "value"),
    [
        ("LlamaForCausalLM", "hidden_act", "relu"),
        ("Qwen2ForCausalLM", "layer_types", ["full_attention", "linear_attention"]),
        ("Qwen3MoeForCausalLM", "mlp_only_layers", [0]),
        ("Gemma3ForCausalLM", "attn_logit_softcapping", 50.0),
        ("Gemma2ForCausalLM", "hidden_activation", "mish"),
        ("OPTForCausalLM", "activation_function", "mish"),
        ("MistralForCausalLM", "rope_parameters", dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
    ],
)
def test_an_unsupported_setting_is_refused_by_name(model, setting, value):
    config, *_ = tiny(next(reference for reference in REFERENCES if reference.model == model), {})
    setattr(config, setting, value)
    name = "partial_rotary_factor" if setting == "rope_parameters" else setting
    with pytest.raises(UserError, match=name):
        family_of(config).read_config(config)


def test_an_unsupported_architecture_lists_the_supported_ones():
    with pytest.raises(UserError, match="LlamaForCausalLM.*GPT2LMHeadModel"):
        family_of(transformers.GPT2Config(architectures=["GPT2LMHeadModel"]))


def test_weights_that_are_not_finite_are_refused_by_name():
    config, _, tensors = reference()
    name = "model.layers.1.mlp.up_proj.weight"
    tensors.arrays[name] = tensors.arrays[name].copy()
    tensors.arrays[name][3, 4] = np.nan
    with pytest.raises(UserError, match=name):
        Decoder.open(config, tensors, mesh(1, 1)).load_block(1)


def test_weights_of_another_shape_are_refused_by_name():
    config, _, tensors = reference()
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors.arrays[name] = tensors.arrays[name][:-1]
    with pytest.raises(UserError, match=name):
        Decoder.open(config, tensors, mesh(1, 1)).load_block(0)
