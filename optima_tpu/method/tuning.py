"""Tuning: chooses settings for each matrix by its error on held-out tokens."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optima_tpu.errors import UserError
from optima_tpu.method.choice import Method
from optima_tpu.method.outcomes import PrunedMatrix
from optima_tpu.method.targets import Target
from optima_tpu.runtime.bounds import Bound

if TYPE_CHECKING:
    from optima_tpu.method.recipe import Recipe

Attempt = Callable[[Array | None, Array | float], tuple[PrunedMatrix, ...]]
"""Solves a group's matrices with a ridge on their problem and an alpha: final weights of every matrix, and outcomes of its rows."""


class Tuning(Method, abc.ABC):
    """Chooses the damping of the objective, and alpha for a dense-model target.

    Attributes:
      by_held_out: whether held-out tokens choose, for each matrix separately.
    """

    setting: ClassVar[str] = "tuning"

    @abc.abstractmethod
    def dampings(self, damping: float) -> tuple[float, ...]:
        """The dampings to try if the objective's own is ``damping``; each is at least as large."""

    @abc.abstractmethod
    def alphas(self, target: Target) -> tuple[float, ...]:
        """The alphas that are tried, the target's own first."""

    @abc.abstractmethod
    def choose(self, damping: float, target: Target, attempt: Attempt) -> tuple[PrunedMatrix, ...]:
        """Returns the attempt that is taken. Traced under ``jit``."""

    def candidates(self, damping: float, target: Target) -> int:
        """How often a matrix is solved."""
        return len(self.dampings(damping)) + len(self.alphas(target)) - 1

    def chosen(self, indices: Array | np.ndarray, damping: float, target: Target) -> tuple[float, float | None]:
        """Damping and alpha from their indices, ``RowOutcomes.chosen``; alpha is None if the target has none."""
        alpha = self.alphas(target)[int(indices[1])] if target.dense_stream else None
        return self.dampings(damping)[int(indices[0])], alpha


@dataclasses.dataclass(frozen=True)
class Fixed(Tuning):
    """Uses the solver's damping and the target's alpha for every matrix."""

    def dampings(self, damping: float) -> tuple[float, ...]:
        return (damping,)

    def alphas(self, target: Target) -> tuple[float, ...]:
        return (target.alpha,)

    def choose(self, damping: float, target: Target, attempt: Attempt) -> tuple[PrunedMatrix, ...]:
        return attempt(None, target.alpha)


@dataclasses.dataclass(frozen=True)
class Grid(Tuning):
    """Chooses the damping, and alpha for a dense-model target, for each matrix by its error on the held-out tokens.

    With a dense-model target, the error is the distance from the dense model's outputs for every alpha, with the residual-drift
    correction if ``target.gamma`` is above 0. Otherwise it is the distance from the layer's own outputs. First the damping is
    chosen, with the target's own alpha, then alpha with that damping. Each candidate is solved from the selector's weights, goes
    through the acceptance, and is measured as it would be stored. An expert that no held-out token reached takes the first
    damping and the first alpha.

    Attributes:
      damping: values to try as ``solver.damping``, each at least the solver's own; null tries 1, 3 and 10 times the solver's own
        (0.01, 0.03 and 0.1 if that is 0), an empty list keeps the solver's own.
      alpha: values to try as ``target.alpha`` in addition to the target's own, if the target is the dense model.
    """

    by_held_out: ClassVar[bool] = True

    damping: Annotated[tuple[float, ...] | None, Bound(0)] = None
    alpha: Annotated[tuple[float, ...], Bound(0, 1)] = (0.0, 0.25, 0.5)

    def needs(self, recipe: "Recipe") -> None:
        """Raises UserError if there is no solver, or as :meth:`dampings`."""
        if recipe.solver is None:
            raise UserError("expected a solver where tuning is grid, got none: there is nothing to tune; take --tuning fixed")
        self.dampings(recipe.damping)

    def dampings(self, damping: float) -> tuple[float, ...]:
        """The dampings that are tried.

        Raises:
          UserError: one is smaller than the objective's own, which solvers assume as the minimum.
        """
        if self.damping is None:
            least = damping or 0.01
            return tuple(float(f"{times * least:.6g}") for times in (1, 3, 10))
        for candidate in self.damping:
            if candidate < damping:
                raise UserError(
                    f"expected tuning.damping of at least the solver's own {damping}, got {candidate}: raise it, or lower "
                    "--solver.damping"
                )
        return self.damping or (damping,)

    def alphas(self, target: Target) -> tuple[float, ...]:
        """The alphas that are tried, the target's own first; only 0 if the target is the layer's own outputs."""
        if not target.dense_stream:
            return (0.0,)
        return target.alpha, *(alpha for alpha in dict.fromkeys(self.alpha) if alpha != target.alpha)

    def choose(self, damping: float, target: Target, attempt: Attempt) -> tuple[PrunedMatrix, ...]:
        """Returns the candidate with the lowest held-out error. The attempts must have held-out tokens."""
        # ``LayerProblem.ridge``, with which the damping in total is the candidate.
        ridges = [(candidate - damping) / (1 + damping) for candidate in self.dampings(damping)]
        best = best_of(ridges, self.alphas(target), attempt, _held_out_error)
        return tuple(matrix._replace(rows=matrix.rows._replace(chosen=best.chosen)) for matrix in best.found)


def _held_out_error(found: tuple[PrunedMatrix, ...]) -> Array:
    """The score of the one matrix that is tuned."""
    (matrix,) = found
    if matrix.rows.score is None:
        raise ValueError("tuning needs held-out tokens")
    return jnp.sum(matrix.rows.score)


T = TypeVar("T")


class Best(NamedTuple, Generic[T]):
    """The candidate with the lowest score.

    Attributes:
      score: float32 scalar.
      ridge: float32 scalar.
      chosen: [2] int32, the indices of the ridge and of the alpha.
      found: what the attempt returned.
    """

    score: Array
    ridge: Array
    chosen: Array
    found: T


def best_of(
    ridges: Sequence[float], alphas: Sequence[float], attempt: Callable[[Array, Array], T], score: Callable[[T], Array]
) -> Best[T]:
    """The best of all ridges at the first alpha; then the best of all alphas at that ridge.

    Traced under ``jit``, as one compiled attempt.

    Args:
      attempt: ``(ridge, alpha) -> found``, a tree of arrays.
      score: the score of an attempt's result, float32 scalar; of equal scores the first counts. A first candidate with a NaN
        score is taken until another one has a number.
    """
    others = len(alphas) - 1
    trials = (
        jnp.asarray([*ridges, *[0.0] * others], jnp.float32),
        jnp.asarray([alphas[0]] * len(ridges) + list(alphas[1:]), jnp.float32),
        jnp.asarray([(i, 0) for i in range(len(ridges))] + [(0, i + 1) for i in range(others)], jnp.int32),
    )

    def step(best: Best[T], trial: tuple[Array, Array, Array]) -> tuple[Best[T], None]:
        amount, alpha, number = trial
        later = number[1] > 0
        amount = jnp.where(later, best.ridge, amount)
        found = attempt(amount, alpha)
        value = score(found)
        better = (value < best.score) | (jnp.isnan(best.score) & ~jnp.isnan(value)) | jnp.all(number == 0)
        new = Best(value, amount, number.at[0].set(jnp.where(later, best.chosen[0], number[0])), found)
        return jax.tree.map(lambda a, b: jnp.where(better, a, b), new, best), None

    shapes = jax.eval_shape(attempt, trials[0][0], trials[1][0])
    nothing = Best(
        jnp.float32(jnp.inf),
        jnp.float32(0),
        jnp.zeros(2, jnp.int32),
        jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), shapes),
    )
    return jax.lax.scan(step, nothing, trials)[0]
