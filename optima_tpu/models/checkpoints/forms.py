"""The forms of an export.

A form writes a model's weights and masks into a folder, reads them again and compares them:

plain                     safetensors, every weight in the dtype of the source
packed                    the same, each pruned matrix as a bit mask and compressed values; see ``packing.py``
compressed-tensors        the integers and scales of a quantised run; see ``compressed_tensors.py``
compressed-tensors-w8a8   the same, and whoever loads it rounds activations to 8 bits
gguf                      one file for llama.cpp, with configuration and tokenizer; see ``gguf_export.py``
maxtext                   MaxText's Orbax layout with its settings, not for ``transformers``; see ``maxtext.py``

The weights of the plain form are dense: no current library reads a packed 2:4 file, and a ``sparsity_config`` makes some refuse to
load.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from huggingface_hub import split_state_dict_into_shards_factory

from optima_tpu.errors import UserError
from optima_tpu.method.quantization import Quantizer
from optima_tpu.models.checkpoints.compressed_tensors import compressed, quantization_config, scale_of_inputs
from optima_tpu.models.checkpoints.exported import Exported
from optima_tpu.models.checkpoints.gguf_export import GGUFModel, Stored
from optima_tpu.models.checkpoints.maxtext import STEP, layout_of
from optima_tpu.models.checkpoints.orbax import block_of, save_items
from optima_tpu.models.checkpoints.packed import MASKS, write_masks
from optima_tpu.models.checkpoints.packing import Packer
from optima_tpu.models.checkpoints.source import Pretrained
from optima_tpu.models.checkpoints.stacks import Stacked, stacks_among, stacks_of
from optima_tpu.report.contents import ExportForm
from optima_tpu.runtime import signals
from optima_tpu.runtime.files import written_here
from optima_tpu.runtime.processes import alone

GGUF_FILE = "model.gguf"

Zeros = dict[str, int]
"""Name of a pruned weight -> the number of its zeros, counted in the file."""


class Options(NamedTuple):
    """The options of a form.

    Attributes:
      max_shard_size: largest size of a safetensors file: bytes, or a text such as "5GB". One is in memory at a time.
      scan_layers: whether all blocks are stacked, for maxtext.
    """

    max_shard_size: int | str = "5GB"
    scan_layers: bool = True


class Form:
    """One form of an export of one run.

    Making a form raises UserError if the run cannot have it.

    Attributes:
      buckets: whether the folder may be in a bucket.
      stacks: whether the form can store one parameter of all experts as one tensor.
      compact: whether people choose the form for its size, so that the command prints it.
      library: the library that loads the folder, for its model card.
      next: what to type next, with FOLDER for the whole path of the folder; empty if the folder loads as it is.
      shards: the names of the safetensors files that a plain folder has.
      masks_apart: whether the masks of pruned weights are a file of their own.
    """

    name: ClassVar[str]
    buckets: ClassVar[bool] = True
    stacks: ClassVar[bool] = False
    compact: ClassVar[bool] = False
    library: ClassVar[str] = "transformers"
    next: ClassVar[str] = ""
    shards: Sequence[str] = ()
    masks_apart: bool = True

    def __init__(self, run: Exported, written_as: ExportForm):
        self.run, self.stacked = run, stacks_among(run.source.stacked, stacks_of(run.architectures()))
        if self.stacked and not self.stacks:
            raise UserError(
                f"expected --format {Plain.name} or {PackedForm.name} for a model that stores its experts in one tensor, or its matrices "
                f"as [inputs, outputs], got {self.name}: not supported"
            )

    def write(self, folder: Path) -> Zeros:
        """Writes weights and masks beside the run's assets, and checks them.

        Returns:
          The zeros of each pruned weight.

        Raises:
          RuntimeError: what was written does not match checkpoint, masks or patterns.
        """
        zeros = self.write_weights(folder)
        source = self.run.source
        names = source.pruned() if self.masks_apart else ()
        if names:  # none where every pruned matrix lost whole inputs
            with written_here(folder / MASKS) as here:
                write_masks(here, ((name, source.mask(name)) for name in names))
        return zeros

    def write_weights(self, folder: Path) -> Zeros:
        """The part of :meth:`write` that forms differ in."""
        raise NotImplementedError

    def finish(self, names: Iterable[str]) -> None:
        """Called when all other files, ``names``, have been written."""


class Plain(Form):
    """Safetensors as ``transformers`` loads them.

    Attributes:
      quantizer: makes the integers that are stored in the place of quantised weights; None stores these as they are.
      activations: whether the inputs of quantised layers are rounded to 8 bits when the model runs.
    """

    name = "plain"
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
                if (read_back.dtype, read_back.shape) != (expected.dtype, expected.shape) or not _same_bytes(read_back, expected):
                    raise RuntimeError(f"{path.name}: {name} differs from the checkpoint")
                parts = self._stacked.split(name, read_back).items()
                zeros |= {each: self.run.zeros(each, part == 0, masks[each]) for each, part in parts if each in masks}
        return zeros


class PackedForm(Plain):
    """The plain folder, packed; ``optima unpack`` restores it bit for bit."""

    name = "packed"
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


class Compressed(Plain):
    """Integers and scales as the library compressed-tensors stores them."""

    name = "compressed-tensors"
    stacks = False
    compact = True
    quantizer: Quantizer

    def __init__(self, run: Exported, written_as: ExportForm):
        super().__init__(run, written_as)
        self.quantizer = run.quantizer(self.name)

    def write(self, folder: Path) -> Zeros:
        source, path = self.run.source, folder / "config.json"
        quantized = set(source.quantized())
        others = (name for name in source.names() if name.endswith(".weight") and len(source.shape(name)) == 2)
        modules = (name.removesuffix(".weight") for name in others if name not in quantized)
        quantization = quantization_config(self.quantizer, modules, self.activations)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}, indent=2) + "\n")
        return super().write(folder)


class CompressedW8A8(Compressed):
    """8-bit integers by rows, for programs whose activations have 8 bits."""

    name = "compressed-tensors-w8a8"
    activations = True

    def __init__(self, run: Exported, written_as: ExportForm):
        super().__init__(run, written_as)
        if (self.quantizer.bits, self.quantizer.group) != (8, None):
            raise UserError(
                f"expected a run with --quantize int8 --quantize.group null to export as {self.name}, whose programs take a scale "
                f"for each row, got {run.directory} with {self.quantizer}; take --format {Compressed.name}"
            )


class GGUF(Form):
    """One file for llama.cpp, with the integers of a quantised run."""

    name = "gguf"
    compact = True

    def __init__(self, run: Exported, written_as: ExportForm):
        super().__init__(run, written_as)
        quantized = run.source.quantized()
        dense = Pretrained(run.config(), run.source, run.assets, "", str(run.directory))
        self._file = GGUFModel.of(dense, quantized, run.quantizer(self.name) if quantized else None)
        self._file.refuse_unsaid()

    def write_weights(self, folder: Path) -> Zeros:
        zeros = Zeros()
        with written_here(folder / GGUF_FILE) as here:
            self._file.write(here, (stored for stored, _ in self._in_blocks()))
            tensors = self._file.reopened(here)
            for (name, values, scale), keep in self._in_blocks():
                read_back = tensors.read(name)
                if keep is not None:
                    zeros[name] = self.run.zeros(name, read_back == 0, keep)
                if not _same_values(read_back, values, scale):
                    raise RuntimeError(f"{GGUF_FILE}: {name} differs from the checkpoint")
        return zeros

    def _in_blocks(self) -> Iterator[tuple[Stored, np.ndarray | None]]:
        """Yields each tensor, with its mask if it is pruned.

        The tensors of one block of the model are in memory at a time.
        """
        for _, block in itertools.groupby(self._file.kinds, block_of):
            if alone():
                signals.check()
            group = list(block)
            (tensors, masks), scales = self.run.weights(group), self.run.source.scales(group)
            for name in group:
                yield Stored(name, tensors[name], scales.get(name)), masks.get(name)


class MaxText(Form):
    """MaxText's Orbax layout and settings; the whole model is in memory."""

    name = "maxtext"
    library = "maxtext"
    next = (
        "MaxText's trainer takes it as FOLDER/maxtext.yml load_parameters_path=FOLDER/0/items tokenizer_path=FOLDER; "
        "docs/guides/jax-programs.md has one that keeps the zeros"
    )

    def __init__(self, run: Exported, written_as: ExportForm):
        super().__init__(run, written_as)
        self._layout = layout_of(run.config(), run.source, written_as.scan_layers)

    def write_weights(self, folder: Path) -> Zeros:
        zeros, tree = Zeros(), dict[str, Any]()
        for leaf in self._layout.leaves:
            if alone():
                signals.check()
            tensors, masks = self.run.weights(leaf.names)
            for name, keep in masks.items():
                zeros[name] = self.run.zeros(name, tensors[name] == 0, keep)
                if np.count_nonzero(leaf.convert(tensors[name])) != tensors[name].size - zeros[name]:
                    raise RuntimeError(f"{name}: its zeros are others in MaxText's layout")
            *above, last = leaf.path
            node = tree
            for part in above:
                node = node.setdefault(part, {})
            node[last] = leaf.array(tensors)
        state = {"step": np.zeros((), np.int32), "params": {"params": tree}, "opt_state": {}}
        save_items(folder / STEP, state, {"scan_layers": self._layout.settings["scan_layers"]})
        for name, text in self._layout.files().items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        return zeros


FORMS: Mapping[str, type[Form]] = {form.name: form for form in (Plain, PackedForm, Compressed, CompressedW8A8, GGUF, MaxText)}


def _readable(folder: Path) -> int:
    """The mode of an ordinary new file in a folder."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    return mode


def _same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8))  # NaN included


def _same_values(read_back: np.ndarray, values: np.ndarray, scale: np.ndarray | None) -> bool:
    """Whether a tensor, read in float32, equals what was written.

    A matrix must be equal exactly, a quantised matrix in its integers, a vector within rounding.
    """
    values = values.astype(np.float32)
    if scale is not None:
        factors = scale_of_inputs(scale, values.shape[1])
        return np.array_equal(np.round(read_back / factors), np.round(values / factors))
    # A Gemma's norms are stored plus 1, which float32 rounds by their size: the norms of Gemma 3 270M reach 1656.
    return _same_bytes(read_back, values) if values.ndim > 1 else np.allclose(read_back, values, rtol=2**-22, atol=2**-22)
