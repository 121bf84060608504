"""What a token source is."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, overload, runtime_checkable

import numpy as np

from optima_tpu.errors import UserError

Split = Literal["calibration", "evaluation"]


class Tokens(NamedTuple):
    """Windows of token ids and where they come from.

    Attributes:
      ids: [samples, length] int32.
      how: one sentence for the report.
      available: tokens that were there to choose from: all of the source's, or those of the part that was read.
      cache: that they came from the token cache, or why they could not be kept there; no part of the record of a run.
    """

    ids: np.ndarray
    how: str
    available: int
    cache: str = ""


def token_digest(ids: np.ndarray) -> str:
    """A hash of token windows, by which texts are compared."""
    return hashlib.sha256(f"{ids.shape}".encode() + np.ascontiguousarray(ids, np.int32).tobytes()).hexdigest()


@runtime_checkable
class TextSource(Protocol):
    """Documents of text. A frozen dataclass; its ``str`` is what the user types."""

    def documents(self, split: Split) -> Iterable[str]:
        """The documents of one split, always in the same order. Raises UserError where they can't be read.

        A Sequence where a document can be read by its number: then only those that are needed are read.
        """
        ...


@runtime_checkable
class TokenSource(Protocol):
    """Windows that are token ids already. A frozen dataclass; its ``str`` is what the user types."""

    def tokens(self, split: Split, *, vocabulary: int, windows: int | None, length: int, seed: int) -> Tokens:
        """``windows`` rows of ``length`` ids in [0, vocabulary); None means all. Raises UserError where it can't."""
        ...


Source = TextSource | TokenSource


class Part(NamedTuple):
    """Documents ``first`` to ``last - 1`` of what is kept at one place; all from ``first`` on where ``last`` is None.

    The configuration of a data set is None where none was named: it may be any.
    """

    place: str
    first: int = 0
    last: int | None = None
    config: str | None = None

    def overlaps(self, other: "Part") -> bool:
        """Whether a document may be in both."""
        return (
            self.place == other.place
            and (None in (self.config, other.config) or self.config == other.config)
            and (self.last is None or other.first < self.last)
            and (other.last is None or self.first < other.last)
        )


@runtime_checkable
class Located(Protocol):
    """A source that can tell where it reads, so that another one is not given the same text."""

    def parts(self, split: Split) -> Iterable[Part]:
        """What is read for a split. Raises UserError where it can't be told."""
        ...


@runtime_checkable
class Fingerprinted(Protocol):
    """A source that can tell whether its text has changed without reading all of it as text."""

    def fingerprint(self, split: Split) -> str | None:
        """Another text for other documents; None where it can't be told. Raises UserError as ``documents`` does."""
        ...


class Documents(Sequence[str]):
    """``count`` documents that are read by their number when they are asked for."""

    def __init__(self, read: Callable[[int], str], count: int):
        self._read, self._numbers = read, range(count)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index):
        numbers = self._numbers[index]
        return [self._read(number) for number in numbers] if isinstance(index, slice) else self._read(numbers)

    def __iter__(self) -> Iterator[str]:
        return map(self._read, self._numbers)


def split_options(text: str, names: Sequence[str], form: str) -> tuple[str, dict[str, str]]:
    """Reads PATH or PATH?NAME=VALUE&NAME=VALUE.

    Args:
      names: the options there are.
      form: how it is written, for the message.

    Raises:
      UserError: an option that is not one of them, or one without a value.
    """
    path, question, rest = text.partition("?")
    pairs = [option.partition("=") for option in rest.split("&")] if question else []
    if not path or not all(name in names and value for name, _, value in pairs):
        raise UserError(f"expected {form}, got {text}")
    return path, {name: value for name, _, value in pairs}
