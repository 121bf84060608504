"""Inverses of positive definite matrices, in matrix products."""

import jax
import jax.numpy as jnp
from jax import Array

from optima_tpu.features import matmul

_LEAF = 256  # matrices up to this size are factorised at once


def inverse(matrix: Array) -> Array:
    """``M^-1`` of a positive definite [d, d] float32; NaN where it is not positive definite in float32."""
    root = inverse_cholesky(matrix)
    return matmul(root.T, root)


def inverse_cholesky(matrix: Array) -> Array:
    """``L^-1`` where ``matrix = L L'``, by halves: as many operations as a factorisation and a triangular solve, in products.

    LAPACK's threads and those of XLA wait for each other's cores, and accelerators have no fast factorisation of large matrices.
    """
    size = matrix.shape[0]
    if size <= _LEAF:
        return jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(matrix), jnp.eye(size, dtype=matrix.dtype), lower=True)
    half = size // 2
    first = inverse_cholesky(matrix[:half, :half])
    below = matmul(matrix[half:, :half], first.T)
    second = inverse_cholesky(matrix[half:, half:] - matmul(below, below.T))
    return jnp.block([[first, jnp.zeros((half, size - half), matrix.dtype)], [-matmul(second, matmul(below, first)), second]])
