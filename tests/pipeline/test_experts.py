"""Experts that are removed before the walk."""

import numpy as np
import pytest

from optima_tpu.models.activations import Activations
from optima_tpu.models.decoder import Decoder, forward
from optima_tpu.models.family import ExpertNames
from optima_tpu.pipeline.experts import expert_statistics
from tests.support.meshes import mesh
from tests.support.references import REFERENCES, tiny

MODELS = {reference.model: reference for reference in REFERENCES}


@pytest.mark.parametrize(
    ("model", "shape"), [("MixtralForCausalLM", (1, 1)), ("GptOssForCausalLM", (4, 2)), ("DeepseekV3ForCausalLM", (2, 2))]
)
def test_the_statistics_of_experts_are_those_of_each_expert_on_its_tokens(model, shape):
    """Against every expert on its own rows of the input, in float64."""
    config, _, tensors = tiny(MODELS[model], {})
    decoder = Decoder.open(config, tensors, mesh(*shape), batch=1)
    names, index, windows = decoder.family.experts, 1, 5
    assert isinstance(names, ExpertNames)
    parameters = next(decoder.blocks([index]))
    values = np.random.default_rng(0).standard_normal((windows, 9, decoder.config.d_model)).astype(np.float32)
    found = expert_statistics(decoder, index, names, parameters, Activations.of(decoder.mesh, values))

    alone = Decoder.open(config, tensors, mesh(1, 1))
    sown = sown_inputs(alone, index, values)
    routed, shares = sown[names.down.replace("*", "0")], np.asarray(sown[names.shares], np.float64).reshape(-1)
    chosen = np.asarray(routed.chosen).reshape(-1)
    order = np.argsort(chosen, kind="stable")
    rows, share = np.asarray(routed.rows, np.float64), shares[order]
    for expert in range(decoder.config.experts):
        path = names.down.replace("*", str(expert))
        mine = chosen[order] == expert
        outputs = rows[mine] @ np.asarray(parameters[path + ".weight"], np.float64).T
        if path + ".bias" in parameters:
            outputs += np.asarray(parameters[path + ".bias"], np.float64)
        norms = np.linalg.norm(outputs, axis=1)
        expected = mine.sum(), norms.sum(), (norms**2).sum(), (share[mine] * norms).sum()
        np.testing.assert_allclose([float(array[expert]) for array in found], expected, rtol=1e-5)


def sown_inputs(decoder: Decoder, index: int, values: np.ndarray):
    """What block ``index`` sows for hidden states, on one device."""
    alike = decoder.at(index)
    state = alike.state(next(decoder.blocks([index])))
    return forward(alike.graph, state, values, decoder.positions(index, values.shape[1]))[1]
