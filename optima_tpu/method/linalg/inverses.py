"""Inverses of positive definite matrices; TPUs of a mesh share the work."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from optima_tpu.method.linalg.blocked_cholesky import inverse_by_panels
from optima_tpu.method.linalg.features import WHOLE, Features, Product, divided, matmul, rough_matmul

_LEAF = 256  # matrices up to this size are factorised in one call

# From this ridge on, R too has rounded products on TPUs, where it only chooses. With factors of 16 bits, as three passes keep,
# the inverses of SmolLM2's Hessians (576 and 1,536 inputs, some with massive activations) are then off by at most 5e-4; at 0.001
# by 1.3e-3.
ROUGH_RIDGE = 0.01


def inverse(matrix: Float[Array, "d d"], ridge: float) -> Float[Array, "d d"]:
    """``M^-1`` for choices only, such as ADMM's mask or a mask exchange.

    NaN where M is not positive definite in float32. The product ``R'R`` is always ``features.rough_matmul``. TPUs make ``R`` by
    it too if the ridge is far above what its rounding can take from an eigenvalue; other platforms make ``R`` by full products.

    Args:
      matrix: [d, d] float32, a Hessian of unit diagonal plus a ridge.
      ridge: a number that no eigenvalue of ``matrix`` is below.
    """
    product = rough_matmul if ridge >= ROUGH_RIDGE else matmul
    return _made(matrix, lambda matrix: _square(_root(matrix, product)), lambda matrix: together(matrix, product)[0])


def inverse_cholesky(matrix: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """``L^-1`` for ``matrix = L L'``; NaN if none exists in float32."""
    return inverse_and_root(matrix)[1]


def inverse_and_root(matrix: Float[Array, "d d"]) -> tuple[Float[Array, "d d"], Float[Array, "d d"]]:
    """``X = M^-1 = R'R`` by rough products, and ``R = L^-1`` in full float32.

    The matrix is replicated. TPUs share the work (:func:`together`) if the call is traced on a mesh: inside ``shard_map``,
    where all devices must call it, or under ``jax.sharding.use_abstract_mesh``. Otherwise this would be the only cost of a
    layer that does not fall with the number of devices. Each device computes the whole inverse if there is no mesh, if
    ``divided`` is False, and on other platforms. CPU devices would wait for each other's threads at every panel. GPUs need less
    time alone, and their network may be slow.
    """
    return _made(matrix, _both, together)


def together(matrix: Float[Array, "d d"], product: Product = matmul) -> tuple[Float[Array, "d d"], Float[Array, "d d"]]:
    """As :func:`inverse_and_root`, each device computing its own columns."""
    mesh = jax.sharding.get_abstract_mesh()

    def share(matrix: Array) -> tuple[Array, Array]:
        features = Features(mesh.axis_names)
        columns = features.part(matrix).T  # the matrix is symmetric
        made, root = inverse_by_panels(columns, features, product=product)
        return features.whole(made), features.whole(root)

    return share(matrix) if mesh.manual_axes else jax.shard_map(share, in_specs=P(), out_specs=P(), check_vma=False)(matrix)


_Made = TypeVar("_Made", Array, tuple[Array, Array])
"""An inverse, or an inverse and R."""


def _made(matrix: Array, each: Callable[[Array], _Made], shared: Callable[[Array], _Made]) -> _Made:
    """Calls ``shared`` on the TPUs of a mesh, ``each`` elsewhere."""
    if not divided(len(matrix), jax.sharding.get_abstract_mesh().size):
        return each(matrix)
    return jax.lax.platform_dependent(matrix, tpu=shared, default=each)


def _both(matrix: Array) -> tuple[Array, Array]:
    root = _root(matrix, matmul)
    # Not by halves: the parts would be in memory together with X and R, when the solver's memory is at its peak.
    return rough_matmul(root.T, root), root


def _root(matrix: Array, panels: Product) -> Array:
    """``L^-1`` by halves, or on TPUs by panels.

    Halves take as many operations as a factorisation and a triangular solve, but as matrix products. On a CPU the threads of
    LAPACK and of XLA compete for cores, and accelerators have no fast factorisation of large matrices. For a large matrix the
    halves become many operations of different shapes, which a TPU's compiler needs minutes for. So TPUs use panels, in a loop
    with 3.6 times the operations.
    """
    if len(matrix) <= _LEAF:
        return _at_once(matrix)
    return jax.lax.platform_dependent(
        matrix, tpu=lambda matrix: inverse_by_panels(matrix, WHOLE, product=panels)[1], default=_by_halves
    )


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
    """``R'R`` of a lower triangular R, which only chooses.

    By halves it needs a third of the operations; TPUs do not use halves, see :func:`_root`.
    """
    return jax.lax.platform_dependent(root, tpu=lambda root: rough_matmul(root.T, root), default=_square_by_halves)


def _square_by_halves(root: Array) -> Array:
    """``R'R`` without multiplying zeros or computing a block twice."""
    size = len(root)
    if size <= _LEAF:
        return rough_matmul(root.T, root)
    half = size // 2
    first, below, second = root[:half, :half], root[half:, :half], root[half:, half:]
    corner = rough_matmul(second.T, below)
    return jnp.block([[_square_by_halves(first) + rough_matmul(below.T, below), corner.T], [corner, _square_by_halves(second)]])


def _at_once(matrix: Array) -> Array:
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)
    return jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(matrix), identity, lower=True)
