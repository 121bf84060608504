"""The TPU kernel for N:M multiplies by matrices that strided patterns prune.

Runs where ``tpu-inference`` is installed.
"""

import functools
import importlib.util
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from optima_tpu.method.patterns import NM


@pytest.mark.parametrize(
    "pattern, dtype, transposed, shape",
    [
        (NM(2, 4, 128), ml_dtypes.bfloat16, False, (32, 1024)),
        (NM(2, 4, 16), ml_dtypes.bfloat16, True, (256, 256)),
        (NM(4, 8, 32), np.int8, True, (128, 512)),
        (NM(1, 2, 128), np.float32, False, (64, 512)),
        (NM(5, 16, 8), np.float32, True, (128, 1024)),
    ],
    ids=str,
)
def test_the_kernel_multiplies_by_what_a_strided_pattern_prunes(pattern, dtype, transposed, shape, monkeypatch):
    """Interpreted, without a TPU: ``pip install --no-deps tpu-inference``."""
    if (package := importlib.util.find_spec("tpu_inference")) is None:
        pytest.skip("tpu-inference is not installed")
    path = Path(package.submodule_search_locations[0]) / "kernels/structured_sparse_matmul/v1/spmm.py"
    spec = importlib.util.spec_from_file_location("spmm_reference", path)
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    monkeypatch.setattr(reference.pl, "pallas_call", functools.partial(reference.pl.pallas_call, interpret=True))

    rng = np.random.default_rng(0)
    keep = np.asarray(pattern.keep_mask(jnp.asarray(rng.random(shape), jnp.float32)))
    weight = np.where(keep, rng.integers(1, 100, shape), 0).astype(dtype)
    sparse = reference.Sparsifier(
        *(jnp.asarray(array.T if transposed else array) for array in (weight, keep.astype(np.int32))),
        sparsity=(pattern.n, pattern.m),
        sparse_dim=0 if transposed else 1,
        stride=pattern.stride,
    )
    x = rng.integers(-3, 4, (32, shape[1])).astype(dtype)
    product = reference.structured_spmm(
        (pattern.n, pattern.m),
        *map(jnp.asarray, (sparse.nonzeros, sparse.metadata, x)),
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
    np.testing.assert_array_equal(product, x.astype(np.float32) @ weight.astype(np.float32).T)
