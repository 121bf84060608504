"""A finished run as its exports read it.

Pruned entries of the weights are exactly zero, and the counts of zeros match the masks.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PretrainedConfig

from optima_tpu.config.choices import CHOICES
from optima_tpu.errors import UserError
from optima_tpu.method.layer_rules import parse_layers, pattern_of, with_patterns
from optima_tpu.method.patterns import Pattern, WholeInputs, WholeParts, parse_pattern
from optima_tpu.method.quantization import Quantizer
from optima_tpu.models.checkpoints.cuts import Cuts, cut, placed
from optima_tpu.models.checkpoints.fewer_blocks import with_settings
from optima_tpu.models.checkpoints.fewer_experts import cut_assets
from optima_tpu.models.checkpoints.orbax import CheckpointTensors
from optima_tpu.models.checkpoints.source import read_config
from optima_tpu.report.contents import LeftOut
from optima_tpu.report.records import LayerReport
from optima_tpu.report.run_record import read_assets


class Weights(NamedTuple):
    """Some tensors of a run.

    Attributes:
      tensors: name -> weights, +0.0 wherever the mask prunes.
      masks: name of a pruned weight -> [d_out, d_in] bool, True where it was kept.
    """

    tensors: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Exported:
    """A run from which every form of an export is made.

    Attributes:
      assets: the source's own files, such as config.json: name -> contents.
      patterns: the pattern of every pruned weight; none for unstructured masks that the run took over, which were checked then.
      cuts: what was cut. ``source`` and ``assets`` are without it.
    """

    directory: Path
    source: CheckpointTensors
    assets: Mapping[str, bytes]
    patterns: Mapping[str, Pattern]
    cuts: Cuts = Cuts()

    @classmethod
    def open(cls, directory: Path, source: CheckpointTensors | None = None) -> "Exported":
        """Opens a run, and cuts what it pruned in every block alike."""
        source = source or CheckpointTensors(directory)
        run = cls(directory, source, cut_assets(read_assets(directory), source.run.left_out), {})
        patterns = run._patterns()
        if source.run.left_out == LeftOut() and not any(isinstance(pattern, WholeInputs) for pattern in patterns.values()):
            return dataclasses.replace(run, patterns=patterns)
        cuts = cut(run.source, patterns, run.config())
        return cls(
            directory,
            run.source.without(cuts.parts, cuts.whole, cuts.further),
            {**run.assets, "config.json": with_settings(run.assets["config.json"], cuts.settings)}
            if cuts.settings
            else run.assets,
            # What a matrix loses elsewhere is in the other patterns' groups, unless rows compete.
            {name: each for name, each in patterns.items() if name not in cuts.parts or each.group == "row"},
            cuts,
        )

    def config(self) -> PretrainedConfig:
        return read_config(self.assets["config.json"], str(self.directory))[0]

    def weights(self, names: Iterable[str]) -> Weights:
        """Loads tensors.

        Raises:
          RuntimeError: the checkpoint holds another number than 0.0 or -0.0 where a mask prunes.
        """
        names = list(names)
        masked = set(self.source.pruned())
        tensors, masks = self.source.load(names), self.source.masks(name for name in names if name in masked)
        for name, keep in masks.items():
            if np.any((tensors[name] != 0) & ~keep):  # tensors[name][~keep] takes ten times as long
                raise RuntimeError(f"{name}: the checkpoint holds weights other than zero where the mask prunes")
            tensors[name] = np.where(keep, tensors[name], np.zeros((), tensors[name].dtype))
        return Weights(tensors, masks)

    def zeros(self, name: str, zero: np.ndarray, keep: np.ndarray) -> int:
        """The number of zeros of a pruned weight.

        Raises:
          RuntimeError: the zeros do not match the mask, the recorded count or the pattern.
        """
        pattern = self.patterns.get(name)
        # The recorded count has the zeros of rows that were cut.
        recorded = 0 if name in self.cuts.parts else self.report_on(name).pruned
        if np.any(~keep & ~zero) or zero.sum() < recorded or not (pattern is None or pattern.holds(zero)):
            raise RuntimeError(f"the zeros of {name} do not match mask and pattern {pattern}")
        return int(zero.sum())

    def removed(self) -> int:
        """Counts the cut weights that were not pruned by a mask.

        A mask is taken to prune the same number of weights in each row.
        """
        pruned, removed = set(self.source.pruned()), sum(self.cuts.further.values())
        for name, (left, axis, total) in self.cuts.parts.items():
            size = math.prod(self.source.shape(name)) * total // len(left)
            kept = size - self.report_on(name).pruned if name in pruned else size
            removed += kept * (total - len(left)) // total * (axis == 0)  # of columns all weights are pruned
        return removed

    def quantizer(self, form: str) -> Quantizer:
        """The run's quantizer, with the bits and the group of its integers.

        Raises:
          UserError: the run did not quantise, so it cannot be exported in this form.
        """
        recorded = self.source.run.decided.recipe.quantize
        cls = CHOICES["quantize"].get(recorded.name) if recorded else None
        if recorded is None or cls is None or not self.source.quantized():
            raise UserError(
                f"expected a run with --quantize int4 or int8 to export as {form}, got {self.directory}, whose weights are no "
                "integers; prune again with --quantize and another --output, or take --format plain, packed or gguf"
            )
        quantizer: Quantizer = cls(group=recorded.group)
        return quantizer

    def _patterns(self) -> dict[str, Pattern]:
        def place(pattern: Pattern) -> Pattern:
            return placed(pattern, self.config()) if isinstance(pattern, WholeParts) else pattern

        decided, allocated = self.source.run.decided, self.source.run.sparsity
        default, rules = place(parse_pattern(decided.recipe.pattern)), with_patterns(parse_layers(decided.recipe.layers), place)
        foreign = decided.recipe.selector.name == "imported" or decided.start is not None
        patterns: dict[str, Pattern] = {}
        for name in self.source.pruned():
            layer = self.report_on(name)
            block_sparsity = None if allocated is None else allocated[layer.block]
            own = default if block_sparsity is None else default.at(block_sparsity)
            pattern = pattern_of(rules, own, name.removesuffix(".weight"), layer.name)
            if pattern is not None and not (foreign and pattern.free):
                patterns[name] = pattern
        return patterns

    def architectures(self) -> list[str] | None:
        """The names of the model's class in config.json."""
        names: list[str] | None = json.loads(self.assets["config.json"]).get("architectures")
        return names

    def report_on(self, name: str) -> LayerReport:
        """The record of the layer that a pruned weight belongs to."""
        return next(
            layer
            for block in self.source.run.blocks
            for layer in block.layers
            if name.endswith(f".{layer.block}.{layer.name}.weight")
        )
