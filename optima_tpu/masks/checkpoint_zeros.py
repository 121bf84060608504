"""The zeros of a pruned checkpoint as masks."""

import dataclasses
from typing import ClassVar

import numpy as np

from optima_tpu.masks.source import checked
from optima_tpu.weights import TensorSource


@dataclasses.dataclass(frozen=True)
class CheckpointZeros:
    """Keeps what is not exactly zero, in every matrix of a checkpoint."""

    tensors: TensorSource
    origin: str
    how: ClassVar[str] = "zeros of a checkpoint"
    from_zeros: ClassVar[bool] = True

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(name for name in self.tensors.names() if len(self.tensors.shape(name)) == 2))

    def read(self, name: str, shape: tuple[int, int]) -> np.ndarray:
        return checked(self.tensors.read(name) != 0, name, shape, self.origin)
