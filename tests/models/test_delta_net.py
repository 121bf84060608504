"""The gated delta rule by chunks against the rule by tokens in float64."""

import jax
import numpy as np

from optima_tpu.models.delta_net import delta_rule


def test_chunks_give_what_the_rule_gives_token_by_token():
    """One head forgets. The other gets nearly the same key at every token.

    A series in powers of the chunk's matrix would lose all precision for such keys.
    """
    rng, length, key_dim = np.random.default_rng(0), 70, 5  # one chunk, and a part of one
    q, k, v = (rng.standard_normal((2, length, 2, width)) for width in (key_dim, key_dim, 3))
    k[:, :, 1] = k[:, :1, 1] + 1e-3 * k[:, :, 1]
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    decay, strength = -3 * rng.random((2, length, 2)), rng.random((2, length, 2))
    decay[..., 1], strength[..., 1] = 0, 1
    first = rng.standard_normal((2, 2, key_dim, 3))

    expected, state = [], first
    for at in range(length):
        state = np.exp(decay[:, at])[..., None, None] * state
        wrong = v[:, at] - np.einsum("bhdv,bhd->bhv", state, k[:, at])
        state = state + np.einsum("bh,bhd,bhv->bhdv", strength[:, at], k[:, at], wrong)
        expected.append(np.einsum("bhdv,bhd->bhv", state, q[:, at]))

    outputs, last = jax.jit(delta_rule)(*(array.astype(np.float32) for array in (q, k, v, decay, strength, first)))
    for ours, exact in ((outputs, np.stack(expected, axis=1)), (last, state)):
        assert np.abs(ours - exact).max() < 3e-6 * np.abs(exact).max()
