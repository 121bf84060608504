"""Parts of blocks that patterns cut, and a run's model without them."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from transformers import PretrainedConfig

from optima_tpu.errors import UserError
from optima_tpu.method.layer_rules import kind_name
from optima_tpu.method.patterns import Pattern, Place, WholeInputs, WholeParts
from optima_tpu.models import family_of
from optima_tpu.models.checkpoints.fewer_blocks import with_settings
from optima_tpu.models.checkpoints.orbax import CheckpointTensors, TensorPart
from optima_tpu.models.checkpoints.source import architecture_of, read_config
from optima_tpu.models.family import FURTHER, Cut
from optima_tpu.report.contents import BLOCKS, EXPERTS, CutCount

_FURTHER_BLOCKS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
"""Settings of ``transformers`` that count the blocks which predict tokens behind the next one."""


class Cuts(NamedTuple):
    """What a run cut from every block.

    Attributes:
      counts: name of each kind of parts that was pruned -> the counts. A kind was cut if all blocks have one number of it left.
      parts: name of each tensor that loses rows or columns -> what is left of the tensor.
      whole: the matrices whose remaining weights are all kept, so that they need no mask.
      settings: the new numbers in config.json.
      further: name of each tensor that predicts tokens behind the next one -> its size. They keep all parts, so they leave whole.
      zeros_stay: why inputs that are pruned in all rows were not cut.
    """

    counts: Mapping[str, CutCount] = {}
    parts: Mapping[str, TensorPart] = {}
    whole: frozenset[str] = frozenset()
    settings: Mapping[str, int] = {}
    further: Mapping[str, int] = {}
    zeros_stay: tuple[str, ...] = ()

    @property
    def deleted(self) -> dict[str, CutCount]:
        """The counts of what was cut."""
        return {called: count for called, count in self.counts.items() if count.deleted}


def cuts_of(model: PretrainedConfig) -> dict[str, tuple[Cut, ...] | str]:
    """The kinds of parts that can be cut from a model, by pattern word.

    Where a kind of parts cannot be cut, a text says why.
    """
    family = family_of(model)
    config = family.read_config(model)
    return {
        word: makers if isinstance(makers, str) else tuple(filter(None, (made(config) for made in makers)))
        for word, makers in family.cuts.items()
    }


def placed(pattern: Pattern, model: PretrainedConfig, setting: str = "") -> Pattern:
    """Sets the ``places`` of a pattern: the parts that it cuts from a model.

    A place has the layers that read such parts, the number of the parts and their name. A pattern that cuts no parts is
    returned unchanged.

    Args:
      setting: the setting that names the parts alone.

    Raises:
      UserError: parts of this kind cannot be cut from this model.
    """
    if not isinstance(pattern, WholeParts):
        return pattern
    every = cuts_of(model)
    cuts = every.get(pattern.word, "have no name in this family")
    if isinstance(cuts, str):
        where, take = f"the pattern is {pattern.text()}", "another pattern, such as 2:4"
        if setting:
            where = f"{setting} is {pattern.word}"
            take = " or ".join(f"--{setting} {word}" for word, kinds in every.items() if not isinstance(kinds, str))
        raise UserError(
            f"expected a model whose {pattern.word}s can be cut where {where}, got {architecture_of(model)}, whose "
            f"{pattern.word}s {cuts}; take {take}"
        )
    return dataclasses.replace(pattern, places=tuple(Place(cut.read_by, cut.total, cut.called) for cut in cuts))


def refuse_unreadable(pattern: Pattern, model: PretrainedConfig) -> None:
    """Reads config.json as it will be without what a placed pattern cuts.

    Raises:
      UserError: the pattern cuts no parts or all, or ``transformers`` does not read this config.json as the cut model's.
    """
    if not isinstance(pattern, WholeParts):
        return
    kept = [pattern.kept(parts.total) for parts in pattern.places]
    if why := why_unreadable(pattern, model):
        first = pattern.places[0].total
        others = sorted(range(pattern.multiple, first, pattern.multiple), key=lambda other: abs(other - kept[0]))
        near = (pattern.leaving(other, first) for other in others)
        take = next((other.text() for other in near if not why_unreadable(other, model)), "another pattern, such as 2:4")
        leaves = ", ".join(f"{left} of {parts.total} {parts.called}" for left, parts in zip(kept, pattern.places))
        raise UserError(
            f"expected a share of {architecture_of(model)} with which transformers reads its new config.json, got "
            f"{pattern.text()}, which leaves {leaves}: {why}; take {take}"
        )


def why_unreadable(pattern: WholeInputs, model: PretrainedConfig) -> str:
    """Why config.json cannot describe the cut model; empty if it can."""
    cuts = cuts_of(model)[pattern.word]
    assert not isinstance(cuts, str), "the pattern is placed in the model"
    try:
        kept = [pattern.kept(cut.total) for cut in cuts]
        settings = {name: number for cut, left in zip(cuts, kept) for name, number in cut.config(left).items()}
        config, _ = read_config(with_settings(model.to_json_string().encode(), settings), "the cut model")
        again = cuts_of(config)[pattern.word]
    except UserError as error:
        return str(error)
    assert not isinstance(again, str), "the family is the same"
    for cut, left, read in zip(cuts, kept, again, strict=True):
        # The inputs of the reading layers: the parts of the cut model may be others, such as queries that have one key left.
        if (read.total * read.width, read.fixed) != (left * cut.width, cut.fixed):
            return f"these are read as of another width than {cut.width}"
    return ""


def cut(source: CheckpointTensors, patterns: Mapping[str, Pattern], model: PretrainedConfig) -> Cuts:
    """What can leave the model of a run without a change of its outputs.

    Reads the masks of the matrices that lost whole inputs.

    Args:
      patterns: of the pruned weights, as :func:`placed` makes them.
      model: the configuration of the dense model.
    """
    cuts, inputs = Cuts(), {name: pattern for name, pattern in patterns.items() if isinstance(pattern, WholeInputs)}
    if gone := len(source.run.left_out.blocks):
        blocks = CutCount((len(source.run.blocks),), len(source.run.blocks) + gone)
        cuts = cuts._replace(counts={BLOCKS: blocks})
    if experts := source.run.left_out.experts:
        cuts = cuts._replace(counts={**cuts.counts, EXPERTS: CutCount((experts.kept,), experts.total)})
    for kinds in cuts_of(model).values() if inputs else ():
        for kind in () if isinstance(kinds, str) else kinds:
            readers = _readers(kind, source, model)
            names = [name for name in readers if name in inputs and inputs[name].parts_in(source.shape(name)[1]) == kind.total]
            for name in names:
                del inputs[name]
            cuts = _without(cuts, source, kind, names, len(readers)) if names else cuts
    if cuts.parts or source.run.left_out.experts:
        rules = [rule for rule, why in family_of(model).ignored.items() if why == FURTHER]
        further = [name for name in source.names() if any(re.fullmatch(rule, name) for rule in rules)]
        counts = [name for name in _FURTHER_BLOCKS if further and hasattr(model.get_text_config(), name)]
        cuts = cuts._replace(
            further={name: math.prod(source.shape(name)) for name in further},
            settings={**cuts.settings, **dict.fromkeys(counts, 0)},
        )
    if inputs:
        first = next(iter(inputs))
        why = f"inputs that are pruned in all rows stay as zeros where they are no parts that can be cut, as in {first}"
        cuts = cuts._replace(zeros_stay=(*cuts.zeros_stay, why))
    return cuts


def _readers(kind: Cut, source: CheckpointTensors, model: PretrainedConfig) -> list[str]:
    """The weights of a run's blocks that read parts of a kind."""
    family = family_of(model)
    before, behind = map(re.escape, family.layers.split("{}"))
    path = re.compile(rf"(?:{'|'.join(map(re.escape, family.roots))}){before}(\d+){behind}(.*)\.weight")
    matches = filter(None, map(path.fullmatch, source.names()))
    # Behind the last block a checkpoint may have others, which predict tokens behind the next one.
    return [each[0] for each in matches if int(each[1]) < len(source.run.blocks) and kind_name(each[2]) in kind.read_by]


def _without(cuts: Cuts, source: CheckpointTensors, kind: Cut, names: list[str], readers: int) -> Cuts:
    """Adds one kind of parts to what was cut before.

    Args:
      names: the weights that lost some of the parts.
      readers: how many weights read such parts.
    """
    parts, whole, kept, present = dict[str, TensorPart](), set[str](), set[int](), set(source.names())
    for name in names:
        mask, beside = source.masks([name])[name], name.removesuffix(".weight").rpartition(".")[0] + "."
        left = np.flatnonzero(mask.reshape(len(mask), kind.total, -1).any(axis=(0, 2)))
        kept.add(len(left))
        columns = _indices(left, kind.total, (mask.shape[1] // kind.total,), mask.shape[1])
        parts[name] = TensorPart(columns, 1, mask.shape[1])
        if mask[:, columns].all():
            whole.add(name)
        made = {beside + maker + ending: rows for maker, rows in kind.made_by.items() for ending in ("", ".weight", ".bias")}
        for maker in present & made.keys():
            size = source.shape(maker)[0]
            parts[maker] = TensorPart(_indices(left, kind.total, made[maker] or (size // kind.total,), size), 0, size)
    if len(names) < readers:
        kept.add(kind.total)
    count = CutCount(tuple(sorted(kept)), kind.total)
    cuts = cuts._replace(counts={**cuts.counts, kind.called: count})
    if len(kept) > 1:
        numbers = " or ".join(f"{left:,}" for left in count.left)
        why = (
            f"pruned {kind.called} stay as zeros, since the blocks keep {numbers} of {kind.total:,}, and config.json has one "
            "number for all"
        )
        return cuts._replace(zeros_stay=(*cuts.zeros_stay, why))
    return cuts._replace(
        parts={**cuts.parts, **parts}, whole=cuts.whole | whole, settings={**cuts.settings, **kind.config(*kept)}
    )


def _indices(left: np.ndarray, total: int, rows: tuple[int, ...], size: int) -> np.ndarray:
    """Indices of the parts that are left, and of all that is behind the parts.

    The parts are in matrices that are one behind the other.

    Args:
      left: which parts, of ``total``.
      rows: of a part in each of the matrices.
      size: of the axis.
    """
    ends = np.cumsum([total * each for each in rows])
    firsts = np.concatenate([[0], ends])
    inside = [(first + left[:, None] * each + np.arange(each)).ravel() for first, each in zip(firsts, rows)]
    return np.concatenate([*inside, np.arange(firsts[-1], size)])
