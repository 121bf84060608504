"""Log-likelihoods of continuations, for many texts of different lengths.

Texts are padded on the right to a few lengths. Attention is causal, so the padding does not change the tokens before it. One
block is on the devices at a time; all texts pass through it before the next block. The hosts hold the hidden states, so a large
number of texts is split into waves.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optima_tpu.evaluate.perplexity import overflow
from optima_tpu.evaluate.predictions import picked
from optima_tpu.models.activations import Activations, held_rows, on_mesh
from optima_tpu.models.decoder import Decoder, Head, head_logits
from optima_tpu.models.family import LENGTHS
from optima_tpu.report.pace import Step
from optima_tpu.runtime.mesh import DATA
from optima_tpu.runtime.processes import fetch

TOKENS = 2048
"""Tokens in a sequence of ``Decoder.batch``. A batch of shorter texts has the same number of tokens; a batch of longer texts has
the same number of attention products."""

WAVE = 4 << 30
"""Bytes of hidden states that one host holds at once."""

_PLACES = 256
"""Positions whose logits one slice of the data axis computes at once: the logits of a whole batch would be the largest array."""


class Request(NamedTuple):
    """A request for a log-likelihood of ``m`` targets, given ``n`` inputs.

    It is ``sum_k log p(targets[k] | inputs[: n - m + k + 1])``. Each target is the next token after one of the last ``m``
    inputs.
    """

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


class Likelihood(NamedTuple):
    """Sum of natural logarithms, and whether each target is the likeliest."""

    logarithm: float
    greedy: bool


class Group(NamedTuple):
    """Texts ``first`` to ``last - 1``, padded to ``length``, in batches."""

    first: int
    last: int
    length: int
    batch: int


@dataclasses.dataclass(frozen=True)
class LikelihoodPlan:
    """Assigns requests to batches and waves.

    Attributes:
      requests: in the caller's order.
      texts: the distinct ``inputs`` of all requests, the longest first.
      owners: [requests] index of each request's text in ``texts``.
      waves: groups in the order of computation; the hosts hold the hidden states of one wave at a time.
    """

    requests: Sequence[Request]
    texts: tuple[tuple[int, ...], ...]
    owners: np.ndarray
    waves: tuple[tuple[Group, ...], ...]

    def steps(self, decoder: Decoder) -> list[Step]:
        """What :func:`likelihoods` does before each call of ``advance``."""
        kinds = [decoder.config.kind_of(index) for index in range(decoder.config.blocks)]
        sizes = [float(sum((group.last - group.first) * group.length for group in wave)) for wave in self.waves]
        return [
            step for size in sizes for step in (*(Step(f"texts {kind}", size) for kind in kinds), Step("head of texts", size))
        ]

    def tokens(self, group: Group) -> np.ndarray:
        """Token ids, [texts, length] int32, zero-padded to full batches."""
        count = -(-(group.last - group.first) // group.batch) * group.batch
        tokens = np.zeros((count, group.length), np.int32)
        for row, text in enumerate(self.texts[group.first : group.last]):
            tokens[row, : len(text)] = text
        return tokens

    def places(self, group: Group) -> "Places":
        """The positions in a group's texts at which a target is scored."""
        indices = np.flatnonzero((self.owners >= group.first) & (self.owners < group.last))
        requests = [self.requests[number] for number in indices.tolist()]
        counts = [len(request.targets) for request in requests]
        ends = [len(request.inputs) for request in requests]
        return Places(
            request=np.repeat(indices, counts),
            text=np.repeat(self.owners[indices] - group.first, counts),
            position=np.concatenate([np.arange(end - count, end) for end, count in zip(ends, counts)]),
            target=np.concatenate([np.asarray(request.targets, np.int32) for request in requests]),
        )


class Places(NamedTuple):
    """Targets to score, one entry each, [targets] int32 or int64.

    Attributes:
      request: index of the request in the plan.
      text: index of the text in its group.
      position: index in the text of the token whose next token is scored.
      target: token id.
    """

    request: np.ndarray
    text: np.ndarray
    position: np.ndarray
    target: np.ndarray


def make_plan(decoder: Decoder, requests: Sequence[Request], longest: int, wave: int = WAVE) -> LikelihoodPlan:
    """Sorts requests by length and cuts them into batches of a few shapes.

    The first text of a batch determines its length; shorter texts fill the rest of the batch. Only the very last batch may have
    fewer texts than other batches of its length; their number per slice is then rounded up to a power of two. So each block is
    compiled once for each length that occurs, and at most once more.

    Args:
      requests: each has at least one target and at most as many targets as inputs.
      longest: the most tokens that the model can read; no text has more inputs.
      wave: bytes of hidden states that a host holds at once.
    """
    texts = sorted({request.inputs for request in requests}, key=lambda text: (-len(text), text))
    numbers = {text: number for number, text in enumerate(texts)}
    owners = np.asarray([numbers[request.inputs] for request in requests], np.int64)
    slices = decoder.mesh.shape[DATA]
    share = len(held_rows(decoder.mesh, 0, slices)) / slices
    width = decoder.config.d_model * 4 * share  # counted as float32
    waves: list[list[Group]] = []
    size = wave
    for group in _batches([len(text) for text in texts], slices, decoder.batch, longest):
        added = group.batch * group.length * width
        if size + added > wave:
            waves.append([])
            size = 0
        size += added
        before = waves[-1][-1] if waves[-1] else None
        if before and before[2:] == group[2:]:
            waves[-1][-1] = before._replace(last=group.last)
        else:
            waves[-1].append(group)
    return LikelihoodPlan(requests, tuple(texts), owners, tuple(map(tuple, waves)))


def _batches(sizes: Sequence[int], slices: int, batch: int, longest: int) -> Iterator[Group]:
    """Yields one batch after another, for texts from long to short."""
    first = 0
    while first < len(sizes):
        length = min(next(length for length in LENGTHS if length >= sizes[first]), longest)
        each = max(1, batch * TOKENS * TOKENS // (length * max(length, TOKENS)))
        left = -(-(len(sizes) - first) // slices)
        if left < each:
            each = min(each, 1 << (left - 1).bit_length())
        last = min(first + each * slices, len(sizes))
        yield Group(first, last, length, each * slices)
        first = last


def likelihoods(decoder: Decoder, plan: LikelihoodPlan, advance: Callable[[], None] = lambda: None) -> list[Likelihood]:
    """Computes a plan, in the order of its requests.

    Requests with the same inputs share the forward pass.

    Args:
      advance: called in every wave after every block and once after the head.

    Raises:
      UserError: the model's output is not finite. The message names the first layer whose input is not finite.
    """
    totals, greedy = np.zeros(len(plan.requests)), np.ones(len(plan.requests), bool)
    for wave in plan.waves:
        states = [decoder.embed(plan.tokens(group)) for group in wave]
        for index, parameters in enumerate(decoder.blocks(range(decoder.config.blocks))):
            for group, hidden in zip(wave, states):
                decoder.apply(index, parameters, hidden, group.batch // decoder.mesh.shape[DATA])
            advance()
        head = decoder.head()
        for group, hidden in zip(wave, states):
            places = plan.places(group)
            for chosen, logarithms, likeliest in _scores(head, hidden, places):
                # Adds float32 logarithms in float64.
                np.add.at(totals, places.request[chosen], logarithms)
                np.logical_and.at(greedy, places.request[chosen], likeliest)
        del states
        advance()
    if not np.isfinite(totals).all():
        text = plan.texts[plan.owners[np.flatnonzero(~np.isfinite(totals))[0]]]
        raise overflow(decoder, np.asarray([text], np.int32))
    return [Likelihood(float(total), bool(best)) for total, best in zip(totals, greedy)]


def _scores(head: Head, hidden: Activations, places: Places) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields chunks of scores of the targets at ``places``.

    A chunk has indices into ``places``, log-probabilities of the targets, and whether each target is the most likely token.
    Only the hidden states at these positions go to the devices. Each slice of the data axis gets the texts that it computed.
    """
    slices = hidden.mesh.shape[DATA]
    by_slice = [np.flatnonzero(places.text % slices == number) for number in range(slices)]
    columns = -(-max(map(len, by_slice)) // _PLACES) * _PLACES
    table = np.full((slices, columns), -1)
    for row, numbers in zip(table, by_slice):
        row[: len(numbers)] = numbers

    def states(numbers):
        gathered = np.zeros((len(numbers), hidden.values.shape[2]), hidden.values.dtype)
        chosen = numbers[numbers >= 0]
        gathered[numbers >= 0] = hidden.values[np.searchsorted(hidden.rows, places.text[chosen]), places.position[chosen]]
        return gathered

    for first in range(0, columns, _PLACES):
        numbers = table[:, first : first + _PLACES].ravel()
        valid = numbers >= 0
        scores = fetch(
            _next_tokens(
                head,
                on_mesh(hidden.mesh, numbers, states, (hidden.values.shape[2],)),
                on_mesh(hidden.mesh, numbers, lambda which: places.target[which], ()),
            )
        )
        yield numbers[valid], *(values[valid] for values in scores)


@jax.jit
def _next_tokens(head: Head, hidden: Array, targets: Array) -> tuple[Array, Array]:
    """Log-probabilities of [n] targets, and whether each is the likeliest."""
    logits = head_logits(head, hidden)
    return picked(logits, targets) - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets
