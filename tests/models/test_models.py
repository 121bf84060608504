"""Our decoders against transformers' (torch), on tiny random models."""

import importlib
import json
import re
from types import SimpleNamespace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from optima_tpu.errors import UserError
from optima_tpu.models import FAMILIES, family_named, family_of, gemma4
from optima_tpu.models.check import check_checkpoint
from optima_tpu.models.checkpoints.source import read_config
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.layers import RMSNorm, ShiftedLayerNorm, ShiftedRMSNorm, UnbiasedLayerNorm, WideRMSNorm
from optima_tpu.models.rope import Rope
from tests.support.meshes import mesh
from tests.support.oracles import input_of, logits_of
from tests.support.pruning import compiled_forward
from tests.support.references import (
    BASE,
    BY_MODEL,
    GEMMA4_IMAGES,
    LLAMA3,
    LLAMA_IMAGES,
    MIXTURES,
    MULTIMODAL,
    QWEN_IMAGES,
    REFERENCES,
    Reference,
    apart,
    far_from,
    tiny,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")


COMMON = ["tied", "untied", "biases", "head_dim", "linear rope", "window", "window above", "no window", "one expert"]
"""What relatives of a family read as it does: slow where it is not their first variant."""
CASES = [
    pytest.param(reference, settings, id=f"{reference.model.removesuffix('ForCausalLM')}-{name}", marks=[pytest.mark.slow] * slow)
    for reference in REFERENCES
    for index, (name, settings) in enumerate(reference.variants.items())
    for slow in [index > 0 and reference.relative and name in COMMON]
]


def reference(**settings):
    return tiny(REFERENCES[0], settings)


def compared(reference: Reference, settings: dict, *, dtype=torch.float32, shape=(1, 1)) -> np.ndarray:
    """Largest relative difference from transformers' logits by position."""
    config, model, tensors = tiny(reference, settings, dtype)
    tokens = np.random.default_rng(0).integers(1, 64, (3, 40)).astype(np.int32)
    return far_from(model, logits_of(Decoder.open(config, tensors, mesh(*shape), batch=2), tokens), tokens)


@pytest.mark.parametrize(("reference", "settings"), CASES)
def test_logits_agree_with_transformers(reference, settings):
    assert (compared(reference, settings) < 1e-4).all()


@pytest.mark.parametrize("reference", apart("Llama4ForCausalLM"))  # which has mixtures of its own
def test_logits_do_not_depend_on_the_mesh(reference):
    """No axis here divides 3 key-value heads; 4 does not divide 6 heads."""
    for shape in ((4, 2), (2, 4)) if reference is REFERENCES[0] else ((4, 2),):
        assert (compared(reference, reference.first, shape=shape) < 1e-4).all()


# The named ones scale or normalise otherwise than the families whose layers they have.
@pytest.mark.parametrize("reference", apart(*(f"{name}ForCausalLM" for name in ("Gemma", "Granite", "Nemotron", "DeepseekV3"))))
def test_bfloat16_logits_agree_within_its_rounding(reference):
    """Measured: 0.008 to 0.018, some roundings of 2^-9 on both sides."""
    near = compared(reference, reference.first, dtype=torch.bfloat16) < 16 * 2**-9
    # Rounding sends a token to another expert where two are nearly equal; the others must agree.
    assert near.mean() > 0.8 if reference.model in MIXTURES else near.all()


@pytest.mark.parametrize(
    "norm, theirs",
    [
        (RMSNorm, "llama.modeling_llama.LlamaRMSNorm"),
        (WideRMSNorm, "olmo2.modeling_olmo2.Olmo2RMSNorm"),
        (WideRMSNorm, "gemma4.modeling_gemma4.Gemma4RMSNorm"),
        (ShiftedRMSNorm, "gemma2.modeling_gemma2.Gemma2RMSNorm"),
        (ShiftedLayerNorm, "nemotron.modeling_nemotron.NemotronLayerNorm1P"),
        (UnbiasedLayerNorm, "cohere.modeling_cohere.CohereLayerNorm"),
    ],
    ids=str,
)
def test_norms_round_where_the_reference_does(norm, theirs):
    """In bfloat16 few values differ: float32 sums may add in another order."""
    module, _, name = theirs.rpartition(".")
    expected = getattr(importlib.import_module("transformers.models." + module), name)(64, eps=1e-5).to(torch.bfloat16)
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal(64).astype(ml_dtypes.bfloat16), rng.standard_normal((256, 64)).astype(ml_dtypes.bfloat16)
    ours = norm(64, eps=1e-5)
    ours.weight = nnx.Param(jnp.asarray(weight))
    with torch.no_grad():
        expected.weight.copy_(torch.from_numpy(weight.astype(np.float32)))
        wanted = expected(torch.from_numpy(x.astype(np.float32)).to(torch.bfloat16)).float().numpy()
    actual = np.asarray(ours(jnp.asarray(x)).astype(jnp.float32))
    assert (actual != wanted).mean() < 0.005


@pytest.mark.parametrize(("reference", "settings"), CASES)
def test_every_tensor_of_the_checkpoint_is_read_and_no_other(reference, settings):
    config, _, tensors = tiny(reference, settings)
    decoder = Decoder.open(config, tensors, mesh(1, 1))
    assert sorted(decoder.tensor_names()) == sorted(tensors.names())
    decoder = decoder.at(decoder.config.blocks - 1)
    # A router, and the norms of queries and keys that have weights for every head, are no layers to prune.
    others = re.compile(r"([._]gate|[qk]_norm)\.weight$|router\.")
    matrices = {name for name, shape in decoder.block_shapes.items() if len(shape) == 2 and not others.search(name)}
    assert {name + ".weight" for name in decoder.linears} == matrices
    assert all(decoder.sharding(name) != P() for name in matrices)


def test_blocks_that_predict_further_tokens_may_stand_behind_the_last_one():
    config, _, tensors = tiny(BY_MODEL["Glm4MoeForCausalLM"], {})
    tensors.arrays["model.layers.46.eh_proj.weight"] = np.ones((2, 2), np.float32)
    check_checkpoint(Decoder.open(config, tensors, mesh(1, 1)))
    tensors.arrays["model.layers.2.eh_proj.weight"] = np.ones((2, 2), np.float32)
    with pytest.raises(UserError, match="unexpected .model.layers.2.eh_proj"):
        check_checkpoint(Decoder.open(config, tensors, mesh(1, 1)))


SLOW = {"Qwen3NextForCausalLM", "Gemma4ForCausalLM"}
WIRINGS = [
    pytest.param(reference, marks=[pytest.mark.slow] * (reference.model in SLOW), id=reference.model)
    for reference in REFERENCES
    if not reference.relative
]


@pytest.mark.parametrize("reference", WIRINGS)
def test_a_block_goes_on_from_the_output_of_attention(reference):
    """Given the input of ``Decoder.attended``, layers before it are unused."""
    config, _, tensors = tiny(reference, reference.first)
    decoder = Decoder.open(config, tensors, mesh(1, 1)).at(1)
    parameters, attended = next(decoder.blocks([1])), decoder.attended
    hidden = np.random.default_rng(0).standard_normal((2, 9, decoder.config.d_model)).astype(np.float32)
    expected, inputs = compiled_forward(decoder.graph, decoder.state(parameters), hidden, decoder.positions(1, 9))

    before = decoder.linears[: decoder.linears.index(attended)]
    broken = parameters | {name + ".weight": jnp.full_like(parameters[name + ".weight"], jnp.nan) for name in before}
    known = {attended: inputs[attended]}
    output, behind = compiled_forward(decoder.graph, decoder.state(broken), hidden, decoder.positions(1, 9), known)
    np.testing.assert_array_equal(output, expected)
    for name in decoder.linears[len(before) :]:
        np.testing.assert_array_equal(input_of(behind, name), input_of(inputs, name))
    assert len(before) > 0 and np.isfinite(output).all()


@pytest.mark.parametrize("high", [1.0, 0.5])
def test_llama3_rope_without_a_range_between_its_factors_has_a_step(high):
    """As in transformers, which then blends nothing; no division by zero."""
    parameters = LLAMA3 | dict(low_freq_factor=1.0, high_freq_factor=high)
    config = transformers.LlamaConfig(**BASE, rope_parameters=parameters)
    expected, _ = rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    with np.errstate(all="raise"):
        cos, _ = Rope.from_hf(parameters).tables(2, 8)
    np.testing.assert_allclose(cos[1, :4], np.cos(expected.numpy()), rtol=1e-6)


def test_an_unsupported_rope_type_is_refused_by_name():
    config, _, _ = reference()
    config.rope_parameters = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
    with pytest.raises(UserError, match="dynamic"):
        family_of(config).read_config(config)


@pytest.mark.parametrize(
    ("model", "setting", "value"),
    [
        ("LlamaForCausalLM", "hidden_act", "relu"),
        ("LlamaForCausalLM", "per_layer_config", {0: dict(num_key_value_heads=6)}),
        ("LlamaForCausalLM", "per_layer_config", {0: dict(hidden_act="relu")}),
        ("OPTForCausalLM", "per_layer_config", {0: dict(ffn_dim=20)}),
        ("Qwen2ForCausalLM", "layer_types", ["full_attention", "linear_attention"]),
        ("DeepseekV2ForCausalLM", "mlp_bias", True),
        ("DeepseekV2ForCausalLM", "topk_method", "noaux_tc"),
        ("DeepseekV3ForCausalLM", "num_key_value_heads", 3),
        ("Glm4MoeForCausalLM", "n_shared_experts", 0),
        ("Glm4MoeForCausalLM", "topk_group", 4),
        ("OlmoeForCausalLM", "clip_qkv", 8.0),
        ("Gemma3ForCausalLM", "attn_logit_softcapping", 50.0),
        ("Gemma2ForCausalLM", "hidden_activation", "mish"),
        ("Gemma4ForCausalLM", "hidden_size_per_layer_input", 8),
        ("Gemma4ForCausalLM", "num_kv_shared_layers", 1),
        ("Gemma4ForCausalLM", "per_layer_config", {0: dict(intermediate_size=40)}),
        ("Gemma4ForCausalLM", "per_layer_config", {0: dict(head_dim=16, num_kv_shared_layers=1)}),
        ("Gemma4ForCausalLM", "top_k_experts", None),
        ("OPTForCausalLM", "activation_function", "mish"),
        ("Glm4MoeLiteForCausalLM", "mlp_layer_types", ["dense", "linear"]),
        ("GptOssForCausalLM", "layer_types", ["full_attention", "chunked_attention"]),
        ("StableLmForCausalLM", "qk_layernorm", True),
        ("SmolLM3ForCausalLM", "no_rope_layers", [1]),
        ("Llama4ForCausalLM", "no_rope_layers", [1]),
        ("Qwen3NextForCausalLM", "layer_types", ["linear_attention", "sliding_attention"]),
        ("Qwen3NextForCausalLM", "linear_num_value_heads", 3),
        ("Olmo3ForCausalLM", "rope_parameters", dict(full_attention=dict(rope_type="default", rope_theta=1e4))),
        ("MistralForCausalLM", "rope_parameters", dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
    ],
)
def test_an_unsupported_setting_is_refused_by_name(model, setting, value):
    config, *_ = tiny(BY_MODEL[model], {})
    setattr(config, setting, value)
    name = "partial_rotary_factor" if "partial_rotary_factor" in str(value) else setting
    with pytest.raises(UserError, match=name):
        family_of(config).read_config(config)


def test_a_transformers_without_blocks_that_differ_is_refused_by_its_version():
    with pytest.raises(UserError, match="^expected transformers 5.15 or newer for a Gemma 4, got [0-9.]+: pip install -U"):
        gemma4.read_config(SimpleNamespace(per_layer_config=None))


@pytest.mark.parametrize(("model", "model_type"), [("ConditionalGeneration", "gemma3n"), ("CausalLM", "gemma3n_text")])
def test_an_architecture_that_does_not_fit_is_refused_with_the_reason(model, model_type):
    sizes = dict(intermediate_size=[8])
    config = dict(architectures=[f"Gemma3nFor{model}"], model_type=model_type)
    with pytest.raises(UserError, match=f"Gemma3nFor{model} .model_type {model_type}., where later blocks read keys"):
        read_config(json.dumps(config | (dict(text_config=sizes) if model_type == "gemma3n" else sizes)).encode(), "a model")


def test_every_family_has_a_reference():
    """One reference is enough for equal families, and for text halves."""
    references = [*REFERENCES, MULTIMODAL, QWEN_IMAGES, GEMMA4_IMAGES, LLAMA_IMAGES]
    compared = [family_named([reference.model]) for reference in references]
    halves = {"Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForCausalLM"}
    assert {name for (name, _), family in FAMILIES.items() if not any(family is each for each in compared)} == halves
