"""The interface of imported masks, the same for all file formats."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from optima_tpu.errors import UserError

UNDERSTOOD = (
    "a MaskLLM npz, an npz or safetensors file of 0/1 matrices, pruning_masks.npz or the folder it is in, "
    "a run directory, ProxSparse's folder of .pt files, one .pt file of a dictionary of masks, or a pruned "
    "checkpoint (folder, .gguf file or hub id)"
)


@dataclasses.dataclass(frozen=True)
class MaskSource:
    """The masks of pruned weights.

    Only :meth:`read` reads data, and nothing is cached.

    Attributes:
      origin: what the user typed.
      how: the format that was recognised, such as "MaskLLM npz".
      keys: name of each weight, "model.layers.0.mlp.up_proj.weight" -> its key in the source.
      load: reads one mask by its key; it also gets the shape of the weight, for formats that do not store it.
      from_zeros: the masks are the zeros of a checkpoint. A checkpoint has a tensor for every layer, pruned or not, and a kept
        weight may be zero.
    """

    origin: str
    how: str
    keys: Mapping[str, str]
    load: Callable[[str, tuple[int, int]], np.ndarray]
    from_zeros: bool = False

    def names(self) -> tuple[str, ...]:
        """The names of the weights, sorted."""
        return tuple(sorted(self.keys))

    def read(self, name: str, shape: tuple[int, int]) -> np.ndarray:
        """One mask, [d_out, d_in] bool, True where the weight is kept.

        Args:
          shape: the shape of the weight. Packed masks may not store it; other masks must have it.

        Raises:
          UserError: the mask has another shape or other values than 0 and 1, or its file is damaged.
        """
        return checked(self.load(self.keys[name], shape), name, shape, self.origin)


def weight_names(keys: Iterable[str], origin: str) -> dict[str, str]:
    """The name of each weight -> its key in the file.

    A key may end in ".weight", in ".mask", in both or in neither.

    Raises:
      UserError: there are no keys, or two keys name the same weight.
    """
    names: dict[str, str] = {}
    for key in keys:
        name = key.removesuffix(".mask").removesuffix(".weight") + ".weight"
        if name in names:
            raise UserError(f"{origin} holds two masks for {name}, {names[name]!r} and {key!r}: keep one of them")
        names[name] = key
    if not names:
        raise UserError(f"expected masks in {origin}, got none; known are {UNDERSTOOD}")
    return names


def checked(mask: np.ndarray, name: str, shape: tuple[int, int], origin: str) -> np.ndarray:
    """The mask as bool, if it has this shape and no values but 0 and 1.

    Raises:
      UserError: the array has another shape or other values.
    """
    if mask.shape != tuple(shape):
        hint = " (it looks transposed)" if mask.shape == tuple(shape)[::-1] else ""
        raise UserError(
            f"{name}: expected a mask of the weight's shape {tuple(shape)}, got {mask.shape}{hint} in "
            f"{origin}; give masks made for this model"
        )
    if mask.dtype == bool:
        return mask
    keep = mask == 1
    other = ~keep & (mask != 0)
    if other.any():
        raise UserError(
            f"{name}: expected a mask of 0 and 1, {origin} holds {mask[other][0]}; "
            "to take the zeros of a pruned model, give its folder"
        )
    return keep
