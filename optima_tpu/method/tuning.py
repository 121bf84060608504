"""What is chosen for each matrix by its error on held-out tokens."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from optima_tpu.errors import UserError
from optima_tpu.method.row_report import RowReport
from optima_tpu.method.solvers import damping_of
from optima_tpu.method.targets import DenseTarget, Target


@dataclasses.dataclass(frozen=True)
class Fixed:
    """The solver's damping and the target's alpha are those that are given."""

    def candidates(self, solver: Any, target: Target) -> int:
        """How often a matrix is solved."""
        return 1


@dataclasses.dataclass(frozen=True)
class Grid:
    """The damping, and of a dense target alpha, are chosen for each matrix, from a few, by its error on the held-out tokens.

    The error is the distance from the dense model's outputs where there is a dense target, whatever alpha, and with
    ``target.gamma`` from these and that share of the residual stream's drift; else from the layer's own. First the damping is
    chosen, at the target's own alpha, then alpha at that damping; each candidate is solved from the selector's weights, goes
    through the acceptance, and is judged as it would be stored. An expert that no held-out token reached takes the first of both.

    Attributes:
      damping: what is tried as ``solver.damping``, each at least what the solver has; null tries 1, 3 and 10 times that (0.01,
        0.03 and 0.1 where it has none), an empty list leaves the solver's own.
      alpha: what is tried as ``target.alpha`` beside the target's own, where the target is the dense model.
    """

    damping: tuple[float, ...] | None = None
    alpha: tuple[float, ...] = (0.0, 0.25, 0.5)

    def __post_init__(self):
        for damping in self.damping or ():
            if not 0 <= damping < math.inf:
                raise UserError(f"expected tuning.damping to hold numbers of at least 0, got {damping}")
        for alpha in self.alpha:
            if not 0 <= alpha <= 1:
                raise UserError(f"expected tuning.alpha to hold numbers in [0, 1], got {alpha}")

    def dampings(self, solver: Any) -> tuple[float, ...]:
        """The dampings that are tried.

        Raises:
          UserError: there is no solver, or one is smaller than the solver's own, which is inside it.
        """
        if solver is None:
            raise UserError("expected a solver where tuning is grid, got none: there is nothing to tune; take --tuning fixed")
        own = damping_of(solver)
        if self.damping is None:
            least = own or 0.01
            return tuple(float(f"{times * least:.6g}") for times in (1, 3, 10))
        for damping in self.damping:
            if damping < own:
                raise UserError(
                    f"expected tuning.damping of at least the solver's own {own}, got {damping}: raise it, or lower "
                    "--solver.damping"
                )
        return self.damping or (own,)

    def alphas(self, target: Target) -> tuple[float, ...]:
        """The alphas that are tried, the target's own first; 0 alone for a layer's own outputs."""
        if not isinstance(target, DenseTarget):
            return (0.0,)
        return target.alpha, *(alpha for alpha in dict.fromkeys(self.alpha) if alpha != target.alpha)

    def candidates(self, solver: Any, target: Target) -> int:
        """How often a matrix is solved."""
        return len(self.dampings(solver)) + len(self.alphas(target)) - 1

    def chosen(self, places: Sequence[int], solver: Any, target: Target) -> tuple[float, float | None]:
        """Damping and alpha from their places, ``Best.chosen``; no alpha where the target has none."""
        alpha = self.alphas(target)[int(places[1])] if isinstance(target, DenseTarget) else None
        return self.dampings(solver)[int(places[0])], alpha


Tuning = Fixed | Grid


def ridge(damping: float, solver: Any) -> float:
    """The ``r`` for which a solver on ``H + r diag H`` solves what it would solve on ``H`` with another damping.

    A solver with damping ``d`` then has ``H + r diag H + d (1 + r) diag H``. So the damping may vary within one program.
    """
    own = damping_of(solver)
    return (damping - own) / (1 + own)


def damping_with(amount: Array, solver: Any) -> Array:
    """The damping to which a ridge of that amount on the problem raises a solver's own: the inverse of :func:`ridge`."""
    own = damping_of(solver)
    return own + amount * (1 + own)


def ridged(hessian: Array, amount: Array) -> Array:
    """``H + r diag H``, elementwise, so that a matrix in columns stays so."""
    places = (jax.lax.broadcasted_iota(jnp.int32, hessian.shape, axis) for axis in (0, 1))
    return jnp.where(jnp.equal(*places), hessian * (1 + amount), hessian)


class Best(NamedTuple):
    """The candidate with the lowest score.

    Attributes:
      score: float32 scalar.
      ridge: float32 scalar.
      chosen: [2] int32, which of the ridges and which of the alphas.
      found: what the attempt returned.
    """

    score: Array
    ridge: Array
    chosen: Array
    found: Any


def best_of(
    ridges: Sequence[float], alphas: Sequence[float], attempt: Callable[[Array, Array], Any], score: Callable[[Any], Array]
) -> Best:
    """The best of all ridges at the first alpha; then the best of all alphas at that ridge. For ``jit``: one compiled attempt.

    Args:
      attempt: ``(ridge, alpha) -> found``, a tree of arrays.
      score: of what was found, float32 scalar; of equal ones the first counts. The first candidate counts whatever its score is,
        until another one has a number.
    """
    others = len(alphas) - 1
    trials = (
        jnp.asarray([*ridges, *[0.0] * others], jnp.float32),
        jnp.asarray([alphas[0]] * len(ridges) + list(alphas[1:]), jnp.float32),
        jnp.asarray([(i, 0) for i in range(len(ridges))] + [(0, i + 1) for i in range(others)], jnp.int32),
    )

    def step(best: Best, trial: tuple[Array, Array, Array]) -> tuple[Best, None]:
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


def tuned(
    tuning: Grid, solver: Any, target: Target, attempt: Callable[[Array, Array], tuple[Array, RowReport]]
) -> tuple[Array, RowReport]:
    """The weights and the report of the candidate that is best on held-out tokens.

    Args:
      attempt: ``(ridge, alpha)`` -> weights and a report that knows of held-out tokens; see :func:`best_of`.
    """
    best = best_of(
        [ridge(damping, solver) for damping in tuning.dampings(solver)],
        tuning.alphas(target),
        attempt,
        lambda found: jnp.sum(found[1].score),
    )
    weight, report = best.found
    return weight, report._replace(chosen=best.chosen)
