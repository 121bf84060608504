"""The interfaces of text sources and token sources."""

import abc
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import ClassVar, Literal, NamedTuple, cast, overload

import numpy as np

from optima_tpu.errors import UserError

Split = Literal["calibration", "evaluation"]


class Tokens(NamedTuple):
    """Windows of token ids and where they come from.

    Attributes:
      ids: [windows, length] int32.
      how: one sentence for the report.
      available: number of tokens to choose from: of the whole source, or of the part that was read.
      cache: says that the tokens came from the token cache, or why they could not be saved there; not part of a run's record.
    """

    ids: np.ndarray
    how: str
    available: int
    cache: str = ""


def token_digest(ids: np.ndarray) -> str:
    """A hash of token windows, by which texts are compared."""
    return hashlib.sha256(f"{ids.shape}".encode() + np.ascontiguousarray(ids, np.int32).tobytes()).hexdigest()


def unigram_perplexity(ids: np.ndarray) -> float:
    """The perplexity of a text by the frequencies of its tokens alone.

    ``exp(H + (K - 1) / 2N)`` with the entropy ``H`` in nats of the ``K`` frequencies among ``N`` tokens; 1 for one repeated
    token. The second term corrects for frequencies that are counted in the text itself (Miller 1955). Without this term a short
    text looks more predictable than it is.
    """
    counts = np.unique(ids, return_counts=True)[1]
    shares = counts / ids.size
    return float(np.exp(-np.sum(shares * np.log(shares)) + (len(counts) - 1) / (2 * ids.size)))


class Part(NamedTuple):
    """Documents ``first`` to ``last - 1`` of ``text``.

    Without a ``last``, all documents from ``first`` on. ``config`` is the configuration of a data set. None, if none was named,
    stands for any.
    """

    text: str
    first: int = 0
    last: int | None = None
    config: str | None = None

    def overlaps(self, other: "Part") -> bool:
        """Whether a document may be in both."""
        return (
            self.text == other.text
            and (None in (self.config, other.config) or self.config == other.config)
            and (self.last is None or other.first < self.last)
            and (other.last is None or self.first < other.last)
        )


def common_part(first: Iterable[Part], second: Iterable[Part]) -> Part | None:
    """The first part that may share a document with others, or None."""
    others = list(second)
    return next((part for part in first if any(map(part.overlaps, others))), None)


class AnySource:
    """What a source can say of itself without reading all of its text.

    A frozen dataclass; its ``str`` is what the user types.

    Attributes:
      by_model: whether the model to be pruned writes the text.
      here: whether the text is on this machine if it is anywhere.
    """

    by_model: ClassVar[bool] = False
    here: ClassVar[bool] = False

    def each_text(self) -> tuple["Source", ...]:
        """The texts of a mix; any other source alone."""
        return (cast("Source", self),)

    def check(self) -> None:  # most sources know it only when they read
        """Raises UserError for a file that does not exist."""

    def parts(self, split: Split) -> Iterable[Part]:
        """The parts of texts read for a split; none if unknown.

        A run does not calibrate and evaluate on the same part.

        Raises:
          UserError: its data set does not exist here.
        """
        return ()

    def fingerprint(self, split: Split) -> str | None:
        """A text that differs if the documents differ; None if unknown.

        Raises UserError as ``documents`` does.
        """
        return None


class TextSource(AnySource, abc.ABC):
    """Documents of text."""

    @abc.abstractmethod
    def documents(self, split: Split) -> Iterable[str]:
        """The documents of one split, always in the same order.

        Raises UserError if the documents can't be read.

        A Sequence if a document can be read by its index: then only the documents that are needed are read.
        """


class TokenSource(AnySource, abc.ABC):
    """Windows that are token ids already."""

    @abc.abstractmethod
    def tokens(self, split: Split, *, vocabulary: int, windows: int | None, length: int, seed: int) -> Tokens:
        """Returns ``windows`` rows of ``length`` ids; None means all rows.

        The ids are in [0, vocabulary). Raises UserError if the source can't give them.
        """


Source = TextSource | TokenSource


class Documents(Sequence[str]):
    """``count`` documents, each read by its index when it is accessed."""

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


def check_field(name: str, fields: Collection[str], where: object) -> None:
    """Raises UserError if the data set ``where`` has no field ``name``."""
    if name not in fields:
        raise UserError(f"{where} has no field {name!r}, it has {', '.join(fields) or 'none'}: name another one by ?field=NAME")


def text_of(value: object, name: str, where: object, record: str) -> str:
    """Returns a field's text; else raises UserError that names ``record``."""
    if not isinstance(value, str):
        raise UserError(
            f"expected text in field {name!r} of {where}, {record} holds {type(value).__name__}: correct or drop that record, or "
            "name another field by ?field=NAME"
        )
    return value


def split_options(text: str, names: Sequence[str], form: str) -> tuple[str, dict[str, str]]:
    """Reads PATH or PATH?NAME=VALUE&NAME=VALUE.

    Args:
      form: the expected form, for the message.

    Raises:
      UserError: an option has another name, or no value.
    """
    path, question, rest = text.partition("?")
    pairs = [option.partition("=") for option in rest.split("&")] if question else []
    if not path or not all(name in names and value for name, _, value in pairs):
        raise UserError(f"expected {form}, got {text}")
    return path, {name: value for name, _, value in pairs}
