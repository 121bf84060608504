"""Chooses blocks to leave out by the change of the model's predictions.

One block after the other is left out: the one without which ``KL(dense || without)`` of the next-token distribution on the
held-out windows is smallest, given those that are left out already. Only the blocks that turn the stream least are tried, by

    1 - cos(x_b, x_b+1)        mean over the tokens

of the hidden states before and behind a block, the score by which ShortGPT (Men et al., 2024, arXiv:2403.03853) leaves out
blocks. A try passes the windows through the blocks behind the one that it leaves out, and no others. All tries of a choice pass
through the blocks together, so every block is read once for them. For the scores of the next choice the windows pass once more
through the blocks behind the one that was left out.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from optima_tpu.errors import UserError
from optima_tpu.evaluate.distance import divergences
from optima_tpu.models.activations import Activations
from optima_tpu.models.checkpoints.fewer_blocks import kept_blocks, why_unreadable
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.model import Model
from optima_tpu.report.contents import LeftOut
from optima_tpu.runtime.processes import everyones

TRIED = 8
"""How many blocks are tried for each choice."""


def choices(model: Model, tokens: np.ndarray, before: LeftOut, tried: int = TRIED) -> Iterator[LeftOut]:
    """Yields the blocks left out so far, after each choice of one more.

    A choice takes the block without which the predictions change least, given the blocks left out already. The hosts hold
    the hidden states of the windows before each block.

    Args:
      model: the dense one.
      tokens: [windows, length] int32, held out.
      before: the blocks that are left out already.
      tried: how many blocks are tried for each choice.

    Raises:
      UserError: no predictions are finite, or config.json cannot describe the model without any other block.
    """
    decoder, count = model.decoder, model.decoder.config.blocks
    entering, turns, gone = dict[int, Activations](), dict[int, float](), before.blocks

    def through(blocks: Sequence[int], hidden: Activations) -> Activations:
        """Passes windows through blocks; keeps each input and its turn."""
        for index, parameters in zip(blocks, decoder.blocks(blocks)):
            entering[index] = hidden.copy()
            decoder.apply(index, parameters, hidden)
            turns[index] = _turn(entering[index], hidden)
        return hidden

    dense = through(range(count), decoder.embed(tokens))
    while True:
        if gone:  # the blocks before them read what they did
            hidden = entering[min(gone)]
            for index in range(min(gone), count):
                entering.pop(index, None), turns.pop(index, None)
            through([index for index in kept_blocks(count, before.blocks) if index > min(gone)], hidden)
        least = sorted(entering, key=lambda index: (turns[index], index))
        readable = (index for index in least if not why_unreadable(model.pretrained.config, (*before.blocks, index)))
        tries = {index: entering[index].copy() for index in sorted(itertools.islice(readable, tried))}
        best, divergence = _best(decoder, tokens, dense, tries, list(entering))
        gone, before = (best,), LeftOut((*before.blocks, best), (*before.divergences, divergence))
        del tries
        yield before


def expected_passes(blocks: int, cut: int, before: int = 0) -> list[float]:
    """About how many passes of the windows through a block each choice takes.

    Args:
      before: how many blocks of the ``cut`` are chosen already.
    """
    # Through half of the blocks that are left for each try, and once more behind each choice; before the first one through all.
    passes = [(TRIED + 1) * left / 2 for left in range(blocks - before, blocks - cut, -1)]
    return [blocks / 2 + passes[0], *passes[1:]] if passes else []


def _best(
    decoder: Decoder, tokens: np.ndarray, dense: Activations, tries: Mapping[int, Activations], left: Sequence[int]
) -> tuple[int, float]:
    """The block without which the predictions diverge least, and by how much.

    Args:
      dense: behind the last block of the dense model.
      tries: what enters each block that is tried. It is passed on through the blocks behind that one.
      left: the blocks that are not left out, ascending.
    """
    if not tries:
        gone = decoder.config.blocks - len(left)
        raise UserError(
            f"expected cut.blocks of at most {gone}, since config.json describes no model without another block, got more"
        )
    behind = [index for index in left if index > min(tries)]
    for index, parameters in zip(behind, decoder.blocks(behind)):
        for without, stream in tries.items():
            if without < index:
                decoder.apply(index, parameters, stream)
    head = decoder.head()
    sums = divergences(head, dense, list(tries.values()), tokens, decoder.batch).sum(axis=1, dtype=np.float64)
    mean_divergence = dict(zip(tries, (sums / tokens[:, 1:].size).tolist()))
    finite = [without for without in tries if np.isfinite(mean_divergence[without])]
    if not finite:
        raise UserError(
            f"the predictions are not finite without any of the blocks {', '.join(map(str, tries))}: {decoder.overflowed}"
        )
    best = min(finite, key=lambda without: (mean_divergence[without], without))
    return best, mean_divergence[best]


def _turn(before: Activations, behind: Activations) -> float:
    """The mean of 1 - cos before and behind a block, over all tokens."""
    own = np.array([_turns(*states) for states in zip(before.values, behind.values)])
    turns = np.empty(len(before))
    for theirs, part in everyones((before.rows, own)):  # processes may hold the same windows, with equal values
        turns[theirs] = part
    return float(turns.mean())


def _turns(before: np.ndarray, behind: np.ndarray) -> float:
    """The mean of 1 - cos over the tokens of a window, [length, d_model]."""
    first, second = (states.astype(np.float32) for states in (before, behind))
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return float(1 - np.mean(np.sum(first * second, axis=-1) / np.maximum(norms, np.finfo(np.float32).tiny), dtype=np.float64))
