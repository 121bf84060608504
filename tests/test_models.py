"""Our decoders against transformers' (torch), on tiny random models."""

import numpy as np
import pytest

from optima_tpu.errors import UserError
from optima_tpu.models import family_of
from optima_tpu.models.decoder import Decoder
from tests.helpers import MemoryTensors, mesh

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BASE = dict(vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
            num_key_value_heads=3, max_position_embeddings=128)
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
VARIANTS = {
    "gqa": {},
    "tied": dict(tie_word_embeddings=True),
    "multi-head": dict(num_key_value_heads=6),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "head_dim": dict(head_dim=16),
    "llama3 rope": dict(rope_parameters=LLAMA3),
    "linear rope": dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0)),
    "nine heads": dict(hidden_size=36, num_attention_heads=9, num_key_value_heads=3),
}


def reference(**settings):
    """A random Llama of transformers, with biases and norms that matter, and its tensors."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(BASE | settings))
    config.architectures = ["LlamaForCausalLM"]
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tensors = {name: value.numpy() for name, value in model.state_dict().items()
               if not (config.tie_word_embeddings and name == "lm_head.weight")}
    return config, model, MemoryTensors(tensors)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("shape", [(1, 1), (4, 2), (2, 4)], ids=str)
def test_logits_agree_with_transformers(settings, shape):
    config, model, tensors = reference(**settings)
    tokens = np.random.default_rng(0).integers(0, 64, (3, 40)).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    ours = Decoder.open(config, tensors, mesh(*shape), batch=2).logits(tokens)
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()


def test_every_tensor_of_the_checkpoint_is_read_and_no_other():
    for settings in VARIANTS.values():
        config, _, tensors = reference(**settings)
        decoder = Decoder.open(config, tensors, mesh(1, 1))
        assert sorted(decoder.tensor_names()) == sorted(tensors.names())
        assert set(decoder.family.SHARDING) >= {n for n in decoder.block_shapes if n.endswith("proj.weight")}


def test_an_unsupported_rope_type_is_refused_by_name():
    config, _, _ = reference()
    config.rope_parameters = dict(rope_type="yarn", rope_theta=1e4, factor=2.0)
    with pytest.raises(UserError, match="yarn"):
        family_of(config).Config.from_hf(config)


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
