"""Training that leaves pruned weights zero, with any optimizer of optax.

    masks = masks_of(parameters)
    optimizer = keep_zeros(optax.adamw(1e-4), masks)
    ...
    broken_zeros(parameters, masks)  # [] as long as every pruned weight is zero

The masks are read from the zeros of the parameters and have the parameters' layout: a pytree of any program, with matrices
transposed, stacked over the layers or split over devices. A program that makes its optimizer before it has read the parameters,
as MaxText does, leaves the masks out: ``keep_zeros(optimizer)`` reads them at every update.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from optima_tpu.errors import UserError

if TYPE_CHECKING:
    import optax

Tree = Any
"""A pytree of arrays."""


def masks_of(parameters: Tree, least: float = 0.1) -> Tree:
    """The masks of pruned parameters: bool, True where a weight stays.

    The masks have the structure and the sharding of the parameters.

    Args:
      parameters: the parameters of a pruned model, in any layout.
      least: an array with a smaller share of zeros, or with fewer than two axes, was not pruned: its mask is True everywhere.

    Raises:
      UserError: no array has this share of zeros.
    """
    if not any(_is_pruned(array, least) for array in jax.tree.leaves(parameters)):
        raise UserError(f"expected parameters of a pruned model, got none with a share of zeros of at least {least:g}")
    return jax.tree.map(lambda array: _kept(array, least), parameters)


def keep_zeros(
    optimizer: "optax.GradientTransformation", masks: Tree | None = None, least: float = 0.1
) -> "optax.GradientTransformationExtraArgs":
    """Wraps an optimizer so that pruned weights stay zero.

    Their gradients are zero before the optimizer sees them, so that they gather no moments and do not count in a norm that clips;
    their updates are zero behind it, whatever it adds. All other weights move as the optimizer says.

    Args:
      optimizer: any optimizer of optax.
      masks: as from :func:`masks_of`, of the structure of the parameters. A bool may stand for an array of it. None reads them
        from the zeros of the parameters at every update: nothing is stored, and what is zero then stays zero. A kept weight that
        becomes exactly zero on the way stays so too, and a matrix that begins with zeros (of an adapter) is not trained.
      least: as for :func:`masks_of`, where there are no masks.

    Raises:
      ValueError: there are no masks, and ``update`` was called without the parameters.
    """
    import optax  # whoever brings an optimizer has it

    inner = optax.with_extra_args_support(optimizer)

    def update(gradient: Tree, state: Any, parameters: Tree | None = None, **extra: Any) -> tuple[Tree, Any]:
        if masks is None and parameters is None:
            raise ValueError(
                "expected update(gradient, state, parameters), from whose zeros the masks are read, got no parameters"
            )
        keep = jax.tree.map(lambda array: _kept(array, least), parameters) if masks is None else masks
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies counters by floats, and bfloat16 by float32
            moved, state = inner.update(_masked(gradient, keep), state, parameters, **extra)
        return _masked(moved, keep), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def broken_zeros(parameters: Tree, masks: Tree) -> list[str]:
    """The paths of arrays with a nonzero pruned weight; empty if none."""
    any_nonzero = jax.tree.map(lambda array, keep: jnp.any((array != 0) & ~keep), parameters, masks)
    broken: Sequence[tuple[Any, Array]] = jax.tree_util.tree_leaves_with_path(jax.device_get(any_nonzero))
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, any_left in broken if any_left]


def _is_pruned(array: Array, least: float) -> Array | bool:
    return array.ndim > 1 and jnp.mean(array == 0) >= least


def _kept(array: Array, least: float) -> Array:
    """The mask of an array; it may be traced."""
    return (array != 0) | jnp.logical_not(_is_pruned(array, least))


def _masked(tree: Tree, masks: Tree) -> Tree:
    return jax.tree.map(lambda array, keep: jnp.where(keep, array, jnp.zeros((), array.dtype)), tree, masks)
