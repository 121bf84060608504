"""Patterns that cut inputs, neurons and heads in all rows at once."""

import dataclasses
import math
from fnmatch import fnmatchcase
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from optima_tpu.errors import UserError, plural
from optima_tpu.method.linalg.smallest import lowest, totals
from optima_tpu.method.patterns.base import MOST_INPUTS, Mask, Pattern, Scores, refuse_share, share_of
from optima_tpu.runtime.bounds import Bound
from optima_tpu.runtime.mesh import padded

MULTIPLE = 128
"""Kept inputs come in multiples of this: matrix units read so many at a time."""


@dataclasses.dataclass(frozen=True)
class WholeInputs(Pattern):
    """Prunes whole inputs: the same inputs in all rows of a matrix.

    The matrix without these inputs computes the same. Inputs leave in consecutive parts of equal width. A part's score is the
    sum of the scores of its weights.

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
        refuse_share(self.sparsity, f"{self.word}s")
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
                f"{self.text()} {'prunes' if kept else 'leaves'} none of {plural(parts, self.word)}{rounded}; take "
                f"{self._instead(parts)}"
            )
        return min(kept, parts)

    def _rounded(self, parts: int) -> int:
        return padded(parts - self._pruned(parts), self.multiple)

    def _pruned(self, parts: int) -> int:
        """The number of parts pruned before the kept ones are rounded up."""
        return share_of(parts, self.sparsity)

    def leaving(self, kept: int, parts: int) -> "WholeInputs":
        """This pattern with the shortest share that keeps ``kept`` parts.

        ``kept`` is a multiple of ``multiple``.
        """
        share = (parts - kept) / parts
        shares = (math.ceil(share * 10**digits) / 10**digits for digits in range(2, 12))
        tried = (dataclasses.replace(self, sparsity=share) for share in shares if share < 1)
        return next(pattern for pattern in tried if pattern._rounded(parts) == kept)

    def _instead(self, parts: int) -> str:
        """What to type instead of a pattern that prunes no part, or all."""
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

    def keep_mask(self, scores: Scores) -> Mask:
        columns, each = scores.shape[1], totals(scores)
        width = columns // self.parts_in(columns)
        if width > 1:
            each = totals(each.reshape(-1, width).T)
        keep = ~lowest(each, self._lost(columns), "row")
        return jnp.broadcast_to(jnp.repeat(keep, width, axis=1), scores.shape)

    def holds(self, zero: np.ndarray) -> bool:
        return bool(self._whole(zero) >= self._lost(zero.shape[1]))

    def _whole(self, zero: np.ndarray) -> int:
        """The number of parts that are True in all rows of ``zero``."""
        return int(zero.all(axis=0).reshape(self.parts_in(zero.shape[1]), -1).all(axis=1).sum())

    def violation(self, keep: np.ndarray, or_fewer: bool = False) -> str | None:
        columns = keep.shape[1]
        expected, pruned = self._lost(columns), self._whole(~keep)
        if pruned < expected or (pruned > expected and not or_fewer):
            return f"expected {expected:,} of {self.parts_in(columns):,} {self.word}s pruned in all rows, got {pruned:,}"
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
    """Prunes whole parts of every block, such as heads or neurons.

    The model's family says which layers read the parts (``Family.cuts``).

    Attributes:
      places: the kinds of parts, each of which loses the share; it is no pattern for other layers. Empty until the model is
        known.
    """

    cuts = True

    places: tuple[Place, ...] = ()

    def __str__(self) -> str:
        """Says "1 of 3 key-value heads cut", or the share without a model."""
        lost = (f"{max(total - self._rounded(total), 0):,} of {total:,} {called}" for _, total, called in self.places)
        return f"{', '.join(lost)} cut" if self.places else super().__str__()

    def of(self, name: str) -> Pattern | None:
        assert self.places, "the model says which layers read the parts, before any layer is asked for"
        kinds = (kind for kind in self.places if any(fnmatchcase(name, layer) for layer in kind.layers))
        kind = next(kinds, None)
        return kind and dataclasses.replace(self, places=(kind,), total=kind.total)


@dataclasses.dataclass(frozen=True)
class Neurons(WholeParts):
    """Prunes whole neurons of MLPs: inputs of the layer that ends an MLP."""

    word: ClassVar[str] = "neuron"


@dataclasses.dataclass(frozen=True)
class Heads(WholeParts):
    """Prunes whole attention heads: all inputs of a head.

    Heads that share a key and a value leave together. A block has few heads, so the share is rounded to the nearest number, a
    half down.
    """

    word: ClassVar[str] = "head"

    multiple: int = 1

    def parts_in(self, columns: int) -> int:
        if not self.total:
            raise UserError(
                f"expected a model, which says how wide a {self.word} is, where the pattern is {self.text()}, got a layer alone; "
                f"take {self.sparsity!r}/{WholeInputs.word}"
            )
        return self.total

    def _pruned(self, parts: int) -> int:
        return math.ceil(round(parts * self.sparsity, 6) - 0.5)
