"""Problems of rows, and oracles in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from optima_tpu.method.patterns import NM, Pattern, Unstructured, WholeInputs
from optima_tpu.method.problem import LayerProblem, Pruned, Solution, pull_of
from optima_tpu.method.solvers import Solver

PATTERNS = [
    Unstructured(0.5, "row"),
    Unstructured(0.7, "row"),
    Unstructured(0.6, "layer"),
    NM(2, 4),
    NM(4, 8),
    NM(6, 8),
    NM(2, 4, stride=8),
    WholeInputs(0.3, multiple=8),
]
"""What contracts of selectors and solvers hold for: sparsities of the paper's tables in both comparison groups, N:M, groups whose
inputs lie apart, and whole inputs. Each is compiled; ``test_patterns.py`` counts at any sparsity."""
ALIKE = (PATTERNS[1], PATTERNS[4])
"""Those of the kind of another one, which are slow."""


def correlated_hessian(rng: np.random.Generator, size: int, tokens: int | None = None, spread: float = 1.0) -> np.ndarray:
    """Draws ``X'X / n`` [size, size] float32 of correlated inputs.

    Their scales spread over ``exp(+-spread)``.
    """
    tokens = tokens or 8 * size
    mixing = np.eye(size) + 0.3 * rng.standard_normal((size, size)) / np.sqrt(size) * 3
    x = rng.standard_normal((tokens, size)) @ mixing * np.exp(spread * rng.standard_normal(size))
    return (x.T @ x / tokens).astype(np.float32)


def layer(rng: np.random.Generator, rows: int, size: int, *, target: str = "self", **hessian) -> LayerProblem:
    """Draws a layer; ``target="other"`` aims at other outputs than its own."""
    problem = LayerProblem(
        jnp.asarray(rng.standard_normal((rows, size)), jnp.float32), jnp.asarray(correlated_hessian(rng, size, **hessian))
    )
    if target == "other":
        shift = jnp.asarray(0.1 * rng.standard_normal((rows, size)), jnp.float32)
        problem = dataclasses.replace(problem, pull=shift @ problem.hessian)
    return problem


@functools.partial(jax.jit, static_argnums=(0, 3))
def solve(solver: Solver, problem: LayerProblem, pruned: Pruned, damping: float | None = None) -> Solution:
    """Runs a solver, compiled once for each choice and shape.

    ``damping`` None stands for the solver's default.
    """
    damping = solver.damping if damping is None else damping
    return solver(dataclasses.replace(problem, damping=damping), pruned)


@functools.partial(jax.jit, static_argnums=(0, 2))
def select(selector, problem: LayerProblem, pattern) -> Pruned:
    """Runs a selector, compiled once for each choice, pattern and shape."""
    return selector(problem, pattern)


def groups(array, pattern: Pattern) -> np.ndarray:
    """The comparison groups as rows."""
    array = np.asarray(array)
    if isinstance(pattern, NM):
        return pattern.groups(array).reshape(-1, pattern.m)
    return array if pattern.group == "row" else array.reshape(1, -1)


def assert_obeys(pruned: Pruned, pattern: Pattern):
    """Asserts the exact number of zeros in every comparison group.

    No zero is negative, and all weights are finite.
    """
    weight, keep = np.asarray(pruned.weight), np.asarray(pruned.keep)
    assert weight.dtype == np.float32 and keep.dtype == bool and weight.shape == keep.shape
    if isinstance(pattern, WholeInputs):
        assert (keep == keep[0]).all()
    else:
        lost = ~groups(keep, pattern)
        share = pattern.m - pattern.n if isinstance(pattern, NM) else pattern.pruned_in(lost.shape[1])
        assert (lost.sum(axis=1) == share).all()
    assert np.sum(~keep) == pattern.pruned_count(weight.shape)
    assert np.isfinite(weight).all()
    assert (weight[~keep] == 0).all() and not np.signbit(weight[~keep]).any()


def wide(problem: LayerProblem, damping: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (weight, damped Hessian, e) in float64; ``e`` was float32."""
    hessian = np.asarray(problem.hessian, np.float64)
    return (
        np.asarray(problem.weight, np.float64),
        hessian + damping * np.diag(np.diag(hessian)),
        np.asarray(pull_of(problem), np.float64),
    )


def linear_of(problem: LayerProblem) -> np.ndarray:
    """``g = W H + e``, the linear term of the published formulas."""
    return np.asarray(problem.weight) @ np.asarray(problem.hessian) + np.asarray(pull_of(problem))


def oracle(problem: LayerProblem, pruned: Pruned, damping: float = 0.0) -> np.ndarray:
    """Returns the optimal weights of every row, float64.

    Each row is a linear solve on its kept inputs, in numpy without code of ours.
    """
    weight, hessian, pull = wide(problem, damping)
    keep, target = np.asarray(pruned.keep), weight @ hessian + pull
    solved = np.zeros_like(weight)
    for row, kept in enumerate(keep):
        if kept.any():
            solved[row, kept] = np.linalg.solve(hessian[np.ix_(kept, kept)], target[row, kept])
    return solved


def row_objective(problem: LayerProblem, weight: np.ndarray, damping: float = 0.0) -> np.ndarray:
    """Returns ``(v - w) H (v - w)' - 2 e (v - w)'`` of every row in float64.

    ``damping`` adds its share of ``diag H`` to ``H``.
    """
    dense, hessian, pull = wide(problem, damping)
    change = np.asarray(weight, np.float64) - dense
    return np.sum(change * (change @ hessian - 2 * pull), axis=1)
