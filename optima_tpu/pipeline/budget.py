"""Finds how many parts stay for a wanted share of the weights."""

import bisect
import dataclasses
import functools
import math
from collections.abc import Iterable

from rich.console import Console
from transformers import PretrainedConfig

from optima_tpu.config.run_config import RunConfig
from optima_tpu.errors import UserError
from optima_tpu.method.layer_rules import LayerRule
from optima_tpu.method.patterns import WholeInputs, WholeParts
from optima_tpu.models.checkpoints.cuts import placed, why_unreadable
from optima_tpu.pipeline.plan.model import DeclaredModel, declared
from optima_tpu.report.progress import say


@dataclasses.dataclass(frozen=True)
class _Staying:
    """The parts of every block that ``cut.by`` names; some of them stay.

    Attributes:
      config: the run, without a rule for these parts.
      dense: the model as it is.
    """

    config: RunConfig
    model: PretrainedConfig
    part: WholeParts
    dense: DeclaredModel

    @property
    def total(self) -> int:
        return self.part.places[0].total

    @property
    def called(self) -> str:
        return self.part.places[0].called

    @property
    def counts(self) -> range:
        """The numbers that may stay."""
        return range(self.part.multiple, self.total, self.part.multiple)

    @functools.cached_property
    def left(self) -> DeclaredModel:
        """The model without the blocks that leave."""
        return self.dense.left_by(self.config.cut)

    def leaving(self, kept: int) -> RunConfig:
        """The run with a rule that keeps ``kept`` parts."""
        without = dataclasses.replace(self.config.cut, to=None)
        rules = (*self.config.recipe.layers, LayerRule("*", self.pattern(kept)))
        return self.config.changed(layers=rules, output=str(self.config.run_directory), cut=without)

    def pattern(self, kept: int) -> WholeInputs:
        return self.part.leaving(kept, self.total)

    def share(self, kept: int) -> float:
        """Share of the dense weights with ``kept`` parts left; 0 for 0."""
        return kept and self.left.narrow(self.leaving(kept).recipe).weights / self.dense.weights

    def readable(self, counts: Iterable[int]) -> int:
        """The first number that transformers reads; 0 if there is none."""
        return next((kept for kept in counts if not why_unreadable(self.pattern(kept), self.model)), 0)

    def most(self, share: float) -> int:
        """The largest number with at most this share; 0 if there is none."""
        counts = self.counts
        fits = bisect.bisect_right(range(len(counts)), share, key=lambda index: self.share(self.readable(counts[index::-1])))
        return self.readable(counts[fits - 1 :: -1]) if fits else 0

    def refuse(self, wanted_share: float) -> None:
        """Refuses a share that removing these parts cannot reach.

        Raises:
          UserError: no smaller number of parts may stay, or the other cuts leave no more than ``wanted_share`` of the weights.
        """
        if not self.counts:
            raise UserError(
                f"expected cut.by with a multiple below {self.total:,}, the {self.called} of a block, got {self.part.multiple}; "
                f"take --cut.by {self.part.word}@{max(1, self.total // 8)}"
            )
        others = self.left.narrow(self.config.recipe).weights / self.dense.weights
        if wanted_share >= others:
            raise UserError(
                f"expected cut.to below {others:.3g}, the share that stays with what else is cut, got {wanted_share:g}; leave "
                "out cut.to"
            )


def on_budget(config: RunConfig, model: PretrainedConfig, console: Console | None = None) -> RunConfig:
    """Replaces ``cut.to`` by a rule that keeps as many parts as it allows.

    Args:
      config: its patterns are placed in the model.
      console: prints how many parts stay.

    Raises:
      UserError: the model has no such parts, another pattern cuts them too, or no number of them leaves this share.
    """
    wanted_share = config.cut.to
    if wanted_share is None:
        return config
    part = placed(config.cut.part, model, "cut.by")
    assert isinstance(part, WholeParts), "cut.by names parts"
    if other := next((each for each in config.recipe.patterns if isinstance(each, type(part))), None):
        raise UserError(
            f"expected no other share of {part.word}s where cut.to is {wanted_share:g}, got {other.text()}; leave out one of the "
            "two"
        )
    parts = _Staying(config, model, part, declared(model))
    parts.refuse(wanted_share)
    kept = parts.most(wanted_share)
    if not kept:
        least = parts.readable(parts.counts)
        lowest = math.ceil(1000 * parts.share(least)) / 1000
        raise UserError(
            f"expected cut.to of at least {lowest:g}, which {least:,} of {parts.total:,} {parts.called} leave, got "
            f"{wanted_share:g}; take it, or leave out more blocks by --cut.blocks"
        )
    if console:
        say(
            console,
            f"cut          {parts.pattern(kept).text()} keeps {kept:,} of {parts.total:,} {parts.called} in every block: "
            f"{parts.share(kept):.3g} of the weights",
        )
    return parts.leaving(kept)
