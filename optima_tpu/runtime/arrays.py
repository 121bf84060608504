"""Converts arrays of numpy and JAX and tensors of PyTorch, without torch."""

from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import ArrayLike

from optima_tpu.errors import UserError, one_line


@runtime_checkable
class Tensor(Protocol):
    """A tensor of PyTorch: any device or dtype, with or without gradient."""

    dtype: Any

    def detach(self) -> Any:
        """The same values outside the graph of gradients."""

    def cpu(self) -> Any:
        """The same values in host memory."""


def as_array(name: str, value: ArrayLike | Tensor) -> Array:
    """Returns the values of an array or a tensor as a JAX array of its dtype.

    A tensor is copied.

    Args:
      name: what the value is, for messages.

    Raises:
      UserError: a tensor that is not dense, or that has no values.
    """
    if not isinstance(value, Tensor):
        return jnp.asarray(value)
    try:
        # By way of float32, which holds bfloat16 and float16 exactly: numpy has no bfloat16 of PyTorch.
        dense = value.detach().cpu().float().numpy()
        return jnp.array(dense, dtype=np.dtype(str(value.dtype).rpartition(".")[2]))
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"expected {name} as a dense array of numbers, got a {type(value).__name__}: {one_line(error)}"
        ) from error
