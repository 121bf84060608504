"""A model as one NNX module: logits, tensor names, training under masks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optima_tpu
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.language_model import LanguageModel
from tests.support.meshes import mesh
from tests.support.oracles import logits_of
from tests.support.references import BY_MODEL, tiny
from tests.support.runs import folder_tensors

TOKENS = np.random.default_rng(0).integers(1, 64, (2, 12)).astype(np.int32)
# Its own head; windows, caps and a scaled embedding; positions that are embedded and a projected embedding; a mixture of experts.
FAMILIES = {"LlamaForCausalLM": "gqa", "Gemma2ForCausalLM": "caps", "OPTForCausalLM": "350m", "Qwen3MoeForCausalLM": "plain"}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_decoder_and_every_tensor_keeps_its_name(name):
    reference = BY_MODEL[name]
    config, _, tensors = tiny(reference, reference.variants[FAMILIES[name]])
    decoder = Decoder.open(config, tensors, mesh(2, 2))
    model = LanguageModel(decoder)
    logits = nnx.jit(lambda model, tokens: model(tokens))(model, TOKENS)
    np.testing.assert_allclose(logits, logits_of(decoder, TOKENS), rtol=1e-5, atol=1e-5)
    assert model.tensors().keys() == set(decoder.tensor_names())
    for each, array in model.tensors().items():
        np.testing.assert_array_equal(array, tensors.arrays[each])


@pytest.mark.slow
def test_a_run_is_trained_in_plain_jax_and_stays_pruned(finished):
    model = optima_tpu.load(finished.directory).nnx(mesh="4x2")
    parameters = nnx.state(model, nnx.Param)
    stored = folder_tensors(finished.directory / "hf")
    assert {name: array.shape for name, array in model.tensors().items()} == {name: array.shape for name, array in stored.items()}
    up = model.blocks[0].mlp.up_proj.weight[...]
    assert up.sharding.shard_shape(up.shape) == (up.shape[0] // 2, up.shape[1])
    masks = optima_tpu.masks_of(parameters)
    optimizer = nnx.Optimizer(model, optima_tpu.keep_zeros(optax.adamw(1e-2), masks), wrt=nnx.Param)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 256, (4, 16)), jnp.int32)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(tokens)[:, :-1], tokens[:, 1:]).mean()

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    losses = [float(step(model, optimizer)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert optima_tpu.broken_zeros(nnx.state(model, nnx.Param), masks) == []
    assert all(jax.tree.leaves(jax.tree.map(lambda old, new: np.any(old != new), stored, model.tensors())))
