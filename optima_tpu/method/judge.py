"""How good the weights of a matrix are, as they will be stored, and which of its rows are updated."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from optima_tpu.errors import UserError
from optima_tpu.method.acceptance import Acceptance
from optima_tpu.method.linalg.features import WHOLE, Features
from optima_tpu.method.mask_swaps import Refined
from optima_tpu.method.problem import LayerProblem, Pruned, Solution, displacement, objective, output_energy, self_target
from optima_tpu.method.row_report import RowReport
from optima_tpu.method.targets import LinearTerm, pulled


class Aim(NamedTuple):
    """What a dense target asks of a matrix beyond its own outputs.

    Attributes:
      dense: [d_out, d_in] float32, the dense weights ``W``.
      pull: [d_out, d_in] float32, ``alpha W B + gamma Q`` of the calibration tokens.
      unseen: of the held-out tokens, where there are any.
      unseen_drift: of the held-out tokens each row's mean of ``(D w')^2``, [d_out] float32.
    """

    dense: Array
    pull: Array
    unseen: LinearTerm | None = None
    unseen_drift: Array | None = None


class RowErrors(NamedTuple):
    """Of the rows of a matrix and of two others in their place, old and new, [rows] float32 each.

    Attributes:
      energy: the mean square of the dense output.
      old, new: the mean squared change of the output.
      old_displacement, new_displacement: ``sum_j H_jj (v_j - w_j)^2``.
    """

    energy: Array
    old: Array
    new: Array
    old_displacement: Array
    new_displacement: Array


Measure = Callable[[Array, Array, Array], RowErrors]
"""Of a Hessian, old and new weights."""


def row_errors(problem: LayerProblem, old: Array, new: Array, features: Features = WHOLE) -> RowErrors:
    """Of the problem's weights; where it aims at more than its own outputs, ``old`` and ``new`` are its objectives."""
    return RowErrors(
        output_energy(problem, features), *(of(problem, end, features) for of in (objective, displacement) for end in (old, new))
    )


def measure_rows(hessian: Array, features: Features) -> Callable[[Array, Array, Array], RowErrors]:
    """Of dense, old and new weights."""
    return lambda dense, old, new: row_errors(self_target(dense, hessian, features), old, new, features)


def judge_rows(
    pruned: Pruned,
    found: Solution | Refined,
    accept: Acceptance | None,
    dtype,
    measure: Measure,
    hessian: Array,
    held_out: Array | None = None,
    aim: Aim | None = None,
    damping: Array | float = 0.0,
) -> tuple[Pruned, RowReport]:
    """Takes the solver's weights, and its mask where it has one, where they are accepted, after the cast to what is stored.

    Args:
      found: for the mask that came, or with another one.
      accept: None takes all of them.
      hessian, held_out: of the calibration and of the held-out tokens.
      aim: for a dense target. The acceptance then compares objectives of that target, and errors against the dense model's
        outputs on held-out tokens: ``(v - w) H (v - w)' - 2 w B (v - w)' + mean (D w')^2``. Where the drift of the residual
        stream is aimed at, it compares these less ``2 gamma q (v - w)'``, the error against both but for a constant; reported
        are the errors against the outputs.
      damping: the solver's; the objectives that are compared have it, no error that is reported does.
    """
    refined = isinstance(found, Refined)
    solution, keep = found if refined else (found, pruned.keep)

    def stored(weight, keep):
        # The mask again after the cast, and + 0.0 so that no -0.0 is left: zeros are exact in the file.
        return jnp.where(keep, weight, 0.0).astype(dtype).astype(jnp.float32) + 0.0

    old, new = stored(pruned.weight, pruned.keep), stored(solution.weight, keep)
    energy, before, after, *displacements = measure(hessian, old, new)
    aims = tuple(value + damping * displaced for value, displaced in zip((before, after), displacements))
    unseen = None if held_out is None else measure(held_out, old, new)[:3]
    against = None
    if aim is not None:
        aims = tuple(value - pulled(aim.pull, aim.dense, end) for value, end in zip(aims, (old, new)))
        if unseen is not None:
            # The dense outputs themselves are what is missed by v = 0.
            against = tuple(
                value - pulled(aim.unseen.outputs, aim.dense, end) + aim.unseen_drift
                for value, end in zip(unseen, (jnp.zeros_like(old), old, new))
            )
    judged = (against or unseen) and (against or unseen)[1:]
    if against and aim.unseen.stream is not None:
        judged = tuple(value - pulled(aim.unseen.stream, aim.dense, end) for value, end in zip(judged, (old, new)))
    accepted = accept(*aims, solution.converged, judged) if accept else jnp.ones(before.shape, bool)

    def taken(values: tuple[Array, ...], *more: Array) -> Array:
        return jnp.stack((values[0], values[1], jnp.where(accepted, values[2], values[1]), *more))

    report = RowReport(
        energy,
        before,
        jnp.where(accepted, after, before),
        solution.gap,
        solution.steps,
        solution.converged,
        ~accepted,
        unseen and taken(unseen),
        against and taken(against, aim.unseen_drift),
        score=judged and jnp.where(accepted, judged[1], judged[0]),
    )
    if refined:
        keep = jnp.where(accepted[:, None], keep, pruned.keep)
        report = report._replace(exchanged=jnp.sum(keep & ~pruned.keep, axis=1, dtype=jnp.int32))
    return Pruned(jnp.where(accepted[:, None], new, old), keep), report


def refuse_broken(prefix: str, names: Sequence[str], rows: Sequence[RowReport]) -> None:
    """For what is on the host, before anything of it is saved.

    Raises:
      UserError: a selector's weights are no numbers, as those of one that factorises an almost singular Hessian may be.
    """
    for name, report in zip(names, rows):
        broken = np.sum(~np.isfinite(report.before))
        if broken:
            raise UserError(
                f"{prefix}{name}: expected finite weights from the selector, got others in {broken:,} of "
                f"{len(report.before):,} rows: its Hessian is too close to singular; raise --selector.damping, or "
                "take more calibration text"
            )
