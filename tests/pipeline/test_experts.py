"""Experts that are removed before the walk."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optima_tpu.errors import UserError
from optima_tpu.method.experts import MSAN, REAP
from optima_tpu.models import layers, routers
from optima_tpu.models.activations import Activations
from optima_tpu.models.checkpoints.export import export
from optima_tpu.models.checkpoints.fewer_experts import ExpertCut, expert_cut
from optima_tpu.models.checkpoints.source import Pretrained
from optima_tpu.models.decoder import Decoder, run_block
from optima_tpu.models.family import ExpertNames
from optima_tpu.models.layers import project
from optima_tpu.models.model import Model, without_experts
from optima_tpu.pipeline.experts import BlockText, ExpertBlock, ExpertRemoval, add_statistics, keep_block, kept
from optima_tpu.report.contents import BlockExperts, ExpertsLeft, LeftOut
from tests.support.fake_run import run_without
from tests.support.meshes import mesh
from tests.support.oracles import logits_of, run_head
from tests.support.pruning import compiled_forward
from tests.support.references import BY_MODEL, GEMMA4_IMAGES, GEMMA4_MIXTURE, LLAMA_IMAGES, far_from, tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        pytest.param("MixtralForCausalLM", (1, 1), marks=pytest.mark.slow),
        ("GptOssForCausalLM", (4, 2)),
        ("DeepseekV3ForCausalLM", (2, 2)),
    ],
)
def test_the_statistics_of_experts_are_those_of_each_expert_on_its_tokens(model, shape):
    """Against every expert on its own rows of the input, in float64."""
    config, _, tensors = tiny(BY_MODEL[model], {})
    decoder = Decoder.open(config, tensors, mesh(*shape), batch=1)
    names, index, windows = decoder.family.experts, 1, 5
    assert isinstance(names, ExpertNames)
    parameters = next(decoder.blocks([index]))
    values = np.random.default_rng(0).standard_normal((windows, 9, decoder.config.d_model)).astype(np.float32)
    block = ExpertBlock.of(decoder, index, names, parameters, values.shape[1])
    text = BlockText(decoder.batch, Activations.of(decoder.mesh, values), {})
    totals = functools.reduce(add_statistics, (sums for sums, _ in block.outputs(lambda: block.sent(text))))

    alone = Decoder.open(config, tensors, mesh(1, 1))
    sown = sown_inputs(alone, index, values)
    routed, shares = sown[names.down.replace("*", "0")], np.asarray(sown[names.shares], np.float64).reshape(-1)
    chosen = np.asarray(routed.chosen).reshape(-1)
    order = np.argsort(chosen, kind="stable")
    rows, share = np.asarray(routed.rows, np.float64), shares[order]
    for expert in range(decoder.config.experts):
        path = names.down.replace("*", str(expert))
        own_rows = chosen[order] == expert
        outputs = rows[own_rows] @ np.asarray(parameters[path + ".weight"], np.float64).T
        if path + ".bias" in parameters:
            outputs += np.asarray(parameters[path + ".bias"], np.float64)
        norms = np.linalg.norm(outputs, axis=1)
        expected = own_rows.sum(), norms.sum(), (norms**2).sum(), (share[own_rows] * norms).sum()
        np.testing.assert_allclose([float(array[expert]) for array in totals if array is not None], expected, rtol=1e-5)


def sown_inputs(decoder: Decoder, index: int, values: np.ndarray):
    """What block ``index`` sows for hidden states, on one device."""
    alike = decoder.at(index)
    state = alike.state(next(decoder.blocks([index])))
    return compiled_forward(alike.graph, state, values, decoder.positions(index, values.shape[1]))[1]


def opened(model: str, shape: tuple[int, int]) -> tuple[Model, ExpertCut]:
    """A tiny model, and a cut of half of its experts.

    Fewer experts are cut where a token is sent to more of them.
    """
    reference, settings = BY_MODEL[model], {}
    if "n_group" in reference.base:
        settings = dict(n_routed_experts=12)
    elif model == GEMMA4_IMAGES.model:
        settings = dict(text_config=reference.base["text_config"] | GEMMA4_MIXTURE)
    config, _, tensors = tiny(reference, settings)
    assets = {"config.json": config.to_json_string(use_diff=False).encode()}
    pretrained = Pretrained(config, tensors, assets, "", model)
    return Model(pretrained, Decoder.open(config, tensors, mesh(*shape), batch=1)), expert_cut(0.5, config)


CUT = {
    "MixtralForCausalLM": (1, 1),
    "OlmoeForCausalLM": None,
    "Qwen2MoeForCausalLM": None,
    "Qwen3MoeForCausalLM": None,
    "Qwen3NextForCausalLM": None,
    "Qwen3_5MoeForConditionalGeneration": None,
    "GptOssForCausalLM": (4, 2),
    "DeepseekV2ForCausalLM": None,
    "DeepseekV3ForCausalLM": (2, 2),
    "Glm4MoeForCausalLM": None,
    "Glm4MoeLiteForCausalLM": None,
    "Llama4ForCausalLM": (2, 4),
    LLAMA_IMAGES.model: None,
    "Gemma4ForCausalLM": (4, 2),
    GEMMA4_IMAGES.model: None,
}
"""The mesh of each model in the ordinary suite, None where another has its experts, router and words; the slow one takes every
model on every mesh of the grid."""
GRID = [
    pytest.param((model, shape), marks=[pytest.mark.slow] * (shape != of_suite), id=f"{model}-{shape[0]}x{shape[1]}")
    for model, of_suite in CUT.items()
    for shape in ((1, 1), (2, 2), (4, 2), (2, 4))
]


TOKENS = np.random.default_rng(1).integers(0, 60, (3, 16)).astype(np.int32)


@pytest.fixture(scope="module", params=GRID)
def halved(request):
    """Whole model, cut, kept experts by block, small model, and its logits."""
    model, cut = opened(*request.param)
    kept = [block.stay for block in ExpertRemoval(model, cut, REAP()).blocks(TOKENS)]
    assert len(kept) == model.decoder.config.blocks and {len(stay) for stay in kept} - {0} == {cut.kept} and cut.kept < cut.total
    small = without_experts(model, cut, kept)
    return model, cut, kept, small, logits_of(small.decoder, TOKENS)


def test_transformers_computes_the_same_of_the_exported_model(halved, tmp_path):
    model, cut, kept, small, logits = halved
    left = LeftOut(experts=ExpertsLeft(cut.total, tuple(BlockExperts(stay) for stay in kept)))
    export(run_without(tmp_path / "run", model, small, left), tmp_path / "out")
    loaded, info = getattr(transformers, model.pretrained.origin).from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype="float32", output_loading_info=True
    )
    assert not any(info.values()), info
    text = loaded.language_model if model.pretrained.origin == LLAMA_IMAGES.model else loaded  # its forward asks for images
    assert (far_from(text, logits, TOKENS) <= 2e-5).all()


def test_the_model_without_experts_is_the_whole_one_whose_router_never_chooses_them(halved, monkeypatch):
    model, cut, kept, _, logits = halved
    never = np.zeros((len(kept), cut.total), np.float32)
    for index, stay in enumerate(kept):
        never[index, [expert for expert in range(cut.total) if expert not in stay]] = -np.inf
    decoder, hidden = model.decoder, model.decoder.embed(TOKENS)
    for index, parameters in enumerate(decoder.blocks(range(len(kept)))):
        # The router of each block has other experts: it is traced again.
        traced = jax.jit(lambda *given: run_block.__wrapped__(*given), static_argnums=0)
        monkeypatch.setattr("optima_tpu.models.decoder.run_block", traced)

        def masking_project(x, weight, *rest, index=index):
            scores = project(x, weight, *rest)
            return scores + never[index] if len(weight) == cut.total else scores

        for module in (routers, layers):
            monkeypatch.setattr(module, "project", masking_project)
        corrected = {
            name: value + jnp.where(never[index] < 0, -1e9, 0) if name.endswith("e_score_correction_bias") else value
            for name, value in parameters.items()
        }
        decoder.apply(index, corrected, hidden)
    monkeypatch.undo()
    head = decoder.head()
    for batch in hidden.batches(decoder.batch):
        expected = np.asarray(run_head(head, batch.hidden))[batch.filled]
        assert np.abs(logits[batch.rows[batch.filled]] - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("name", "shape"), [pytest.param("Qwen3MoeForCausalLM", (1, 1), marks=pytest.mark.slow), ("GptOssForCausalLM", (2, 2))]
)
def test_the_refit_is_the_ridge_regression_of_all_experts_jointly(name, shape):
    """Against the normal equations of all experts, in float64."""
    model, cut = opened(name, shape)
    decoder, names, tokens = model.decoder, cut.names, np.random.default_rng(1).integers(0, 60, (5, 16)).astype(np.int32)
    refitted = next(ExpertRemoval(model, cut, REAP(), steps=60).blocks(tokens))
    parameters, hidden = next(decoder.blocks([0])), decoder.embed(tokens)
    fewer = without_experts(model, cut, [refitted.stay, *[range(cut.kept)] * (decoder.config.blocks - 1)]).decoder
    (y, *_), (yhat, features, down) = (
        mixed_by_hand(each, names, next(each.blocks([0])), np.asarray(hidden.values)) for each in (decoder, fewer)
    )
    gram, pull = features.T @ features / len(y), (y - yhat).T @ features / len(y)
    width = down.shape[2]
    blocks = np.arange(len(gram)) // width
    ridge = np.diag(0.1 * np.diag(gram) + (np.diag(gram) == 0))
    change = np.linalg.solve(gram + ridge, pull.T).T
    assert blocks[-1] == cut.kept - 1
    solved = np.stack([np.asarray(refitted.down[names.down.replace("*", str(number)) + ".weight"]) for number in range(cut.kept)])
    expected = down + change.reshape(-1, cut.kept, width).swapaxes(0, 1)
    assert np.abs(solved - expected).max() <= 1e-4 * np.abs(expected).max()
    errors = [np.sum(error**2) / np.sum(y**2) for error in (y - yhat, y - yhat - features @ change.T)]
    np.testing.assert_allclose([refitted.error_before, refitted.error_after], errors, rtol=1e-4)
    assert errors[1] < 0.9 * errors[0] and parameters


def test_the_price_of_an_expert_is_what_the_output_loses_without_it_when_the_others_move():
    """Against one ridge regression for each expert, in float64."""
    model, cut = opened("Qwen3MoeForCausalLM", (2, 2))
    decoder, tokens = model.decoder, np.random.default_rng(1).integers(0, 60, (5, 16)).astype(np.int32)
    parameters, hidden = next(decoder.blocks([0])), decoder.embed(tokens)
    block, text = ExpertBlock.of(decoder, 0, cut.names, parameters, hidden.length), BlockText(decoder.batch, hidden, {})
    experts, rows, width = block.down.shape
    sents = kept(lambda: block.sent(text), keep=True)
    computed = np.asarray(block.prices(sents, text.tokens, rows, steps=60))
    _, features, down = mixed_by_hand(decoder, cut.names, next(decoder.blocks([0])), np.asarray(hidden.values))
    expected = []
    for expert in range(experts):
        own = np.arange(experts * width) // width == expert
        output, others = features[:, own] @ down[expert].T, features[:, ~own]
        gram = others.T @ others / len(others)
        ridge = np.diag(0.1 * np.diag(gram) + (np.diag(gram) == 0))
        moved = others @ np.linalg.solve(gram + ridge, others.T @ output / len(others))
        expected.append(np.sum((output - moved) ** 2) / len(others))
    np.testing.assert_allclose(computed, expected, rtol=1e-3)
    few = np.asarray(block.prices(sents, text.tokens, 8, steps=60))
    assert np.all(np.abs(np.log(few / computed)) < np.log(2))  # an estimate from 8 random sums of the outputs


def mixed_by_hand(decoder: Decoder, names: ExpertNames, parameters, values: np.ndarray):
    """The mixture of block 0, computed in float64.

    Returns its output [tokens, d_out], the inputs of all its experts times their shares [tokens, experts * width], and the
    experts' ``down`` [experts, d_out, width].
    """
    alone = dataclasses.replace(decoder, mesh=mesh(1, 1))
    arrays = {name: np.asarray(value) for name, value in parameters.items()}
    sown = compiled_forward(alone.graph, alone.state(arrays), values, alone.config.positions(0, values.shape[1]))[1]
    routed, shares = sown[names.down.replace("*", "0")], np.asarray(sown[names.shares], np.float64)
    chosen, few = np.asarray(routed.chosen).reshape(-1), shares.shape[-1]
    rows = np.argsort(np.argsort(chosen, kind="stable"), kind="stable")
    inputs = np.asarray(routed.rows, np.float64)[rows] * shares.reshape(-1, 1)
    layers = [names.down.replace("*", str(number)) for number in range(routed.experts)]
    down = np.stack([np.asarray(arrays[layer + ".weight"], np.float64) for layer in layers])
    features = np.zeros((len(chosen) // few, routed.experts, down.shape[2]))
    features[np.arange(len(chosen)) // few, chosen] = inputs
    output = np.einsum("tei,eoi->to", features, down)
    if layers[0] + ".bias" in arrays:
        weighed = shares.reshape(-1, 1) * np.stack([arrays[layer + ".bias"] for layer in layers])[chosen]
        output += weighed.reshape(len(output), few, -1).sum(axis=1)
    return output, features.reshape(len(output), -1), down


@pytest.mark.parametrize("steps", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_removal_goes_on_behind_the_blocks_that_are_done(steps, tmp_path):
    model, cut = opened("Qwen3MoeForCausalLM", (2, 2))
    tokens = np.random.default_rng(1).integers(0, 60, (5, 16)).astype(np.int32)
    removal = ExpertRemoval(model, cut, MSAN(), steps)
    first, *others = removal.blocks(tokens)
    begun = keep_block(tmp_path, 0, model.decoder.prefix(0), first)
    again = dataclasses.replace(removal, keep=False)  # what passes compute again has the same bits
    for expected, resumed in zip(others, again.blocks(tokens, [begun], tmp_path), strict=True):
        assert resumed.stay == expected.stay and resumed.down.keys() == expected.down.keys()
        assert all(np.array_equal(resumed.down[name], value) for name, value in expected.down.items())


@pytest.mark.parametrize(
    ("name", "experts", "why"),
    [
        (
            "LlamaForCausalLM",
            0.5,
            "got LlamaForCausalLM, which has no experts; leave out cut.experts, and prune weights by --pattern 2:4",
        ),
        (GEMMA4_IMAGES.model, 0.5, "got Gemma4ForConditionalGeneration, which has no experts"),
        ("Qwen3MoeForCausalLM", 4, "the 5 experts of Qwen3MoeForCausalLM, got 4: a token is sent to 2; take --cut.experts 3"),
        (
            "Glm4MoeForCausalLM",
            0.5,
            "the 6 experts of Glm4MoeForCausalLM, got 0.5: a token is sent to 2 and 3 groups keep as many",
        ),
    ],
)
def test_experts_that_cannot_be_removed_are_refused_by_name(name, experts, why):
    with pytest.raises(UserError, match=re.escape(why)):
        expert_cut(experts, BY_MODEL[name].configuration({}))
