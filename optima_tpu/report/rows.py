"""Sums row results into the report of a layer."""

from typing import NamedTuple

import numpy as np
from jax import Array

from optima_tpu.method.outcomes import RowOutcomes
from optima_tpu.report.records import LayerReport


class LayerFacts(NamedTuple):
    """Facts about a pruned layer that are not per row.

    Attributes:
      block: index of the block.
      name: name of the layer inside the block.
      shape: (d_out, d_in).
      kept: number of kept weights.
      dead: number of dead inputs.
      tokens: number of calibration tokens that reached the layer.
      damping, alpha: the values that tuning chose; None without tuning.
    """

    block: int
    name: str
    shape: tuple[int, int]
    kept: int
    dead: int
    tokens: int
    damping: float | None = None
    alpha: float | None = None


def layer_report(layer: LayerFacts, rows: RowOutcomes) -> LayerReport:
    """The report of a layer, from row results on the host."""
    size = layer.shape[0] * layer.shape[1]

    def share(values: Array | np.ndarray, energies: Array | np.ndarray = rows.energy) -> float:
        energy = float(np.sum(energies, dtype=np.float64))
        return float(np.sum(values, dtype=np.float64)) / energy if energy > 0 else 0.0

    def shares(found: Array | np.ndarray | None, count: int) -> tuple[float | None, ...]:
        if found is None or not np.any(found[0]):  # no held-out tokens, or none was routed to this expert
            return (None,) * count
        return tuple(share(values, found[0]) for values in found[1:])

    def rounded(values: Array | np.ndarray | None, energies: Array | np.ndarray | None) -> tuple[float | None, ...]:
        if values is None or energies is None or not np.any(energies):
            return None, None
        return tuple(share(each, energies) for each in values)

    unseen, dense = shares(rows.held_out, 2), shares(rows.dense, 3)
    quantized = rounded(rows.quantized, rows.energy)
    unseen_quantized = rounded(rows.quantized_held_out, None if rows.held_out is None else rows.held_out[0])
    dense_quantized = rounded(rows.quantized_dense, None if rows.dense is None else rows.dense[0])
    return LayerReport(
        block=layer.block,
        name=layer.name,
        shape=layer.shape,
        pruned=size - layer.kept,
        sparsity=(size - layer.kept) / size,
        error_before=share(rows.before),
        error_after=share(rows.after),
        gap_median=float(np.median(rows.gap)),
        gap_max=float(np.max(rows.gap)),
        steps_median=int(np.median(rows.steps)),
        steps_max=int(np.max(rows.steps)),
        rows=len(rows.gap),
        rows_converged=int(np.sum(rows.converged)),
        rows_refused=int(np.sum(rows.refused)),
        dead_inputs=layer.dead,
        tokens=layer.tokens,
        held_out_before=unseen[0],
        held_out_after=unseen[1],
        dense_before=dense[0],
        dense_after=dense[1],
        dense_drift=dense[2],
        damping=layer.damping,
        alpha=layer.alpha,
        exchanged=None if rows.exchanged is None else int(np.sum(rows.exchanged)),
        error_nearest=quantized[0],
        error_quantized=quantized[1],
        held_out_nearest=unseen_quantized[0],
        held_out_quantized=unseen_quantized[1],
        dense_nearest=dense_quantized[0],
        dense_quantized=dense_quantized[1],
    )
