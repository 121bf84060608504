"""Whether a solver's weights replace the selector's: the last word on every row.

Both are judged as they will be stored (after the cast to the checkpoint's dtype), on the objective of the solver, its damping
included: a solver with more damping than the selector had gives some of the calibration error back on purpose.
"""

import dataclasses
from typing import Protocol

import jax.numpy as jnp
from jax import Array

from optima_tpu.errors import UserError


class Acceptance(Protocol):
    """Says which rows of one matrix take the solver's weights.

    Args:
      before: [d_out] float32, the objective of the selector's weights, with the solver's damping.
      after: [d_out] float32, the objective of the solver's weights; NaN where they are not finite.
      converged: [d_out] bool, the solver's own verdict.
      held_out: errors of both on held-out tokens, [d_out] float32 each, against the dense model's outputs where those are the
        target, less what the rows make up for of the residual stream's drift where that is aimed at (see ``judge.judge_rows``);
        None where there are no such tokens.

    Returns:
      [d_out] bool.
    """

    def __call__(self, before: Array, after: Array, converged: Array, held_out: tuple[Array, Array] | None = None) -> Array: ...


@dataclasses.dataclass(frozen=True)
class PerRow:
    """A row is updated when its own objective did not rise, the solver's damping included. So no row gets worse."""

    def __call__(self, before: Array, after: Array, converged: Array, held_out: tuple[Array, Array] | None = None) -> Array:
        return after <= before


@dataclasses.dataclass(frozen=True)
class PerLayer:
    """The paper's rule: a matrix is updated as a whole, when enough rows converged and its total objective fell.

    The rows of a matrix are counted together. The paper's code (paramathic/optima ``optima/weight_update.py``) solves
    ``12 * 2**27 / d_in**2`` rows at a time and gives a matrix up at the first part of which fewer converged: the same up to some
    1,500 inputs, where a part is a whole matrix; at 14,336 a part has 7 rows, and one of them is enough.

    Attributes:
      min_converged: share of rows that must have converged, 0.95 in the paper's code.
    """

    min_converged: float = 0.95

    def __post_init__(self):
        if not 0 <= self.min_converged <= 1:
            raise UserError(f"expected min_converged in [0, 1], got {self.min_converged}")

    def __call__(self, before: Array, after: Array, converged: Array, held_out: tuple[Array, Array] | None = None) -> Array:
        # A NaN makes the comparison False: a layer with one broken row is refused.
        fell = jnp.sum(after) < jnp.sum(before)
        enough = jnp.mean(converged, dtype=jnp.float32) >= self.min_converged
        return jnp.broadcast_to(fell & enough, before.shape)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Rows whose own objective did not rise are updated, all of a matrix or none: its error on held-out tokens must not rise.

    That of a layer which is to make up for the residual stream's drift is counted against its outputs together with that, so that
    the errors in the report, against the outputs alone, may rise. An expert that no held-out token reached has errors of 0.
    """

    def __call__(self, before: Array, after: Array, converged: Array, held_out: tuple[Array, Array] | None = None) -> Array:
        if held_out is None:
            raise UserError("expected held-out tokens where accept is held_out, got none: raise --calibration.held_out")
        rows = after <= before
        # A NaN makes the comparison False. The rows that stay as they are have no part in it.
        kept, moved = held_out
        return rows & (jnp.sum(jnp.where(rows, moved - kept, 0.0)) <= 0)
