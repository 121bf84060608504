"""What a token source is."""

from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

Split = Literal["calibration", "evaluation"]


class Tokens(NamedTuple):
    """Windows of token ids and where they come from.

    Attributes:
      ids: [samples, length] int32.
      how: one sentence for the report.
      available: tokens that were there to choose from: all of the source's, or those of the part that was read.
    """

    ids: np.ndarray
    how: str
    available: int


@runtime_checkable
class TextSource(Protocol):
    """Documents of text. A frozen dataclass; its ``str`` is what the user types."""

    def documents(self, split: Split) -> Iterator[str]:
        """The documents of one split, always in the same order. Raises UserError where they can't be read."""
        ...


@runtime_checkable
class TokenSource(Protocol):
    """Windows that are token ids already. A frozen dataclass; its ``str`` is what the user types."""

    def tokens(self, split: Split, *, vocabulary: int, windows: int | None, length: int, seed: int) -> Tokens:
        """``windows`` rows of ``length`` ids in [0, vocabulary); None means all. Raises UserError where it can't."""
        ...


Source = TextSource | TokenSource
