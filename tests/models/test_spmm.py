"""The operands of the TPU kernel for N:M, against its documented layout and, where it is installed, against the kernel."""

import functools
import importlib.util
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from optima_tpu.errors import UserError
from optima_tpu.method.patterns import NM
from optima_tpu.models.checkpoints.spmm import operands

# Pattern, dtype, transposed, shape.
CASES = [
    (NM(2, 4, 128), ml_dtypes.bfloat16, False, (32, 1024)),
    (NM(2, 4, 16), ml_dtypes.bfloat16, True, (256, 256)),
    (NM(4, 8, 32), np.int8, True, (128, 512)),
    (NM(1, 2, 128), np.float32, False, (64, 512)),
    (NM(5, 16, 8), np.float32, True, (128, 1024)),
]


def pruned(pattern: NM, dtype, shape) -> tuple[np.ndarray, np.ndarray]:
    """A weight without a zero where it is kept, and its mask."""
    rng = np.random.default_rng(0)
    keep = np.asarray(pattern.keep_mask(jnp.asarray(rng.random(shape), jnp.float32)))
    return np.where(keep, rng.integers(1, 100, shape), 0).astype(dtype), keep


@pytest.mark.parametrize("pattern, dtype, transposed, shape", CASES, ids=str)
def test_every_kept_weight_is_where_the_layout_says(pattern, dtype, transposed, shape):
    weight, keep = pruned(pattern, dtype, shape)
    nonzeros, metadata = operands(weight, keep, pattern, transposed)
    bits = {2: 1, 4: 2, 8: 4, 16: 4}[pattern.m]
    assert nonzeros.dtype == dtype and metadata.dtype == np.int32
    back, seen = np.zeros_like(weight), np.zeros_like(keep)
    place = np.arange(shape[1] // pattern.m)
    first = place // pattern.stride * pattern.m * pattern.stride + place % pattern.stride
    for kth in range(pattern.n):
        words = np.repeat(metadata[kth], 32 // bits, axis=0)
        rows = np.arange(len(words))[:, None]
        index = (words >> rows % (32 // bits) * bits) & (2**bits - 1)
        values = nonzeros[kth]
        if transposed:
            index, values = index.T, values.T
        at = np.arange(shape[0])[:, None], first + index * pattern.stride
        back[at], seen[at] = values, True
    assert (seen == keep).all() and (back == weight).all()


@pytest.mark.parametrize("pattern, dtype, transposed, shape", CASES, ids=str)
def test_they_are_the_reference_s_and_the_kernel_multiplies_them(pattern, dtype, transposed, shape, monkeypatch):
    """In the interpreter of Pallas: no TPU is needed. ``pip install --no-deps tpu-inference`` is enough."""
    if (package := importlib.util.find_spec("tpu_inference")) is None:
        pytest.skip("tpu-inference is not installed")
    path = Path(package.submodule_search_locations[0]) / "kernels/structured_sparse_matmul/v1/spmm.py"
    spec = importlib.util.spec_from_file_location("spmm_reference", path)
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    monkeypatch.setattr(reference.pl, "pallas_call", functools.partial(reference.pl.pallas_call, interpret=True))

    weight, keep = pruned(pattern, dtype, shape)
    nonzeros, metadata = operands(weight, keep, pattern, transposed)
    sparse = reference.Sparsifier(
        *(jnp.asarray(array.T if transposed else array) for array in (weight, keep.astype(np.int32))),
        sparsity=(pattern.n, pattern.m),
        sparse_dim=0 if transposed else 1,
        stride=pattern.stride,
    )
    np.testing.assert_array_equal(nonzeros, sparse.nonzeros)
    np.testing.assert_array_equal(metadata, sparse.metadata)
    x = np.random.default_rng(1).integers(-3, 4, (32, shape[1])).astype(dtype)
    found = reference.structured_spmm(
        (pattern.n, pattern.m),
        *map(jnp.asarray, (nonzeros, metadata, x)),
        rhs_sparse=True,
        contract_sparse=True,
        rhs_transpose=not transposed,
        stride=pattern.stride,
        block_m=32,
        block_k=shape[1],
        block_n=shape[0],
        out_dtype=jnp.float32,
    )
    # Sums of integers, exact in float32.
    np.testing.assert_array_equal(found, x.astype(np.float32) @ weight.astype(np.float32).T)


@pytest.mark.parametrize(
    "pattern, transposed, message",
    [
        (NM(2, 4, 16), False, "multiple of 128, got 2:4@16; prune with --pattern 2:4@128"),
        (NM(2, 4, 8), True, "multiple of 16, got 2:4@8; prune with --pattern 2:4@16"),
        (NM(2, 4), True, "multiple of 16, got 2:4; prune with"),
    ],
)
def test_what_the_kernel_does_not_read_is_refused(pattern, transposed, message):
    weight, keep = pruned(pattern, ml_dtypes.bfloat16, (32, 512))
    with pytest.raises(UserError, match=message):
        operands(weight, keep, pattern, transposed)


def test_a_mask_of_another_pattern_and_rows_that_fill_no_word_are_refused():
    weight, keep = pruned(NM(2, 4), np.float32, (32, 512))
    with pytest.raises(UserError, match="expected 2 kept of every 4, got .* give the mask of a run with --pattern 2:4@128"):
        operands(weight, keep, NM(2, 4, 128))
    weight, keep = pruned(NM(2, 4, 128), np.float32, (24, 512))
    with pytest.raises(UserError, match="expected a multiple of 16 rows"):
        operands(weight, keep, NM(2, 4, 128))
