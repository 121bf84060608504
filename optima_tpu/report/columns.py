"""The columns of tables on layers, of the terminal and of the page. A row is a layer, or all layers of a kind."""

import statistics
from collections.abc import Callable, Mapping, Sequence

from optima_tpu.report.numbers import percent
from optima_tpu.report.records import LayerReport
from optima_tpu.report.summary import FITTED, mean_or_none, sparsity
from optima_tpu.report.view import NONE

Cell = Callable[[Sequence[LayerReport]], str]
"""What a column says of the layers of a row."""


def mean_of(error: str) -> Cell:
    """The mean of an error over the layers that have it; on the calibration text without experts that no token reached."""

    def cell(layers: Sequence[LayerReport]) -> str:
        reached = [layer for layer in layers if layer.tokens != 0] if error in FITTED else []
        values = [value for layer in reached or layers if (value := getattr(layer, error)) is not None]
        return percent(mean_or_none(values)) if values else NONE

    return cell


def steps(value: float) -> str:
    """A number of iterations."""
    return f"{value:.0f}"


def share_pruned(layers: Sequence[LayerReport]) -> str:
    """The sparsity of the layers together."""
    return percent(sparsity(layers))


ROWS: Mapping[str, Cell] = {
    "median steps": lambda layers: steps(statistics.median(layer.steps_median for layer in layers)),
    "most steps": lambda layers: steps(max(layer.steps_max for layer in layers)),
    "largest gap": lambda layers: percent(max(layer.gap_max for layer in layers)),
    "not converged": lambda layers: f"{sum(layer.rows - layer.rows_converged for layer in layers):,}",
    "refused": lambda layers: f"{sum(layer.rows_refused for layer in layers):,}",
}
"""What a solver did with the rows."""
