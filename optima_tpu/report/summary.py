"""Summarises layers: means of errors, kinds of layers, unusual layers."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from optima_tpu.method.layer_rules import kind_name
from optima_tpu.report.numbers import percent
from optima_tpu.report.records import LayerKind, LayerReport
from optima_tpu.report.settings import RecipeSettings
from optima_tpu.runtime.records import Record

FITTED, HELD_OUT = ("error_before", "error_after"), ("held_out_before", "held_out_after")
"""Names of the errors on calibration and on held-out tokens, with the selector's and with the final weights."""


def measured(layers: Sequence[LayerReport]) -> bool:
    """Whether the errors of the layers were measured: not in a model that another program pruned."""
    return not layers or any(math.isfinite(error) for layer in layers for error in (layer.error_before, layer.error_after))


def by_kind(layers: Iterable[LayerReport]) -> tuple[LayerKind, ...]:
    """One summary for each kind of layer, in the order of first occurrence."""
    return tuple(_kind(name, own) for name, own in layers_by_kind(layers).items())


def layers_by_kind(layers: Iterable[LayerReport]) -> dict[str, list[LayerReport]]:
    """The layers of each kind, in the order of first occurrence."""
    kinds: dict[str, list[LayerReport]] = {}
    for layer in layers:
        kinds.setdefault(kind_name(layer.name), []).append(layer)
    return kinds


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Maps "self_attn.q_proj" to "q_proj" if no other name ends in "q_proj"."""
    last = [name.rpartition(".")[2] for name in names]
    return {name: short if last.count(short) == 1 else name for name, short in zip(names, last)}


def sparsity(layers: Iterable[LayerReport]) -> float:
    """Share of pruned weights among all weights of the layers; 0 without layers."""
    layers = list(layers)
    weights = sum(math.prod(layer.shape) for layer in layers)
    return sum(layer.pruned for layer in layers) / weights if weights else 0.0


def exchanged(layers: Iterable[LayerReport]) -> float | None:
    """Share of the kept weights that the selector had pruned; None if no mask was refined."""
    refined = [(layer, count) for layer in layers if (count := layer.exchanged) is not None]
    kept = sum(math.prod(layer.shape) - layer.pruned for layer, _ in refined)
    return sum(count for _, count in refined) / kept if kept else None


QUANTIZED = {
    "": ("error_after", "error_nearest", "error_quantized"),
    "held out": ("held_out_after", "held_out_nearest", "held_out_quantized"),
    "against dense": ("dense_after", "dense_nearest", "dense_quantized"),
}
"""For each text: the names of the errors before the quantisation, with the nearest integers, and as stored."""


def quantized_line(layers: Sequence[LayerReport]) -> str:
    """The mean errors around the quantisation: "1.2%, 1.6% with the nearest integers, 1.4% as stored"; empty without one."""
    told = []
    for where, names in QUANTIZED.items():
        before, nearest, stored = means([layer for layer in layers if getattr(layer, names[1]) is not None], names)
        if before is not None and nearest is not None and stored is not None:
            told.append(
                f"{where and where + ' '}{percent(before)} before, {percent(nearest)} with the nearest integers, "
                f"{percent(stored)} as stored"
            )
    return "; ".join(told)


def gap_meaning(solvers: Sequence[str]) -> str:
    """The meaning of these solvers' gaps, as the end of a sentence without its full stop."""
    distance = "the distance of a row from the best weights for its mask"
    match sorted(set(solvers)):
        case ["cg"]:
            return f"{distance}; a certified upper bound, relative to the optimum"
        case [one]:
            return f"{distance}, by {one}'s own measure"
        case several:
            return f"{distance}, by the measures of {' and '.join(several)}, which are not comparable"


class MeanErrors(NamedTuple):
    """Mean errors of layers before and after the update; None where an error is not finite or was not measured.

    Attributes:
      before, after: on the calibration text, over the layers that its tokens reached, so without experts that none reached; over all
        layers if none was reached.
      held_before, held_after: on held-out text, over the layers that its tokens reached.
    """

    before: float | None
    after: float | None
    held_before: float | None
    held_after: float | None


def mean_errors(layers: Sequence[LayerReport]) -> MeanErrors:
    """The mean errors of layers, on the calibration text and on held-out text."""
    fitted = means([layer for layer in layers if layer.tokens != 0] or layers, FITTED)
    return MeanErrors(*fitted, *means(layers, HELD_OUT))


def held_out_caveat(settings: RecipeSettings) -> str:
    """What the held-out text chose, as a caveat for its error; empty if nothing."""
    chosen = settings.allocation.name == "measured"
    return "also chose the sparsities, so its error is slightly too low" if chosen else ""


def means(layers: Iterable[Record], names: Sequence[str]) -> tuple[float | None, ...]:
    """The mean of each error in ``names`` over the layers, or blocks, that have them; see :func:`mean_or_none`.

    Layers that have none of these errors are ignored: without held-out tokens, or experts that received none of them.
    """
    rows = [[getattr(layer, name) for name in names] for layer in layers]
    rows = [row for row in rows if any(value is not None for value in row)]
    return tuple(mean_or_none(row[place] for row in rows) for place in range(len(names)))


def mean_or_none(values: Iterable[float | None]) -> float | None:
    """The mean of ``values``; None if there are no values, or if one is None or not finite."""
    values = list(values)
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(numbers) if numbers and len(numbers) == len(values) else None


def _kind(name: str, layers: list[LayerReport]) -> LayerKind:
    errors = mean_errors(layers)
    dense_before, dense_after, dense_drift = means(layers, ("dense_before", "dense_after", "dense_drift"))
    return LayerKind(
        name=name,
        layers=len(layers),
        error_before=errors.before,
        error_after=errors.after,
        held_out=errors.held_after,
        dense_before=dense_before,
        dense_after=dense_after,
        dense_drift=dense_drift,
        sparsity=sparsity(layers),
        gap_max=max(layer.gap_max for layer in layers),
        steps_median=statistics.median(layer.steps_median for layer in layers),
        rows=sum(layer.rows for layer in layers),
        rows_not_converged=sum(layer.rows - layer.rows_converged for layer in layers),
        rows_refused=sum(layer.rows_refused for layer in layers),
    )
