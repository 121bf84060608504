"""What a run has finished so far, read like a checkpoint."""

import numpy as np

from optima_tpu.checkpoint import read_metadata
from optima_tpu.journal import Journal


class FinishedTensors:
    """The tensors of the finished blocks of a journal, as a ``TensorSource`` that is read block by block."""

    def __init__(self, journal: Journal):
        self._blocks = {name: index for index in sorted(journal.finished)
                        for name in read_metadata(journal.entry(index)).metadata["weights"]}
        self._journal, self._held = journal, (-1, {})

    def names(self) -> tuple[str, ...]:
        return tuple(self._blocks)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._block(name)[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._block(name)[name].dtype

    def read(self, name: str, index=(...,)) -> np.ndarray:
        return self._block(name)[name][index]

    def _block(self, name: str) -> dict[str, np.ndarray]:
        index = self._blocks[name]
        if self._held[0] != index:
            self._held = index, self._journal.weights(index)
        return self._held[1]
