"""Decides row by row whether the solver's weights replace the selector's.

Both sets of weights are compared as they will be stored (after the cast to the checkpoint's dtype), by the objective that was
solved, damping included. Damping counts because a solver with more damping than the selector accepts some calibration error on
purpose.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Float32

from optima_tpu.errors import UserError
from optima_tpu.method.linalg.features import WHOLE, Features
from optima_tpu.method.outcomes import RowOutcomes
from optima_tpu.method.problem import LayerProblem, Pruned, Solution, displacement, output_energy, undamped_objective
from optima_tpu.method.statistics import TokenSets
from optima_tpu.method.targets import LinearTerm, pulled

BeforeAndAfter = tuple[Float32[Array, " rows"], Float32[Array, " rows"]]
"""One number for each row: with the selector's weights, and with the solver's."""


class Acceptance(abc.ABC):
    """Chooses the rows of one matrix that take the solver's weights. A rule is a frozen dataclass.

    Attributes:
      by_held_out: whether held-out tokens decide.
    """

    by_held_out: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(
        self,
        before: Float32[Array, " rows"],
        after: Float32[Array, " rows"],
        converged: Bool[Array, " rows"],
        held_out: BeforeAndAfter | None = None,
    ) -> Bool[Array, " rows"]:
        """Returns the rows that take the solver's weights, [d_out] bool.

        Args:
          before: [d_out] float32, the objective of the selector's weights, damping included.
          after: [d_out] float32, the objective of the solver's weights; NaN where they are not finite.
          converged: [d_out] bool, whether the solver's own test passed.
          held_out: errors on held-out tokens with both sets of weights, [d_out] float32 each. With a dense-model target, the
            errors are against the dense model's outputs, and they include the residual-drift correction if the target has one
            (see :func:`accept_rows`). None without held-out tokens.
        """


@dataclasses.dataclass(frozen=True)
class PerRow(Acceptance):
    """Updates a row if its own objective, the solver's damping included, did not rise. So no row gets worse."""

    def __call__(
        self,
        before: Float32[Array, " rows"],
        after: Float32[Array, " rows"],
        converged: Bool[Array, " rows"],
        held_out: BeforeAndAfter | None = None,
    ) -> Bool[Array, " rows"]:
        return after <= before


@dataclasses.dataclass(frozen=True)
class PerLayer(Acceptance):
    """The paper's rule: updates a matrix as a whole if enough rows converged and its total objective fell.

    The rows of a matrix are counted together. The paper's code (paramathic/optima ``optima/weight_update.py``) solves
    ``12 * 2**27 / d_in**2`` rows at a time, and rejects the whole matrix at the first batch in which too few rows converged. Both
    rules agree up to about 1,500 inputs, where one batch holds a whole matrix. At 14,336 inputs a batch has 7 rows, so a single
    row that did not converge rejects the matrix.

    Attributes:
      min_converged: share of rows that must have converged, 0.95 in the paper's code.
    """

    min_converged: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.min_converged <= 1:
            raise UserError(f"expected min_converged in [0, 1], got {self.min_converged}")

    def __call__(
        self,
        before: Float32[Array, " rows"],
        after: Float32[Array, " rows"],
        converged: Bool[Array, " rows"],
        held_out: BeforeAndAfter | None = None,
    ) -> Bool[Array, " rows"]:
        # A NaN makes the comparison False: a layer with one broken row is refused.
        fell = jnp.sum(after) < jnp.sum(before)
        enough = jnp.mean(converged, dtype=jnp.float32) >= self.min_converged
        return jnp.broadcast_to(fell & enough, before.shape)


@dataclasses.dataclass(frozen=True)
class HeldOut(Acceptance):
    """Updates the rows whose own objective did not rise, if the matrix's error on held-out tokens does not rise.

    If the held-out error of a matrix would rise, none of its rows is updated. For a layer with residual-drift correction, the
    error is measured against its target output with that correction. The errors in the report are without the correction, so they
    may rise. An expert that no held-out token reached has held-out errors of 0 and passes.
    """

    by_held_out: ClassVar[bool] = True

    def __call__(
        self,
        before: Float32[Array, " rows"],
        after: Float32[Array, " rows"],
        converged: Bool[Array, " rows"],
        held_out: BeforeAndAfter | None = None,
    ) -> Bool[Array, " rows"]:
        if held_out is None:
            raise UserError("expected held-out tokens where accept is held_out, got none: raise --calibration.held_out")
        rows = after <= before
        # A NaN makes the comparison False. Rows that keep the selector's weights do not count.
        kept, moved = held_out
        return rows & (jnp.sum(jnp.where(rows, moved - kept, 0.0)) <= 0)


class RowErrors(NamedTuple):
    """The errors of two replacements, old and new, for the dense rows of a matrix, [rows] float32 each.

    Attributes:
      energy: the mean square of the dense output.
      old, new: the mean squared change of the output.
      old_displacement, new_displacement: ``sum_j H_jj (v_j - w_j)^2``.
    """

    energy: Float32[Array, " rows"]
    old: Float32[Array, " rows"]
    new: Float32[Array, " rows"]
    old_displacement: Float32[Array, " rows"]
    new_displacement: Float32[Array, " rows"]


Measure = Callable[[Array, Array, Array, Array], RowErrors]
"""Takes a Hessian and the dense, old and new weights."""


def row_errors(hessian: Float32[Array, "d_in d"], features: Features = WHOLE) -> Callable[[Array, Array, Array], RowErrors]:
    """Returns a function that measures the errors of old and new weights against dense ones."""

    def measure(dense: Float32[Array, "rows d"], old: Float32[Array, "rows d"], new: Float32[Array, "rows d"]) -> RowErrors:
        problem = LayerProblem(dense, hessian)
        return RowErrors(
            output_energy(problem, features),
            *(of(problem, end, features) for of in (undamped_objective, displacement) for end in (old, new)),
        )

    return measure


class TokenTerms(NamedTuple):
    """The objective of rows on one set of tokens.

    Attributes:
      hessian: [d_in, d_in] float32.
      term: what a dense-model target adds; None if the target is the layer's own outputs.
      drift: each row's mean of ``(D w')^2``, [rows] float32; only for held-out tokens with a dense-model target.
    """

    hessian: Float32[Array, "d_in d_in"]
    term: LinearTerm | None = None
    drift: Float32[Array, " rows"] | None = None


class MatrixObjective(NamedTuple):
    """The objective of the rows of one matrix.

    Attributes:
      weight: [d_out, d_in] float32, the dense weights.
      tokens: the terms of both sets of tokens.
      pull: [d_out, d_in] float32, ``e`` on the calibration tokens; None if the target is the layer's own outputs.
      damping: of the objective.
    """

    weight: Float32[Array, "rows d_in"]
    tokens: TokenSets[TokenTerms]
    pull: Float32[Array, "rows d_in"] | None = None
    damping: Float[Array, ""] | float = 0.0


class _HeldOutErrors(NamedTuple):
    """Errors on held-out tokens, [d_out] float32 each.

    Attributes:
      own: against the layer's own outputs: energy, error of the old and of the new weights.
      dense: the same against the dense model's outputs, and the error of the dense weights; None without a dense-model target.
      decisive: the old and the new number that the acceptance compares.
    """

    own: tuple[Array, Array, Array]
    dense: tuple[Array, Array, Array, Array] | None
    decisive: BeforeAndAfter


def accept_rows(
    objective: MatrixObjective, pruned: Pruned, found: Solution, accept: Acceptance | None, dtype: np.dtype, measure: Measure
) -> tuple[Pruned, RowOutcomes]:
    """Takes the solver's weights, and its mask if it has one, in the rows that are accepted.

    Weights are compared after the cast to the stored dtype. With a dense-model target, the acceptance compares the objectives of
    that target and, on held-out tokens, the errors against the dense model's outputs: ``(v - w) H (v - w)' - 2 w B (v - w)' +
    mean (D w')^2``. With residual-drift correction it compares these minus ``2 gamma q (v - w)'``, which is the error against the
    corrected target up to a constant; the reported errors are without the correction. The compared objectives include the
    damping, the reported errors do not.

    Args:
      pruned: the selector's weights and mask.
      found: the solver's weights, for the selector's mask or with a new mask.
      accept: None takes all rows.
      dtype: the dtype in which the weights are stored.
    """
    keep = pruned.keep if found.keep is None else found.keep
    old, new = (_stored(weight, mask, dtype) for weight, mask in (pruned, (found.weight, keep)))
    errors = measure(objective.tokens.calibration.hessian, objective.weight, old, new)
    aims = (errors.old + objective.damping * errors.old_displacement, errors.new + objective.damping * errors.new_displacement)
    if objective.pull is not None:
        pull, dense = objective.pull, objective.weight
        aims = (aims[0] - pulled(pull, dense, old), aims[1] - pulled(pull, dense, new))
    held_out = objective.tokens.held_out
    unseen = None if held_out is None else _held_out_errors(objective.weight, held_out, old, new, measure)
    accepted = jnp.ones(errors.old.shape, bool)
    if accept is not None:
        accepted = accept(*aims, found.converged, None if unseen is None else unseen.decisive)

    def taken(values: tuple[Array, ...]) -> Array:
        return jnp.stack((*values[:2], jnp.where(accepted, values[2], values[1]), *values[3:]))

    outcomes = RowOutcomes(
        errors.energy,
        errors.old,
        jnp.where(accepted, errors.new, errors.old),
        found.gap,
        found.steps,
        found.converged,
        ~accepted,
        held_out=None if unseen is None else taken(unseen.own),
        dense=None if unseen is None or unseen.dense is None else taken(unseen.dense),
        score=None if unseen is None else jnp.where(accepted, unseen.decisive[1], unseen.decisive[0]),
    )
    if found.keep is not None:
        keep = jnp.where(accepted[:, None], keep, pruned.keep)
        outcomes = outcomes._replace(exchanged=jnp.sum(keep & ~pruned.keep, axis=1, dtype=jnp.int32))
    return Pruned(jnp.where(accepted[:, None], new, old), keep), outcomes


def _stored(weight: Float32[Array, "rows d_in"], keep: Bool[Array, "rows d_in"], dtype: np.dtype) -> Float32[Array, "rows d_in"]:
    # Apply the mask again after the cast, and add 0.0 to turn -0.0 into 0.0: the file then has exact zeros.
    return jnp.where(keep, weight, 0.0).astype(dtype).astype(jnp.float32) + 0.0


def _held_out_errors(
    dense: Float32[Array, "rows d_in"],
    terms: TokenTerms,
    old: Float32[Array, "rows d_in"],
    new: Float32[Array, "rows d_in"],
    measure: Measure,
) -> _HeldOutErrors:
    own = measure(terms.hessian, dense, old, new)[:3]
    if terms.term is None:
        return _HeldOutErrors(own, None, own[1:])
    if terms.drift is None:
        raise ValueError("a dense target needs the drift of the held-out tokens")
    (outputs, stream), drift = terms.term, terms.drift

    def missed(value: Array, end: Array) -> Array:
        return value - pulled(outputs, dense, end) + drift

    # With v = 0 the error is the energy of the dense outputs.
    nothing = jnp.zeros_like(old)
    against = (missed(own[0], nothing), missed(own[1], old), missed(own[2], new))
    decisive = against[1:]
    if stream is not None:
        decisive = (decisive[0] - pulled(stream, dense, old), decisive[1] - pulled(stream, dense, new))
    return _HeldOutErrors(own, (*against, drift), decisive)


def refuse_broken(prefix: str, names: Sequence[str], rows: Sequence[RowOutcomes]) -> None:
    """Refuses matrices for which the selector left weights that are not finite.

    Takes outcomes on the host, before any of them is saved.

    Raises:
      UserError: weights are not finite. A selector that factorises an almost singular Hessian may produce them.
    """
    for name, report in zip(names, rows):
        broken = np.sum(~np.isfinite(report.before))
        if broken:
            raise UserError(
                f"{prefix}{name}: expected finite weights from the selector, got NaN or infinity in {broken:,} of "
                f"{len(report.before):,} rows: its Hessian is too close to singular; raise --selector.damping, or "
                "take more calibration text"
            )
