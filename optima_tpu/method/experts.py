"""Scores of the experts of a mixture, and the choice of those that stay."""

import abc
import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32, Int32

from optima_tpu.method.choice import Method


class ExpertStatistics(NamedTuple):
    """Sums over the tokens that the router sends to each expert of a block.

    The output ``f_e(t) = W_d h`` of expert e for token t counts without the share ``g_e(t)`` of the router.

    Attributes:
      tokens: number of these tokens.
      norms: ``sum_t |f_e(t)|``.
      squares: ``sum_t |f_e(t)|^2``; equals ``tr(W_d A_e W_d')`` with ``A_e = sum_t h h'`` if down has no bias.
      shared_norms: ``sum_t g_e(t) |f_e(t)|``.
    """

    tokens: Int32[Array, " experts"]
    norms: Float32[Array, " experts"]
    squares: Float32[Array, " experts"]
    shared_norms: Float32[Array, " experts"]

    def mean(self, sums: Float32[Array, " experts"]) -> Float32[Array, " experts"]:
        """The mean over the tokens of each expert; 0 for an expert without tokens."""
        return sums / jnp.maximum(self.tokens.astype(sums.dtype), 1)


class ExpertScore(Method, abc.ABC):
    """Scores the experts of a block. The experts with the highest scores stay.

    A score is a frozen dataclass.
    """

    setting: ClassVar[str] = "cut.score"

    @abc.abstractmethod
    def __call__(self, statistics: ExpertStatistics) -> Float32[Array, " experts"]:
        """The score of each expert."""


@dataclasses.dataclass(frozen=True)
class Frequency(ExpertScore):
    """The number of tokens that the router sends to the expert."""

    def __call__(self, statistics: ExpertStatistics) -> Float32[Array, " experts"]:
        return statistics.tokens.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class REAP(ExpertScore):
    """The mean of ``g_e(t) |f_e(t)|`` over the expert's tokens. Source: arXiv:2510.13999, equation 9."""

    def __call__(self, statistics: ExpertStatistics) -> Float32[Array, " experts"]:
        return statistics.mean(statistics.shared_norms)


@dataclasses.dataclass(frozen=True)
class MAN(ExpertScore):
    """The mean of ``|f_e(t)|`` over the expert's tokens: mean activation norm. Source: arXiv:2606.15716."""

    def __call__(self, statistics: ExpertStatistics) -> Float32[Array, " experts"]:
        return statistics.mean(statistics.norms)


@dataclasses.dataclass(frozen=True)
class MSAN(ExpertScore):
    """The mean of ``|f_e(t)|^2`` over the expert's tokens, ``tr(W_d A_e W_d') / N_e``. Source: arXiv:2606.15716."""

    def __call__(self, statistics: ExpertStatistics) -> Float32[Array, " experts"]:
        return statistics.mean(statistics.squares)


SCORES: Mapping[str, type[ExpertScore]] = MappingProxyType({"reap": REAP, "frequency": Frequency, "man": MAN, "msan": MSAN})
"""The scores by their names in YAML files and on the command line."""


def kept_experts(scores: np.ndarray, kept: int, groups: int = 1) -> np.ndarray:
    """The experts with the highest scores, ascending, [kept] int. Of equal scores the first expert stays.

    Args:
      scores: [experts].
      kept: their number, the same from each group.
      groups: number of equal groups of neighbouring experts.
    """
    inside = np.argsort(-scores.reshape(groups, -1), axis=1, kind="stable")[:, : kept // groups]
    return np.sort(inside + np.arange(groups)[:, None] * (len(scores) // groups), axis=None)
