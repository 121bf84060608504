"""Patterns of 2:4 in other groups, for ``--pattern``.

    python -m benchmarks.layer_errors 30 --preset fast --pattern "benchmarks.groupings:Shuffled?seed=1"

They tell what a stride costs from what any change of the groups costs. ``layer_errors`` prints the errors of all layers and the
perplexity. ``optima prune`` takes such a pattern too.
"""

import abc
import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array

from optima_tpu.method.patterns import NM, Pattern

_WINDOW = 64
"""Inputs among which groups are made: those that 2:4@16 mixes, and one attention head of SmolLM2."""


class Regrouped(Pattern):
    """2:4 of reordered inputs; every input stays in its window of 64."""

    @abc.abstractmethod
    def windows(self, count: int) -> list[np.ndarray]:
        """The order of the inputs of each window, [64] int from 0 to 63."""

    @property
    def span(self) -> int:
        return 4

    def order(self, columns: int) -> np.ndarray:
        return np.concatenate([_WINDOW * index + window for index, window in enumerate(self.windows(columns // _WINDOW))])

    def in_order(self) -> NM:
        return NM(2, 4)

    def pruned_count(self, shape: tuple[int, int]) -> int:
        return NM(2, 4, stride=_WINDOW // 4).pruned_count(shape)  # raises where windows do not divide the inputs

    def keep_mask(self, scores: Array) -> Array:
        order = self.order(scores.shape[1])
        return self.in_order().keep_mask(scores[:, order])[:, jnp.asarray(np.argsort(order))]


@dataclasses.dataclass(frozen=True)
class Shuffled(Regrouped):
    """Groups of four inputs of a window of 64, drawn anew for every window."""

    seed: int = 0

    def windows(self, count: int) -> list[np.ndarray]:
        rng = np.random.default_rng(self.seed)
        return [rng.permutation(_WINDOW) for _ in range(count)]


@dataclasses.dataclass(frozen=True)
class Rolled(Regrouped):
    """Groups of neighbours that begin ``by`` inputs later.

    The last group of a window takes the window's first inputs.
    """

    by: int = 2

    def windows(self, count: int) -> list[np.ndarray]:
        return [np.roll(np.arange(_WINDOW), -self.by)] * count
