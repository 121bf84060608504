"""Published configurations of large models, built without a weight."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from optima_tpu.models.decoder import Decoder, forward
from optima_tpu.pipeline.layer_groups import linear_groups
from optima_tpu.runtime.mesh import divisible
from tests.support.ecosystem import LLAMA31
from tests.support.meshes import mesh
from tests.support.tiny_models import MemoryTensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GEMMA = dict(num_hidden_layers=26, head_dim=256, query_pre_attn_scalar=256)
GEMMA2_2B = GEMMA | dict(vocab_size=256_000, hidden_size=2304, intermediate_size=9216, num_attention_heads=8)
GEMMA2_2B |= dict(num_key_value_heads=4, sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
GEMMA3_1B = GEMMA | dict(vocab_size=262_144, hidden_size=1152, intermediate_size=6912, num_attention_heads=4)
GEMMA3_1B |= dict(num_key_value_heads=1, sliding_window=512, sliding_window_pattern=6)
GEMMA4 = dict(attention_k_eq_v=True, hidden_size_per_layer_input=0, sliding_window=1024, final_logit_softcapping=30.0)
GEMMA4_31B = GEMMA4 | dict(hidden_size=5376, intermediate_size=21504, num_hidden_layers=60)
GEMMA4_31B |= dict(num_attention_heads=32, num_key_value_heads=16, num_global_key_value_heads=4)
LLAMA31_8B = dict(vocab_size=128_256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
LLAMA31_8B |= dict(num_key_value_heads=8, head_dim=128, max_position_embeddings=131_072, rope_parameters=LLAMA31)
OPT = dict(vocab_size=50_272, max_position_embeddings=2048)
OPT_125M = OPT | dict(hidden_size=768, ffn_dim=3072, num_hidden_layers=12, num_attention_heads=12, word_embed_proj_dim=768)
OPT_350M = OPT | dict(hidden_size=1024, ffn_dim=4096, num_hidden_layers=24, num_attention_heads=16)
OPT_350M |= dict(word_embed_proj_dim=512, do_layer_norm_before=False)
QWEN25 = dict(max_position_embeddings=32_768, rope_parameters=dict(rope_type="default", rope_theta=1e6))
QWEN25_05B = QWEN25 | dict(vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24)
QWEN25_05B |= dict(num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True)
QWEN25_7B = QWEN25 | dict(vocab_size=152_064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28)
QWEN25_7B |= dict(num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False)
PUBLISHED = {
    "Llama-3.1-8B": ("LlamaForCausalLM", "LlamaConfig", LLAMA31_8B, 8_030_261_248),
    "Qwen2.5-0.5B": ("Qwen2ForCausalLM", "Qwen2Config", QWEN25_05B, 494_032_768),
    "Qwen2.5-7B": ("Qwen2ForCausalLM", "Qwen2Config", QWEN25_7B, 7_615_616_512),
    "gemma-2-2b": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA2_2B, 2_614_341_888),
    "gemma-3-1b": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA3_1B, 999_885_952),
    "gemma-4-31B": ("Gemma4ForCausalLM", "Gemma4TextConfig", GEMMA4_31B, 30_697_345_340),
    "opt-125m": ("OPTForCausalLM", "OPTConfig", OPT_125M, 125_239_296),
    "opt-350m": ("OPTForCausalLM", "OPTConfig", OPT_350M, 331_196_416),
}

GPT_OSS_20B = dict(num_hidden_layers=24, num_local_experts=32)
DEEPSEEK_V2_LITE = dict(hidden_size=2048, num_hidden_layers=27, num_attention_heads=16, q_lora_rank=None)
DEEPSEEK_V2_LITE |= dict(intermediate_size=10944, moe_intermediate_size=1408, num_experts_per_tok=6, first_k_dense_replace=1)
GEMMA4_26B = GEMMA4 | dict(hidden_size=2816, intermediate_size=2112, num_attention_heads=16, num_key_value_heads=8)
GEMMA4_26B |= dict(
    num_global_key_value_heads=2, enable_moe_block=True, num_experts=128, top_k_experts=8, moe_intermediate_size=704
)
GLM45_AIR = dict(attention_bias=True, head_dim=128)
MIXTURES = {
    "gpt-oss-20b": ("GptOssForCausalLM", "GptOssConfig", GPT_OSS_20B, 20_914_757_184),
    "DeepSeek-V2-Lite": ("DeepseekV2ForCausalLM", "DeepseekV2Config", DEEPSEEK_V2_LITE, 15_706_484_224),
    "GLM-4.5-Air": ("Glm4MoeForCausalLM", "Glm4MoeConfig", GLM45_AIR, 106_852_251_264),
    "gemma-4-26B-A4B": ("Gemma4ForCausalLM", "Gemma4TextConfig", GEMMA4_26B, 25_233_141_790),
    "Qwen3.5-35B-A3B": ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", {}, 34_660_610_688),
    "Llama-4-Scout": ("Llama4ForCausalLM", "Llama4TextConfig", {}, 107_769_861_120),
}


@pytest.fixture(scope="module", params=PUBLISHED, ids=str)
def published(request):
    """(decoder on a 4x2 mesh, torch's shapes by name, number of weights)."""
    architecture, kind, settings, parameters = PUBLISHED[request.param]
    config = getattr(transformers, kind)(**settings)
    config.architectures = [architecture]
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    tensors = {
        name: tensor.shape
        for name, tensor in model.state_dict().items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    return Decoder.open(config, MemoryTensors({}), mesh(4, 2)), tensors, parameters


def shapes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    return decoder.end_shapes | {
        decoder.prefix(i) + name: shape
        for i in range(decoder.config.blocks)
        for name, shape in decoder.at(i).block_shapes.items()
    }


@pytest.mark.parametrize("name", MIXTURES)
def test_a_published_mixture_has_its_number_of_weights(name):
    """Without the blocks behind the last one, which predict further tokens."""
    architecture, kind, settings, parameters = MIXTURES[name]
    config = getattr(transformers, kind)(**settings)
    config.architectures = [architecture]
    sizes = shapes(Decoder.open(config, MemoryTensors({}), mesh(4, 2)))
    assert sum(map(math.prod, sizes.values())) == parameters


def test_every_tensor_of_the_checkpoint_is_named_with_its_shape(published):
    decoder, tensors, parameters = published
    assert shapes(decoder) == {name: tuple(shape) for name, shape in tensors.items()}
    assert sorted(shapes(decoder)) == sorted(decoder.tensor_names())
    assert sum(map(math.prod, shapes(decoder).values())) == parameters


def test_every_matrix_is_split_over_the_model_axis(published):
    decoder, *_ = published
    for name in decoder.linears:
        shape = decoder.block_shapes[name + ".weight"]
        spec = divisible(decoder.mesh, shape, decoder.sharding(name + ".weight"))
        part = NamedSharding(decoder.mesh, spec).shard_shape(shape)
        assert math.prod(part) * 2 == math.prod(shape), name


def test_a_block_traces_at_its_full_size(published):
    decoder, *_ = published
    state = decoder.state({name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in decoder.block_shapes.items()})
    hidden = jax.ShapeDtypeStruct((4, 2048, decoder.config.d_model), jnp.bfloat16)
    output, inputs = jax.eval_shape(lambda *args: forward(decoder.graph, *args), state, hidden, decoder.config.positions(0, 2048))
    assert (output.shape, output.dtype) == (hidden.shape, hidden.dtype)
    for name in decoder.linears:
        assert inputs[name].shape == (4, 2048, decoder.block_shapes[name + ".weight"][1])
    assert {name for group in linear_groups(decoder) for name in group} == set(decoder.linears)
