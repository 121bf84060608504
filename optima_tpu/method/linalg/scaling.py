"""Unit-diagonal variables, checks and batch sizes that the solvers share.

In unit-diagonal variables, tolerances and damping are independent of scale. A matrix with damping in it comes from
:func:`ridged` or :func:`damped`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from optima_tpu.method.linalg.features import WHOLE, Features

# A feature with at most this share of the largest feature's energy is dead: no solver moves its weights, and no gap counts it.
DEAD = 1e-12
# Gaps are relative to f*, or to this share of sum_j w_j^2 H_jj if that is larger. The sum is the row's output energy if its
# inputs were uncorrelated. An error below this share of it does not matter for any use.
RESOLUTION = 1e-8

# Each row of a batch of factorisations holds a square matrix; this is the memory for all of them together.
_BATCH_BYTES = 2**28


def rows_at_once(size: int, dtype: jnp.dtype, *, alone: bool) -> int:
    """How many rows with [size, size] factorisations fit in one batch.

    On the CPU, a LAPACK call for a batch waits for other threads of the one thread pool. Several such calls at once may use up
    all threads and wait for ever (jax 0.10): calls of several devices, of several matrices in one program, or of a batch and its
    remainder. So use only whole batches. If several calls may run at once, use batches of one row, which run in the calling
    thread.

    Args:
      alone: whether no other factorisation of this program runs on the same device at the same time.
    """
    inline = jax.default_backend() == "cpu" and (jax.device_count() > 1 or not alone)
    return 1 if inline else max(1, _BATCH_BYTES // (size * size * jnp.dtype(dtype).itemsize))


def live_features(hessian: Float[Array, "d_in d"], features: Features = WHOLE) -> Bool[Array, " d"]:
    """Which inputs carry any signal, [d_in] bool.

    Inputs with a dead, negative or non-finite diagonal carry none. With sharded features, the function takes a device's columns
    of the Hessian and returns the device's own part [d].
    """
    diagonal = features.diagonal(hessian)
    finite = jnp.isfinite(diagonal)
    return finite & (diagonal > DEAD * features.maximum(jnp.where(finite, diagonal, 0.0))) & (diagonal > 0)


def live_diagonal(diagonal: np.ndarray) -> np.ndarray:
    """As :func:`live_features` on the host, with no compilation per d_in."""
    finite = np.isfinite(diagonal)
    return finite & (diagonal > diagonal.dtype.type(DEAD) * np.where(finite, diagonal, 0).max()) & (diagonal > 0)


def unit_diagonal(
    hessian: Float[Array, "d_in d"], features: Features = WHOLE
) -> tuple[Float[Array, "d_in d"], Float[Array, " d"], Bool[Array, " d"]]:
    """The Hessian in unit-diagonal variables: (matrix, scale, live).

    They are [d_in, d_in], [d_in] and [d_in]. Dead features become rows and columns of the identity. With sharded features, the
    function takes a device's columns of the Hessian. It returns the device's own columns of the matrix [d_in, d], and its own
    parts [d] of scale and live.
    """
    live = live_features(hessian, features)
    scale = jnp.where(live, jnp.sqrt(jnp.where(live, features.diagonal(hessian), 1.0)), 1.0)
    both = features.whole(live)[:, None] & live
    matrix = jnp.where(both, hessian / features.whole(scale)[:, None] / scale, 0.0)
    matrix = 0.5 * (matrix + features.transpose(matrix))
    return jnp.where(features.on_diagonal(hessian), jnp.ones((), hessian.dtype), matrix), scale, live


def ridged(matrix: Float[Array, "d_in d"], ridge: float | Float[Array, ""], features: Features = WHOLE) -> Float[Array, "d_in d"]:
    """``A + ridge I``, [d_in, d_in]: damping in unit-diagonal variables.

    With sharded features, the function takes and returns a device's columns.
    """
    return matrix + ridge * features.on_diagonal(matrix).astype(matrix.dtype)


def damped(hessian: Float[Array, "d_in d_in"], damping: float | Float[Array, ""]) -> Float[Array, "d_in d_in"]:
    """``H + d diag H``, [d_in, d_in]: damping by a share of the diagonal."""
    return hessian + jnp.diag(damping * jnp.diagonal(hessian))
