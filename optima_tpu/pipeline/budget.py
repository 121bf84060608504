"""The number of parts with which a model has the share of its weights that a person asks for, given what else leaves it."""

import bisect
import dataclasses
import math
from collections.abc import Iterable

from rich.console import Console
from transformers import PretrainedConfig

from optima_tpu.config.run_config import RunConfig
from optima_tpu.errors import UserError
from optima_tpu.method.layer_rules import LayerRule
from optima_tpu.method.patterns import WholeInputs, WholeParts
from optima_tpu.models.checkpoints.cuts import placed, why_unreadable
from optima_tpu.pipeline.plan.model import declared
from optima_tpu.report.progress import say


def on_budget(config: RunConfig, model: PretrainedConfig, console: Console | None = None) -> RunConfig:
    """The run with a rule for the parts of ``cut.by`` in the place of ``cut.to``: as many stay as this share of the weights allows.

    Args:
      config: its patterns are placed in the model.
      console: prints how many parts stay.

    Raises:
      UserError: the model has no such parts, another pattern cuts them too, or no number of them leaves this share.
    """
    asked = config.cut.to
    if asked is None:
        return config
    part = placed(config.cut.part, model, "cut.by")
    assert isinstance(part, WholeParts), "cut.by names parts"
    if other := next((each for each in config.recipe.patterns if isinstance(each, type(part))), None):
        raise UserError(
            f"expected no other share of {part.word}s where cut.to is {asked:g}, got {other.text()}; leave out one of the two"
        )
    whole = declared(model)
    left = whole.without_last(config.cut.blocks)
    first = part.places[0]
    counts = range(part.multiple, first.total, part.multiple)
    if not counts:
        raise UserError(
            f"expected cut.by with a multiple below {first.total:,}, the {first.called} of a block, got {part.multiple}; take --cut.by "
            f"{part.word}@{max(1, first.total // 8)}"
        )

    def leaving(pattern: WholeInputs) -> RunConfig:
        without = dataclasses.replace(config.cut, to=None)
        rules = (*config.recipe.layers, LayerRule("*", pattern))
        return config.changed(layers=rules, output=str(config.run_directory), cut=without)

    def share(kept: int) -> float:
        return kept and left.narrow(leaving(part.leaving(kept, first.total)).recipe).weights / whole.weights

    def readable(counts: Iterable[int]) -> int:
        """The first number that transformers reads; 0 if there is none."""
        return next((kept for kept in counts if not why_unreadable(part.leaving(kept, first.total), model)), 0)

    fits = bisect.bisect_right(range(len(counts)), asked, key=lambda place: share(readable(counts[place::-1])))
    others = left.narrow(config.recipe).weights / whole.weights
    if asked >= others:
        raise UserError(
            f"expected cut.to below {others:.3g}, the share that stays with what else is cut, got {asked:g}; leave out cut.to"
        )
    kept = readable(counts[fits - 1 :: -1]) if fits else 0
    if not kept:
        least = readable(counts)
        lowest = math.ceil(1000 * share(least)) / 1000
        raise UserError(
            f"expected cut.to of at least {lowest:g}, which {least:,} of {first.total:,} {first.called} leave, got {asked:g}; take it, "
            "or leave out more blocks by --cut.blocks"
        )
    pattern = part.leaving(kept, first.total)
    if console:
        say(
            console,
            f"cut          {pattern.text()} keeps {kept:,} of {first.total:,} {first.called} in every block: "
            f"{share(kept):.3g} of the weights",
        )
    return leaving(pattern)
