"""Hessians against a float64 product of the very inputs, on any mesh."""

import numpy as np
import pytest

from optima_tpu.errors import UserError
from optima_tpu.models.activations import Activations
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline.calibrate import Stream, accumulate
from optima_tpu.pipeline.grams import whole
from optima_tpu.pipeline.layer_groups import groups_of_blocks, linear_groups
from optima_tpu.pipeline.sums import Capture
from tests.support.meshes import mesh
from tests.support.oracles import input_of
from tests.support.pruning import compiled_forward
from tests.support.references import BY_MODEL, MIXTURES, REFERENCES, small, tiny
from tests.support.tiny_models import tiny_llama


@pytest.mark.parametrize("size", [1, 5, 2048])  # of 2,048 rows XLA makes a program of its own kind
def test_a_symmetric_matrix_is_made_whole_from_its_upper_half(size):
    matrix = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    upper = np.triu(matrix)
    assert (np.asarray(whole(matrix)) == upper + np.triu(upper, 1).T).all()


def test_layers_that_read_one_input_are_found():
    groups = linear_groups(Decoder.open(*tiny_llama(), mesh(1, 1)))
    assert [set(names) for names in groups] == [
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
        {"self_attn.o_proj"},
        {"mlp.gate_proj", "mlp.up_proj"},
        {"mlp.down_proj"},
    ]


def test_blocks_whose_heads_differ_in_width_have_groups_of_their_own():
    """The first block has the wider heads, and its keys are its values."""
    reference = BY_MODEL["Gemma4ForCausalLM"]
    config, _, tensors = tiny(reference, reference.variants["no window first"])
    by_block = groups_of_blocks(Decoder.open(config, tensors, mesh(1, 1)))
    queries = [tuple(name.removeprefix("self_attn.") for name in groups[0]) for groups in by_block]
    assert queries == [("q_proj", "k_proj"), ("q_proj", "k_proj", "v_proj"), ("q_proj", "k_proj")]


@pytest.mark.parametrize(
    "architecture, shape", [("Llama", (1, 1)), ("Llama", (4, 2)), ("Llama", (2, 4)), ("OPT", (4, 2))], ids=str
)
def test_hessians_are_the_mean_outer_product_of_the_inputs(architecture, shape):
    # 7 windows divide no mesh; d_model 36 is not divisible by 8; 9 heads and 3 key-value heads divide none. OPT's biases make
    # something of the zeros behind the last window.
    decoder = Decoder.open(*small(architecture), mesh(*shape), batch=2)
    hidden = np.random.default_rng(0).standard_normal((7, 11, decoder.config.d_model)).astype(np.float32)
    parameters = next(decoder.blocks([1]))
    groups = linear_groups(decoder)
    statistics = accumulate(decoder, 1, Capture(groups), (Stream(parameters, Activations.of(decoder.mesh, hidden)),))
    _, inputs = compiled_forward(decoder.graph, decoder.state(parameters), hidden, decoder.positions(1, 11))
    for names, (hessian, tokens, _) in zip(groups, statistics):
        assert tokens == 77
        rows = np.asarray(inputs[names[0]], np.float64).reshape(77, -1)
        expected = rows.T @ rows / 77
        assert hessian.dtype == np.float32
        assert np.abs(hessian - expected).max() < 1e-5 * np.abs(expected).max()


def test_activations_that_are_not_finite_are_refused_by_name():
    decoder = Decoder.open(*tiny_llama(), mesh(1, 1))
    hidden = np.zeros((2, 4, 36), np.float32)
    hidden[1, 2, 3] = np.inf
    with pytest.raises(UserError, match="input of model.layers.0.self_attn"):
        accumulate(
            decoder,
            0,
            Capture(linear_groups(decoder)),
            (Stream(next(decoder.blocks([0])), Activations.of(decoder.mesh, hidden)),),
        )


def test_an_experts_statistics_are_those_of_the_tokens_that_were_sent_to_it():
    reference = next(reference for reference in REFERENCES if reference.model in MIXTURES)
    config, _, tensors = tiny(reference, {})
    decoder = Decoder.open(config, tensors, mesh(2, 2), batch=1)
    hidden = np.random.default_rng(0).standard_normal((7, 11, config.hidden_size)).astype(np.float32)
    parameters, groups = next(decoder.blocks([0])), linear_groups(decoder)
    stream = Stream(parameters, Activations.of(decoder.mesh, hidden))
    statistics = dict(zip(groups, accumulate(decoder, 0, Capture(groups), (stream,))))
    _, inputs = compiled_forward(decoder.graph, decoder.state(parameters), hidden, decoder.positions(0, 11))
    shared, sent = np.zeros((77, config.hidden_size)), np.zeros(77, int)
    for expert in range(config.num_experts):
        hessian, tokens, _ = statistics[f"mlp.experts.{expert}.gate_proj", f"mlp.experts.{expert}.up_proj"]
        rows = np.asarray(input_of(inputs, f"mlp.experts.{expert}.up_proj"), np.float64).reshape(77, -1)
        reached = rows.any(axis=1)
        assert tokens == reached.sum() == statistics[(f"mlp.experts.{expert}.down_proj",)].tokens
        assert 0 < tokens < 77
        assert np.abs(hessian - rows[reached].T @ rows[reached] / 77).max() < 1e-5 * np.abs(rows.T @ rows / 77).max()
        assert (rows[reached & (sent > 0)] == shared[reached & (sent > 0)]).all(), "experts of one token read the same"
        hidden_rows = np.asarray(input_of(inputs, f"mlp.experts.{expert}.down_proj"), np.float64).reshape(77, -1)
        expected = hidden_rows.T @ hidden_rows / 77
        assert np.abs(statistics[(f"mlp.experts.{expert}.down_proj",)].hessian - expected).max() < 1e-5 * np.abs(expected).max()
        shared[reached], sent = rows[reached], sent + reached
    assert (sent == config.num_experts_per_tok).all()

    # With borrowed tokens, the layers that read the block's input count the mean over all tokens too, as a share of their inputs.
    borrowed = dict(zip(groups, accumulate(decoder, 0, Capture(groups, borrow=0.25), (stream,))))
    mean = shared.T @ shared / 77
    for names, (hessian, tokens, _) in borrowed.items():
        own = statistics[names]
        expected = own.hessian + (0.25 * 48 / 77 * mean if "gate" in names[0] else 0)
        assert tokens == own.tokens and np.abs(hessian - expected).max() < 1e-5 * np.abs(expected).max()

    # Where memory is short, a pass accumulates the Hessians of some experts.
    some = tuple(names for names in groups if "experts.1." in names[0] or "experts.3.down" in names[0])
    for names, (hessian, tokens, _) in zip(some, accumulate(decoder, 0, Capture(some), (stream,)), strict=True):
        assert tokens == statistics[names].tokens
        np.testing.assert_allclose(hessian, statistics[names].hessian, rtol=1e-5, atol=1e-7)
