"""Distance of a pruned model to the dense one, against float64, on meshes."""

import json
import re

import jax
import numpy as np
import pytest

from optima_tpu.errors import UserError
from optima_tpu.evaluate.distance import _batch_divergences, _batch_scores, distance, divergences
from optima_tpu.evaluate.perplexity import perplexity, token_losses
from optima_tpu.evaluate.predictions import STRETCH
from optima_tpu.models.decoder import Decoder
from optima_tpu.report.numbers import number
from optima_tpu.runtime.records import encoded
from tests.support.meshes import mesh
from tests.support.oracles import run_head
from tests.support.tiny_models import MemoryTensors, tiny_llama

BLOCKS, VOCAB = 3, 64
# Two stretches of positions, the second not full; five windows fill no batch of four.
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (5, 150)).astype(np.int32)


def models(shape=(1, 1), change=lambda arrays: None):
    """Decoders of a tiny Llama and of a copy with 1 in 20 weights zeroed."""
    config, tensors = tiny_llama()
    rng = np.random.default_rng(2)
    arrays = {
        name: array * (rng.random(array.shape) > 0.05) if "_proj" in name else array.copy()
        for name, array in tensors.arrays.items()
    }
    change(arrays)
    return [Decoder.open(config, source, mesh(*shape), batch=1) for source in (tensors, MemoryTensors(arrays))]


def streams(decoder: Decoder) -> list[np.ndarray]:
    """The hidden states after every block."""
    hidden, states = decoder.embed(TOKENS), []
    for index in range(BLOCKS):
        decoder.apply(index, next(decoder.blocks([index])), hidden)
        states.append(hidden.values.copy())
    return states


def log_probabilities(decoder: Decoder, hidden: np.ndarray) -> np.ndarray:
    """Of all predictions that have a following token, float64."""
    logits = np.asarray(run_head(decoder.head(), hidden), np.float64)[:, :-1]
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_a_model_without_hidden_states_has_a_distance_that_json_can_hold():
    """Hidden states of 0 leave every relative error undefined."""
    config, tensors = tiny_llama()
    tensors.arrays["model.embed_tokens.weight"][: VOCAB - 1] = 0
    measured = distance(*[Decoder.open(config, tensors, mesh(1, 1), 1)] * 2, np.minimum(TOKENS, VOCAB - 2))
    record = json.loads(encoded(measured.distance))
    assert record["hidden_errors"] == [None] * BLOCKS and record["kl"] == 0
    assert number(record["hidden_errors"][-1]) == "not finite"


def clustered(values: np.ndarray) -> tuple[float, float]:
    """Mean of [windows, positions] and its cluster-robust standard error."""
    windows, residuals = len(values), values - values.mean()
    variance = windows / (windows - 1) * np.sum(residuals.sum(axis=1) ** 2) / values.size**2
    return values.mean(), np.sqrt(variance)


@pytest.fixture(scope="module")
def expected():
    """(errors, KLs, agreements) after every block, and both perplexities.

    An error is relative; a KL and an agreement are (mean, standard error).
    """
    of_blocks = []
    for dense, pruned in zip(*map(streams, models())):
        p, q = (log_probabilities(decoder, hidden) for decoder, hidden in zip(models(), (dense, pruned)))
        error = np.sum((pruned.astype(np.float64) - dense) ** 2) / np.sum(dense.astype(np.float64) ** 2)
        of_blocks.append(
            (
                error,
                clustered(np.sum(np.exp(p) * (p - q), axis=-1)),
                clustered((p.argmax(axis=-1) == q.argmax(axis=-1)).astype(float)),
            )
        )
    return *zip(*of_blocks), [perplexity(decoder, TOKENS) for decoder in models()]


@pytest.mark.parametrize("shape", [(1, 1), (4, 2)])
def test_it_is_what_float64_gives_on_any_mesh(expected, shape):
    errors, kls, agreements, perplexities = expected
    calls = []
    measured, *both = distance(*models(shape), TOKENS, advance=lambda: calls.append(1), per_block=True)
    assert len(calls) == BLOCKS * (1 + -(-len(TOKENS) // shape[0])) and measured.tokens == 5 * 149
    assert 0.01 < min(errors) and 0.01 < kls[-1][0] and 0.05 < agreements[-1][0] < 0.95
    assert measured.hidden_errors == pytest.approx(errors, rel=1e-5)
    assert measured.kls == pytest.approx([mean for mean, _ in kls], rel=1e-5)
    assert (measured.kl, measured.kl_stderr) == pytest.approx(kls[-1], rel=1e-5)
    # Rounding may decide between two tokens at one position.
    assert measured.agreements == pytest.approx([mean for mean, _ in agreements], abs=1.1 / measured.tokens)
    assert measured.agreement == measured.agreements[-1]
    assert measured.agreement_stderr == pytest.approx(agreements[-1][1], rel=0.05)
    assert both == pytest.approx(perplexities, rel=1e-6)
    rises = np.subtract(*(token_losses(decoder, TOKENS).mean(axis=1, dtype=np.float64) for decoder in models()))
    assert measured.log_ratio_stderr == pytest.approx(rises.std(ddof=1) / len(rises) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("shape", [(1, 1), (4, 2)])
def test_the_divergences_of_several_models_from_one_are_what_float64_gives(expected, shape):
    both = models(shape)
    ends = [decoder.embed(TOKENS) for decoder in both]
    for decoder, hidden in zip(both, ends):
        for index, parameters in zip(range(BLOCKS), decoder.blocks(range(BLOCKS))):
            decoder.apply(index, parameters, hidden)
    actual = divergences(both[0].head(), ends[0], [ends[1], ends[0], ends[1]], TOKENS, 1)
    assert actual.shape == (3, len(TOKENS))
    np.testing.assert_allclose(
        actual.sum(axis=1) / TOKENS[:, 1:].size, np.array([1, 0, 1]) * expected[1][-1][0], rtol=1e-5, atol=1e-7
    )


def test_a_model_is_at_no_distance_of_itself():
    dense, _ = models()
    apart, first, second = distance(dense, dense, TOKENS[:1])
    assert (apart.kl, apart.agreement, apart.hidden_errors) == (0.0, 1.0, (0.0,) * BLOCKS)
    assert first == second
    assert apart.kl_stderr is apart.agreement_stderr is apart.kls is apart.agreements is apart.log_ratio_stderr is None


def scores(head, hidden, tokens):
    return _batch_scores.lower((head, head), (hidden, hidden), tokens)


def several(head, hidden, tokens):
    return _batch_divergences.lower(head, hidden, (hidden, hidden, hidden), tokens, STRETCH)


@pytest.mark.parametrize("lowered", [scores, several])
def test_no_logits_travel_between_devices(lowered):
    """Devices exchange at most one number for each device and position."""
    dense, _ = models((2, 4))
    batch = next(dense.embed(TOKENS).batches(2))
    text = lowered(dense.head(), batch.hidden, batch.place(TOKENS)).compile().as_text()
    sent = re.findall(r"= (.*?) (?:all-gather|all-to-all|collective-permute|all-reduce)(?:-start)?\(", text)
    assert sent
    windows = batch.hidden.shape[0] // 2
    for shape in re.findall(r"\[([\d,]+)\]", " ".join(sent)):
        assert np.prod([int(size) for size in shape.split(",")]) <= windows * 128 * 4, shape


def test_models_that_do_not_belong_together_are_refused():
    dense, _ = models()
    other = Decoder.open(*tiny_llama(num_hidden_layers=2), mesh(1, 1))
    with pytest.raises(UserError, match="3 blocks, as in the dense model, got 2"):
        distance(dense, other, TOKENS)


def test_a_model_that_overflows_is_named():
    def change(arrays):
        arrays["model.layers.1.mlp.up_proj.weight"] *= np.float32(1e38)

    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj .* the pruned model overflows"):
        distance(*models(change=change), TOKENS)


def test_a_second_pair_of_models_compiles_nothing():
    compiled = []
    distance(*models(), TOKENS)
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    distance(*models(), TOKENS)
    assert not compiled
