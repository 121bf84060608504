"""Inverses of positive definite matrices, in matrix products."""

import jax
import jax.numpy as jnp
from jax import Array

from optima_tpu.features import WHOLE, matmul
from optima_tpu.solvers.panels import inverse_by_panels

_LEAF = 256  # matrices up to this size are factorised at once


def inverse(matrix: Array) -> Array:
    """``M^-1`` of a positive definite [d, d] float32; NaN where it is not positive definite in float32."""
    root = inverse_cholesky(matrix)
    return matmul(root.T, root)


def inverse_cholesky(matrix: Array) -> Array:
    """``L^-1`` where ``matrix = L L'``, of a [d, d] float32; NaN where it is not positive definite in float32.

    By halves: as many operations as a factorisation and a triangular solve, in products. LAPACK's threads and those of XLA wait
    for each other's cores, and accelerators have no fast factorisation of large matrices. A TPU's compiler takes minutes for the
    many programs that this makes of a large matrix, so there it is done by panels, in a loop with 3.6 times the operations.
    """
    if matrix.shape[0] <= _LEAF:
        return _at_once(matrix)
    return jax.lax.platform_dependent(matrix, tpu=lambda matrix: inverse_by_panels(matrix, WHOLE)[1], default=_by_halves)


def _by_halves(matrix: Array) -> Array:
    size = matrix.shape[0]
    if size <= _LEAF:
        return _at_once(matrix)
    half = size // 2
    first = _by_halves(matrix[:half, :half])
    below = matmul(matrix[half:, :half], first.T)
    second = _by_halves(matrix[half:, half:] - matmul(below, below.T))
    return jnp.block([[first, jnp.zeros((half, size - half), matrix.dtype)], [-matmul(second, matmul(below, first)), second]])


def _at_once(matrix: Array) -> Array:
    identity = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    return jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(matrix), identity, lower=True)
