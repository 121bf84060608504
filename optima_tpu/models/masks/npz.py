"""Masks in npz files: MaskLLM's, this program's own, and plain matrices."""

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from optima_tpu.errors import UserError, refusing
from optima_tpu.models.checkpoints.packed import MASKS, SHAPE
from optima_tpu.models.masks.source import UNDERSTOOD, MaskSource, weight_names

MASKLLM = "mask_compressed.npz"
"""The file that MaskLLM publishes beside or without a model."""

Entries = Mapping[str, tuple[tuple[int, ...], np.dtype]]


def open_npz(path: Path, origin: str) -> MaskSource:
    """Recognises one of three layouts by all shapes and dtypes; 1 means kept.

    MaskLLM (NVlabs/MaskLLM, tool_compress_mask.py): "<parameter>.mask" -> [ceil(d_out d_in / 8)] uint8,
    ``numpy.packbits`` of the flattened mask, which does not store the shape.

    This program's own: see :func:`optima_tpu.models.checkpoints.export.read_masks`.

    Plain: "<parameter>" -> [d_out, d_in] bool, or numbers that are 0 and 1.

    Raises:
      UserError: the file is damaged, or has none of these layouts.
    """
    entries = _entries(path)
    if any(key.endswith(SHAPE) for key in entries):
        for key in entries:
            partner = key.removesuffix(SHAPE) if key.endswith(SHAPE) else key + SHAPE
            if partner not in entries:
                raise UserError(f"{path} holds {key!r} without {partner!r}: it is not all of {MASKS}; export again")
        keys = [key for key in entries if not key.endswith(SHAPE)]
        how, unpack = f"{MASKS} of this program", _rows
    elif entries and all(len(shape) == 1 and dtype == np.uint8 for shape, dtype in entries.values()):
        how, keys, unpack = "MaskLLM npz", list(entries), _flat
    else:
        for key, (shape, dtype) in entries.items():
            if len(shape) != 2 or dtype.kind not in "biuf":
                raise UserError(f"expected masks in {path}, but {key!r} is {dtype}{list(shape)}; known are {UNDERSTOOD}")
        how, keys, unpack = "npz of 0/1 matrices", list(entries), _plain

    def load(key: str, shape: tuple[int, int]) -> np.ndarray:
        most = max(8 * shape[0] * shape[1], 1 << 10)
        for name in (key, key + SHAPE):
            size = entries.get(name, ((), np.dtype(bool)))
            if math.prod(size[0]) * size[1].itemsize > most:
                raise UserError(
                    f"{key}: expected at most {most} bytes of a mask of shape {tuple(shape)} in {path}, got an array of {size[1]}"
                    f"{list(size[0])}; give masks made for this model"
                )
        # Exception, because zipfile, its decompressors and numpy's headers have many exceptions for damage.
        unread = refusing(Exception, f"{key}: can't be read from {path}", "get or write the file again")
        with unread, np.load(path, allow_pickle=False) as file:
            return unpack(file, key, shape)

    return MaskSource(origin, how, weight_names(keys, origin), load)


def _entries(path: Path) -> Entries:
    """Shape and dtype of every array, from the headers alone."""
    headers = {}
    unread = refusing(Exception, f"{path} can't be read as an npz file", "get or write it again")  # as in open_npz
    with unread, zipfile.ZipFile(path) as archive:
        for entry in archive.namelist():
            with archive.open(entry) as file:
                # Version 3.0 is written for field names that are not Latin-1, which no mask has.
                read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
                    np.lib.format.read_magic(file)
                ]
                shape, _, dtype = read(file)
                headers[entry.removesuffix(".npy")] = shape, dtype
    return headers


def _flat(file: np.lib.npyio.NpzFile, key: str, shape: tuple[int, int]) -> np.ndarray:
    packed, size = file[key], shape[0] * shape[1]
    bits = np.unpackbits(packed)
    if len(packed) != -(-size // 8) or bits[size:].any():
        raise UserError(
            f"{key}: expected the {size} packed bits of a mask of the weight's shape {tuple(shape)}, got "
            f"{len(packed)} bytes that hold others; give masks made for this model"
        )
    return bits[:size].view(bool).reshape(shape)


def _rows(file: np.lib.npyio.NpzFile, key: str, shape: tuple[int, int]) -> np.ndarray:
    d_out, d_in = (int(size) for size in file[key + SHAPE])
    packed = file[key]
    if packed.shape != (d_out, -(-d_in // 8)):
        raise ValueError(f"packed bits {packed.shape} do not belong to a mask of shape {(d_out, d_in)}")
    return np.unpackbits(packed, axis=1, count=d_in).view(bool)


def _plain(file: np.lib.npyio.NpzFile, key: str, shape: tuple[int, int]) -> np.ndarray:
    return file[key]
