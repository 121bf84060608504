"""Masks in a safetensors file: a bool or 0/1 matrix for each weight."""

from pathlib import Path

from optima_tpu.errors import UserError
from optima_tpu.models.checkpoints.folder import SafetensorsSource
from optima_tpu.models.masks.source import MaskSource, weight_names


def open_safetensors(path: Path, origin: str) -> MaskSource:
    """Opens a file that maps "<parameter>" to [d_out, d_in]; 1 means kept.

    Raises:
      UserError: it is damaged, or holds a tensor that is no matrix.
    """
    tensors = SafetensorsSource([path])
    for key in tensors.names():
        if tensors.dtype(key).name.startswith("float8"):  # which safetensors cannot read into numpy
            raise UserError(
                f"expected masks in {path}, matrices of 0 and 1, but {key!r} is stored as {tensors.dtype(key)}; save it as bool"
            )
        if len(tensors.shape(key)) != 2:
            raise UserError(
                f"expected masks in {path}, matrices of 0 and 1, but {key!r} has shape "
                f"{tensors.shape(key)}; to take the zeros of a pruned model, give its folder"
            )
    return MaskSource(
        origin, "safetensors of 0/1 matrices", weight_names(tensors.names(), origin), lambda key, shape: tensors.read(key)
    )
