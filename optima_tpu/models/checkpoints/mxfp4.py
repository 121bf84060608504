"""Experts in MXFP4, as gpt-oss is published, read as bfloat16.

bfloat16 holds each of their values exactly. A block of 32 inputs of one output shares a scale. The weight is
``element * scale`` (OCP Microscaling Formats v1.0, 5.3.3, 5.4.1 and 6.3): an element has 4 bits, E2M1, with the values 0, .5,
1, 1.5, 2, 3, 4, 6 and their negatives; a scale has 8, E8M0, which is ``2^(byte - 127)``, and NaN for 255. Two tensors stand for
the weights ``NAME`` [experts, d_in, d_out]:

    NAME_blocks   [experts, d_out, d_in / 32, 16] uint8: two elements a byte, the first input in the low four bits
    NAME_scales   [experts, d_out, d_in / 32] uint8

``transformers`` reads them in the same way (5.24, ``integrations/mxfp4.py``), except that it takes a scale of 255 for 2^128.
"""

import functools

import ml_dtypes
import numpy as np

from optima_tpu.errors import UserError
from optima_tpu.models.checkpoints.source import ComputedTensors, LazyTensor, TensorSource

BLOCKS, SCALES = "_blocks", "_scales"
_INPUTS, _BYTES = 32, 16

_ALL = np.arange(256, dtype=np.uint8)
_ELEMENTS = np.stack([_ALL & 15, _ALL >> 4], axis=1).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
"""The two elements of each byte, [256, 2]."""
_POWERS = _ALL.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
"""The scale of each byte, [256]."""


def expand(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Expands MXFP4 blocks and scales to weights [..., groups * 32] bfloat16.

    Args:
      blocks: [..., groups, 16] uint8.
      scales: [..., groups] uint8.
    """
    weights = _ELEMENTS[blocks].reshape(*scales.shape, _INPUTS)
    with np.errstate(over="ignore"):  # 2^128 and more is infinite in float32 as in bfloat16, and refused when the model is loaded
        weights *= _POWERS[scales][..., None]
    return weights.reshape(*scales.shape[:-1], scales.shape[-1] * _INPUTS).astype(ml_dtypes.bfloat16)


def without_mxfp4(stored: TensorSource) -> ComputedTensors:
    """The tensors of a folder; MXFP4 weights are expanded on reading.

    Raises:
      UserError: the two tensors of a weight do not fit one another.
    """
    computed, names = dict[str, LazyTensor](), set(stored.names())
    halves = {name for name in names if name.endswith((BLOCKS, SCALES))}
    for name in sorted({half.removesuffix(BLOCKS).removesuffix(SCALES) for half in halves}):
        for half, other in ((BLOCKS, SCALES), (SCALES, BLOCKS)):
            if name + half not in names:
                raise UserError(f"expected {name + half} beside {name + other}, got none: download the model again")
        if name in names:
            raise UserError(f"expected {name} in MXFP4 alone, got it beside {name + BLOCKS}: download the model again")
        blocks, scales = stored.shape(name + BLOCKS), stored.shape(name + SCALES)
        kinds = stored.dtype(name + BLOCKS), stored.dtype(name + SCALES)
        if len(blocks) != 4 or blocks[3] != _BYTES or scales != blocks[:3] or {*kinds} != {np.dtype(np.uint8)}:
            raise UserError(
                f"{name + BLOCKS}: expected uint8 [experts, d_out, groups, {_BYTES}] and scales in uint8 [experts, d_out, "
                f"groups], got {kinds[0]} {list(blocks)} and {kinds[1]} {list(scales)}: download the model again"
            )
        shape = blocks[0], blocks[2] * _INPUTS, blocks[1]
        computed[name] = LazyTensor(shape, np.dtype(ml_dtypes.bfloat16), functools.partial(_read, stored, name))
    return ComputedTensors(stored, computed, halves)


def _read(stored: TensorSource, name: str, index: tuple[slice, ...]) -> np.ndarray:
    experts, inputs, outputs = index
    first = inputs.start // _INPUTS
    part = experts, outputs, slice(first, -(-inputs.stop // _INPUTS))
    weights = expand(stored.read(name + BLOCKS, part), stored.read(name + SCALES, part))
    before = first * _INPUTS
    return np.swapaxes(weights[..., inputs.start - before : inputs.stop - before : inputs.step], 1, 2)
