"""What needs a look in a run: one table of findings for all outputs.

A new kind of finding is a row of :data:`FINDINGS`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from optima_tpu.errors import plural
from optima_tpu.report.numbers import percent
from optima_tpu.report.records import LayerReport

RISE = 0.01
"""A smaller relative rise of an error on held-out text counts as noise."""
_NAMED = 4
"""Number of layers that a sentence names; report.json has all of them."""


class Finding(NamedTuple):
    """A kind of finding.

    Attributes:
      name: its entry in report.json.
      words: what was found; ``{error}`` stands for the error that the update minimises.
      amount: the amount of a layer; None if the layer has no such finding.
      show: formats an amount.
      rank: the sort key of an amount; the layer with the largest key comes first.
      remedy: what to try.
    """

    name: str
    words: str
    amount: Callable[[LayerReport], Any]
    show: Callable[[Any], str]
    rank: Callable[[Any], float] = float
    remedy: str = ""

    def of(self, layers: Iterable[LayerReport]) -> dict[str, Any]:
        """Amounts by layer, such as "block 3 mlp.down_proj", worst first."""
        amounts = {_layer_name(layer): amount for layer in layers if (amount := self.amount(layer)) is not None}
        return dict(sorted(amounts.items(), key=lambda item: self.rank(item[1]), reverse=True))

    def written(self, layers: Sequence[LayerReport]) -> str:
        """``words`` for these layers."""
        dense = any(layer.dense_after is not None for layer in layers)
        return self.words.format(error="the distance to the dense model's output" if dense else "the error")

    def line(self, layers: Sequence[LayerReport]) -> str:
        """A sentence with the most affected layers; empty if there is none."""
        named = [f"{name} ({self.show(amount)})" for name, amount in self.of(layers).items()]
        more = [f"{len(named) - _NAMED} more in the report"] * (len(named) > _NAMED)
        listed = f"{self.written(layers)}: {', '.join([*named[:_NAMED], *more])}"
        return "; ".join(filter(None, (listed, self.remedy))) if named else ""


Errors = tuple[float, float]
"""An error on held-out text before and after the update, which raised it."""


def _raised(before: float | None, after: float | None) -> Errors | None:
    """Both errors, if the update raised the error by more than noise."""
    return (before, after) if before is not None and after is not None and after > (1 + RISE) * before else None


def _worsened(layer: LayerReport) -> Errors | None:
    """Both errors, if the update raised the error that it minimises."""
    if layer.corrects_stream:
        return None
    aims = layer.dense_after is not None
    return _raised(layer.dense_before, layer.dense_after) if aims else _raised(layer.held_out_before, layer.held_out_after)


def _traded(layer: LayerReport) -> tuple[Errors, Errors] | None:
    """Own error and dense error, if the update raised the first alone.

    Without pruned weights the first begins at 0: it always rises, and says nothing.
    """
    own = _raised(layer.held_out_before, layer.held_out_after) if layer.pruned and not layer.corrects_stream else None
    before, after = layer.dense_before, layer.dense_after
    return (own, (before, after)) if own and before is not None and after is not None and not _worsened(layer) else None


def _change(errors: Errors) -> str:
    return f"from {percent(errors[0])} to {percent(errors[1])}"


def _rise(errors: Errors) -> float:
    return errors[1] / errors[0] if errors[0] > 0 else math.inf


def _counted(noun: str) -> Callable[[int], str]:
    return lambda count: plural(count, noun)


FINDINGS: Sequence[Finding] = (
    Finding(
        "worse_on_held_out",
        "the update raised {error} on held-out text",
        _worsened,
        _change,
        _rise,
        "try more --calibration.windows or --calibration.written, or a larger --solver.damping",
    ),
    Finding(
        "few_tokens",  # the least-squares problems of such a layer have no unique solution
        "reached by fewer calibration tokens than they have inputs",
        lambda layer: layer.tokens if layer.tokens is not None and layer.tokens < layer.shape[1] else None,
        _counted("token"),
        lambda tokens: -tokens,
    ),
    Finding(
        "dead_inputs", "dead inputs, zero on all calibration tokens", lambda layer: layer.dead_inputs or None, _counted("input")
    ),
    Finding(
        "rows_not_converged",
        "rows not converged",
        lambda layer: layer.rows - layer.rows_converged or None,
        _counted("row"),
        remedy="raise --solver.max_steps (of mpax: --solver.iteration_limit), or --solver.damping",
    ),
    Finding(
        "rows_refused",
        "rows refused (they keep the selector's weights)",
        lambda layer: layer.rows_refused or None if layer.rows_refused < layer.rows else None,
        _counted("row"),
    ),
    Finding(
        "layers_refused",
        "layers refused (they keep the selector's weights)",
        lambda layer: layer.rows_refused or None if layer.rows_refused == layer.rows else None,
        _counted("row"),
    ),
)
TRADED = Finding(
    "",
    "as a dense target intends, the update raised the error of the layer's own output on held-out text, but not the distance to "
    "the dense model's output",
    _traded,
    lambda both: f"{_change(both[0])}; against dense {_change(both[1])}",
    lambda both: _rise(both[0]),
)
"""Not unusual: such a layer corrects the error of the layers before it."""


def unusual(layers: Iterable[LayerReport]) -> dict[str, dict[str, Any]]:
    """The amounts of every finding by layer; empty where no layer has it."""
    layers = list(layers)
    return {finding.name: finding.of(layers) for finding in FINDINGS}


def unusual_count(layers: Iterable[LayerReport]) -> int:
    """The number of layers with an unusual finding."""
    return len({name for names in unusual(layers).values() for name in names})


def finding_lines(findings: Iterable[Finding], layers: Sequence[LayerReport]) -> list[str]:
    """A sentence for each finding that occurs, most affected layers first."""
    return [line for finding in findings if (line := finding.line(layers))]


def _layer_name(layer: LayerReport) -> str:
    return f"block {layer.block} {layer.name}"
