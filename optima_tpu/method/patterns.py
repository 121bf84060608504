"""Patterns: the sets of weights that may stay, and the choice of the set with the best score.

A pattern says how many weights are pruned and inside which comparison group; a score says which. Ties are broken by
index: of two weights of one group with equal scores the one with the lower index is pruned first. The rule is part of
the result (4-bit checkpoints tie often), and it makes the mask independent of the mesh.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int32

from optima_tpu.errors import UserError, did_you_mean, plural
from optima_tpu.method.linalg.smallest import lowest, order_of, pairs_that_pay, totals
from optima_tpu.runtime.bounds import Bound, whole
from optima_tpu.runtime.mesh import padded
from optima_tpu.runtime.own_classes import import_class, import_path, is_import_path, only_named, read_options, write_options

_TOLERANCE = 0.01
"""How far the sparsity of a layer with an imported mask may be from an unstructured pattern: published SparseGPT prunes one
weight more in every block, and implementations round the count differently."""
MOST_INPUTS = 1 << 24
"""The most inputs of a layer that a pattern is for. The widest layers that anybody has have a hundredth of them."""
MULTIPLE = 128
"""Kept inputs come in multiples of this: matrix units read so many at a time."""
_TPU_STRIDES = (128, 16, 32)
"""The strides that the TPU kernel reads: of matrices [d_out, d_in], and of transposed ones in bfloat16 and in int8."""


class Pattern(abc.ABC):
    """How many weights of a matrix go, and inside which comparison groups. A pattern is a frozen dataclass.

    Attributes:
      group: "row" where weights of different rows never compete, else "layer".
      span: number of inputs in a comparison group, consecutive in :meth:`order`, must divide d_in; None if the group is a whole row
        or matrix.
      free: whether the pruned weights may be anywhere in a comparison group, so that sparsities can be allocated to blocks.
      sparsity: the share of weights that are pruned.
      damping: the least damping of the objective where the person names none and the solver has some of its own.
    """

    group: str = "row"
    free: ClassVar[bool] = False
    damping: ClassVar[float] = 0.0
    sparsity: float = math.nan

    @property
    def span(self) -> int | None:
        return None

    def of(self, name: str) -> "Pattern | None":
        """The pattern of the layer of that path inside a block; None if it is for others, and this one stays as it would be without it."""
        return self

    def order(self, columns: int) -> np.ndarray | None:
        """The inputs [columns] int, sorted so that those of a group are consecutive; None if they are already."""
        return None

    def in_order(self) -> "Pattern":
        """The pattern of a matrix whose inputs are sorted by :meth:`order`."""
        return self

    def at(self, sparsity: float) -> "Pattern":
        """The same pattern with another sparsity, for patterns that are ``free``."""
        raise ValueError(f"the sparsity of {self} is fixed")

    def __str__(self) -> str:
        return self.text()

    @abc.abstractmethod
    def pruned_count(self, shape: tuple[int, int]) -> int:
        """How many weights a [d_out, d_in] matrix loses. Raises UserError where the pattern does not fit the shape."""

    @abc.abstractmethod
    def keep_mask(self, scores: Float[Array, "rows d_in"]) -> Bool[Array, "rows d_in"]:
        """The mask with the largest total score.

        Args:
          scores: [d_out, d_in] float32, larger is more worth keeping; NaN counts as the smallest of all.

        Returns:
          [d_out, d_in] bool with exactly ``pruned_count(shape)`` False entries.
        """

    def pruned_in(self, size: int) -> int:
        """How many weights a comparison group of ``size`` loses, for methods that choose a row part by part.

        Raises:
          UserError: the pattern fixes no such number.
        """
        raise UserError(f"expected a pattern that says how many weights a part of a row loses, got {self}; take --selector wanda")

    @property
    def exchanges(self) -> bool:
        """Whether the pattern implements :meth:`exchange`."""
        return type(self).exchange is not Pattern.exchange

    def exchange(
        self,
        win: Float[Array, "rows d_in"],
        cost: Float[Array, "rows d_in"],
        keep: Bool[Array, "rows d_in"],
        limit: Int32[Array, " rows"],
    ) -> tuple[Bool[Array, "rows d_in"], Int32[Array, " rows"]]:
        """Exchanges the best ``limit`` pairs of each row that win more than they cost. Returns the mask, and the number of pairs.

        The largest win is paired with the smallest cost, the second with the second, and so on. Of equal values the lower index
        comes first.

        Args:
          win: [rows, d_in] float32, at least 0, read where a weight is pruned.
          cost: [rows, d_in] float32, at least 0, read where a weight is kept.
          keep: [rows, d_in] bool.
          limit: [rows] int32, at least 0.

        Returns:
          [rows, d_in] bool and [rows] int32.
        """
        raise NotImplementedError

    def holds(self, zero: np.ndarray) -> bool:
        """Whether the comparison groups of a [d_out, d_in] bool matrix (True: zero) have the zeros that the pattern asks for."""
        return bool(zero.sum() >= self.pruned_count(zero.shape))

    def violation(self, keep: np.ndarray, or_fewer: bool = False) -> str | None:
        """How an imported mask [d_out, d_in] violates the pattern, as a text; None if it does not.

        Args:
          or_fewer: whether fewer weights may be kept. Masks made from a checkpoint's zeros need this, as a kept weight may be
            zero.
        """
        expected, found = self.pruned_count(keep.shape), keep.size - np.count_nonzero(keep)
        if found == expected or (or_fewer and found > expected):
            return None
        return f"expected {expected:,} of {keep.size:,} weights pruned, got {found:,}"

    def text(self, group: str | None = None) -> str:
        """The text that :func:`parse_pattern` reads back.

        Args:
          group: the default comparison group, which the text leaves out.
        """
        return import_path(type(self)) + write_options(self)


def _refuse_share(sparsity: float, what: str) -> None:
    if not 0 <= sparsity < 1:
        half = f"; 0.5 prunes half of the {what}" if sparsity >= 1 else ""
        raise UserError(f"expected a sparsity in [0, 1), got {sparsity}{half}")


def _share_of(size: int, sparsity: float) -> int:
    """``floor(size * sparsity)`` in exact arithmetic, but fewer than ``size``.

    Decimal sparsities are not exact in binary (100 * 0.29 is 28.999...), so the product is rounded first. At least one stays,
    because the sparsity is below 1.
    """
    return min(math.floor(round(size * sparsity, 6)), max(size - 1, 0))


DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class Dense(Pattern):
    """Prunes nothing: every layer that no rule names stays as it is, for a run that cuts whole structures alone."""

    sparsity: float = 0.0

    def of(self, name: str) -> None:
        return None

    def pruned_count(self, shape: tuple[int, int]) -> int:
        return 0

    def keep_mask(self, scores: Float[Array, "rows d_in"]) -> Bool[Array, "rows d_in"]:
        return jnp.ones(scores.shape, bool)

    def exchange(
        self,
        win: Float[Array, "rows d_in"],
        cost: Float[Array, "rows d_in"],
        keep: Bool[Array, "rows d_in"],
        limit: Int32[Array, " rows"],
    ) -> tuple[Bool[Array, "rows d_in"], Int32[Array, " rows"]]:
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
        _refuse_share(self.sparsity, "weights")
        if self.group not in ("row", "layer"):
            meant = did_you_mean(self.group, ("row", "layer", "input", "neuron", "head"))
            raise UserError(f"expected 'row', 'layer', 'input', 'neuron' or 'head' behind a share, got {self.group!r}{meant}")

    def __str__(self) -> str:
        return f"{self.sparsity:.4g} per {self.group}"

    def at(self, sparsity: float) -> "Unstructured":
        return dataclasses.replace(self, sparsity=sparsity)

    def pruned_in(self, size: int) -> int:
        """How many weights a group of ``size`` loses: ``floor(size * sparsity)`` in exact arithmetic."""
        return _share_of(size, self.sparsity)

    def pruned_count(self, shape: tuple[int, int]) -> int:
        rows, columns = shape
        return rows * self.pruned_in(columns) if self.group == "row" else self.pruned_in(rows * columns)

    def keep_mask(self, scores: Float[Array, "rows d_in"]) -> Bool[Array, "rows d_in"]:
        return ~lowest(scores, self.pruned_in(scores.shape[1] if self.group == "row" else scores.size), self.group)

    def exchange(
        self,
        win: Float[Array, "rows d_in"],
        cost: Float[Array, "rows d_in"],
        keep: Bool[Array, "rows d_in"],
        limit: Int32[Array, " rows"],
    ) -> tuple[Bool[Array, "rows d_in"], Int32[Array, " rows"]]:
        win, cost = jnp.where(keep, -jnp.inf, win), jnp.where(keep, cost, jnp.inf)
        count = jnp.minimum(pairs_that_pay(win, cost), limit)
        return (keep | lowest(-win, count[:, None], "row")) & ~lowest(cost, count[:, None], "row"), count

    def holds(self, zero: np.ndarray) -> bool:
        if self.group == "row":
            return bool(np.all(zero.sum(axis=1) >= self.pruned_in(zero.shape[1])))
        return bool(zero.sum() >= self.pruned_in(zero.size))

    def violation(self, keep: np.ndarray, or_fewer: bool = False) -> str | None:
        """Compares the sparsity of the layer, whatever the comparison group, with a tolerance."""
        found = 1 - np.count_nonzero(keep) / keep.size
        fewest = self.pruned_count(keep.shape) / keep.size  # rounded down in every group
        if fewest - _TOLERANCE <= found <= self.sparsity + _TOLERANCE:
            return None
        return f"expected {self.sparsity:.2%} of the weights pruned, got {found:.2%}"

    def text(self, group: str | None = None) -> str:
        return repr(float(self.sparsity)) + ("" if self.group == group else f"/{self.group}")


@dataclasses.dataclass(frozen=True)
class NM(Pattern):
    """Keeps ``n`` of every ``m`` inputs of a row, consecutive ones as 2:4 hardware reads them, or ``stride`` apart.

    With a stride ``S``, inputs ``j, j + S, ..., j + (m - 1) S`` of every ``m S`` consecutive ones are a group, for ``0 <= j < S``.
    This is how TPU kernels read N:M (vllm-project/tpu-inference ``kernels/structured_sparse_matmul/v1/spmm.py``): a group then lies
    in one lane.

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
        if self.stride < 1:
            raise UserError(f"expected a stride of at least 1 in a pattern N:M@STRIDE, got {self.stride}")
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
        """The same N:M with a stride that fits layers of these numbers of inputs; None if there is none.

        Strides that a TPU kernel reads come first, then the largest below this one.
        """
        widths = set(widths)
        most = min(self.stride - 1, math.gcd(*widths) // self.m)  # a stride that fits divides all of the widths
        strides = (*_TPU_STRIDES, *range(most, 0, -1))
        patterns = (NM(self.n, self.m, stride) for stride in strides)
        return next((pattern for pattern in patterns if all(map(pattern.fits, widths))), None)

    def refusal(self, found: str, choose: str) -> UserError:
        """The error for numbers of inputs that the groups do not divide: which were found, and what to choose."""
        return UserError(f"pattern {self} needs a number of inputs divisible by {self.m * self.stride}, got {found}; {choose}")

    def pruned_count(self, shape: tuple[int, int]) -> int:
        rows, columns = shape
        if not self.fits(columns):
            other = self.fitting([columns])
            raise self.refusal(f"a layer with {columns}", f"{other} fits it" if other else "choose an M that divides it")
        return rows * (columns // self.m) * (self.m - self.n)

    def keep_mask(self, scores: Float[Array, "rows d_in"]) -> Bool[Array, "rows d_in"]:
        rows, columns = scores.shape
        self.pruned_count((rows, columns))  # raises where the groups do not divide d_in
        order, place = order_of(scores), jnp.arange(columns) // self.stride % self.m

        # Not reshaped to [groups, m]: a TPU would pad the last axis to 128.
        def count(shift: Array, before: Array) -> Array:
            """Adds the weights of the same group, ``shift`` to the left and to the right, that are pruned before this one."""
            left, right = (jnp.roll(order, way * shift * self.stride, axis=1) for way in (1, -1))
            lower = (place >= shift) & (left <= order), (place < self.m - shift) & (right < order)
            return before + sum(side.astype(jnp.int32) for side in lower)

        before = jax.lax.fori_loop(1, self.m, count, jnp.zeros(scores.shape, jnp.int32))
        return before >= self.m - self.n

    def exchange(
        self,
        win: Float[Array, "rows d_in"],
        cost: Float[Array, "rows d_in"],
        keep: Bool[Array, "rows d_in"],
        limit: Int32[Array, " rows"],
    ) -> tuple[Bool[Array, "rows d_in"], Int32[Array, " rows"]]:
        """Exchanges at most one pair in each M, see :meth:`Pattern.exchange`."""
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


@dataclasses.dataclass(frozen=True)
class WholeInputs(Pattern):
    """Prunes whole inputs: one set of inputs is pruned in all rows, so that the matrix without them computes the same.

    Inputs leave in parts of equal width, one behind the other. A part's score is the sum of the scores of its weights.

    Attributes:
      sparsity: share of parts pruned, in [0, 1).
      multiple: the number of kept parts is rounded up to a multiple of this.
      total: how many parts a layer has, which divides its inputs; 0 where each input is one.
    """

    group = "layer"
    word: ClassVar[str] = "input"
    # All rows lose the same inputs: what stays moves much further than behind masks, and fits the calibration tokens too well.
    damping: ClassVar[float] = 0.3

    sparsity: float = 0.25
    multiple: int = MULTIPLE
    total: int = 0

    def __post_init__(self) -> None:
        _refuse_share(self.sparsity, f"{self.word}s")
        Bound(1, MOST_INPUTS).refuse(f"the multiple in a pattern SHARE/{self.word}@MULTIPLE", self.multiple)

    def __str__(self) -> str:
        rounded = f" (kept in multiples of {self.multiple})" if self.multiple > 1 else ""
        return f"{self.sparsity:.4g} of the {self.word}s{rounded}"

    def kept(self, parts: int) -> int:
        """How many of so many parts stay.

        Raises:
          UserError: all of them would, although the share is not 0, or none.
        """
        kept = self._rounded(parts)
        if self.sparsity and not 0 < kept < parts:
            rounded = f", since the kept number is rounded up to a multiple of {self.multiple}" * (kept > 0 and self.multiple > 1)
            raise UserError(
                f"{self.text()} {'prunes' if kept else 'leaves'} none of {plural(parts, self.word)}{rounded}; take {self._instead(parts)}"
            )
        return min(kept, parts)

    def _rounded(self, parts: int) -> int:
        return padded(parts - self._pruned(parts), self.multiple)

    def _pruned(self, parts: int) -> int:
        """How many of so many parts are pruned, before the others are rounded up to a multiple."""
        return _share_of(parts, self.sparsity)

    def leaving(self, kept: int, parts: int) -> "WholeInputs":
        """The same pattern with the shortest share that leaves so many parts, a multiple of ``multiple``."""
        share = (parts - kept) / parts
        shares = (math.ceil(share * 10**digits) / 10**digits for digits in range(2, 12))
        tried = (dataclasses.replace(self, sparsity=share) for share in shares if share < 1)
        return next(pattern for pattern in tried if pattern._rounded(parts) == kept)

    def _instead(self, parts: int) -> str:
        """What to type for so many parts, of which this pattern would prune none, or all."""
        most = (parts - 1) // self.multiple * self.multiple
        larger = [self.leaving(most if self._rounded(parts) else self.multiple, parts)] if most else []
        finer = (dataclasses.replace(self, multiple=self.multiple >> shift) for shift in range(1, self.multiple.bit_length()))
        kept = parts - self._pruned(parts)
        # The coarsest that cuts nearly what was asked for, or else the coarsest that cuts anything.
        near = [pattern for pattern in finer if padded(kept, pattern.multiple) - kept <= 0.2 * (parts - kept)]
        fits = [pattern for pattern in near if 0 < padded(kept, pattern.multiple) < parts]
        return " or ".join(pattern.text() for pattern in larger + fits[:1]) or "another pattern, such as 2:4"

    def parts_in(self, columns: int) -> int:
        """The number of parts of a layer with so many inputs."""
        return self.total or columns

    def _lost(self, columns: int) -> int:
        """The number of parts that so many inputs lose."""
        parts = self.parts_in(columns)
        return parts - self.kept(parts)

    def pruned_count(self, shape: tuple[int, int]) -> int:
        rows, columns = shape
        return rows * self._lost(columns) * (columns // self.parts_in(columns))

    def keep_mask(self, scores: Float[Array, "rows d_in"]) -> Bool[Array, "rows d_in"]:
        columns, each = scores.shape[1], totals(scores)
        width = columns // self.parts_in(columns)
        if width > 1:
            each = totals(each.reshape(-1, width).T)
        keep = ~lowest(each, self._lost(columns), "row")
        return jnp.broadcast_to(jnp.repeat(keep, width, axis=1), scores.shape)

    def holds(self, zero: np.ndarray) -> bool:
        return bool(self._whole(zero) >= self._lost(zero.shape[1]))

    def _whole(self, zero: np.ndarray) -> int:
        """The number of parts that are True in all rows of [d_out, d_in] bool."""
        return int(zero.all(axis=0).reshape(self.parts_in(zero.shape[1]), -1).all(axis=1).sum())

    def violation(self, keep: np.ndarray, or_fewer: bool = False) -> str | None:
        columns = keep.shape[1]
        expected, whole = self._lost(columns), self._whole(~keep)
        if whole < expected or (whole > expected and not or_fewer):
            return f"expected {expected:,} of {self.parts_in(columns):,} {self.word}s pruned in all rows, got {whole:,}"
        parts = np.any(keep, axis=0).reshape(self.parts_in(columns), -1)
        ragged = np.flatnonzero((parts.any(axis=1, keepdims=True) | parts).ravel() != np.all(keep, axis=0))
        if or_fewer or not len(ragged):
            return None
        return f"expected every {self.word} pruned in all rows or in none, got input {ragged[0]} pruned in some"

    def text(self, group: str | None = None) -> str:
        return f"{float(self.sparsity)!r}/{self.word}" + (f"@{self.multiple}" if self.multiple != type(self).multiple else "")


class Place(NamedTuple):
    """Where a model has parts of one kind.

    Attributes:
      layers: the layers that read them, by their paths in a block, with ``*`` for every number.
      total: how many each of these layers reads.
      called: what they are called, "key-value heads".
    """

    layers: tuple[str, ...]
    total: int
    called: str


@dataclasses.dataclass(frozen=True)
class WholeParts(WholeInputs):
    """Prunes whole parts of every block. The model's family says which layers read them (``Family.cuts``).

    Attributes:
      places: the kinds of parts, each of which loses the share; it is no pattern for other layers. Empty until the model is known.
    """

    places: tuple[Place, ...] = ()

    def __str__(self) -> str:
        """ "1 of 3 key-value heads cut", which the share of an odd number says only roughly; the share until the model is known."""
        lost = (f"{max(total - self._rounded(total), 0):,} of {total:,} {called}" for _, total, called in self.places)
        return f"{', '.join(lost)} cut" if self.places else super().__str__()

    def of(self, name: str) -> Pattern | None:
        assert self.places, "the model says which layers read the parts, before any layer is asked for"
        here = (place for place in self.places if any(fnmatchcase(name, layer) for layer in place.layers))
        place = next(here, None)
        return place and dataclasses.replace(self, places=(place,), total=place.total)


@dataclasses.dataclass(frozen=True)
class Neurons(WholeParts):
    """Prunes whole neurons of the MLPs: inputs of the layer that ends an MLP."""

    word: ClassVar[str] = "neuron"


@dataclasses.dataclass(frozen=True)
class Heads(WholeParts):
    """Prunes whole heads of attention: all inputs of a head, or of the heads that share a key and a value.

    A block has few heads, so that the share is rounded to the nearest number, a half down.
    """

    word: ClassVar[str] = "head"

    multiple: int = 1

    def parts_in(self, columns: int) -> int:
        if not self.total:
            raise UserError(
                f"expected a model, which says how wide a {self.word} is, where the pattern is {self.text()}, got a layer alone; take "
                f"{self.sparsity!r}/{WholeInputs.word}"
            )
        return self.total

    def _pruned(self, parts: int) -> int:
        return math.ceil(round(parts * self.sparsity, 6) - 0.5)


@dataclasses.dataclass(frozen=True)
class NamedPattern(Pattern):
    """A pattern of the user's own as a record names it: its text, of which nothing is imported.

    It allows whatever the recorded run did. It chooses no mask.

    Attributes:
      words: the import path and the options.
    """

    free: ClassVar[bool] = True

    words: str

    def at(self, sparsity: float) -> "NamedPattern":
        return self

    def pruned_count(self, shape: tuple[int, int]) -> int:
        raise only_named(self.words)

    def keep_mask(self, scores: Float[Array, "rows d_in"]) -> Bool[Array, "rows d_in"]:
        raise only_named(self.words)

    def exchange(self, *_: Any, **__: Any) -> Any:
        raise only_named(self.words)

    def holds(self, zero: np.ndarray) -> bool:
        return True

    def text(self, group: str | None = None) -> str:
        return self.words


def import_pattern(text: str) -> Pattern:
    """The pattern of the user's own that a text such as "my_lab.patterns:Banded?width=4" names, imported as by ``import_class``."""
    path, _, options = text.partition("?")
    return read_options(import_class(path, Pattern), options)  # type: ignore[type-abstract]  # never instantiates Pattern itself


def parse_pattern(text: str | float, group: str = "row", own: Callable[[str], Pattern] = NamedPattern) -> Pattern:
    """Reads "0.5/row" (half of every row), "0.5/layer" (half of every matrix), "0.5", "0.25/input" (a quarter of the inputs),
    "0.25/neuron", "0.25/neuron@64", "0.5/head", "2:4", "2:4@128", "dense" or "my_lab.patterns:Banded?width=4".

    Args:
      group: the comparison group of a plain "0.5": that of the published selector.
      own: makes the pattern of an import path. :func:`import_pattern` for a text that the person typed; by default nothing is imported.

    Raises:
      UserError: the text is none of these.
    """
    text = str(text).strip()
    if is_import_path(text):
        return own(text)
    try:
        if text == DENSE:
            return Dense()
        if ":" in text:
            n, m = text.split(":")
            m, apart, stride = m.partition("@")
            return NM(whole(n), whole(m), whole(stride) if apart else 1)
        sparsity, _, given = text.partition("/")
        unit, apart, multiple = given.partition("@")
        for cls in (WholeInputs, Neurons, Heads):
            if unit == cls.word:
                return cls(float(sparsity), whole(multiple) if apart else cls.multiple)
        return Unstructured(float(sparsity), given or group)
    except ValueError:
        raise UserError(f"expected a pattern such as 0.5, 0.5/layer, 0.25/neuron, 2:4 or 2:4@128, got {text!r}") from None
