"""Block reports, summed up."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, overload

from optima_tpu.config.run_config import chosen_by_held_out
from optima_tpu.method.layer_rules import kind_name
from optima_tpu.report.records import BlockReport, LayerReport

T = TypeVar("T")
FITTED, HELD_OUT = ("error_before", "error_after"), ("held_out_before", "held_out_after")
"""The errors on calibration and on held-out tokens, with the selector's weights and with the final ones."""

RISE = 0.01
"""So much of itself an error on held-out text has to rise by before it counts."""

_CHOSEN = {"tuning": "the tuning", "accept": "the acceptance", "allocation": "the sparsities"}


class LayerKind(NamedTuple):
    """All layers of one kind.

    Attributes:
      name: "self_attn.q_proj", for experts "mlp.experts.*.up_proj".
      layers: how many there are, one for each block, or each of its experts.
      error_before: mean over layers that calibration tokens reached, of the selector's weights.
      error_after: likewise, of the final weights.
      held_out: mean over layers that held-out tokens reached, of the final weights on these; None where there are none.
      dense_before, dense_after, dense_drift: means over layers, against the dense model on held-out tokens: of the selector's, of
        the final and of the dense weights; None where they were not measured.
      sparsity: share of the weights of all of them that are pruned.
      gap_max: largest over rows and layers.
      steps_median: median over layers of the median over rows.
      rows: of all layers, as the next two.
      rows_not_converged: rows that did not meet the solver's own test.
      rows_refused: rows that kept the selector's weights.
    """

    name: str
    layers: int
    error_before: float
    error_after: float
    held_out: float | None
    dense_before: float | None
    dense_after: float | None
    dense_drift: float | None
    sparsity: float
    gap_max: float
    steps_median: float
    rows: int
    rows_not_converged: int
    rows_refused: int


def all_layers(blocks: Iterable[BlockReport]) -> list[LayerReport]:
    """The layers of all blocks, in the order of the walk."""
    return [layer for block in blocks for layer in block.layers]


def by_kind(blocks: Sequence[BlockReport]) -> tuple[LayerKind, ...]:
    """One summary for each kind of layer, in the order in which they first come."""
    kinds: dict[str, list[LayerReport]] = {}
    for layer in all_layers(blocks):
        kinds.setdefault(kind_name(layer.name), []).append(layer)
    return tuple(_kind(name, layers) for name, layers in kinds.items())


def short_names(names: Sequence[str]) -> dict[str, str]:
    """ "self_attn.q_proj" -> "q_proj", where no other layer ends alike."""
    last = [name.rpartition(".")[2] for name in names]
    return {name: short if last.count(short) == 1 else name for name, short in zip(names, last)}


def sparsity(layers: Iterable[LayerReport]) -> float:
    """Share of the weights of all these layers together that are pruned. 0 for no layers."""
    layers = list(layers)
    weights = sum(math.prod(layer.shape) for layer in layers)
    return sum(layer.pruned for layer in layers) / weights if weights else 0.0


def exchanged(layers: Iterable[LayerReport]) -> float | None:
    """Share of the weights that stay which the selector had pruned; None where no mask was refined."""
    refined = [(layer, count) for layer in layers if (count := layer.exchanged) is not None]
    kept = sum(math.prod(layer.shape) - layer.pruned for layer, _ in refined)
    return sum(count for _, count in refined) / kept if kept else None


def gap_meaning(solvers: Sequence[str]) -> str:
    """What the gaps of these solvers tell, without a stop."""
    distance = "how far a row is from the best weights for its mask"
    match sorted(set(solvers)):
        case ["cg"]:
            return f"{distance}, at most: a certified bound, as a share of the optimum"
        case [one]:
            return f"{distance}, by {one}'s own measure"
        case several:
            return f"{distance}, by the measures of {' and '.join(several)}, which do not compare"


def unusual(blocks: Sequence[BlockReport]) -> dict[str, dict[str, int]]:
    """What a person should look at, by layer: {"rows_not_converged": {"block 3 mlp.down_proj": 12}, ...}.

    The kinds are always there, empty when there is nothing to say. A refused layer has all of its rows refused and is
    listed under ``layers_refused``, not under ``rows_refused``. ``few_tokens`` has the layers that fewer tokens reached than they
    have inputs, which leaves their problems without a unique answer, with the number of those tokens.
    """
    found: dict[str, dict[str, int]] = {
        "few_tokens": {},
        "dead_inputs": {},
        "rows_not_converged": {},
        "rows_refused": {},
        "layers_refused": {},
    }
    for layer in all_layers(blocks):
        if layer.tokens is not None and layer.tokens < layer.shape[1]:
            found["few_tokens"][f"block {layer.block} {layer.name}"] = layer.tokens
        counts = {
            "dead_inputs": layer.dead_inputs,
            "rows_not_converged": layer.rows - layer.rows_converged,
            "layers_refused" if layer.rows_refused == layer.rows else "rows_refused": layer.rows_refused,
        }
        for kind, count in counts.items():
            if count:
                found[kind][f"block {layer.block} {layer.name}"] = count
    return found


def worsened(blocks: Sequence[BlockReport]) -> dict[str, tuple[float, float]]:
    """Every matrix that the update made worse on held-out text, with its error before and after: {"block 3 mlp.down_proj": ...}.

    Errors are those that the update aims at: against the dense model where the run has a dense target, else of the layer's own
    output. A rise of less than :data:`RISE` is noise. The matrix with the largest rise comes first.
    """
    found: dict[str, tuple[float, float]] = {}
    for layer in all_layers(blocks):
        before, after = (
            (layer.held_out_before, layer.held_out_after)
            if layer.dense_after is None
            else (layer.dense_before, layer.dense_after)
        )
        if before is not None and after is not None and _rose(before, after):
            found[f"block {layer.block} {layer.name}"] = (before, after)
    return dict(sorted(found.items(), key=lambda item: _rise(*item[1]), reverse=True))


def traded(blocks: Sequence[BlockReport]) -> list[LayerReport]:
    """Layers whose own output is further off on held-out text after the update, and whose distance to the dense model is smaller.

    A dense target asks for that: the layer makes up for what the layers before it have lost.
    """
    return [
        layer
        for layer in all_layers(blocks)
        if layer.dense_after is not None
        and _rose(layer.held_out_before, layer.held_out_after)
        and not _rose(layer.dense_before, layer.dense_after)
    ]


def of_record(layer: Mapping[str, Any], name: str) -> Any:
    """A value of a layer that is a record in JSON types, None where it has none."""
    return layer.get(name)


@overload
def fitted_errors(layers: Sequence[LayerReport]) -> tuple[float, float]: ...
@overload
def fitted_errors(layers: Sequence[T], get: Callable[[T, str], Any]) -> tuple[float | None, float | None]: ...
def fitted_errors(layers: Sequence[Any], get: Callable[[Any, str], Any] = getattr) -> tuple[float | None, float | None]:
    """The mean of both ``FITTED`` over the layers that calibration tokens reached: all but experts without any.

    Over all layers where none was reached. None for records without the error, see :func:`mean_or_none`.

    Args:
      layers: at least one.
      get: ``(layer, name) -> value``, for layers that are records :func:`of_record`.
    """
    before, after = means([layer for layer in layers if get(layer, "tokens") != 0] or layers, FITTED, get)
    return before, after


def held_out_errors(layers: Sequence[T], get: Callable[[T, str], Any] = getattr) -> tuple[float | None, float | None]:
    """The mean of both ``HELD_OUT`` over the layers that held-out tokens reached; as :func:`fitted_errors`."""
    before, after = means(layers, HELD_OUT, get)
    return before, after


def held_out_caveat(configuration: Mapping[str, Any]) -> str:
    """What held-out text did beside being measured on, to be said of it: "also chose the tuning, ..."; empty for nothing."""
    chosen = [_CHOSEN[setting] for setting in chosen_by_held_out(configuration)]
    listed = " and ".join(filter(None, [", ".join(chosen[:-1]), *chosen[-1:]]))
    return f"also chose {listed}, so the error on it is a little too small" if chosen else ""


def means(layers: Iterable[T], names: Sequence[str], get: Callable[[T, str], Any] = getattr) -> tuple[float | None, ...]:
    """The mean of each of several errors over the layers that have them; see :func:`mean_or_none`.

    A layer without any of them has none: there were no held-out tokens, or none was routed to this expert.
    """
    rows = [[get(layer, name) for name in names] for layer in layers]
    rows = [row for row in rows if any(value is not None for value in row)]
    return tuple(mean_or_none(row[place] for row in rows) for place in range(len(names)))


def mean_or_none(values: Iterable[float | None]) -> float | None:
    """The mean; None where there are no values, or one is missing or was not finite, which JSON does not have."""
    values = list(values)
    numbers = [value for value in values if value is not None]
    return statistics.fmean(numbers) if numbers and len(numbers) == len(values) else None


def _rose(before: float | None, after: float | None) -> bool:
    return before is not None and after is not None and after > (1 + RISE) * before


def _rise(before: float, after: float) -> float:
    return after / before if before > 0 else math.inf


def _kind(name: str, layers: list[LayerReport]) -> LayerKind:
    before, after = fitted_errors(layers)
    dense_before, dense_after, dense_drift = means(layers, ("dense_before", "dense_after", "dense_drift"))
    return LayerKind(
        name=name,
        layers=len(layers),
        error_before=before,
        error_after=after,
        held_out=held_out_errors(layers)[1],
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
