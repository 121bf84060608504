"""Records of layers and blocks, for the journal and for report.json."""

import math
from typing import TYPE_CHECKING

from msgspec import structs

from optima_tpu.runtime.records import Block, Count, Record, Share, Size

# A number that may not be finite: JSON has null in its place, which is read as infinity.
if TYPE_CHECKING:
    Unbounded = float
else:
    Unbounded = float | None


class LayerReport(Record, frozen=True):
    """The record of one pruned matrix.

    Errors are ``||X W' - X V'||^2 / ||X W'||^2`` over the calibration tokens, with ``W`` the dense and ``V`` the pruned
    weights as they are stored. A bias is in both outputs and cancels. Errors whose name begins with ``dense`` are
    ``||X_d W' - X V'||^2 / ||X_d W'||^2`` over held-out tokens, with ``X_d`` the inputs of the layer in the dense model; they are
    None without held-out tokens or without a dense target. With a dense target, ``error_after`` may be larger than
    ``error_before``, because the solver minimises another objective.

    Attributes:
      name: the layer inside the block, "self_attn.q_proj".
      shape: (d_out, d_in).
      pruned: number of weights that are zero by the mask.
      sparsity: ``pruned / (d_out d_in)``.
      error_before: error of the selector's weights. For an expert that no token reached, the error is computed from the weights
        alone, as if its inputs were independent and of equal size; such an expert is left out of all means.
      error_after: error of the final weights, before they are quantised.
      gap_median: median over rows of the solver's measure of suboptimality.
      gap_max: largest gap of all rows; infinite if the solver found no solution.
      steps_median: median over rows of the number of solver iterations.
      steps_max: largest number of iterations of all rows.
      rows_converged: rows that met the solver's own test.
      rows_refused: rows that kept the selector's weights, by the acceptance rule.
      dead_inputs: inputs that are zero on all calibration tokens.
      tokens: calibration tokens that reached the layer: all of them, or for an expert those routed to it; None if not counted.
      held_out_before: same as ``error_before``, but over held-out tokens, which no weight was fitted to; None without them.
      held_out_after: same as ``error_after``, but over held-out tokens.
      dense_before: error of the selector's weights against the dense model.
      dense_after: error of the final weights against the dense model.
      dense_drift: error of the dense weights against the dense model, caused by the pruned layers before this one.
      corrects_stream: whether the update also corrects what the residual stream lost before the layer's output is added to it.
        Then no error of the layer's own output says how near the update came to its aim, and these errors may rise.
      damping, alpha: what version 0.2.0 chose on held-out tokens, where it did.
      exchanged: number of kept weights that the selector had pruned; as many weights that it had kept were pruned instead. None
        if masks are not refined.
      error_nearest: same as ``error_after``, once these weights are rounded to the nearest integers; None if the weights are not
        quantised. ``error_after`` is the error before.
      error_quantized: error of the weights as they are stored, on integers that the quantizer chose.
      held_out_nearest, held_out_quantized: the same over held-out tokens.
      dense_nearest, dense_quantized: the same against the dense model.
    """

    block: Block
    name: str
    shape: tuple[Size, Size]
    pruned: Count
    sparsity: Share
    error_before: Unbounded
    error_after: Unbounded
    gap_median: Unbounded
    gap_max: Unbounded
    steps_median: Count
    steps_max: Count
    rows: Count
    rows_converged: Count
    rows_refused: Count
    dead_inputs: Count
    tokens: Count | None = None
    held_out_before: float | None = None
    held_out_after: float | None = None
    dense_before: float | None = None
    dense_after: float | None = None
    dense_drift: float | None = None
    corrects_stream: bool = False
    damping: float | None = None
    alpha: float | None = None
    exchanged: Count | None = None
    error_nearest: float | None = None
    error_quantized: float | None = None
    held_out_nearest: float | None = None
    held_out_quantized: float | None = None
    dense_nearest: float | None = None
    dense_quantized: float | None = None

    def __post_init__(self) -> None:
        for name in ("error_before", "error_after", "gap_median", "gap_max"):
            if getattr(self, name) is None:
                structs.force_setattr(self, name, math.inf)


class BlockReport(Record, frozen=True):
    """The record of one block.

    Attributes:
      seconds: elapsed time from reading its weights to its finished activations.
      layers: its layers, in the order in which they were pruned.
    """

    index: Block
    seconds: float
    layers: tuple[LayerReport, ...]
