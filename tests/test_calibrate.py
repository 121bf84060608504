"""Hessians against a float64 product of the very inputs, on any mesh."""

import numpy as np
import pytest

from optima_tpu.calibrate import accumulate_hessians, linear_groups
from optima_tpu.errors import UserError
from optima_tpu.models.decoder import Decoder, forward
from tests.helpers import mesh, tiny_llama


def test_layers_that_read_one_input_are_found():
    groups = linear_groups(Decoder.open(*tiny_llama(), mesh(1, 1)))
    assert [set(names) for names in groups] == [
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}, {"self_attn.o_proj"},
        {"mlp.gate_proj", "mlp.up_proj"}, {"mlp.down_proj"}]


@pytest.mark.parametrize("shape", [(1, 1), (4, 2), (2, 4)], ids=str)
def test_hessians_are_the_mean_outer_product_of_the_inputs(shape):
    # 7 samples divide no mesh; d_model 36 is not divisible by 8; 9 heads and 3 key-value heads divide none.
    decoder = Decoder.open(*tiny_llama(), mesh(*shape), batch=2)
    hidden = np.random.default_rng(0).standard_normal((7, 11, 36)).astype(np.float32)
    parameters = decoder.load_block(1)
    groups = linear_groups(decoder)
    hessians = accumulate_hessians(decoder, 1, parameters, hidden, groups)
    _, inputs = forward(decoder.graph, decoder.state(parameters), hidden, decoder.positions(1, 11))
    for names, hessian in zip(groups, hessians):
        rows = np.asarray(inputs[names[0]], np.float64).reshape(77, -1)
        expected = rows.T @ rows / 77
        assert hessian.dtype == np.float32
        assert np.abs(hessian - expected).max() < 1e-5 * np.abs(expected).max()


def test_activations_that_are_not_finite_are_refused_by_name():
    decoder = Decoder.open(*tiny_llama(), mesh(1, 1))
    hidden = np.zeros((2, 4, 36), np.float32)
    hidden[1, 2, 3] = np.inf
    with pytest.raises(UserError, match="input of model.layers.0.self_attn"):
        accumulate_hessians(decoder, 0, decoder.load_block(0), hidden, linear_groups(decoder))
