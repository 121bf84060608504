"""One file for llama.cpp, with configuration and tokenizer."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from optima_tpu.models.checkpoints.compressed_tensors import scale_of_inputs
from optima_tpu.models.checkpoints.exported import Exported
from optima_tpu.models.checkpoints.forms.base import Form, Zeros, same_bytes
from optima_tpu.models.checkpoints.gguf_export import GGUFModel, Stored
from optima_tpu.models.checkpoints.orbax import block_of
from optima_tpu.models.checkpoints.source import Pretrained
from optima_tpu.report.contents import ExportForm
from optima_tpu.runtime import signals
from optima_tpu.runtime.files import written_here
from optima_tpu.runtime.processes import alone

_FILE = "model.gguf"


class GGUF(Form):
    """One file for llama.cpp, with the integers of a quantised run."""

    name = "gguf"
    text = "a file for llama.cpp, of Llama, Qwen 2 and Gemma 3"
    weights = (".gguf",)
    compact = True

    def __init__(self, run: Exported, written_as: ExportForm):
        super().__init__(run, written_as)
        quantized = run.source.quantized()
        dense = Pretrained(run.config(), run.source, run.assets, "", str(run.directory))
        self._file = GGUFModel.of(dense, quantized, run.quantizer(self.name) if quantized else None)
        self._file.refuse_unsaid()

    def write_weights(self, folder: Path) -> Zeros:
        zeros = Zeros()
        with written_here(folder / _FILE) as here:
            self._file.write(here, (stored for stored, _ in self._in_blocks()))
            tensors = self._file.reopened(here)
            for (name, values, scale), keep in self._in_blocks():
                read_back = tensors.read(name)
                if keep is not None:
                    zeros[name] = self.run.zeros(name, read_back == 0, keep)
                if not _same_values(read_back, values, scale):
                    raise RuntimeError(f"{_FILE}: {name} differs from the checkpoint")
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


def _same_values(read_back: np.ndarray, values: np.ndarray, scale: np.ndarray | None) -> bool:
    """Whether a tensor, read in float32, equals what was written.

    A matrix must be equal exactly, a quantised matrix in its integers, a vector within rounding.
    """
    values = values.astype(np.float32)
    if scale is not None:
        factors = scale_of_inputs(scale, values.shape[1])
        return np.array_equal(np.round(read_back / factors), np.round(values / factors))
    # A Gemma's norms are stored plus 1, which float32 rounds by their size: the norms of Gemma 3 270M reach 1656.
    return same_bytes(read_back, values) if values.ndim > 1 else np.allclose(read_back, values, rtol=2**-22, atol=2**-22)
