"""Finds the tokens that a pruned model predicts worse than the dense one."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from optima_tpu.report.contents import ChangedToken, TokenChanges

EDGES = (-2.0, -0.5, -0.1, 0.1, 0.5, 2.0)
"""Boundaries between the classes of loss changes, in nats. The middle class counts as unchanged."""

_LISTED, _APART = 10, 16
"""Number of tokens listed, and the least distance between two listed tokens of one window."""

_BEFORE, _AFTER = 20, 6
_LETTERS, _FEW_LETTERS = 80, 40
"""Tokens shown before and after a listed token; most characters before it, and most characters of it and after it.

The limits keep report.json small.
"""

Decode = Callable[[Sequence[int]], str]


def token_changes(dense: np.ndarray, pruned: np.ndarray, tokens: np.ndarray, decode: Decode) -> TokenChanges:
    """Summarises loss changes per token in a few kB, for report.json.

    Args:
      dense, pruned: negative log-likelihoods [windows, length - 1] in nats, for every token except the first of its window.
      tokens: [windows, length] int32; windows beyond the number of losses are ignored.
      decode: token ids -> text.
    """
    rise = pruned.astype(np.float64) - dense
    counts = np.bincount(np.searchsorted(EDGES, rise.ravel()), minlength=len(EDGES) + 1)
    most = np.sort(rise.ravel())[::-1][: max(1, rise.size // 100)]
    total = float(rise.sum())
    return TokenChanges(
        tokens=rise.size,
        mean=float(rise.mean()),
        mean_stderr=float(np.std(rise.mean(axis=1), ddof=1)) / math.sqrt(len(rise)) if len(rise) > 1 else None,
        median=float(np.median(rise)),
        edges=EDGES,
        shares=tuple((counts / rise.size).tolist()),
        rise_share=float(most.sum()) / total if total > 0 else None,
        worst=tuple(_shown(*position, dense, pruned, tokens, decode) for position in _worst(rise)),
    )


def pieces(decode: Decode, *parts: Sequence[int]) -> list[str]:
    """Decodes consecutive parts of a token sequence into parts of its text.

    A token that is decoded alone may lose the space before it.
    """
    decoded = [decode([token for part in parts[: count + 1] for token in part]) for count in range(len(parts))]
    starts = ["", *decoded[:-1]]
    if all(text.startswith(start) for text, start in zip(decoded, starts, strict=True)):
        return [text[len(start) :] for text, start in zip(decoded, starts, strict=True)]
    return [decode(part) for part in parts]  # a part ends inside a character that several tokens encode


def readable(text: str) -> str:
    """One line of text: ⏎ for a line break, ⇥ for a tab, � for unprintable."""
    text = text.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def _worst(rise: np.ndarray) -> list[tuple[int, int]]:
    """(window, column) of the largest rises, ``_APART`` or more apart."""
    chosen: list[tuple[int, int]] = []
    # Look at more candidates than are listed, because neighbours of a listed token are skipped.
    for index in np.argsort(rise, axis=None, kind="stable")[::-1][: _LISTED * 2 * _APART].tolist():
        window, column = divmod(index, rise.shape[1])
        if rise[window, column] <= 0 or len(chosen) == _LISTED:
            break
        if all(window != other or abs(column - listed) >= _APART for other, listed in chosen):
            chosen.append((window, column))
    return chosen


def _shown(window: int, column: int, dense: np.ndarray, pruned: np.ndarray, tokens: np.ndarray, decode: Decode) -> ChangedToken:
    at, row = column + 1, tokens[window].tolist()  # column 0 is the loss of token 1: token 0 is not predicted
    parts = row[max(0, at - _BEFORE) : at], row[at : at + 1], row[at + 1 : at + 1 + _AFTER]
    before, token, after = map(readable, pieces(decode, *parts))
    return ChangedToken(
        window=window,
        position=at,
        before=before[-_LETTERS:],
        token=token[:_FEW_LETTERS],
        after=after[:_FEW_LETTERS],
        dense=math.exp(-max(float(dense[window, column]), 0.0)),
        pruned=math.exp(-max(float(pruned[window, column]), 0.0)),
    )
