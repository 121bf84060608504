"""Which tokens of a text a pruned model predicts worse than the dense one, from the losses of both on every token."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

EDGES = (-2.0, -0.5, -0.1, 0.1, 0.5, 2.0)
"""Borders of the classes in nats: a token in the middle class is as well predicted as before."""

_LISTED, _APART = 10, 16
"""So many tokens are shown; two of one window are at least so many tokens apart."""

_BEFORE, _AFTER = 20, 6
_LETTERS, _FEW_LETTERS = 80, 40
"""So many tokens, and at most so many characters, are shown before and behind a token, and of it: report.json stays small."""

Decode = Callable[[Sequence[int]], str]


def token_changes(dense: np.ndarray, pruned: np.ndarray, tokens: np.ndarray, decode: Decode) -> dict[str, Any]:
    """What report.json says of single tokens. JSON types, a few thousand bytes.

    Args:
      dense, pruned: negative log-likelihoods [windows, length - 1] of every token but the first of its window, in nats.
      tokens: [windows, length] int32; more windows than there are losses are left out.
      decode: token ids -> text.

    Returns:
      "tokens": how many there are; "mean", "median": of the rise in nats; "edges": :data:`EDGES`; "shares": of tokens in each class
      between them, from those that got better to those that got worse; "rise_share": the share of the whole rise that the worst
      1% of the tokens have, None where the loss did not rise; "worst": the tokens whose loss rose most, each with "window" and
      "position", "before", "token", "after" (text), and "dense", "pruned" (their probabilities).
    """
    rise = pruned.astype(np.float64) - dense
    counts = np.bincount(np.searchsorted(EDGES, rise.ravel()), minlength=len(EDGES) + 1)
    most = np.sort(rise.ravel())[::-1][: max(1, rise.size // 100)]
    total = float(rise.sum())
    return {
        "tokens": rise.size,
        "mean": float(rise.mean()),
        "median": float(np.median(rise)),
        "edges": list(EDGES),
        "shares": (counts / rise.size).tolist(),
        "rise_share": float(most.sum()) / total if total > 0 else None,
        "worst": [_shown(*place, dense, pruned, tokens, decode) for place in _worst(rise)],
    }


def pieces(decode: Decode, *parts: Sequence[int]) -> list[str]:
    """The texts of token ids that follow each other: of each part what it adds to the text of those before it.

    Decoded alone, a token may lose the space before it.
    """
    whole = [decode([token for part in parts[: count + 1] for token in part]) for count in range(len(parts))]
    starts = ["", *whole[:-1]]
    if all(text.startswith(start) for text, start in zip(whole, starts, strict=True)):
        return [text[len(start) :] for text, start in zip(whole, starts, strict=True)]
    return [decode(part) for part in parts]  # a letter of several tokens was cut


def readable(text: str) -> str:
    """Text in one line, with a sign for what is not printed: line breaks as ⏎, tabs as ⇥, other control characters as �."""
    text = text.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def _worst(rise: np.ndarray) -> list[tuple[int, int]]:
    """Windows and columns of the largest rises, not two of one spot."""
    found: list[tuple[int, int]] = []
    # More than are listed, as some of them are neighbours.
    for index in np.argsort(rise, axis=None, kind="stable")[::-1][: _LISTED * 2 * _APART].tolist():
        window, column = divmod(index, rise.shape[1])
        if rise[window, column] <= 0 or len(found) == _LISTED:
            break
        if all(window != other or abs(column - place) >= _APART for other, place in found):
            found.append((window, column))
    return found


def _shown(window: int, column: int, dense: np.ndarray, pruned: np.ndarray, tokens: np.ndarray, decode: Decode) -> dict[str, Any]:
    at, row = column + 1, tokens[window].tolist()  # no prediction of the first token
    parts = row[max(0, at - _BEFORE) : at], row[at : at + 1], row[at + 1 : at + 1 + _AFTER]
    before, token, after = map(readable, pieces(decode, *parts))
    return {
        "window": window,
        "position": at,
        "before": before[-_LETTERS:],
        "token": token[:_FEW_LETTERS],
        "after": after[:_FEW_LETTERS],
        "dense": math.exp(-max(float(dense[window, column]), 0.0)),
        "pruned": math.exp(-max(float(pruned[window, column]), 0.0)),
    }
