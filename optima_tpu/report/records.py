"""What happened to one layer and to one block, as it is journalled and reported."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What happened to one matrix.

    Errors are ``||X W' - X V'||^2 / ||X W'||^2`` over the calibration tokens, with ``W`` the dense and ``V`` the pruned
    weights as they are stored. A bias is in both outputs and cancels. Those that begin with ``dense`` are
    ``||X_d W' - X V'||^2 / ||X_d W'||^2`` over held-out tokens, with ``X_d`` the inputs of the layer in the dense model; None
    without such tokens or without a dense target. With one, ``error_after`` may be above ``error_before``: it is not what was
    minimised.

    Attributes:
      block: index of the block.
      name: the layer inside the block, "self_attn.q_proj".
      shape: (d_out, d_in).
      pruned: number of weights that are zero by the mask.
      sparsity: ``pruned / (d_out d_in)``.
      error_before: error of the selector's weights. Of an expert that no token reached: of its weights alone, as if all inputs
        were of one size and independent; it is in no mean.
      error_after: error of the final weights.
      gap_median: median over rows of the solver's measure of suboptimality.
      gap_max: largest over rows; infinite where the solver found nothing.
      steps_median: median over rows of the solver's iterations.
      steps_max: largest over rows.
      rows: d_out.
      rows_converged: rows that met the solver's own test.
      rows_refused: rows that kept the selector's weights, by the acceptance rule.
      dead_inputs: inputs without any signal in the calibration text.
      tokens: calibration tokens that reached the layer: all of them, or those routed to an expert; None where not counted.
      held_out_before: as ``error_before``, over held-out tokens, which no weight was fitted to; None without such tokens.
      held_out_after: as ``error_after``, over held-out tokens.
      dense_before: of the selector's weights, against the dense model.
      dense_after: of the final weights.
      dense_drift: of the dense weights, what the layers before this one have lost.
      damping: of the solver, as it was chosen on held-out tokens; None where the recipe fixes it.
      alpha: of the target, likewise.
      exchanged: weights that stay where the selector had pruned them, as many as it had kept and that went; None where masks are
        not refined.
    """

    block: int
    name: str
    shape: tuple[int, int]
    pruned: int
    sparsity: float
    error_before: float
    error_after: float
    gap_median: float
    gap_max: float
    steps_median: int
    steps_max: int
    rows: int
    rows_converged: int
    rows_refused: int
    dead_inputs: int
    tokens: int | None = None
    held_out_before: float | None = None
    held_out_after: float | None = None
    dense_before: float | None = None
    dense_after: float | None = None
    dense_drift: float | None = None
    damping: float | None = None
    alpha: float | None = None
    exchanged: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON types, see :func:`finite`."""
        return finite(dataclasses.asdict(self) | {"shape": list(self.shape)})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """From :meth:`to_json`; None is read as infinity, but for what there may be none of."""
        optional = {field.name for field in dataclasses.fields(cls) if field.default is None}
        read = {key: math.inf if value is None and key not in optional else value for key, value in values.items()}
        return cls(**read | {"shape": tuple(values["shape"])})


@dataclasses.dataclass(frozen=True)
class BlockReport:
    """What happened to one block.

    Attributes:
      index: of the block.
      seconds: from reading its weights to its finished activations.
      layers: in the order in which they were pruned.
    """

    index: int
    seconds: float
    layers: tuple[LayerReport, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {"index": self.index, "seconds": self.seconds, "layers": [layer.to_json() for layer in self.layers]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """From :meth:`to_json`."""
        layers = tuple(LayerReport.from_json(layer) for layer in values["layers"])
        return cls(values["index"], values["seconds"], layers)


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with None for infinity and NaN, which JSON does not have."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}
