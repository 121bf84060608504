"""The outcomes of pruning the rows of a matrix."""

from typing import NamedTuple

from jax import Array
from jaxtyping import Bool, Float, Float32, Int32


class RowOutcomes(NamedTuple):
    """The outcomes of each row of a matrix; every array is [d_out].

    Attributes:
      energy: float32, mean square of the dense output.
      before: float32, mean squared change of the output with the selector's weights.
      after: float32, mean squared change of the output with the final weights.
      gap: float32, the solver's measure of suboptimality, ``Solution.gap``.
      steps: int32, the solver's iterations, ``Solution.steps``.
      converged: bool, the solver's own test.
      refused: bool, the solver's weights were not accepted.
      held_out: [3, d_out] float32, energy, before and after on held-out tokens.
      dense: [4, d_out] float32, the same three against the dense model's outputs on held-out tokens, and the error of dense
        weights.
      exchanged: int32, number of kept weights that the selector had pruned; None if masks are not refined.
      quantized: [2, d_out] float32, as ``after`` once the weights are rounded to the nearest integers, and as they are stored;
        None if they are not quantised. ``after``, ``held_out`` and ``dense`` are of the weights before.
      quantized_held_out: [2, d_out] float32, the same on held-out tokens.
      quantized_dense: [2, d_out] float32, the same against the dense model's outputs on held-out tokens.
    """

    energy: Float32[Array, " d_out"]
    before: Float32[Array, " d_out"]
    after: Float32[Array, " d_out"]
    gap: Float32[Array, " d_out"]
    steps: Int32[Array, " d_out"]
    converged: Bool[Array, " d_out"]
    refused: Bool[Array, " d_out"]
    held_out: Float32[Array, "3 d_out"] | None = None
    dense: Float32[Array, "4 d_out"] | None = None
    exchanged: Int32[Array, " d_out"] | None = None
    quantized: Float32[Array, "2 d_out"] | None = None
    quantized_held_out: Float32[Array, "2 d_out"] | None = None
    quantized_dense: Float32[Array, "2 d_out"] | None = None


class PrunedMatrix(NamedTuple):
    """A pruned matrix, and the outcomes of its rows.

    Attributes:
      weight: [d_out, d_in] in the dtype of the dense weights.
      keep: [d_out, d_in] bool.
      rows: the outcomes of its rows.
      scale: [d_out, groups] in the dtype of the dense weights: every weight is an integer times the scale of its group of inputs,
        rounded to that dtype; None if the weights are not quantised.
    """

    weight: Float[Array, "d_out d_in"]
    keep: Bool[Array, "d_out d_in"]
    rows: RowOutcomes
    scale: Float[Array, "d_out groups"] | None = None
