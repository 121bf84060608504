"""Sums row results into the report of a layer."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax import Array

from optima_tpu.method.outcomes import RowOutcomes
from optima_tpu.report.records import LayerReport


def layer_report(rows: RowOutcomes, shape: tuple[int, int], kept: int, others: Mapping[str, Any]) -> LayerReport:
    """The report of a layer, from row results on the host.

    Args:
      kept: number of kept weights.
      others: the fields of the report that follow neither from these nor from rows.
    """
    size = math.prod(shape)

    def share(values: Array | np.ndarray, energies: Array | np.ndarray = rows.energy) -> float:
        energy = float(np.sum(energies, dtype=np.float64))
        return float(np.sum(values, dtype=np.float64)) / energy if energy > 0 else 0.0

    held_out, unseen = (None, None) if rows.held_out is None else (rows.held_out[0], rows.held_out[1:])
    dense, drifted = (None, None) if rows.dense is None else (rows.dense[0], rows.dense[1:])
    # Without energy no held-out token was there, or none was routed to this expert.
    errors: dict[str, Any] = {
        name: share(values, energy)
        for names, energy, squares in (
            (("held_out_before", "held_out_after"), held_out, unseen),
            (("dense_before", "dense_after", "dense_drift"), dense, drifted),
            (("error_nearest", "error_quantized"), rows.energy, rows.quantized),
            (("held_out_nearest", "held_out_quantized"), held_out, rows.quantized_held_out),
            (("dense_nearest", "dense_quantized"), dense, rows.quantized_dense),
        )
        if energy is not None and squares is not None and np.any(energy)
        for name, values in zip(names, squares, strict=True)
    }
    return LayerReport(
        shape=shape,
        pruned=size - kept,
        sparsity=(size - kept) / size,
        error_before=share(rows.before),
        error_after=share(rows.after),
        gap_median=float(np.median(rows.gap)),
        gap_max=float(np.max(rows.gap)),
        steps_median=int(np.median(rows.steps)),
        steps_max=int(np.max(rows.steps)),
        rows=len(rows.gap),
        rows_converged=int(np.sum(rows.converged)),
        rows_refused=int(np.sum(rows.refused)),
        exchanged=None if rows.exchanged is None else int(np.sum(rows.exchanged)),
        **errors,
        **others,
    )
