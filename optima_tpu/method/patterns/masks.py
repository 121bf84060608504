"""Patterns that prune single weights: a share, N of every M, or none."""

import dataclasses
import math
from collections.abc import Iterable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optima_tpu.errors import UserError, did_you_mean
from optima_tpu.method.linalg.smallest import lowest, order_of, pairs_that_pay
from optima_tpu.method.patterns.base import MOST_INPUTS, Counts, Mask, Pattern, Scores, refuse_share, share_of
from optima_tpu.runtime.bounds import Bound

DENSE = "dense"
_TOLERANCE = 0.01
"""How far the sparsity of a layer with an imported mask may be from an unstructured pattern: published SparseGPT prunes one
weight more in every block, and implementations round the count differently."""
_TPU_STRIDES = (128, 16, 32)
"""The strides that the TPU kernel reads: of matrices [d_out, d_in], and of transposed ones in bfloat16 and in int8."""


@dataclasses.dataclass(frozen=True)
class Dense(Pattern):
    """Prunes nothing, for a run that only cuts whole structures."""

    sparsity: float = 0.0

    def of(self, name: str) -> None:
        return None

    def pruned_count(self, shape: tuple[int, int]) -> int:
        return 0

    def keep_mask(self, scores: Scores) -> Mask:
        return jnp.ones(scores.shape, bool)

    def exchange(self, win: Scores, cost: Scores, keep: Mask, limit: Counts) -> tuple[Mask, Counts]:
        return keep, jnp.zeros_like(limit)

    def text(self, group: str | None = None) -> str:
        return DENSE


@dataclasses.dataclass(frozen=True)
class Unstructured(Pattern):
    """Prunes the given share of every comparison group, at any positions.

    Attributes:
      sparsity: share of weights pruned, in [0, 1). A group of ``n`` weights loses exactly ``floor(n * sparsity)``, as in
        Wanda's published code.
      group: "row" compares the weights of one output (Wanda), "layer" all weights of a matrix (magnitude pruning).
    """

    free: ClassVar[bool] = True

    sparsity: float = 0.5
    group: str = "row"

    def __post_init__(self) -> None:
        refuse_share(self.sparsity, "weights")
        if self.group not in ("row", "layer"):
            meant = did_you_mean(self.group, ("row", "layer", "input", "neuron", "head"))
            raise UserError(f"expected 'row', 'layer', 'input', 'neuron' or 'head' behind a share, got {self.group!r}{meant}")

    def __str__(self) -> str:
        return f"{self.sparsity:.4g} per {self.group}"

    def at(self, sparsity: float) -> "Unstructured":
        return dataclasses.replace(self, sparsity=sparsity)

    def pruned_in(self, size: int) -> int:
        """How many weights a group loses: ``floor(size * sparsity)``."""
        return share_of(size, self.sparsity)

    def pruned_count(self, shape: tuple[int, int]) -> int:
        rows, columns = shape
        return rows * self.pruned_in(columns) if self.group == "row" else self.pruned_in(rows * columns)

    def keep_mask(self, scores: Scores) -> Mask:
        return ~lowest(scores, self.pruned_in(scores.shape[1] if self.group == "row" else scores.size), self.group)

    def exchange(self, win: Scores, cost: Scores, keep: Mask, limit: Counts) -> tuple[Mask, Counts]:
        win, cost = jnp.where(keep, -jnp.inf, win), jnp.where(keep, cost, jnp.inf)
        count = jnp.minimum(pairs_that_pay(win, cost), limit)
        return (keep | lowest(-win, count[:, None], "row")) & ~lowest(cost, count[:, None], "row"), count

    def holds(self, zero: np.ndarray) -> bool:
        if self.group == "row":
            return bool(np.all(zero.sum(axis=1) >= self.pruned_in(zero.shape[1])))
        return bool(zero.sum() >= self.pruned_in(zero.size))

    def violation(self, keep: np.ndarray, or_fewer: bool = False) -> str | None:
        """Compares the whole layer's sparsity, with a tolerance."""
        pruned = 1 - np.count_nonzero(keep) / keep.size
        fewest = self.pruned_count(keep.shape) / keep.size  # rounded down in every group
        if fewest - _TOLERANCE <= pruned <= self.sparsity + _TOLERANCE:
            return None
        return f"expected {self.sparsity:.2%} of the weights pruned, got {pruned:.2%}"

    def text(self, group: str | None = None) -> str:
        return repr(float(self.sparsity)) + ("" if self.group == group else f"/{self.group}")


@dataclasses.dataclass(frozen=True)
class NM(Pattern):
    """Keeps ``n`` of every ``m`` inputs of a row.

    The ``m`` inputs are consecutive, as 2:4 hardware reads them, or ``stride`` apart. With a stride ``S``, inputs ``j, j + S,
    ..., j + (m - 1) S`` of every ``m S`` consecutive ones are a group, for ``0 <= j < S``. This is how TPU kernels read N:M
    (vllm-project/tpu-inference ``kernels/structured_sparse_matmul/v1/spmm.py``): a group then lies in one lane.

    Attributes:
      n: weights kept in a group, 0 < n < m.
      m: size of the group; ``m`` times ``stride`` must divide d_in.
      stride: how far apart the inputs of a group lie.
    """

    n: int = 2
    m: int = 4
    stride: int = 1

    @property
    def span(self) -> int:
        return self.m

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise UserError(f"expected a pattern N:M with 0 < N < M, got {self.n}:{self.m}")
        Bound(1).refuse("the stride in a pattern N:M@STRIDE", self.stride)
        Bound(1, MOST_INPUTS).refuse("the inputs that a group spans, M times the stride,", self.m * self.stride)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" + (f"@{self.stride}" if self.stride > 1 else "")

    def order(self, columns: int) -> np.ndarray | None:
        if self.stride == 1:
            return None
        return np.arange(columns).reshape(-1, self.m, self.stride).swapaxes(1, 2).ravel()

    def in_order(self) -> "NM":
        return NM(self.n, self.m)

    def fits(self, columns: int) -> bool:
        """Whether the groups divide that many inputs."""
        return columns % (self.m * self.stride) == 0

    def fitting(self, widths: Iterable[int]) -> "NM | None":
        """This N:M with a stride that fits layers of all ``widths``, or None.

        Strides that a TPU kernel reads come first, then the largest below this one.
        """
        widths = set(widths)
        most = min(self.stride - 1, math.gcd(*widths) // self.m)  # a stride that fits divides all of the widths
        strides = (*_TPU_STRIDES, *range(most, 0, -1))
        patterns = (NM(self.n, self.m, stride) for stride in strides)
        return next((pattern for pattern in patterns if all(map(pattern.fits, widths))), None)

    def refusal(self, layers: str, choose: str) -> UserError:
        """The error for layers whose inputs the groups do not divide."""
        return UserError(f"pattern {self} needs a number of inputs divisible by {self.m * self.stride}, got {layers}; {choose}")

    def pruned_count(self, shape: tuple[int, int]) -> int:
        rows, columns = shape
        if not self.fits(columns):
            other = self.fitting([columns])
            raise self.refusal(f"a layer with {columns}", f"{other} fits it" if other else "choose an M that divides it")
        return rows * (columns // self.m) * (self.m - self.n)

    def keep_mask(self, scores: Scores) -> Mask:
        rows, columns = scores.shape
        self.pruned_count((rows, columns))  # raises where the groups do not divide d_in
        order, index = order_of(scores), jnp.arange(columns) // self.stride % self.m

        # Not reshaped to [groups, m]: a TPU would pad the last axis to 128.
        def count(shift: Array, before: Array) -> Array:
            """Adds group members ``shift`` away that are pruned earlier."""
            left, right = (jnp.roll(order, way * shift * self.stride, axis=1) for way in (1, -1))
            lower = (index >= shift) & (left <= order), (index < self.m - shift) & (right < order)
            return before + sum(side.astype(jnp.int32) for side in lower)

        before = jax.lax.fori_loop(1, self.m, count, jnp.zeros(scores.shape, jnp.int32))
        return before >= self.m - self.n

    def exchange(self, win: Scores, cost: Scores, keep: Mask, limit: Counts) -> tuple[Mask, Counts]:
        """Exchanges at most one pair in an M, see :meth:`Pattern.exchange`."""
        order = self.order(keep.shape[-1])
        if order is not None:
            sorted_keep, count = self.in_order().exchange(win[:, order], cost[:, order], keep[:, order], limit)
            return sorted_keep[:, np.argsort(order)], count
        win, cost = jnp.where(keep, -jnp.inf, win), jnp.where(keep, cost, jnp.inf)
        inside = (*keep.shape[:-1], -1, self.m)
        win, cost, kept = win.reshape(inside), cost.reshape(inside), keep.reshape(inside)
        profit = jnp.max(win, axis=-1) - jnp.min(cost, axis=-1)
        count = jnp.minimum(jnp.sum(profit > 0, axis=-1, dtype=jnp.int32), limit)
        chosen = lowest(-profit, count[:, None], "row")[..., None]
        enters, leaves = (
            chosen & (jnp.arange(self.m) == best[..., None]) for best in (jnp.argmax(win, axis=-1), jnp.argmin(cost, axis=-1))
        )
        return ((kept | enters) & ~leaves).reshape(keep.shape), count

    def groups(self, matrix: np.ndarray) -> np.ndarray:
        """The entries [d_out, d_in] of each group, [d_out, groups, m]."""
        order = self.order(matrix.shape[1])
        return (matrix if order is None else matrix[:, order]).reshape(len(matrix), -1, self.m)

    def holds(self, zero: np.ndarray) -> bool:
        return bool(np.all(self.groups(zero).sum(axis=-1) >= self.m - self.n))

    def violation(self, keep: np.ndarray, or_fewer: bool = False) -> str | None:
        self.pruned_count(keep.shape)  # raises where the groups do not divide d_in
        counts = np.einsum("rgm->rg", self.groups(keep).view(np.uint8), dtype=np.int32)
        wrong = counts > self.n if or_fewer else counts != self.n
        if not wrong.any():
            return None
        row, group = np.unravel_index(np.argmax(wrong), wrong.shape)
        inputs = self.groups(np.arange(keep.shape[1])[None])[0, group]
        apart = f" by {self.stride}" if self.stride > 1 else ""
        return (
            f"expected {self.n} kept of every {self.m}, got {counts[row, group]} in row {row}, group {group} (inputs "
            f"{inputs[0]} to {inputs[-1]}{apart}), wrong in {int(wrong.sum()):,} of {wrong.size:,} groups"
        )

    def text(self, group: str | None = None) -> str:
        return str(self)
