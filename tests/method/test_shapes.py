"""Shapes and dtypes that the method declares are checked in the tests."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from optima_tpu.method.linalg.scaling import unit_diagonal
from optima_tpu.method.patterns import NM


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: unit_diagonal(jnp.ones(3)),
        lambda: NM(2, 4).keep_mask(jnp.ones((2, 4), jnp.int32)),
        lambda: NM(2, 4).exchange(jnp.ones((2, 4)), jnp.ones((2, 4)), jnp.ones((2, 4), bool), jnp.ones(3, jnp.int32)),
    ],
    ids=["axes", "dtype", "rows"],
)
def test_another_shape_or_dtype_is_an_error(wrong):
    with pytest.raises(TypeCheckError):
        wrong()
