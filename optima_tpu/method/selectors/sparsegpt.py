"""SparseGPT: a sweep over inputs (Frantar and Alistarh, 2023, algorithm 1)."""

import dataclasses
from typing import Annotated, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optima_tpu.method.linalg.features import matmul
from optima_tpu.method.linalg.scaling import live_features
from optima_tpu.method.linalg.smallest import lowest
from optima_tpu.method.patterns import Pattern
from optima_tpu.method.problem import LayerProblem, Pruned
from optima_tpu.method.selectors.obs import InputSweep, inverse_factor
from optima_tpu.runtime.bounds import Bound
from optima_tpu.runtime.loops import usual_turns
from optima_tpu.runtime.mesh import padded


@dataclasses.dataclass(frozen=True)
class SparseGPT(InputSweep):
    """Prunes input by input and moves later inputs' weights to compensate.

    With ``U'U`` the inverse of the damped Hessian (:func:`inverse_factor`) and ``w`` the weights as moved so far,
    the score is ``w_rj^2 / U_jj^2``, as for the optimal brain surgeon. When ``w_rj`` is pruned:

        w[r, j:] -= w_rj / U_jj * U[j, j:]

    which is optimal for the inputs from ``j`` on, with the inputs before ``j`` fixed. A kept weight is not moved any more once
    the sweep has passed it, so a solver on the same mask finds better weights. ``problem.pull`` is not read: the sweep
    reproduces the layer's own outputs, even if the target is another one.

    What competes:
      An unstructured mask is chosen block by block, when the sweep reaches the block: over all rows and the block (group "layer",
      as published), or over the block's part of every row (group "row"). The block of the inputs ``[a, b)`` loses ``floor(d_out b
      s) - floor(d_out a s)`` weights (in each row: ``floor(b s) - floor(a s)``), so that a layer loses
      ``pattern.pruned_count(shape)`` exactly. The published code (IST-DASLab/sparsegpt, sparsegpt.py) prunes one weight more in
      each block, and every weight with an equal score. N:M groups are chosen one by one, each when the sweep reaches it.

    Dead inputs (``scaling.live_features``) score 0: they are pruned first, and pruning them moves no other weight. If some of
    their weights stay, these keep their value; the published code sets them to zero. Dead inputs do not raise the mean of the
    diagonal; the published code adds 1 for each. Of equal scores the lower index is pruned first, rows before inputs. This
    decides between the weights of dead inputs too, so no score has to be shifted off zero (OPTIMA's shift_zero_metrics).

    A damping too small for float32 to factorise the Hessian gives NaN weights, with the right number of them pruned.

    Attributes:
      block: inputs that compete for an unstructured mask, 128 in the paper; the last block may be smaller. For N:M it only sets
        how many inputs are swept between two updates of all later inputs, in whole groups of M.
      damping: ridge on the Hessian, as a share of the mean of its diagonal, 0.01 in the paper.
    """

    hessians: ClassVar[int] = 3

    block: Annotated[int, Bound(1, hint="128 is the paper's")] = 128
    damping: Annotated[float, Bound(above=0, hint="0.01 is the paper's")] = 0.01

    def sweep(self, problem: LayerProblem, pattern: Pattern) -> Pruned:
        rows, inputs = problem.weight.shape
        unit = pattern.span or 1
        size = min(max(self.block // unit, 1) * unit, inputs)
        extra = padded(inputs, size) - inputs
        starts = np.arange(0, inputs, size)

        # Pad the last block with decoupled inputs, which are never pruned instead of a real input.
        factor = inverse_factor(problem.hessian, self.damping)
        diagonal = jnp.pad(jnp.diagonal(factor), (0, extra), constant_values=1.0)
        blocks = _Block(
            start=jnp.asarray(starts),
            losing=jnp.asarray(_pruned_in_blocks(pattern, (rows, inputs), starts)),
            factor=jnp.pad(factor, ((0, extra), (0, extra))).reshape(len(starts), size, -1),
            diagonal=diagonal.reshape(-1, size),
            live=jnp.pad(live_features(problem.hessian), (0, extra)).reshape(-1, size),
            real=(np.arange(inputs + extra) < inputs).reshape(-1, size),
        )

        def sweep(weight: Array, block: _Block) -> tuple[Array, Array]:
            swept = _sweep_block(jax.lax.dynamic_slice_in_dim(weight, block.start, size, axis=1), block, pattern)
            # U is zero before its diagonal, so outside the block only later inputs move.
            weight = weight - matmul(swept.errors, block.factor)
            return jax.lax.dynamic_update_slice_in_dim(weight, swept.weight, block.start, axis=1), swept.keep

        weight, keep = jax.lax.scan(sweep, jnp.pad(problem.weight, ((0, 0), (0, extra))), blocks)
        keep = jnp.moveaxis(keep, 0, 1).reshape(rows, -1)[:, :inputs]
        return Pruned(jnp.where(keep, weight[:, :inputs], 0.0), keep)


class _Block(NamedTuple):
    """The data of one block of inputs for the sweep."""

    start: Array  # [] int32, its first input
    losing: Array  # [] int32, how many weights a comparison group loses here; not read for N:M
    factor: Array  # [size, d_in], its rows of U
    diagonal: Array  # [size], U_jj
    live: Array  # [size] bool
    real: Array | np.ndarray  # [size] bool, False for the padding of the last block


class _Swept(NamedTuple):
    """A block after the sweep; every array is [rows, size]."""

    weight: Array  # float32, to be read where ``keep``
    errors: Array  # float32, w_rj / U_jj of the pruned weights, 0 of the kept ones
    keep: Array  # bool


def _pruned_in_blocks(pattern: Pattern, shape: tuple[int, int], starts: np.ndarray) -> np.ndarray:
    """How many weights a group loses in each block, [blocks] int32."""
    if pattern.span:
        return np.zeros(len(starts), np.int32)
    rows = 1 if pattern.group == "row" else shape[0]
    edges = [*starts.tolist(), shape[1]]
    return np.diff([pattern.pruned_in(rows * edge) for edge in edges]).astype(np.int32)


def _sweep_block(weight: Array, block: _Block, pattern: Pattern) -> _Swept:
    """Chooses and prunes in a block [rows, size], and moves its weights."""
    rows, size = weight.shape
    width = pattern.span or size
    inside = jax.lax.dynamic_slice_in_dim(block.factor, block.start, size, axis=1)

    def prune_input(j: int | Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        weight, errors, keep = carry
        error = jnp.where(keep[j], 0.0, weight[j] / block.diagonal[j])
        return weight - inside[j][:, None] * error, errors.at[j].set(error), keep

    def prune_group(index: int | Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        weight, errors, keep = carry
        first = index * width
        group_weight, diagonal, live, real = (
            jax.lax.dynamic_slice_in_dim(array, first, width) for array in (weight, block.diagonal, block.live, block.real)
        )
        # |w| / U gives the same order as its square, without overflow or underflow.
        scores = jnp.where(live, jnp.abs(group_weight.T) / diagonal, 0.0)
        chosen = _choose(jnp.where(real, scores, jnp.inf), block.losing, pattern)
        keep = jax.lax.dynamic_update_slice_in_dim(keep, chosen.T, first, axis=0)
        with usual_turns(width):
            return jax.lax.fori_loop(first, first + width, prune_input, (weight, errors, keep))

    # Inputs are the first axis, so that the loop reads and writes contiguous memory.
    start = (weight.T, jnp.zeros((size, rows), weight.dtype), jnp.ones((size, rows), bool))
    return _Swept(*(array.T for array in jax.lax.fori_loop(0, size // width, prune_group, start)))


def _choose(scores: Array, count: Array, pattern: Pattern) -> Array:
    """Keeps all but each group's ``count`` lowest scores, or N of M."""
    return pattern.keep_mask(scores) if pattern.span else ~lowest(scores, count, pattern.group)
