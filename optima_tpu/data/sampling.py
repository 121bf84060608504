"""Cuts documents into windows of tokens.

Calibration follows SparseGPT (arXiv:2301.00774) and Wanda (arXiv:2306.11695): random windows of documents that are
longer than a window. Texts whose documents are too short for that are packed, as in pretraining.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated

import numpy as np

from optima_tpu.data.source import Tokens
from optima_tpu.errors import UserError, plural
from optima_tpu.runtime.bounds import Bound, Bounded, Seed

Encode = Callable[[str], np.ndarray]
"""Text to [tokens] int32 ids, special tokens included."""

Over = Callable[[Callable[[int], np.ndarray], Sequence[int]], Iterator[np.ndarray]]
"""Applies a function to indices, in order: ``map`` or ``processes.spread``."""

CHARACTERS_PER_TOKEN = 8
"""Characters of text that are read at first for each evaluation token: about twice what English needs."""

_ATTEMPTS = 1000
"""Draws for each held-out window before the text counts as too short for it."""


@dataclasses.dataclass(frozen=True)
class Draw(Bounded):
    """Which windows are drawn from a text.

    Attributes:
      seed: the same seed gives the same windows.
      held_out: number of windows drawn in addition to ``windows``; they share no token position with the calibration windows.
      bos: the first token of every window, followed by ``length - 1`` tokens of text that is tokenised without special tokens.
        In the windows of a :class:`~optima_tpu.data.source.TokenSource` it replaces the first token.
    """

    windows: Annotated[int, Bound(1)]
    length: Annotated[int, Bound(1)]
    seed: Seed
    held_out: Annotated[int, Bound(0)] = 0
    bos: int | None = None

    @property
    def count(self) -> int:
        """The number of all windows."""
        return self.windows + self.held_out


def calibration_windows(
    documents: Sequence[str], encode: Encode, draw: Draw, *, separator: int | None, origin: str, over: Over = map
) -> Tokens:
    """Draws ``windows`` windows, and ``held_out`` that overlap none of them.

    The documents are visited in an order drawn with numpy's PCG64 from ``seed``. Blank ones are skipped. The first of these
    cases that holds decides, where ``windows`` means ``windows + held_out``:

    1. ``windows`` documents have more than ``length`` tokens: one window of each of the first such documents, with a uniformly
       drawn start. Further documents are not tokenised. On a large corpus this is SparseGPT's draw of random documents.
    2. The documents with more than ``length`` tokens hold ``windows * length`` or more together: windows drawn with
       replacement, every window of these documents equally likely. On one long text this is SparseGPT's random start.
       Held-out windows are drawn again until they overlap no calibration window; if no room is left for them, the next case
       holds.
    3. All documents together hold ``windows * length`` or more: they are joined in the order of the visit,
       ``separator`` between two of them, and the first ``windows * length`` tokens are cut into consecutive windows.

    Args:
      separator: the id of the tokenizer's EOS; None where it has none. Not repeated after a document that ends with it.
      origin: the source's name, for the report and the error.
      over: applies reading and tokenising to the documents, in the order of the visit; documents that are not needed stay unread.

    Raises:
      UserError: no case holds.
    """
    rng, count, length = np.random.Generator(np.random.PCG64(draw.seed)), draw.count, draw.length
    packed, total, read, needed = [], 0, 0, count * length
    long: list[np.ndarray] = []
    for ids, joined in _visited(documents, encode, rng, separator, over):
        if total < needed:
            packed.append(joined)
        read, total = read + 1, total + joined.size
        if ids.size > length:
            long.append(ids)
            if len(long) == count:
                break

    windows, more, drawn = (
        f"{plural(count, 'window')} of {length} tokens",
        held_out_text(draw.windows, draw.held_out),
        f"drawn with seed {draw.seed}",
    )
    sizes = np.array([ids.size for ids in long], np.int64)
    if len(long) == count:
        places = list(enumerate(rng.integers(0, sizes - length, endpoint=True)))
        how = f"{windows} {drawn}, each from another document of {origin} that is longer than a window{more}"
    elif sizes.sum() >= needed and (places := _places(rng, sizes, draw)):
        which = "one document" if len(long) == 1 else plural(len(long), "document")
        how = f"{windows} {drawn} from {which} of {origin} longer than a window{more}"
    elif total >= needed:
        how = (
            f"{plural(count, 'consecutive window')} of {length} tokens of {plural(read, 'document')} of {origin}, packed in an "
            f"order {drawn}{more}"
        )
        return Tokens(np.concatenate(packed)[:needed].reshape(count, length), how, total)
    else:
        raise UserError(
            f"{origin} holds {total} tokens of calibration text, {plural(count, 'window')} of {length} need {needed}, and "
            f"{total // length} would fit: give a longer text, or ask for fewer or shorter windows (calibration.windows, "
            "calibration.held_out and distill.windows count together); calibration.written lets the model write some"
        )
    return Tokens(np.stack([long[document][start : start + length] for document, start in places]), how, int(sizes.sum()))


def _visited(
    documents: Sequence[str], encode: Encode, rng: np.random.Generator, separator: int | None, over: Over = map
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (ids, ids as they are joined) of documents in random order.

    Blank documents are skipped. Joined ids begin with the separator, except at the first document and after one that ends with
    it.
    """
    order, last = rng.permutation(len(documents)), separator

    def read_and_encode(index: int) -> np.ndarray:
        text = documents[int(order[index])]
        return encode(text) if text.strip() else np.array([], np.int32)

    for ids in over(read_and_encode, range(len(documents))):
        if ids.size:
            yield ids, ids if separator is None or last == separator else np.insert(ids, 0, separator)
            last = ids[-1]


def _places(rng: np.random.Generator, sizes: np.ndarray, draw: Draw) -> list[tuple[int, int]]:
    """Draws (document, first token) of windows, held-out windows last.

    The windows are drawn with replacement from documents of these sizes. Empty if the others left no room for the held-out
    ones.
    """
    ends = np.cumsum(sizes - draw.length + 1)

    def some(size: int) -> list[tuple[int, int]]:
        draws = rng.integers(0, ends[-1], size=size)
        chosen = np.searchsorted(ends, draws, side="right")
        # Counted from the end of the document's share: the last draw of a share is the document's first window.
        return list(zip(chosen.tolist(), (ends[chosen] - 1 - draws).tolist()))

    places = some(draw.windows)
    for _ in range(_ATTEMPTS * draw.held_out):
        if len(places) == draw.count:
            break
        document, start = some(1)[0]
        if all(document != other or abs(start - begin) >= draw.length for other, begin in places[: draw.windows]):
            places.append((document, start))
    return places if len(places) == draw.count else []


def stream_windows(documents: Iterable[str], encode: Encode, draw: Draw, *, separator: int | None, origin: str) -> Tokens:
    """Cuts documents into at most ``windows`` windows; none overlap.

    A shorter text gives fewer windows of ``length`` tokens. The documents are visited in an order drawn with numpy's PCG64 from
    ``seed``, joined as in the third case of :func:`calibration_windows`, and cut into consecutive windows. Further documents
    are not tokenised. More windows begin with the same ones.

    Raises:
      UserError: the text is shorter than one window.
    """
    documents, length = documents if isinstance(documents, Sequence) else list(documents), draw.length
    parts, total = [], 0
    for _, joined in _visited(documents, encode, np.random.Generator(np.random.PCG64(draw.seed)), separator):
        parts.append(joined)
        total += joined.size
        if total >= draw.windows * length:
            break
    count = min(draw.windows, total // length)
    if not count:
        raise UserError(
            f"{origin} holds {total} tokens of text, one window needs {length}: give a longer text or shorter windows"
        )
    ids = np.concatenate(parts)[: count * length].reshape(count, length)
    how = (
        f"{plural(count, 'consecutive window')} of {length} tokens of {plural(len(parts), 'document')} of {origin}, packed in "
        "random order"
    )
    return Tokens(ids, how, total)


def held_out_text(windows: int, held_out: int) -> str:
    """Says how many windows are fitted to and held out; empty if none is."""
    return f" ({windows} to fit to, {held_out} held out)" if held_out else ""


def evaluation_windows(documents: Iterable[str], encode: Encode, *, length: int, windows: int | None, origin: str) -> Tokens:
    """Cuts documents into their first ``windows`` consecutive windows.

    The documents are joined by a blank line and tokenised as one text. If ``windows`` is given, documents are read only until
    they hold more tokens than these windows.

    Raises:
      UserError: the text is shorter than one window.
    """
    documents = iter(documents)
    wanted = None if windows is None else windows * length
    limit = None if wanted is None else wanted * CHARACTERS_PER_TOKEN
    read, characters, more = [], 0, True
    while more:
        more = False
        for document in documents:
            read.append(document)
            characters += len(document)
            if limit is not None and characters >= limit:
                more = True
                break
        ids = encode("\n\n".join(read))
        # Strictly more: a special token that the tokenizer puts at the end of a text is then not in a window.
        if wanted is not None and ids.size > wanted:
            break
        limit = limit and 2 * limit
    count = ids.size // length if windows is None else min(windows, ids.size // length)
    if not count:
        raise UserError(
            f"{origin} holds {ids.size} tokens of evaluation text, one window needs {length}: give a "
            "longer text or ask for shorter windows"
        )
    how = f"the first {plural(count, 'consecutive window')} of {length} tokens of {origin}"
    return Tokens(ids[: count * length].reshape(count, length), how, ids.size)
