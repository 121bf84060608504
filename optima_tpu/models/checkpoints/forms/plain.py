"""Safetensors as ``transformers`` loads them, and the same packed.

The weights of the plain form are dense: no current library reads a packed 2:4 file, and a ``sparsity_config`` makes some refuse
to load.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import safetensors
import safetensors.numpy
from huggingface_hub import split_state_dict_into_shards_factory

from optima_tpu.method.quantization import Quantizer
from optima_tpu.models.checkpoints.compressed_tensors import compressed
from optima_tpu.models.checkpoints.exported import Exported
from optima_tpu.models.checkpoints.forms.base import PACKED, PLAIN, Form, Zeros, same_bytes
from optima_tpu.models.checkpoints.packing import Packer
from optima_tpu.models.checkpoints.stacks import Stacked
from optima_tpu.report.contents import ExportForm
from optima_tpu.runtime import signals
from optima_tpu.runtime.files import written_here
from optima_tpu.runtime.processes import alone


class Plain(Form):
    """Safetensors as ``transformers`` loads them.

    Attributes:
      quantizer: makes the integers that are stored in the place of quantised weights; None stores these as they are.
      activations: whether the inputs of quantised layers are rounded to 8 bits when the model runs.
    """

    name = PLAIN
    text = "every weight in the dtype of the source"
    stacks = True
    quantizer: Quantizer | None = None
    activations: ClassVar[bool] = False

    def __init__(self, run: Exported, written_as: ExportForm):
        super().__init__(run, written_as)
        self._stacked = Stacked(run.source, self.stacked)
        stacked = self._stacked
        # A tensor that is larger than a file may be gets one of its own.
        self._split = split_state_dict_into_shards_factory(
            {name: math.prod(stacked.shape(name)) * stacked.dtype(name).itemsize for name in stacked.names()},
            get_storage_size=int,
            max_shard_size=written_as.max_shard_size,
            filename_pattern="model{suffix}.safetensors",
        )
        self.shards = tuple(self._split.filename_to_tensors)

    def write_weights(self, folder: Path) -> Zeros:
        stacked, zeros, weight_map, size = self._stacked, Zeros(), dict[str, str](), 0
        for file_name, names in self._split.filename_to_tensors.items():
            if alone():
                signals.check()
            loaded = self.run.weights(member for name in names for member in stacked.members(name))
            # safetensors writes the buffer in memory order: without this a transposed view would be saved wrongly.
            arrays = {name: np.ascontiguousarray(stacked.joined(name, loaded.tensors)) for name in names}
            tensors = {name: tensor.reshape(stacked.shape(name)) for name, tensor in arrays.items()}
            if self.quantizer is not None:
                for name, scale in self.run.source.scales(names).items():
                    if name in loaded.masks:  # a layer that was only cut has none left
                        zeros[name] = self.run.zeros(name, tensors[name] == 0, loaded.masks[name])
                    tensors |= compressed(name, tensors.pop(name), scale, self.quantizer.bits, self.activations)
            weight_map |= dict.fromkeys(tensors, file_name)
            size += sum(array.nbytes for array in tensors.values())
            with written_here(folder / file_name) as here:
                safetensors.numpy.save_file(tensors, here, metadata={"format": "pt"})
                # safetensors makes files that only their owner can read, but the folder is meant to be shared.
                here.chmod(_readable(here.parent))
                zeros |= self._counted(here, tensors, loaded.masks)
                self.written(here, loaded.masks)
        if self._split.is_sharded:
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        return zeros

    def written(self, file: Path, masks: Mapping[str, np.ndarray]) -> None:
        """Called when a file of weights is written and checked."""

    def _counted(self, path: Path, tensors: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray]) -> Zeros:
        """Reads a file again, and counts the zeros of pruned weights.

        Raises:
          RuntimeError: a tensor differs from the tensor that was written.
        """
        zeros = Zeros()
        with safetensors.safe_open(path, framework="np") as file:
            for name, expected in tensors.items():
                read_back = file.get_tensor(name)
                if (read_back.dtype, read_back.shape) != (expected.dtype, expected.shape) or not same_bytes(read_back, expected):
                    raise RuntimeError(f"{path.name}: {name} differs from the checkpoint")
                parts = self._stacked.split(name, read_back).items()
                zeros |= {each: self.run.zeros(each, part == 0, masks[each]) for each, part in parts if each in masks}
        return zeros


class PackedForm(Plain):
    """The plain folder, packed; ``optima unpack`` restores it bit for bit."""

    name = PACKED
    text = "as --packed"
    buckets = False
    compact = True

    def write(self, folder: Path) -> Zeros:
        self._folder, self._packer = folder, Packer(folder)
        # Masks are beside the values. But the mask of an expert is no mask of a stored tensor.
        self.masks_apart = bool(self.stacked)
        return super().write(folder)

    def written(self, file: Path, masks: Mapping[str, np.ndarray]) -> None:
        self._packer.add_weights(file, {} if self.masks_apart else masks)
        file.unlink()

    def finish(self, names: Iterable[str]) -> None:
        for name in sorted(names):
            self._packer.add_file(self._folder / name, name)
        self._packer.finish()


def _readable(folder: Path) -> int:
    """The mode of an ordinary new file in a folder."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    return mode
