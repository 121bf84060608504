"""Chunks of positions change no score; large vocabularies get short ones."""

import numpy as np
import pytest

from optima_tpu.evaluate.predictions import STRETCH, per_token, stretch_of, sum_over_windows


def test_logits_of_a_chunk_take_at_most_128_mib():
    assert stretch_of(4, 49_152) == STRETCH  # SmolLM2
    assert stretch_of(4, 262_144) == 32  # Gemma 3
    for windows, vocabulary in ((1, 262_144), (4, 151_936), (16, 128_256), (64, 262_144)):
        assert 4 * windows * vocabulary * stretch_of(windows, vocabulary) <= 128 << 20
    assert stretch_of(1000, 262_144) == 1


@pytest.mark.parametrize("stretch", [1, 8, 64])
def test_chunks_of_any_length_give_the_same_scores(stretch):
    rng = np.random.default_rng(0)
    tokens, hidden = rng.integers(0, 9, (3, 41)).astype(np.int32), rng.standard_normal((3, 41, 5)).astype(np.float32)

    def score(targets, states):
        return targets.astype(np.float32) * states.sum(axis=-1)

    expected = tokens[:, 1:] * hidden[:, :-1].sum(axis=-1)
    np.testing.assert_allclose(per_token(score, tokens, hidden, stretch=stretch), expected, rtol=1e-5)
    sums = sum_over_windows(score, tokens, hidden, stretch=stretch)
    np.testing.assert_allclose(sums, expected.sum(axis=1), rtol=1e-4, atol=1e-4)
