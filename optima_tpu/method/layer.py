"""Prunes one weight matrix, for a caller who has a layer and no model.

    layer = prune_layer(weight, inputs=x, recipe=dataclasses.replace(FAST, pattern=NM(2, 4)))

Nothing here depends on more than jax, numpy and jaxtyping. ``optima_tpu.prune_layer`` is the same with settings by their names.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import ArrayLike

from optima_tpu.errors import UserError, plural
from optima_tpu.method.linalg.features import matmul
from optima_tpu.method.problem import Given
from optima_tpu.method.prune_group import prune_group
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.row_sharding import RowSharding
from optima_tpu.method.selectors import Imported
from optima_tpu.method.statistics import TokenSets, TokenStatistics
from optima_tpu.runtime.arrays import Tensor, as_array
from optima_tpu.runtime.mesh import make_mesh

FAST = Recipe()
"""Half of every row, Wanda's mask, and certified weights: the preset ``fast``."""


class PrunedLayer(NamedTuple):
    """One pruned weight matrix.

    Attributes:
      weight: [d_out, d_in] in the dtype of the dense weights, zero wherever the mask is False.
      mask: [d_out, d_in] bool, True where a weight stays.
      error_before: relative squared error of the layer's output with the selector's weights, ``|X W' - X V'|^2 / |X W'|^2``.
      error_after: likewise with the final weights.
      gap: [d_out] float32, the solver's measure of suboptimality of each row; of ``cg`` an upper bound on ``(f - f*) / f*``.
      steps: [d_out] int32, the solver's iterations for each row.
      refused: [d_out] bool, rows that kept the selector's weights because the solver's were not better.
      scale: [d_out, groups] in the dtype of the weights, which are integers times it; None if they are not quantised.
    """

    weight: Array
    mask: Array
    error_before: float
    error_after: float
    gap: Array
    steps: Array
    refused: Array
    scale: Array | None = None

    def __repr__(self) -> str:
        rows, columns = self.weight.shape
        zeros = 1 - float(jnp.mean(self.mask))
        return (
            f"PrunedLayer({rows} x {columns}, {zeros:.1%} zeros, output error {self.error_before:.4g} -> "
            f"{self.error_after:.4g}, largest gap {float(jnp.max(self.gap)):.2g})"
        )


def prune_layer(
    weight: ArrayLike | Tensor,
    *,
    inputs: ArrayLike | Tensor | None = None,
    hessian: ArrayLike | Tensor | None = None,
    mask: ArrayLike | Tensor | None = None,
    recipe: Recipe = FAST,
) -> PrunedLayer:
    """Prunes one weight matrix: chooses a mask and solves for kept weights.

    For each row ``w`` with kept inputs ``K``: minimise ``(v - w) H (v - w)'`` over ``v`` with ``v[j] = 0`` for ``j`` not in
    ``K``, where ``H = X'X / n`` (OPTIMA, equation 6). A solver with a damping ``d`` adds ``d diag(H)`` to ``H``: the gap belongs
    to that problem, the errors to this one. All matrix products are float32 at full precision. On accelerators those that only
    choose a direction or a mask are rougher.

    Args:
      weight: [d_out, d_in], dense.
      inputs: ``X`` [..., d_in], the layer's calibration inputs; every leading axis counts tokens.
      hessian: [d_in, d_in], ``X'X / n`` instead of ``inputs``.
      mask: [d_out, d_in] bool, True where a weight stays; instead of the recipe's selector, whatever its pattern.
      recipe: pattern, selector, solver, acceptance, exchanges and quantizer. What only means something for a model has no effect.

    Raises:
      UserError: shapes that do not fit, or values that are not finite; a Hessian with a negative diagonal.
    """
    dense = as_array("weight", weight)
    _refuse_infinite("weight", dense)
    statistics = _statistics(dense, inputs, hessian)
    given = None
    if mask is not None:
        keep = as_array("mask", mask).astype(bool)
        if keep.shape != dense.shape:
            raise UserError(f"expected a mask of the weight's shape {dense.shape}, got {keep.shape}")
        recipe, given = dataclasses.replace(recipe, selector=Imported()), (Given(keep),)
    elif not recipe.selector.chooses:
        raise UserError("expected mask=ARRAY for a layer whose mask is brought from outside, got selector imported")
    rows, columns = dense.shape
    recipe.pattern.pruned_count((rows, columns))  # raises where N:M does not divide the inputs
    sharding = RowSharding(make_mesh(None))
    (pruned,) = prune_group((dense,), TokenSets(statistics), given, recipe, (recipe.pattern,), sharding)
    outcomes = pruned.rows
    energy = float(jnp.sum(outcomes.energy))
    final = outcomes.after if outcomes.quantized is None else outcomes.quantized[1]
    before, after = (float(jnp.sum(error)) / energy if energy > 0 else 0.0 for error in (outcomes.before, final))
    return PrunedLayer(pruned.weight, pruned.keep, before, after, outcomes.gap, outcomes.steps, outcomes.refused, pruned.scale)


def _statistics(weight: Array, inputs: ArrayLike | Tensor | None, hessian: ArrayLike | Tensor | None) -> TokenStatistics:
    """The Hessian of a layer, from its inputs or as it was given."""
    if weight.ndim != 2:
        raise UserError(f"expected a weight matrix [d_out, d_in], got the shape {weight.shape}")
    size = weight.shape[1]
    if (inputs is None) == (hessian is None):
        raise UserError("expected either inputs=X or hessian=X'X/n, got " + ("both" if inputs is not None else "neither"))
    if inputs is not None:
        x = as_array("inputs", inputs).astype(jnp.float32)
        if x.ndim < 2 or x.shape[-1] != size or not x.size:
            raise UserError(f"expected inputs [tokens, {size}] for a weight {weight.shape}, got {x.shape}")
        x = x.reshape(-1, size)
        _refuse_infinite("inputs", x)
        products = matmul(x.T, x) / len(x)
        _refuse_infinite("products of the inputs in float32", products)
        return TokenStatistics(products, jnp.asarray(len(x), dtype=jnp.int32))
    assert hessian is not None, "refused above"
    matrix = as_array("hessian", hessian).astype(jnp.float32)
    if matrix.shape != (size, size):
        raise UserError(f"expected a Hessian [{size}, {size}] for a weight {weight.shape}, got {matrix.shape}")
    _refuse_infinite("hessian", matrix)
    if not np.allclose(matrix, matrix.T, rtol=1e-3, atol=1e-6 * float(jnp.max(jnp.abs(matrix)))):
        raise UserError("expected a symmetric Hessian X'X / n, got one that differs from its transpose")
    if (least := float(jnp.min(jnp.diagonal(matrix)))) < 0:
        raise UserError(f"expected a Hessian X'X / n, whose diagonal is at least 0, got {least:.3g} on it")
    return TokenStatistics(matrix, jnp.asarray(0, dtype=jnp.int32))


def _refuse_infinite(name: str, matrix: Array) -> None:
    """Raises UserError for NaN or infinities: no certificate would hold."""
    if broken := int(jnp.sum(~jnp.all(jnp.isfinite(matrix), axis=1))):
        raise UserError(f"expected finite {name}, got NaN or an infinity in {broken} of {plural(len(matrix), 'row')}")
