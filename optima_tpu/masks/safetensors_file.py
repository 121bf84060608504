"""Masks in a safetensors file: one matrix of booleans, or of the numbers 0 and 1, for each weight."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from optima_tpu.errors import UserError
from optima_tpu.masks.source import checked, weight_names
from optima_tpu.weights.folder import SafetensorsSource


@dataclasses.dataclass(frozen=True)
class SafetensorsMasks:
    """The masks of one safetensors file; see :func:`open_safetensors`."""

    tensors: SafetensorsSource
    origin: str
    keys: Mapping[str, str]
    how: ClassVar[str] = "safetensors of 0/1 matrices"
    from_zeros: ClassVar[bool] = False

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.keys))

    def read(self, name: str, shape: tuple[int, int]) -> np.ndarray:
        return checked(self.tensors.read(self.keys[name]), name, shape, self.origin)


def open_safetensors(path: Path, origin: str) -> SafetensorsMasks:
    """Opens a file that maps "<parameter>" to [d_out, d_in]; 1 means kept.

    Raises:
      UserError: it is damaged, or holds a tensor that is no matrix.
    """
    tensors = SafetensorsSource([path])
    for key in tensors.names():
        if len(tensors.shape(key)) != 2:
            raise UserError(f"expected masks in {path}, matrices of 0 and 1, but {key!r} has shape "
                            f"{tensors.shape(key)}; to take the zeros of a pruned model, give its folder")
    return SafetensorsMasks(tensors, origin, weight_names(tensors.names(), origin))
