"""What the solvers share: unit-diagonal variables, which make tolerances and damping free of scale, checks, batches."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from optima_tpu.errors import UserError
from optima_tpu.method.linalg.features import WHOLE, Features

# A feature whose energy is this share of the largest one's, or less, is dead: no solver moves its weights, and no gap counts it.
DEAD = 1e-12
# Gaps are relative to f*, but never to less than this share of sum_j w_j^2 H_jj, what the row's output energy would be if its
# inputs were uncorrelated: below it a layer is exact for any use.
RESOLUTION = 1e-8

# Rows that are factorised at once hold a square matrix each; together they get this much memory.
_BATCH_BYTES = 2**28


def require(holds: bool, name: str, expected: str, value: object) -> None:
    """Raises UserError unless a solver's setting holds what it must."""
    if not holds:
        raise UserError(f"expected the solver's {name} to be {expected}, got {value}")


def rows_at_once(size: int, dtype: jnp.dtype, *, alone: bool) -> int:
    """How many rows with a [size, size] factorisation each may be solved in one batch, at least 1.

    On the CPU, LAPACK calls of several devices, of several matrices in one program, or of a batch and a remainder compiled
    beside it, wait in the one thread pool for its other threads to work on their batches: where all wait, none is left
    (jax 0.10). So whole batches only, and batches of one, which are done where they are called, where there may be several.

    Args:
      alone: no other factorisations of this program run at the same time on one device.
    """
    inline = jax.default_backend() == "cpu" and (jax.device_count() > 1 or not alone)
    return 1 if inline else max(1, _BATCH_BYTES // (size * size * jnp.dtype(dtype).itemsize))


def live_features(hessian: Float[Array, "d_in d"], features: Features = WHOLE) -> Bool[Array, " d"]:
    """[d_in] bool: inputs that carry any signal. Dead, negative and non-finite diagonals are excluded.

    Of a device's columns of the Hessian: its own part [d] of them.
    """
    diagonal = features.diagonal(hessian)
    finite = jnp.isfinite(diagonal)
    return finite & (diagonal > DEAD * features.maximum(jnp.where(finite, diagonal, 0.0))) & (diagonal > 0)


def unit_diagonal(
    hessian: Float[Array, "d_in d"], features: Features = WHOLE
) -> tuple[Float[Array, "d_in d"], Float[Array, " d"], Bool[Array, " d"]]:
    """The Hessian in unit-diagonal variables: (matrix [d_in, d_in], scale [d_in], live [d_in]).

    Dead features become rows and columns of the identity. Of a device's columns of the Hessian: its own columns of the matrix
    [d_in, d], and its own parts [d] of scale and live.
    """
    live = live_features(hessian, features)
    scale = jnp.where(live, jnp.sqrt(jnp.where(live, features.diagonal(hessian), 1.0)), 1.0)
    both = features.whole(live)[:, None] & live
    matrix = jnp.where(both, hessian / features.whole(scale)[:, None] / scale, 0.0)
    matrix = 0.5 * (matrix + features.transpose(matrix))
    return jnp.where(features.on_diagonal(hessian), jnp.ones((), hessian.dtype), matrix), scale, live
