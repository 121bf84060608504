"""What happened to the rows of a layer, and its sum."""

import numpy as np
from jax import Array

from optima_tpu.method.row_report import RowReport
from optima_tpu.report.records import LayerReport


def layer_report(
    index: int,
    name: str,
    shape: tuple[int, int],
    kept: int,
    rows: RowReport,
    dead: int,
    tokens: int,
    chosen: tuple[float | None, float | None] = (None, None),
) -> LayerReport:
    """The sum over rows, which are on the host.

    Args:
      index: of the block.
      name: of the layer inside it.
      kept: weights that stay.
      dead: inputs without signal.
      tokens: that reached the layer.
      chosen: damping and alpha, where they were.
    """
    size = shape[0] * shape[1]

    def share(values: Array | np.ndarray, energies: Array | np.ndarray = rows.energy) -> float:
        energy = float(np.sum(energies, dtype=np.float64))
        return float(np.sum(values, dtype=np.float64)) / energy if energy > 0 else 0.0

    def shares(found: Array | np.ndarray | None, count: int) -> tuple[float | None, ...]:
        if found is None or not np.any(found[0]):  # no held-out tokens, or none that was routed to this expert
            return (None,) * count
        return tuple(share(values, found[0]) for values in found[1:])

    unseen, dense = shares(rows.held_out, 2), shares(rows.dense, 3)
    return LayerReport(
        block=index,
        name=name,
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
        dead_inputs=dead,
        tokens=tokens,
        held_out_before=unseen[0],
        held_out_after=unseen[1],
        dense_before=dense[0],
        dense_after=dense[1],
        dense_drift=dense[2],
        damping=chosen[0],
        alpha=chosen[1],
        exchanged=None if rows.exchanged is None else int(np.sum(rows.exchanged)),
    )
