"""What the solvers share: unit-diagonal variables, which make tolerances and damping free of scale, and checks of settings."""

import jax.numpy as jnp
from jax import Array

from optima_tpu.errors import UserError

# A feature whose energy is this share of the largest one's, or less, is dead: its column is rounding noise.
DEAD = 1e-12
# Gaps are relative to f*, but never to less than this share of sum_j w_j^2 H_jj, what the row's output energy would be if its
# inputs were uncorrelated: below it a layer is exact for any use.
RESOLUTION = 1e-8


def require(holds: bool, name: str, expected: str, value: float) -> None:
    """Raises UserError unless a solver's setting holds what it must."""
    if not holds:
        raise UserError(f"expected the solver's {name} to be {expected}, got {value}")


def live_features(hessian: Array) -> Array:
    """[d_in] bool: inputs that carry any signal. Dead, negative and non-finite diagonals are excluded."""
    diagonal = jnp.diagonal(hessian)
    finite = jnp.isfinite(diagonal)
    return finite & (diagonal > DEAD * jnp.max(jnp.where(finite, diagonal, 0.0))) & (diagonal > 0)


def unit_diagonal(hessian: Array) -> tuple[Array, Array, Array]:
    """The Hessian in unit-diagonal variables: (matrix [d_in, d_in], scale [d_in], live [d_in]).

    Dead features become rows and columns of the identity.
    """
    live = live_features(hessian)
    scale = jnp.where(live, jnp.sqrt(jnp.where(live, jnp.diagonal(hessian), 1.0)), 1.0)
    both = live[:, None] & live
    matrix = jnp.where(both, hessian / scale[:, None] / scale, 0.0)
    matrix = 0.5 * (matrix + matrix.T)
    return jnp.where(jnp.eye(hessian.shape[0], dtype=bool), jnp.ones((), hessian.dtype), matrix), scale, live
