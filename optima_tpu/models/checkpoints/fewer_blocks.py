"""A model without some of its blocks: config.json and renumbered tensors."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from transformers import PretrainedConfig

from optima_tpu.config.run_config import CutStructures
from optima_tpu.errors import UserError
from optima_tpu.models import family_named, family_of
from optima_tpu.models.checkpoints.source import ComputedTensors, LazyTensor, TensorSource, architecture_of, read_config
from optima_tpu.models.family import DecoderConfig


def _entries(value: Any, kept: Sequence[int]) -> Any:
    return [value[index] for index in kept]


def _indices(value: Any, kept: Sequence[int]) -> Any:
    return [new for new, old in enumerate(kept) if old in value]


def _numbers(value: Any, kept: Sequence[int]) -> Any:
    return {str(new): value[str(old)] for new, old in enumerate(kept) if str(old) in value}


def _first(value: Any, kept: Sequence[int]) -> Any:
    return sum(old < value for old in kept)


_BY_BLOCK: Mapping[str, Callable[[Any, Sequence[int]], Any]] = {
    **dict.fromkeys(("layer_types", "mlp_layer_types", "no_rope_layers"), _entries),
    **dict.fromkeys(("moe_layers", "mlp_only_layers"), _indices),
    "per_layer_config": _numbers,
    **dict.fromkeys(("first_k_dense_replace", "max_window_layers"), _first),
}
"""Settings of ``transformers`` that describe blocks -> their values for the kept blocks. A setting has an entry for each block,
indices of blocks, values by the number of a block, or the number of the first blocks."""

_LENGTH = 64
"""Positions at which two blocks are compared."""


def kept_blocks(blocks: int, left_out: Collection[int]) -> tuple[int, ...]:
    """The indices of the blocks that are not left out, ascending."""
    return tuple(index for index in range(blocks) if index not in left_out)


def last_blocks(model: PretrainedConfig, count: int) -> tuple[int, ...]:
    """The last ``count`` blocks that the model can be without.

    They stand for the blocks that a run has not chosen yet.
    """
    removable: tuple[int, ...] = ()
    for index in reversed(range(family_of(model).read_config(model).blocks if count else 0)):
        if len(removable) < count and not why_unreadable(model, (*removable, index)):
            removable += (index,)
    return removable


def settings_without(model: PretrainedConfig, left_out: Collection[int]) -> dict[str, Any]:
    """The settings of config.json that change where blocks are left out."""
    text = json.loads(model.get_text_config().to_json_string(use_diff=False))
    kept = kept_blocks(text["num_hidden_layers"], left_out)
    changed = {name: change(text[name], kept) for name, change in _BY_BLOCK.items() if text.get(name) is not None}
    return {"num_hidden_layers": len(kept)} | changed


def with_settings(config: bytes, settings: Mapping[str, Any], only_present: bool = False) -> bytes:
    """config.json with other settings, in text_config if there is one.

    Args:
      settings: ``per_layer_config.*.NAME`` is the value of every block for which the configuration has a NAME of its own.
      only_present: change only settings that config.json has already.
    """
    record: dict[str, Any] = json.loads(config)
    text = nested if isinstance(nested := record.get("text_config"), dict) else record
    for name, value in settings.items():
        outer, of_blocks, inner = name.partition(".*.")
        if of_blocks:
            for block in (text.get(outer) or {}).values():
                block.update({inner: value} if inner in block else {})
        elif name in text or not only_present:
            text[name] = value
    return json.dumps(record, indent=2).encode() + b"\n"


def assets_without(assets: Mapping[str, bytes], left_out: Collection[int]) -> dict[str, bytes]:
    """A model's files, with config.json changed for the blocks left out."""
    if not left_out:
        return dict(assets)
    model, _ = read_config(assets["config.json"], "the dense model")
    return {**assets, "config.json": with_settings(assets["config.json"], settings_without(model, left_out))}


def refuse_uncuttable(cut: CutStructures, model: PretrainedConfig) -> None:
    """Reads config.json as it will be without each of the blocks.

    Raises:
      UserError: the model has no family of this program, no block would be left, or fewer than ``cut.blocks`` blocks can be
        left out, because config.json would describe the others wrongly.
    """
    if not cut.blocks:
        return
    named = architecture_of(model)
    if family_named(model.architectures) is None:
        raise UserError(
            f"expected a model of a family of this program where cut.blocks is {cut.blocks}, got {named}, which runs by its own "
            "code in torch and names its blocks in ways of its own; leave out cut.blocks"
        )
    blocks = family_of(model).read_config(model).blocks
    if cut.blocks >= blocks:
        raise UserError(f"expected cut.blocks below {blocks}, the blocks of {named}, got {cut.blocks}")
    whys = {index: why for index in range(blocks) if (why := why_unreadable(model, (index,)))}
    if blocks - len(whys) < cut.blocks:
        first = next(iter(whys))
        raise UserError(
            f"expected a model without whose blocks config.json describes the others where cut.blocks is {cut.blocks}, got "
            f"{named}: without block {first} {whys[first]}; leave out cut.blocks, and cut neurons by --pattern 0.25/neuron"
        )


def why_unreadable(model: PretrainedConfig, left_out: Collection[int]) -> str:
    """Why config.json cannot leave out these blocks; empty if it can."""
    config = with_settings(model.to_json_string(use_diff=False).encode(), settings_without(model, left_out))
    family = family_of(model)
    try:
        reduced = family.read_config(read_config(config, "the cut model")[0])
    except UserError as error:
        return f"its config.json is refused: {error}"
    return _other(family.read_config(model), reduced, kept_blocks(family.read_config(model).blocks, left_out))


def _other(dense: DecoderConfig, reduced: DecoderConfig, kept: Sequence[int]) -> str:
    """The first difference between the kept and the read blocks, or empty."""
    names = [name for name, value in vars(dense).items() if isinstance(value, str | float | int | None)]
    for name in names:
        if name not in ("blocks", "kind") and getattr(dense, name) != getattr(reduced, name):
            return f"{name} would be {getattr(reduced, name)} instead of {getattr(dense, name)}"
    for new, old in enumerate(kept):
        layers = [each.block_layers and each.block_layers[index] for each, index in ((dense, old), (reduced, new))]
        positions = [jax.tree.leaves(each.positions(index, _LENGTH)) for each, index in ((dense, old), (reduced, new))]
        if layers[0] != layers[1] or not all(map(np.array_equal, *positions)):
            return f"block {old} would be read as a block of another kind"
    return ""


def renumbered(tensors: TensorSource, prefix: str, left_out: Collection[int]) -> ComputedTensors:
    """The tensors of a model without some blocks, by their new names.

    Args:
      tensors: of the whole model. The model may not read tensors of further blocks; these stay behind its last block.
      prefix: of the names of a block's tensors, with ``{}`` for its number.
    """
    before, behind = prefix.split("{}")
    block = re.compile(re.escape(before) + r"(\d+)" + re.escape(behind))

    def renamed(names: Iterable[str]) -> dict[str, str]:
        blocks = {name: int(match[1]) for name in names if (match := block.match(name))}
        new = {old: old - sum(each < old for each in left_out) for old in blocks.values() if old not in left_out}
        return {
            name if old is None else block.sub(f"{before}{new[old]}{behind}", name, 1): name
            for name in names
            if (old := blocks.get(name)) is None or old in new
        }

    names = renamed(tensors.names())
    computed = {new: LazyTensor.of(tensors, old) for new, old in names.items() if new != old}
    return ComputedTensors(tensors, computed, set(tensors.names()) - names.keys(), renamed(getattr(tensors, "stacks", ())))
