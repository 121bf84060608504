"""Mixtures of experts against computing every expert on every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from optima_tpu.errors import UserError
from optima_tpu.models import family_of
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.generate import Prompt, Sampling, generate, plan_generation
from optima_tpu.models.grouped import Stretches, grouped_dot, grouped_outer
from optima_tpu.runtime.mesh import place
from tests.support.meshes import mesh
from tests.support.oracles import logits_of
from tests.support.references import BY_MODEL, MIXTURES, REFERENCES, tiny

FEW = {reference.model: reference for reference in REFERENCES if reference.model in MIXTURES}


@pytest.mark.parametrize("counts", [(30, 0, 7, 40, 0), (0, 77)], ids=str)
def test_grouped_products_are_those_of_each_group(counts):
    rng, group = np.random.default_rng(0), np.repeat(np.arange(len(counts)), counts)
    stretches = Stretches(jnp.cumsum(jnp.array(counts)) - jnp.array(counts), jnp.array(counts))
    x, weights, cotangent = (rng.standard_normal(shape) for shape in ((77, 12), (len(counts), 9, 12), (77, 9)))
    wide = [np.asarray(array, np.float32) for array in (x, weights, cotangent)]

    @jax.jit
    def products(x, weights, cotangent):
        y, pull = jax.vjp(lambda x, weights: grouped_dot(x, weights, stretches, jnp.float32), x, weights)
        return y, *pull(cotangent), grouped_outer(x, cotangent, stretches)

    y, towards_x, towards_weights, outer = products(*wide)

    def sums(left, right):
        return np.stack([left[group == each].T @ right[group == each] for each in range(len(counts))])

    for actual, expected in (
        (y, np.einsum("ri,roi->ro", x, weights[group])),
        (towards_x, np.einsum("ro,roi->ri", cotangent, weights[group])),
        (towards_weights, sums(cotangent, x)),
        (outer, sums(x, cotangent)),
    ):
        assert actual.shape == expected.shape
        assert np.abs(actual - expected).max() < 2e-6 * np.abs(expected).max()


def dense_way(x, router, experts, few, normalise):
    """Runs every expert on every token; all but ``few`` shares are 0."""
    shares = jax.nn.softmax(x @ router.T)
    shares = jnp.where(shares >= jnp.sort(shares)[..., -few, None], shares, 0)
    shares = shares / shares.sum(axis=-1, keepdims=True) if normalise else shares
    outputs = [(jax.nn.silu(x @ gate.T) * (x @ up.T)) @ down.T for gate, up, down in experts]
    return sum(shares[..., number, None] * output for number, output in enumerate(outputs))


@pytest.mark.parametrize(("model", "shape"), list(zip(MIXTURES[:2], [(1, 1), (4, 2)])), ids=str)
def test_a_mixture_and_its_gradients_are_those_of_the_dense_way(model, shape):
    config, _, tensors = tiny(FEW[model], {})
    decoder = Decoder.open(config, tensors, mesh(*shape))
    block_weights, kinds = next(decoder.blocks([0])), decoder.family.linears[-3:]
    name = kinds[0].split(".")[0]
    mixture_weights = {key: value for key, value in block_weights.items() if key.startswith(name)}

    def ours(parameters, x):
        block = nnx.merge(decoder.graph, decoder.state(block_weights | parameters))
        return nnx.capture(getattr(block, name).routed_output, nnx.Intermediate)(x)[0]

    def theirs(parameters, x):
        experts = [
            [parameters[kind.replace("*", str(number)) + ".weight"] for kind in kinds] for number in range(decoder.config.experts)
        ]
        return dense_way(x, parameters[name + ".gate.weight"], experts, 2, decoder.config.normalise)

    x, cotangent = np.random.default_rng(0).standard_normal((2, 8, 11, 48)).astype(np.float32)
    placed = place(decoder.mesh, x, P("data"))

    @functools.partial(jax.jit, static_argnums=0)
    def both_ways(way, parameters, x):
        with jax.default_matmul_precision("highest"):
            output, pull = jax.vjp(way, parameters, x)
            return output, *pull(cotangent)

    actual, expected = both_ways(ours, mixture_weights, placed), both_ways(theirs, jax.tree.map(np.asarray, mixture_weights), x)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("model", MIXTURES[:2])
def test_more_experts_for_a_token_than_there_are_is_refused(model):
    config, *_ = tiny(FEW[model], {})
    config.num_experts_per_tok = 6
    with pytest.raises(UserError, match="num_experts_per_tok, or top_k_experts, of at most the number of experts, got 6 and 5"):
        family_of(config).read_config(config)


def test_blocks_that_differ_write_what_a_pass_through_them_says():
    """Prompts are read in chunks; linear attention reads no token twice."""
    reference = BY_MODEL["Qwen3_5ForCausalLM"]
    config, _, tensors = tiny(reference, {})
    decoder, prompts = Decoder.open(config, tensors, mesh(1, 1)), [Prompt((3, 1, 4), 8), Prompt((1, 5, 9, 2, 6, 5), 5)]
    assert [len(blocks) for _, blocks in decoder.stretches] == [1, 1]
    plan = plan_generation(decoder, prompts, Sampling(60), advice="")
    for (prompt, _), answer in zip(prompts, generate(decoder, plan), strict=True):
        logits = logits_of(decoder, np.array([[*prompt, *answer]], np.int32))[0]
        assert answer == logits[len(prompt) - 1 : -1, :60].argmax(axis=-1).tolist()
