"""A model with fewer experts in its mixtures: their number, its tensors."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PretrainedConfig

from optima_tpu.errors import UserError
from optima_tpu.models import family_of
from optima_tpu.models.checkpoints.fewer_blocks import assets_without, with_settings
from optima_tpu.models.checkpoints.source import ComputedTensors, LazyTensor, TensorSource, architecture_of
from optima_tpu.models.experts import MixtureConfig
from optima_tpu.models.family import ExpertNames
from optima_tpu.models.routers import Groups
from optima_tpu.report.contents import LeftOut


class ExpertCut(NamedTuple):
    """How many experts every mixture of a model keeps.

    Attributes:
      groups: number of equal groups, each of which keeps as many.
    """

    names: ExpertNames
    kept: int
    total: int
    groups: int


_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""The settings of ``transformers`` that count experts: a model has one of them, which may have two names in different files."""


def assets_with(assets: Mapping[str, bytes], experts: int) -> dict[str, bytes]:
    """A model's files, with config.json for this number of experts."""
    return {**assets, "config.json": with_settings(assets["config.json"], dict.fromkeys(_COUNTS, experts), only_present=True)}


def cut_assets(assets: Mapping[str, bytes], left_out: LeftOut) -> dict[str, bytes]:
    """A model's files, with config.json for the blocks and experts kept."""
    fewer = assets_without(assets, left_out.blocks)
    return assets_with(fewer, left_out.experts.kept) if left_out.experts else fewer


def expert_cut(experts: float, model: PretrainedConfig) -> ExpertCut:
    """How many experts every mixture keeps at a value of ``cut.experts``.

    The value is a share below 1, or a number of experts that leave every mixture. With a share, the number of experts that stay
    is rounded up to a multiple of the number of groups.

    Raises:
      UserError: experts of this model cannot be removed, or too few would stay.
    """
    family, named = family_of(model), architecture_of(model)
    config = family.read_config(model)
    names = "which has no experts" if isinstance(config, MixtureConfig) and not config.experts else family.experts
    if isinstance(names, str):
        raise UserError(
            f"expected a model whose experts can be removed where cut.experts is {experts:g}, got {named}, {names}; leave out "
            "cut.experts, and prune weights by --pattern 2:4"
        )
    assert isinstance(config, MixtureConfig), "a family with names of experts has mixtures"
    total, groups = config.experts, config.groups or Groups()
    sizes = [size for size in range(1, total // groups.total) if _enough(size, groups, config.experts_per_token)]
    kept = total - experts if experts >= 1 else -(-round(total * (1 - experts), 6) // groups.total) * groups.total
    allowed = [size * groups.total for size in sizes]
    if kept not in allowed:
        nearest = min(allowed, key=lambda count: abs(count - kept), default=None)
        reasons = f"a token is sent to {config.experts_per_token}" + f" and {groups.total} groups keep as many" * (
            groups.total > 1
        )
        take = "leave out cut.experts" if nearest is None else f"take --cut.experts {total - nearest}"
        raise UserError(
            f"expected cut.experts to remove some and leave enough of the {total} experts of {named}, got {experts:g}: "
            f"{reasons}; {take}"
        )
    return ExpertCut(names, int(kept), total, groups.total)


def _enough(size: int, groups: Groups, few: int) -> bool:
    """Whether groups of ``size`` experts are large enough for the router."""
    return size * groups.chosen >= few and (groups.chosen == groups.total or size >= groups.best)


def fewer_experts(
    tensors: TensorSource, names: ExpertNames, kept: Mapping[str, Sequence[int]], solved: TensorSource | None = None
) -> ComputedTensors:
    """The tensors of a model without some experts, which are renumbered.

    Args:
      kept: the experts that stay, ascending, by the prefix of the names of their block.
      solved: tensors by their new names, each instead of the tensor of this name.
    """
    computed, gone = dict[str, LazyTensor](), set[str]()
    of_experts = {prefix + names.each: {old: new for new, old in enumerate(stay)} for prefix, stay in kept.items()}
    for name in tensors.names():
        before, _, behind = name.partition(names.each)
        if (numbers := of_experts.get(before + names.each)) is not None and behind:
            number, _, rest = behind.partition(".")
            gone.add(name)
            if int(number) in numbers:
                new = f"{before}{names.each}{numbers[int(number)]}.{rest}"
                computed[new] = LazyTensor.of(tensors, name)
    present = set(tensors.names())
    for prefix, stay in kept.items():
        for name in present & {prefix + each for each in names.router}:
            shape = len(stay), *tensors.shape(name)[1:]
            read = functools.partial(_rows, tensors, name, np.array(stay))
            computed[name] = LazyTensor(shape, tensors.dtype(name), read)
    if solved is not None:
        computed |= {name: LazyTensor.of(solved, name) for name in solved.names()}
    return ComputedTensors(tensors, computed, gone - computed.keys(), getattr(tensors, "stacks", ()))


def _rows(tensors: TensorSource, name: str, stay: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    first, *rest = index
    return tensors.read(name, (slice(None), *rest))[stay[first]]
