"""Compares every selector and solver on a layer with float64 and a CPU."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator.parts import Sizes
from optima_tpu.config.choices import CHOICES
from optima_tpu.method.mask_swaps import Exchanging, Swaps
from optima_tpu.method.patterns import Pattern, parse_pattern
from optima_tpu.method.problem import LayerProblem, Pruned
from optima_tpu.method.selectors import Price, Wanda
from optima_tpu.method.solvers import CG

DAMPING = 0.1
_HALF = parse_pattern("0.5/row")


class Result(NamedTuple):
    """A method's weights and mask [rows, inputs], on the host."""

    weight: np.ndarray
    keep: np.ndarray


class Layer(NamedTuple):
    """A layer [rows, inputs] and its Hessian, in float64.

    All numbers are exact in float32.
    """

    weight: np.ndarray
    hessian: np.ndarray

    @classmethod
    def drawn(cls, rows: int, inputs: int) -> "Layer":
        """Draws weights, and the Hessian of correlated, uneven inputs."""
        rng = np.random.default_rng(0)
        spectrum = np.arange(1, inputs + 1) ** -0.5
        tokens = (rng.standard_normal((2 * inputs, inputs)) * spectrum) @ rng.standard_normal((inputs, inputs))
        drawn = rng.standard_normal((rows, inputs)), tokens.T @ tokens / len(tokens)
        return cls(*(each.astype(np.float32).astype(np.float64) for each in drawn))

    def problem(self, dtype: type) -> LayerProblem:
        """The problem of the rows, on the device in force."""
        return LayerProblem(jnp.asarray(self.weight, dtype), jnp.asarray(self.hessian, dtype), damping=DAMPING)

    @property
    def damped(self) -> np.ndarray:
        """``A = H + D diag H``; a row's objective: ``(v - w) A (v - w)'``."""
        return self.hessian + DAMPING * np.diag(np.diag(self.hessian))

    def objective(self, weight: np.ndarray) -> np.ndarray:
        """Each row's objective, [rows]."""
        change = weight - self.weight
        return np.einsum("ri,ij,rj->r", change, self.damped, change)

    def optimum(self, keep: np.ndarray) -> np.ndarray:
        """The best weights of each row's mask, one dense solve a row."""
        best, matrix = np.zeros_like(self.weight), self.damped
        for row, (weight, kept) in enumerate(zip(self.weight, keep)):
            best[row, kept] = weight[kept] + np.linalg.solve(
                matrix[np.ix_(kept, kept)], matrix[np.ix_(kept, ~kept)] @ weight[~kept]
            )
        return best


class Case(NamedTuple):
    """A method as a function of the problem, and whether it solves rows."""

    name: str
    run: Callable[[LayerProblem], tuple[jax.Array, jax.Array]]
    solves: bool


def cases() -> Iterator[Case]:
    """Yields every selector and solver, and the exchange of masks."""
    for name, kind in CHOICES["selector"].items():
        if kind is not None and kind.chooses:
            yield Case(f"`{name}`", _selects(kind(), parse_pattern("0.5/input@8") if kind is Price else _HALF), False)
    for name, kind in CHOICES["solver"].items():
        if kind is not None:
            yield Case(f"`{name}`", _solves(kind()), True)
    yield Case("`cg` with `swaps`", _solves(Exchanging(CG(), Swaps(), _HALF)), True)


def _selects(selector: Callable[[LayerProblem, Pattern], Pruned], pattern: Pattern) -> Callable[..., tuple[jax.Array, jax.Array]]:
    return lambda problem: tuple(selector(problem, pattern))


def _solves(solver: Callable) -> Callable[..., tuple[jax.Array, jax.Array]]:
    def run(problem: LayerProblem) -> tuple[jax.Array, jax.Array]:
        pruned = Wanda()(problem, _HALF)
        solved = solver(problem, pruned)
        return solved.weight, pruned.keep if solved.keep is None else solved.keep

    return run


def computed(case: Case, layer: Layer, dtype: type) -> Result:
    """The result of a method on the devices in force."""
    return Result(*map(np.asarray, jax.jit(case.run)(layer.problem(dtype))))


def differences(ours: Result, theirs: Result) -> tuple[float, float]:
    """Returns how far two results are apart: (masks, weights).

    Masks: the percentage of entries that differ. Weights: the largest difference in a row with the same mask, relative to the
    largest weight.
    """
    same = (ours.keep == theirs.keep).all(axis=1)
    weights = np.abs(ours.weight - theirs.weight)[same].max(initial=0.0) / np.abs(theirs.weight).max()
    return 100 * float((ours.keep != theirs.keep).mean()), float(weights)


def results(sizes: Sizes) -> Iterator[tuple[object, ...]]:
    """Yields each method's differences from float64 and from the CPU.

    A row is (method, masks, weights, objective above the optimum, masks, weights): three against float64, two against the CPU.
    """
    layer, cpu = Layer.drawn(*sizes.problem), jax.devices("cpu")[0]
    for case in cases():
        ours = computed(case, layer, jnp.float32)
        if case.solves:
            best = layer.optimum(ours.keep)
            least = layer.objective(best)
            exact = (
                None,
                differences(ours, Result(best, ours.keep))[1],
                float(((layer.objective(ours.weight) - least) / least).max()),
            )
        else:
            with jax.enable_x64(True), jax.default_device(cpu):
                exact = (*differences(ours, computed(case, layer, jnp.float64)), None)
        if jax.default_backend() == "cpu":
            other: tuple[float | None, float | None] = (None, None)
        else:
            with jax.default_device(cpu):
                other = differences(ours, computed(case, layer, jnp.float32))
        yield case.name, *exact, *other
