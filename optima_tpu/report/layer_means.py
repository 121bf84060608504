"""Means of errors over layers and kinds of layers, and their meaning."""

import math
import statistics
from collections.abc import Iterable, Sequence

from optima_tpu.method.layer_rules import kind_name
from optima_tpu.report.numbers import percent
from optima_tpu.report.records import LayerReport
from optima_tpu.report.settings import RecipeSettings
from optima_tpu.runtime.records import Record


def measured(layers: Sequence[LayerReport]) -> bool:
    """Whether the errors of the layers were measured.

    False for a model that another program pruned; True without layers.
    """
    return not layers or any(math.isfinite(error) for layer in layers for error in (layer.error_before, layer.error_after))


def named_kinds(layers: Iterable[LayerReport]) -> dict[str, list[LayerReport]]:
    """Short name of a kind -> its layers, in order of first occurrence."""
    kinds: dict[str, list[LayerReport]] = {}
    for layer in layers:
        kinds.setdefault(kind_name(layer.name), []).append(layer)
    return {short: kinds[kind] for kind, short in short_names(list(kinds)).items()}


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Maps "self_attn.q_proj" to "q_proj" if no other name ends so."""
    last = [name.rpartition(".")[2] for name in names]
    return {name: short if last.count(short) == 1 else name for name, short in zip(names, last)}


def sparsity(layers: Iterable[LayerReport]) -> float:
    """The share of the layers' weights that is pruned; 0 without layers."""
    layers = list(layers)
    weights = sum(math.prod(layer.shape) for layer in layers)
    return sum(layer.pruned for layer in layers) / weights if weights else 0.0


def exchanged(layers: Iterable[LayerReport]) -> float | None:
    """The share of the kept weights that came in by exchange.

    The selector had pruned these weights. None if no mask was refined.
    """
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
    """Mean errors around the quantisation, in words; empty without one."""
    texts = []
    for where, names in QUANTIZED.items():
        own = [layer for layer in layers if getattr(layer, names[1]) is not None]
        if own:
            before, nearest, stored = (percent(mean(own, name)) for name in names)
            texts.append(f"{where and where + ' '}{before} before, {nearest} with the nearest integers, {stored} as stored")
    return "; ".join(texts)


def gap_meaning(solvers: Sequence[str]) -> str:
    """What the solvers' gaps mean, as the end of a sentence."""
    distance = "the distance of a row from the best weights for its mask"
    match sorted(set(solvers)):
        case ["cg"]:
            return f"{distance}; a certified upper bound, relative to the optimum"
        case [one]:
            return f"{distance}, by {one}'s own measure"
        case several:
            return f"{distance}, by the measures of {' and '.join(several)}, which are not comparable"


def aimed_at_dense(layers: Sequence[LayerReport]) -> Sequence[LayerReport]:
    """The layers that aim at the dense output alone; all if none does."""
    return [layer for layer in layers if not layer.corrects_stream] or layers


def mean(layers: Iterable[Record], error: str) -> float | None:
    """The mean of an error over the layers or blocks that have the error.

    NaN if one is not finite, None if none has it. On the calibration text an expert that no token reached is left out, unless
    there are no others.
    """
    layers = list(layers)
    reached = [layer for layer in layers if getattr(layer, "tokens", None) != 0] if error.startswith("error_") else []
    values = [value for layer in reached or layers if (value := getattr(layer, error)) is not None]
    if not all(map(math.isfinite, values)):
        return math.nan
    return statistics.fmean(values) if values else None


def held_out_caveat(settings: RecipeSettings) -> str:
    """What the held-out text chose, as a caveat for its error; or empty."""
    chosen = settings.allocation.name == "measured"
    return "also chose the sparsities, so its error is slightly too low" if chosen else ""
