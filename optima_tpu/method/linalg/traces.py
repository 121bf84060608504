"""Traces of a shifted matrix's inverse, estimated by random vectors."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from optima_tpu.method.linalg.features import rough_matmul

# The estimate of the trace is off by a hundredth or two if the random vectors have this many entries together.
_ENTRIES = 8192
_STEPS = 12


def inverse_traces(matrix: Float[Array, "d d"]) -> Callable[[Float[Array, ""]], Float[Array, ""]]:
    """Returns a function of ``t`` that estimates ``tr (M + t I)^-1 / d``.

    ``M`` is positive definite. All values of ``t`` share 12 products with ``M``. The trace is the mean of ``d u (M + t I)^-1
    u'`` over unit vectors ``u`` of random signs. Lanczos steps from ``u`` make a tridiagonal ``T`` for which ``[(T + t
    I)^-1]_00`` is this form, by Gauss's quadrature (Golub and Meurant, Matrices, Moments and Quadrature, 2010). For a small
    matrix the vectors are the rows of the identity: then only the steps are an approximation.
    """
    size = len(matrix)
    count = -(-_ENTRIES // size)
    if count < size:
        start = jax.random.rademacher(jax.random.key(0), (count, size), matrix.dtype) * size**-0.5
    else:
        start = jnp.eye(size, dtype=matrix.dtype)

    def step(carry: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
        last, vector, coupling = carry
        image = rough_matmul(vector, matrix) - coupling[:, None] * last
        diagonal = jnp.sum(image * vector, axis=1)
        image = image - diagonal[:, None] * vector
        length = jnp.sqrt(jnp.sum(image**2, axis=1))
        following = image / jnp.where(length > 0, length, 1.0)[:, None]
        return (vector, following, length), (diagonal, coupling)

    zero = jnp.zeros(len(start), matrix.dtype)
    _, tridiagonal = jax.lax.scan(step, (jnp.zeros_like(start), start, zero), None, length=_STEPS)

    def trace(shift: Float[Array, ""]) -> Float[Array, ""]:
        def upward(carry: tuple[Array, Array], row: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
            (below, coupling), (diagonal, above) = carry, row
            return (diagonal + shift - coupling**2 / below, above), None

        (corner, _), _ = jax.lax.scan(upward, (jnp.full_like(zero, jnp.inf), zero), tridiagonal, reverse=True)
        return jnp.mean(1 / corner)

    return trace
