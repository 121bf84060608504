"""The scores of experts, and the choice by them, against float64 formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from optima_tpu.method.experts import DAMPING, MAN, MSAN, REAP, ExpertStatistics, Frequency, Passes, kept_experts, refit

TOKENS, WIDTH, INNER, EXPERTS, FEW = 40, 7, 5, 6, 2
rng = np.random.default_rng(0)
DOWN = rng.standard_normal((EXPERTS, WIDTH, INNER))
HIDDEN = rng.standard_normal((EXPERTS, TOKENS, INNER))
GATES = rng.random((TOKENS, EXPERTS))
# The last expert gets no token.
CHOSEN = np.argsort(-GATES[:, :-1], axis=1)[:, :FEW]
SENT = [np.flatnonzero((CHOSEN == expert).any(axis=1)) for expert in range(EXPERTS)]
NORMS = [np.linalg.norm(HIDDEN[expert, sent] @ DOWN[expert].T, axis=1) for expert, sent in enumerate(SENT)]
STATISTICS = ExpertStatistics(
    jnp.array([len(sent) for sent in SENT]),
    *(
        jnp.array([sum(of(expert, sent)) for expert, sent in enumerate(SENT)], jnp.float32)
        for of in (
            lambda expert, sent: NORMS[expert],
            lambda expert, sent: NORMS[expert] ** 2,
            lambda expert, sent: GATES[sent, expert] * NORMS[expert],
        )
    ),
)


def reap(expert, sent):
    return np.mean(GATES[sent, expert] * NORMS[expert])


def msan(expert, sent):
    gram = HIDDEN[expert, sent].T @ HIDDEN[expert, sent]
    return np.trace(DOWN[expert] @ gram @ DOWN[expert].T) / len(sent)


@pytest.mark.parametrize(
    ("score", "formula"),
    [
        (Frequency(), lambda expert, sent: len(sent)),
        (REAP(), reap),
        (MAN(), lambda expert, sent: np.mean(NORMS[expert])),
        (MSAN(), msan),
    ],
    ids=["frequency", "reap", "man", "msan"],
)
def test_a_score_is_its_formula(score, formula):
    expected = [formula(expert, sent) if len(sent) else 0 for expert, sent in enumerate(SENT)]
    assert len(SENT[-1]) == 0 and min(expected[:-1]) > 0
    np.testing.assert_allclose(score(STATISTICS), expected, rtol=1e-6)


def test_the_experts_with_the_highest_scores_stay_and_the_first_of_equal_ones():
    assert kept_experts(np.array([1.0, 3, 2, 3, 0, 2]), 3).tolist() == [1, 2, 3]


def test_every_group_keeps_as_many_experts():
    assert kept_experts(np.array([9.0, 8, 7, 3, 2, 1]), 4, groups=2).tolist() == [0, 1, 3, 4]


def test_each_step_of_the_refit_lowers_the_objective_with_rounded_directions():
    """Directions are rounded to bfloat16; errors are computed in float64."""
    rng = np.random.default_rng(1)
    inputs = rng.standard_normal((TOKENS, EXPERTS, INNER)) * (rng.random((TOKENS, EXPERTS, 1)) < 0.5)
    target = rng.standard_normal((TOKENS, WIDTH))

    def outputs(weights):
        return np.einsum("tei,eoi->to", inputs, np.asarray(weights, np.float64))

    def moments(output):
        return jnp.array(np.einsum("to,tei->eoi", output, inputs) / TOKENS, jnp.float32)

    passes = Passes(
        lambda weights: moments(outputs(weights)), lambda weights: jnp.array(np.mean(outputs(weights) ** 2, axis=0)), jnp.bfloat16
    )
    gram = np.einsum("tei,tej->eij", inputs, inputs) / TOKENS
    before = jnp.array(np.mean(target**2, axis=0), jnp.float32)
    last = before
    for steps in (1, 2, 3):
        refitted = refit(moments(target), jnp.array(gram, jnp.float32), before, passes, steps)
        change = np.asarray(refitted.change, np.float64)
        error = np.mean((target - outputs(change)) ** 2, axis=0)
        np.testing.assert_allclose(refitted.after, error, rtol=1e-4)
        ridge = DAMPING * np.einsum("eii,eoi->o", gram, change**2)
        assert np.all(error + ridge < last)
        last = error + ridge
