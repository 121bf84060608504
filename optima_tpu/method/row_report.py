"""What happened to the rows of a matrix."""

from typing import NamedTuple

from jax import Array


class RowReport(NamedTuple):
    """What happened to each row of a layer; every array is [d_out]."""

    energy: Array  # float32, mean square of the dense output
    before: Array  # float32, mean squared change of the output by the selector's weights
    after: Array  # float32, by the final weights
    gap: Array  # float32, the solver's
    steps: Array  # int32
    converged: Array  # bool
    refused: Array  # bool, the solver's weights were not accepted
    held_out: Array | None = None  # [3, d_out] float32: energy, before and after on held-out tokens
    dense: Array | None = None  # [4, d_out] float32, there against the dense model's outputs: these three, and of dense weights
    exchanged: Array | None = None  # int32, kept weights that the selector had pruned, where masks are refined
    score: Array | None = None  # float32, by what held-out tokens choose between final weights, up to a constant
    chosen: Array | None = None  # [2] int32, not of rows: which damping and which alpha of the tuning
