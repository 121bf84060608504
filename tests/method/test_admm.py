"""ADMM against a float64 port of the algorithm, and by its properties."""

import numpy as np
import pytest

from optima_tpu.method.patterns import NM, Unstructured
from optima_tpu.method.problem import LayerProblem
from optima_tpu.method.selectors import ADMM, Wanda
from tests.support import ports
from tests.support.problems import layer, linear_of, oracle, row_objective, select

# As in test_selectors, so that much of it is compiled once.
ROWS, INPUTS, SELECTOR = 8, 32, ADMM(rho_first=0.3, levels=3)
PATTERNS = [Unstructured(0.5), Unstructured(0.6, "layer"), NM(2, 4)]
patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


@patterns
def test_mask_and_weights_are_those_of_the_algorithm(pattern):
    """For the layer's own outputs and for others."""
    for seed, target in enumerate(("self", "other", "other")):  # no two scores are so close that rounding could decide
        problem = layer(np.random.default_rng(seed), ROWS, INPUTS, target=target)
        pruned = select(SELECTOR, problem, pattern)
        weight, keep = ports.admm(*map(np.asarray, (problem.weight, problem.hessian, linear_of(problem))), pattern, SELECTOR)
        assert (np.asarray(pruned.keep) == keep).all()
        assert np.abs(np.asarray(pruned.weight) - weight).max() <= 1e-4 * np.abs(weight).max()


def test_levels_share_inverses_and_the_last_has_its_own():
    for inverses, shared in ((None, [1] * 6), (6, [1] * 6), (3, [3, 2, 1]), (2, [5, 1]), (1, [6])):
        selector = ADMM(damping=0.3, levels=6, inverses=inverses)
        stages = selector.stages()
        assert [len(stage.penalties) for stage in stages] == shared and len(stages) == (inverses or 6)
        penalties = [rho for stage in stages for rho in stage.penalties]
        np.testing.assert_allclose(penalties, np.geomspace(selector.rho_first, selector.rho_last, selector.levels))
        for (first, *_, last), sigma in ((stage.penalties[:1] + stage.penalties, stage.sigma) for stage in stages):
            assert abs(sigma - 0.3 - (first + last) / 2) < 1e-6


@patterns
def test_weights_that_obey_the_pattern_come_back(pattern):
    problem = layer(np.random.default_rng(3), ROWS, INPUTS)
    obeys = select(Wanda(), problem, pattern).weight
    pruned = select(SELECTOR, LayerProblem(obeys, problem.hessian), pattern)
    assert (np.asarray(pruned.weight) == obeys).all() and (np.asarray(pruned.keep) == (obeys != 0)).all()


@pytest.mark.parametrize("pattern", [Unstructured(0.6, "layer"), Unstructured(0.6, "row"), NM(2, 4)], ids=str)
def test_its_mask_is_better_than_wandas_and_its_weights_are_near_the_best_on_it(pattern):
    errors = []
    for seed in range(4):
        problem = layer(np.random.default_rng(seed), ROWS, INPUTS)
        ours, wandas = select(ADMM(), problem, pattern), select(Wanda(), problem, pattern)
        best, theirs = (oracle(problem, pruned, ADMM.damping) for pruned in (ours, wandas))
        errors.append([row_objective(problem, weight, ADMM.damping).sum() for weight in (ours.weight, best, theirs)])
    ours, best, theirs = np.sum(errors, axis=0)
    assert best < 0.8 * theirs and best <= ours < 1.02 * best
