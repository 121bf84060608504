"""Uniformly random token ids, for tests and timings only."""

import dataclasses
from typing import get_args

import numpy as np

from optima_tpu.data.source import Split, Tokens, TokenSource
from optima_tpu.errors import UserError, plural


@dataclasses.dataclass(frozen=True)
class Random(TokenSource):
    """Uniformly random ids from numpy's PCG64; the two splits differ."""

    def __str__(self) -> str:
        return "random"

    def tokens(self, split: Split, *, vocabulary: int, windows: int | None, length: int, seed: int) -> Tokens:
        """Ids [windows, length]. Raises UserError if ``windows`` is None."""
        if windows is None:
            raise UserError(
                "the source random has no end: expected a number of windows, got none; give a run --evaluation.windows, "
                "or optima_tpu.evaluate --windows"
            )
        rng = np.random.Generator(np.random.PCG64([seed, get_args(Split).index(split)]))
        ids = rng.integers(0, vocabulary, (windows, length), dtype=np.int32)
        return Tokens(ids, f"{plural(windows, 'window')} of {length} random token ids", ids.size)
