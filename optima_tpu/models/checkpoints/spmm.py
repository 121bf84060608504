"""Strided N:M matrices as the operands of the Pallas kernel of vLLM's TPU backend.

The kernel (vllm-project/tpu-inference, ``tpu_inference/kernels/structured_sparse_matmul/v1/spmm.py``) stores a matrix whose rows
obey ``N:M@S`` as its kept values, and their indices inside their groups:

    nonzeros   [N, d_out, d_in / M]               the k-th kept value of every group, in the dtype of the weight
    metadata   [N, d_out bits / 32, d_in / M]     int32, the indices of 32 / bits rows in a word, the first row in the lowest bits

Entry ``c S + j`` of the last axis is the group of the inputs ``c M S + j + i S`` for ``0 <= i < M``. An index has 1, 2 or 4 bits,
the least power of two that holds ``M - 1``. No program that loads models calls the kernel yet, so no file has this layout.
"""

from typing import NamedTuple

import numpy as np

from optima_tpu.errors import UserError
from optima_tpu.method.patterns import NM

_LANES, _SUBLANES, _MOST = 128, 8, 16


class Operands(NamedTuple):
    """What the kernel reads of a sparse matrix. The axes are those of the stored matrix, transposed or not.

    Attributes:
      nonzeros: [n, d_out, d_in / m], or [n, d_in / m, d_out] if transposed.
      metadata: int32, as ``nonzeros`` with the middle axis divided by ``32 / bits``.
    """

    nonzeros: np.ndarray
    metadata: np.ndarray


def operands(weight: np.ndarray, keep: np.ndarray, pattern: NM, transposed: bool = False) -> Operands:
    """The operands of a pruned matrix, for ``x [tokens, d_in]`` times the matrix.

    They are the arguments ``nonzeros`` and ``metadata`` of ``structured_spmm((n, m), nonzeros, metadata, x, rhs_sparse=True,
    contract_sparse=True, rhs_transpose=not transposed, stride=stride, ...)``.

    Args:
      weight: [d_out, d_in].
      keep: [d_out, d_in] bool, exactly n of every group.
      transposed: store [d_in, d_out]. Then the stride is a multiple of 8 sublanes, 16 in bfloat16 and 32 in int8; of 128 lanes
        else.

    Raises:
      UserError: the mask does not obey the pattern, or the kernel does not read the pattern or the shape.
    """
    if violation := pattern.violation(keep):
        raise UserError(f"{violation}; give the mask of a run with --pattern {pattern}")
    least = _SUBLANES * max(1, 4 // weight.dtype.itemsize) if transposed else _LANES
    if pattern.m > _MOST or pattern.stride % least:
        raise UserError(
            f"expected a pattern N:M@STRIDE with M of at most {_MOST} and a stride that is a multiple of {least}, got {pattern}; "
            f"prune with --pattern 2:4@{least}"
        )
    # The first n are the kept ones, in the order of the inputs.
    index = np.argsort(~pattern.groups(keep), axis=-1, kind="stable")[..., : pattern.n]
    values = np.take_along_axis(pattern.groups(weight), index, axis=-1)
    axes = (2, 1, 0) if transposed else (2, 0, 1)
    return Operands(np.ascontiguousarray(values.transpose(axes)), _words(index.transpose(axes), _bits(pattern.m)))


def _bits(m: int) -> int:
    """The least power of two that is enough bits for an index below ``m``."""
    return 1 << ((m - 1).bit_length() - 1).bit_length()


def _words(index: np.ndarray, bits: int) -> np.ndarray:
    """Indices [n, rows, columns] as int32 words of ``32 / bits`` rows."""
    each = 32 // bits
    n, rows, columns = index.shape
    if rows % each:
        raise UserError(f"expected a multiple of {each} rows, which share a word of the kernel's indices, got {rows}")
    fields = index.reshape(n, -1, each, columns).astype(np.uint32) << np.arange(0, 32, bits, dtype=np.uint32)[:, None]
    return np.bitwise_or.reduce(fields, axis=2).view(np.int32)
