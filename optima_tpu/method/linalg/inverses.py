"""Inverses of positive definite matrices, in matrix products; on TPUs by all devices of the mesh together."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from optima_tpu.method.linalg.blocked_cholesky import inverse_by_panels
from optima_tpu.method.linalg.features import WHOLE, Features, divided, matmul

_LEAF = 256  # matrices up to this size are factorised at once


def inverse(matrix: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """``M^-1`` of a positive definite [d, d] float32; NaN where it is not positive definite in float32."""
    return _made(matrix, lambda matrix: _square(_root(matrix)), lambda matrix: together(matrix)[0])


def inverse_cholesky(matrix: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """``L^-1`` where ``matrix = L L'``, of a [d, d] float32; NaN where it is not positive definite in float32."""
    return inverse_and_root(matrix)[1]


def inverse_and_root(matrix: Float[Array, "d d"]) -> tuple[Float[Array, "d d"], Float[Array, "d d"]]:
    """Both of the above, ``X = R'R`` and ``R``, of a matrix that every device has.

    Traced on a mesh, be it inside ``shard_map``, where all devices must come here, or where ``jax.sharding.use_abstract_mesh``
    names one, TPUs make it :func:`together`: else it is the one thing that a layer costs every device, however many share its
    rows. Each does all of it where there is no mesh, where ``divided`` is False, and on other devices: those of a CPU wait
    for each other's threads at every panel, and GPUs, which have less to do alone, may be joined by a slow network.
    """
    return _made(matrix, _both, together)


def together(matrix: Float[Array, "d d"]) -> tuple[Float[Array, "d d"], Float[Array, "d d"]]:
    """As :func:`inverse_and_root`: every device of the mesh makes its share of the columns, and gets those of the others."""
    mesh = jax.sharding.get_abstract_mesh()

    def share(matrix: Array) -> tuple[Array, Array]:
        features = Features(mesh.axis_names)
        columns = features.mine(matrix).T  # it is symmetric
        made, root = inverse_by_panels(columns, features)
        return features.whole(made), features.whole(root)

    return share(matrix) if mesh.manual_axes else jax.shard_map(share, in_specs=P(), out_specs=P(), check_vma=False)(matrix)


_Made = TypeVar("_Made", Array, tuple[Array, Array])
"""An inverse, or an inverse and R."""


def _made(matrix: Array, each: Callable[[Array], _Made], shared: Callable[[Array], _Made]) -> _Made:
    """By ``shared`` on TPUs of one mesh, by ``each`` elsewhere; see :func:`inverse_and_root`."""
    if not divided(len(matrix), jax.sharding.get_abstract_mesh().size):
        return each(matrix)
    return jax.lax.platform_dependent(matrix, tpu=shared, default=each)


def _both(matrix: Array) -> tuple[Array, Array]:
    root = _root(matrix)
    # Not by halves: their parts would lie beside X and R, where a solver needs the most memory.
    return matmul(root.T, root), root


def _root(matrix: Array) -> Array:
    """``L^-1``, by halves: as many operations as a factorisation and a triangular solve, in products.

    LAPACK's threads and those of XLA wait for each other's cores, and accelerators have no fast factorisation of large matrices.
    A TPU's compiler takes minutes for the many programs that this makes of a large matrix, so there it is done by panels, in a
    loop with 3.6 times the operations.
    """
    if len(matrix) <= _LEAF:
        return _at_once(matrix)
    return jax.lax.platform_dependent(matrix, tpu=lambda matrix: inverse_by_panels(matrix, WHOLE)[1], default=_by_halves)


def _by_halves(matrix: Array) -> Array:
    size = len(matrix)
    if size <= _LEAF:
        return _at_once(matrix)
    half = size // 2
    first = _by_halves(matrix[:half, :half])
    below = matmul(matrix[half:, :half], first.T)
    second = _by_halves(matrix[half:, half:] - matmul(below, below.T))
    return jnp.block([[first, jnp.zeros((half, size - half), matrix.dtype)], [-matmul(second, matmul(below, first)), second]])


def _square(root: Array) -> Array:
    """``R'R`` of a lower triangular R; in a third of the operations where it is done by halves, see :func:`_root`."""
    return jax.lax.platform_dependent(root, tpu=lambda root: matmul(root.T, root), default=_square_by_halves)


def _square_by_halves(root: Array) -> Array:
    """Without products of zeros, and without those that symmetry gives."""
    size = len(root)
    if size <= _LEAF:
        return matmul(root.T, root)
    half = size // 2
    first, below, second = root[:half, :half], root[half:, :half], root[half:, half:]
    corner = matmul(second.T, below)
    return jnp.block([[_square_by_halves(first) + matmul(below.T, below), corner.T], [corner, _square_by_halves(second)]])


def _at_once(matrix: Array) -> Array:
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)
    return jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(matrix), identity, lower=True)
