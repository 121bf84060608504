"""The inverse of a positive definite matrix, by blocked Cholesky in a loop.

With ``A = L L'`` and ``R = L^-1`` the inverse is ``X = R'R``. The loop takes one panel of columns after the other. Columns may
be sharded over a mesh axis: then the device that owns the panel broadcasts it, and every device updates its own columns.

    L_kk L_kk' = A_kk       L_ik = A_ik L_kk^-T         A_ij -= L_ik L_jk'          (right-looking Cholesky)
    R_k: = L_kk^-1 R_k:     R_i: -= L_ik R_k:           from R = I                  (forward substitution with the same panel)
    X_k: = R_:k' R                                                                  (with the panels of R, afterwards)

Each device holds only its own columns of ``A``, ``R`` and ``X``, and one panel. Updates are masked over the full height of the
matrix. So shapes are fixed, and the compiled program does not grow with the matrix. The cost is ``6 d_in^3 / n`` operations on
each of ``n`` devices, and ``2 d_in^2`` broadcast numbers. An inverse by halves (``inverses.inverse``) skips zeros and needs ``2
d_in^3`` operations in all.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from optima_tpu.method.linalg.features import Features, Product, matmul, rough_matmul


def inverse_by_panels(
    columns: Float[Array, "d_in d"], features: Features, panel: int = 128, product: Product = matmul
) -> tuple[Float[Array, "d_in d"], Float[Array, "d_in d"]]:
    """Columns of ``X = A^-1``, and of the triangular ``R`` with ``X = R'R``.

    ``R`` is lower triangular. If features are sharded, call this inside ``shard_map``.

    Args:
      columns: [d_in, d] float32, a device's ``d = d_in / n`` columns of ``A``.
      features: how the columns are sharded over the ``n`` devices.
      panel: the largest number of columns in one broadcast. If equal panels do not divide ``d``, every device pads its columns
        with a few decoupled columns of the identity.
      product: makes ``R``: ``linalg.features.matmul``, or ``rough_matmul`` where ``R`` too only chooses. Panels are factorised in
        full, and ``X`` is always rough: nobody reads more of it than directions and choices.

    Returns:
      (X, R), each [d_in, d] float32; NaN where ``A`` is not positive definite in float32.
    """
    devices, size = features.devices, columns.shape[1]
    count = -(-size // panel)  # panels per device
    width = -(-size // count)
    extra = count * width - size
    columns = _grown(columns, features, extra)
    rows = jnp.arange(columns.shape[0])

    def broadcast(columns: Array, k: Array) -> Array:
        """Panel k [d_in, width], broadcast from its owner to all devices."""
        return features.from_owner(jax.lax.dynamic_slice_in_dim(columns, k % count * width, width, axis=1), k // count)

    def factor(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        rest, root = carry
        first = k * width
        column = broadcast(rest, k)
        corner = jnp.linalg.cholesky(jax.lax.dynamic_slice_in_dim(column, first, width))
        corner = jax.scipy.linalg.solve_triangular(corner, jnp.eye(width, dtype=corner.dtype), lower=True)
        below = jnp.where((rows >= first + width)[:, None], product(column, corner.T), 0.0)
        done = product(corner, jax.lax.dynamic_slice_in_dim(root, first, width))
        root = jax.lax.dynamic_update_slice_in_dim(root - product(below, done), done, first, axis=0)
        return rest - product(below, features.part(below).T), root

    identity = features.on_diagonal(columns).astype(columns.dtype)
    _, root = jax.lax.fori_loop(0, devices * count, factor, (columns, identity))

    def square(k: Array, inverse: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(inverse, rough_matmul(broadcast(root, k).T, root), k * width, axis=0)

    inverse = jax.lax.fori_loop(0, devices * count, square, jnp.zeros_like(root))
    return _cut(inverse, devices, extra), _cut(root, devices, extra)


def _grown(columns: Array, features: Features, extra: int) -> Array:
    """Adds ``extra`` decoupled features per device, with 1 on the diagonal."""
    if not extra:
        return columns
    size = columns.shape[1]
    grown = jnp.pad(columns.reshape(-1, size, size), ((0, 0), (0, extra), (0, extra))).reshape(-1, size + extra)
    return jnp.where(features.on_diagonal(grown) & (jnp.arange(size + extra) >= size), 1.0, grown)


def _cut(columns: Array, devices: int, extra: int) -> Array:
    """Removes the features that :func:`_grown` added."""
    size = columns.shape[1] - extra
    return columns.reshape(devices, size + extra, -1)[:, :size, :size].reshape(-1, size) if extra else columns
