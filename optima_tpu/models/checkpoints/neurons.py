"""The neurons that a run cut from its MLPs, and what is left of the model's tensors and of its config.json without them."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from optima_tpu.method.patterns import Pattern, WholeInputs
from optima_tpu.models.checkpoints.orbax import CheckpointTensors, TensorPart
from optima_tpu.models.family import NeuronLayers


class CutNeurons(NamedTuple):
    """What a run cut from the MLP of every block.

    Attributes:
      kept: the neurons that every block has left.
      total: those of the dense model.
      parts: what is left of each tensor that loses rows or columns, by its name.
      whole: the matrices of which the whole rest is kept, so that they need no mask.
      setting: the number of neurons, by its name in config.json.
    """

    kept: int
    total: int
    parts: Mapping[str, TensorPart]
    whole: frozenset[str]
    setting: str

    def config(self, config: bytes) -> bytes:
        """config.json with the new number."""
        record: dict[str, Any] = json.loads(config)
        text = record.get("text_config")
        (text if isinstance(text, dict) else record)[self.setting] = self.kept
        return json.dumps(record, indent=2).encode() + b"\n"


def cut_neurons(source: CheckpointTensors, patterns: Mapping[str, Pattern], layers: NeuronLayers | None) -> CutNeurons | str:
    """What can leave the model although nothing else is computed then; or why inputs that are pruned in all rows stay as zeros.

    The text is empty if no layer has lost whole inputs. Reads the masks of those that have.

    Args:
      patterns: of the pruned weights.
      layers: of the family; None if it has other blocks than with one MLP each.
    """
    inputs = sorted(name for name, pattern in patterns.items() if isinstance(pattern, WholeInputs))
    if not inputs:
        return ""
    if layers is None:
        return "inputs that are pruned in all rows stay as zeros: neurons are cut from models with one MLP in every block alone"
    ending, present = f"{layers.read_by}.weight", set(source.names())
    names = [name for name in inputs if name.endswith("." + ending)]
    if not names:
        return f"inputs that are pruned in all rows stay as zeros, since those of {inputs[0]} are no neurons of an MLP"
    parts, whole, kept = dict[str, TensorPart](), set[str](), set[int]()
    for name in names:
        mask, prefix, total = source.masks([name])[name], name.removesuffix(ending), source.shape(name)[1]
        left = np.flatnonzero(mask.any(axis=0))
        kept.add(len(left))
        parts[name] = TensorPart(left, 1)
        if mask[:, left].all():
            whole.add(name)
        made = (f"{prefix}{layer}.{what}" for layer in layers.made_by for what in ("weight", "bias"))
        for maker in present.intersection(made):
            firsts = range(0, source.shape(maker)[0], total)  # gate and up may be one matrix, one behind the other
            parts[maker] = TensorPart(np.concatenate([left + first for first in firsts]), 0)
    if len(names) < len(source.run.blocks):
        kept.add(total)
    if len(kept) > 1:
        return (
            f"pruned neurons stay as zeros, since the blocks keep {' or '.join(f'{count:,}' for count in sorted(kept))} of {total:,}, "
            "and config.json has one number for all"
        )
    return CutNeurons(kept.pop(), total, parts, frozenset(whole), layers.setting)
