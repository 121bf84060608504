"""The masks of a finished run."""

import dataclasses
from typing import ClassVar

import numpy as np

from optima_tpu.checkpoint import CheckpointTensors
from optima_tpu.masks.source import checked


@dataclasses.dataclass(frozen=True)
class RunMasks:
    """The masks in RUN/checkpoint, as the run kept them."""

    tensors: CheckpointTensors
    origin: str
    how: ClassVar[str] = "masks of a run directory"
    from_zeros: ClassVar[bool] = False

    def names(self) -> tuple[str, ...]:
        return self.tensors.pruned()

    def read(self, name: str, shape: tuple[int, int]) -> np.ndarray:
        return checked(self.tensors.mask(name), name, shape, self.origin)
