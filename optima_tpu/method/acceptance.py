"""Decides row by row whether the solver's weights replace the selector's.

Both sets of weights are compared as they will be stored (after the cast to the checkpoint's dtype), by the objective that was
solved, damping included. Damping counts because a solver with more damping than the selector accepts some calibration error on
purpose.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float32

from optima_tpu.errors import UserError, plural
from optima_tpu.method.choice import Method
from optima_tpu.method.linalg.features import WHOLE, Features
from optima_tpu.method.outcomes import RowOutcomes
from optima_tpu.method.problem import Errors, LayerProblem, Pruned, Solution
from optima_tpu.method.statistics import TokenSets
from optima_tpu.runtime.bounds import Bound

Numbers = Float32[Array, " rows"]
Flags = Bool[Array, " rows"]


class Acceptance(Method, abc.ABC):
    """Chooses the rows of one matrix that take the solver's weights."""

    setting: ClassVar[str] = "accept"

    @abc.abstractmethod
    def __call__(self, before: Numbers, after: Numbers, converged: Flags) -> Flags:
        """Returns the rows that take the solver's weights, [d_out] bool.

        Args:
          before: [d_out] float32, the objective of the selector's weights, damping included.
          after: [d_out] float32, the objective of the solver's weights; NaN where they are not finite.
          converged: [d_out] bool, whether the solver's own test passed.
        """


@dataclasses.dataclass(frozen=True)
class PerRow(Acceptance):
    """Updates a row if its damped objective did not rise: none gets worse."""

    def __call__(self, before: Numbers, after: Numbers, converged: Flags) -> Flags:
        return after <= before


@dataclasses.dataclass(frozen=True)
class PerLayer(Acceptance):
    """Updates a matrix if enough rows converged and its total objective fell.

    This is the paper's rule. The rows of a matrix are counted together. The paper's code (paramathic/optima
    ``optima/weight_update.py``) solves ``12 * 2**27 / d_in**2`` rows at a time, and rejects the whole matrix at the first batch
    in which too few rows converged. Both rules agree up to about 1,500 inputs, where one batch holds a whole matrix. At 14,336
    inputs a batch has 7 rows, so a single row that did not converge rejects the matrix.

    Attributes:
      min_converged: share of rows that must have converged, 0.95 in the paper's code.
    """

    min_converged: Annotated[float, Bound(0, 1)] = 0.95

    def __call__(self, before: Numbers, after: Numbers, converged: Flags) -> Flags:
        # A NaN makes the comparison False: a layer with one broken row is refused.
        fell = jnp.sum(after) < jnp.sum(before)
        enough = jnp.mean(converged, dtype=jnp.float32) >= self.min_converged
        return jnp.broadcast_to(fell & enough, before.shape)


class RowErrors(NamedTuple):
    """Two replacements of the dense rows of a matrix, on one set of tokens.

    Attributes:
      energy: [rows] float32, the mean square of the dense output.
      old, new: the errors of either.
    """

    energy: Float32[Array, " rows"]
    old: Errors
    new: Errors


Measure = Callable[[Array, Array, Array, Array], RowErrors]
"""Takes a Hessian and the dense, old and new weights."""


def row_errors(hessian: Float32[Array, "d_in d"], features: Features = WHOLE) -> Callable[[Array, Array, Array], RowErrors]:
    """Returns a function that compares old and new weights to dense ones."""

    def measure(dense: Float32[Array, "rows d"], old: Float32[Array, "rows d"], new: Float32[Array, "rows d"]) -> RowErrors:
        problem = LayerProblem(dense, hessian)
        return RowErrors(problem.energy(features), problem.errors(old, features), problem.errors(new, features))

    return measure


def accept_rows(
    problems: TokenSets[LayerProblem],
    pruned: Pruned,
    solution: Solution,
    accept: Acceptance | None,
    dtype: np.dtype,
    measure: Measure,
) -> tuple[Pruned, RowOutcomes]:
    """Takes the solver's weights, and any new mask, in the accepted rows.

    Weights are compared after the cast to the stored dtype, by the values of ``problems.calibration``, damping included. The
    reported errors are without damping and without residual-drift correction; held-out tokens are only reported.

    Args:
      problems: the one that was solved, and its rows on held-out tokens, without damping.
      pruned: the selector's weights and mask.
      solution: the solver's weights, for the selector's mask or with a new mask.
      accept: None takes all rows.
      dtype: the dtype in which the weights are stored.
    """
    problem, unseen = problems
    keep = pruned.keep if solution.keep is None else solution.keep
    old, new = (_stored(weight, mask, dtype) for weight, mask in (pruned, (solution.weight, keep)))
    errors = measure(problem.hessian, problem.weight, old, new)
    own, dense = (None, None) if unseen is None else _held_out_errors(unseen, old, new, measure)
    accepted = jnp.ones(errors.energy.shape, bool)
    if accept is not None:
        aims = problem.value(old, errors.old), problem.value(new, errors.new)
        accepted = accept(*aims, solution.converged)

    def taken(values: tuple[Array, ...] | None) -> Array | None:
        if values is None:
            return None
        return jnp.stack((*values[:2], jnp.where(accepted, values[2], values[1]), *values[3:]))

    outcomes = RowOutcomes(
        errors.energy,
        errors.old.output,
        jnp.where(accepted, errors.new.output, errors.old.output),
        solution.gap,
        solution.steps,
        solution.converged,
        ~accepted,
        held_out=taken(own),
        dense=taken(dense),
    )
    if solution.keep is not None:
        keep = jnp.where(accepted[:, None], keep, pruned.keep)
        outcomes = outcomes._replace(exchanged=jnp.sum(keep & ~pruned.keep, axis=1, dtype=jnp.int32))
    return Pruned(jnp.where(accepted[:, None], new, old), keep), outcomes


def _stored(weight: Float32[Array, "rows d_in"], keep: Bool[Array, "rows d_in"], dtype: np.dtype) -> Float32[Array, "rows d_in"]:
    # Apply the mask again after the cast, and add 0.0 to turn -0.0 into 0.0: the file then has exact zeros.
    return jnp.where(keep, weight, 0.0).astype(dtype).astype(jnp.float32) + 0.0


def _held_out_errors(
    problem: LayerProblem, old: Float32[Array, "rows d_in"], new: Float32[Array, "rows d_in"], measure: Measure
) -> tuple[tuple[Array, ...], tuple[Array, ...] | None]:
    """The errors on held-out tokens of old and new weights, [d_out] each.

    Returns:
      Against the layer's own outputs: energy, old and new error. Against the dense model's: the same, and the error of the dense
      weights; None without a dense target.
    """
    energy, old_errors, new_errors = measure(problem.hessian, problem.weight, old, new)
    own = (energy, old_errors.output, new_errors.output)
    if problem.pull is None:
        return own, None
    if problem.offset is None:
        raise ValueError("a dense target needs the drift of the held-out tokens")
    # With v = 0 the error is the energy of the dense outputs.
    zero_error = problem.value(jnp.zeros_like(old), Errors(energy, jnp.zeros_like(energy)))
    return own, (zero_error, problem.value(old, old_errors), problem.value(new, new_errors), problem.offset)


def refuse_broken(prefix: str, names: Sequence[str], rows: Sequence[RowOutcomes]) -> None:
    """Refuses matrices whose selector left weights that are not finite.

    Takes outcomes on the host, before any of them is saved.

    Raises:
      UserError: weights are not finite. A selector that factorises an almost singular Hessian may produce them.
    """
    for name, report in zip(names, rows):
        broken = np.sum(~np.isfinite(report.before))
        if broken:
            raise UserError(
                f"{prefix}{name}: expected finite weights from the selector, got NaN or infinity in {broken:,} of "
                f"{plural(len(report.before), 'row')}: its Hessian is too close to singular; raise --selector.damping, or "
                "take more calibration text"
            )
