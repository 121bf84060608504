"""Means of errors over layers and kinds of layers, and what they are in words."""

import math
import statistics
from collections.abc import Iterable, Sequence

from optima_tpu.method.layer_rules import kind_name
from optima_tpu.report.numbers import percent
from optima_tpu.report.records import LayerReport
from optima_tpu.report.settings import RecipeSettings
from optima_tpu.runtime.records import Record


def measured(layers: Sequence[LayerReport]) -> bool:
    """Whether the errors of the layers were measured: not in a model that another program pruned."""
    return not layers or any(math.isfinite(error) for layer in layers for error in (layer.error_before, layer.error_after))


def named_kinds(layers: Iterable[LayerReport]) -> dict[str, list[LayerReport]]:
    """The layers of each kind by its short name, in the order of first occurrence."""
    kinds: dict[str, list[LayerReport]] = {}
    for layer in layers:
        kinds.setdefault(kind_name(layer.name), []).append(layer)
    return {short: kinds[kind] for kind, short in short_names(list(kinds)).items()}


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
        own = [layer for layer in layers if getattr(layer, names[1]) is not None]
        if own:
            before, nearest, stored = (percent(mean(own, name)) for name in names)
            told.append(f"{where and where + ' '}{before} before, {nearest} with the nearest integers, {stored} as stored")
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


def aimed_at_dense(layers: Sequence[LayerReport]) -> Sequence[LayerReport]:
    """The layers that aim at the dense model's output alone, or all if there are none: the others also make up for the stream's drift."""
    return [layer for layer in layers if not layer.corrects_stream] or layers


def mean(layers: Iterable[Record], error: str) -> float | None:
    """The mean of an error over the layers, or blocks, that have it; NaN if one is not finite, None if none has it.

    On the calibration text an expert that no token reached is left out, unless there are no others.
    """
    layers = list(layers)
    reached = [layer for layer in layers if getattr(layer, "tokens", None) != 0] if error.startswith("error_") else []
    values = [value for layer in reached or layers if (value := getattr(layer, error)) is not None]
    if not all(map(math.isfinite, values)):
        return math.nan
    return statistics.fmean(values) if values else None


def held_out_caveat(settings: RecipeSettings) -> str:
    """What the held-out text chose, as a caveat for its error; empty if nothing."""
    chosen = settings.allocation.name == "measured"
    return "also chose the sparsities, so its error is slightly too low" if chosen else ""
