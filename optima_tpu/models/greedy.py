"""Greedy continuations of prompts of different lengths, in batches of a few shapes.

Every window begins at position 0 and all windows of a step are at the same position. So positions and masks are those of one pass
over the finished text, and there is no padding before a prompt. While a short prompt is continued, the rest of a longer one in its
batch is still read, a token a step.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P

from optima_tpu.errors import UserError
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.family import LENGTHS
from optima_tpu.models.generate import Caches, Resident, State, empty_cache, load, positions_on_mesh, step, windows_at_once
from optima_tpu.runtime.mesh import DATA, place
from optima_tpu.runtime.processes import fetch

_STRETCH = 32
"""Tokens of every window that one call of the compiled program writes, at most. Then the caller says which answers are enough."""

_CHUNK = 32
"""Tokens of every prompt that one call of the compiled program reads. All ``LENGTHS`` from 64 on are multiples of it."""

_TOGETHER = 16
"""Prompts that are continued at once on a slice of the data axis, for every sequence of ``Decoder.batch``, if memory allows."""


class Prompt(NamedTuple):
    """A text to continue: its token ids, at least one, and the most tokens to write after them."""

    tokens: tuple[int, ...]
    new: int


class Batch(NamedTuple):
    """Prompts that are continued at once.

    Attributes:
      prompts: their indices.
      rows: windows of the batch; those without a prompt repeat the last one.
      room: length of the cache, in tokens.
      read: tokens of every window that are read before the first one is written, all but one of the shortest prompt.
      written: steps that write a token of every window; the last one writes the last token of the longest answer.
    """

    prompts: tuple[int, ...]
    rows: int
    room: int
    read: int
    written: int

    @property
    def stretches(self) -> range:
        """The position of the first step of every call that writes."""
        return range(self.read, self.read + self.written, _STRETCH)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Prompts in batches of a few shapes, and the compiled programs, which decoders of one shape share.

    Attributes:
      prompts: in the caller's order.
      batches: the batches with the longest cache first.
      read: reads a chunk of every window into the cache.
      write: writes a stretch of every window.
    """

    prompts: Sequence[Prompt]
    batches: tuple[Batch, ...]
    read: Callable[..., Caches]
    write: Callable[..., tuple[State, Array, Array]]

    @property
    def steps(self) -> int:
        """How often :func:`greedy` calls ``advance``."""
        return sum(len(batch.stretches) for batch in self.batches)


def make_plan(decoder: Decoder, prompts: Sequence[Prompt], *, vocabulary: int, budget: float = math.inf, advice: str) -> Plan:
    """Sorts prompts into batches. A batch holds prompts of nearly one length.

    The length of the cache follows from a prompt alone, not from the others of its batch: the least of ``LENGTHS`` that holds it
    with all that may be written. So LongRoPE, whose factors depend on that length, gives the same answers in every batch.

    Args:
      vocabulary: only ids below it are written.
      budget: bytes of memory to use on each device.
      advice: what to do if the model does not fit, the end of the message.

    Raises:
      UserError: the model does not fit the devices as a whole, with one prompt on each slice of the data axis.
    """
    rooms: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        rooms.setdefault(_room(len(prompt.tokens) + prompt.new), []).append(number)
    most, batches = _TOGETHER * decoder.batch * decoder.mesh.shape[DATA], []
    for room, members in sorted(rooms.items(), reverse=True):
        members.sort(key=lambda number: (-len(prompts[number].tokens), -prompts[number].new))
        rows = windows_at_once(decoder, len(members), room, budget, most, advice)
        for first in range(0, len(members), rows):
            part = members[first : first + rows]
            read = min(len(prompts[number].tokens) for number in part) - 1
            last = max(len(prompts[number].tokens) + prompts[number].new for number in part) - 1
            batches.append(Batch(tuple(part), rows, room, read, last - read))
    return Plan(
        prompts,
        tuple(batches),
        jax.jit(functools.partial(_read, decoder), donate_argnums=1),
        jax.jit(functools.partial(_continue, decoder, vocabulary), donate_argnums=1),
    )


def greedy(
    decoder: Decoder,
    plan: Plan,
    enough: Callable[[int, list[int]], bool] = lambda number, tokens: False,
    advance: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Continues prompts with the most likely tokens; of equally likely ones, with the one of the smaller id.

    Args:
      decoder: of the shape of the plan's decoder.
      enough: (number of the prompt, the tokens written after it) -> whether no more are wanted. A batch ends when this holds for
        all of its prompts. Every process must give the same answer.
      advance: called :attr:`Plan.steps` times.

    Returns:
      For each prompt, at most ``Prompt.new`` tokens; fewer where they were enough. The same in every process.

    Raises:
      UserError: the model's logits are not finite.
    """
    written: list[list[int]] = [[] for _ in plan.prompts]
    model = load(decoder, plan.batches[0].room)
    for batch in plan.batches:
        going, steps = dict(enumerate(batch.prompts)), len(batch.stretches)
        for first, tokens in _written(decoder, model, plan, batch):
            for row, number in list(going.items()):
                (prompt, new), answer = plan.prompts[number], written[number]
                # The step at a position writes the token after it.
                answer += tokens[max(len(prompt) - 1 - first, 0) :, row][: new - len(answer)].tolist()
                if len(answer) == new or enough(number, answer):
                    del going[row]
            advance()
            steps -= 1
            if not going:
                break
        for _ in range(steps):
            advance()
    return written


def _written(decoder: Decoder, model: Resident, plan: Plan, batch: Batch) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (position of the first step, tokens [steps, rows] that the steps write) of every stretch of a batch.

    Tokens of a prompt are repeated as they are.
    """
    mesh, model = decoder.mesh, model._replace(positions=positions_on_mesh(decoder, batch.room))
    given, ends = np.zeros((batch.rows, batch.room), np.int32), np.zeros(batch.rows, np.int32)
    for row in range(batch.rows):
        prompt = plan.prompts[batch.prompts[min(row, len(batch.prompts) - 1)]].tokens
        given[row, : len(prompt)], ends[row] = prompt, len(prompt)
    prompts, sizes, before = (place(mesh, array, P(DATA)) for array in (given, ends, given[:, batch.read]))
    caches = empty_cache(decoder, batch.rows, batch.room)
    # The last chunk may read past the shortest prompt: later steps read these tokens again.
    for chunk in range(0, batch.read, _CHUNK):
        caches = plan.read(model, caches, prompts, np.int32(chunk), np.int32(batch.read))
    state = (caches, before)
    for first in batch.stretches:
        last = min(first + _STRETCH, batch.read + batch.written)
        state, tokens, finite = plan.write(model, state, prompts, sizes, np.int32(first), np.int32(last))
        tokens, finite = fetch((tokens, finite))
        if not finite:
            raise UserError(f"the logits of a model hold NaN or infinite values after a prompt: {decoder.overflowed}")
        yield first, tokens[: last - first]


def _room(size: int) -> int:
    return next(length for length in LENGTHS if length >= max(size, 2 * _CHUNK))


def _read(decoder: Decoder, model: Resident, caches: Caches, prompts: Array, first: Array, end: Array) -> Caches:
    """A compiled program: the caches with the prompts' tokens ``first`` to ``first + _CHUNK - 1``, as far as they are before ``end``."""
    tokens = jax.lax.dynamic_slice_in_dim(prompts, first, _CHUNK, axis=1)
    return step(decoder, model, caches, tokens, first, end)[1]


def _continue(
    decoder: Decoder, vocabulary: int, model: Resident, state: State, prompts: Array, ends: Array, first: Array, last: Array
) -> tuple[State, Array, Array]:
    """A compiled program: (state, tokens [_STRETCH, prompts], whether all logits are finite).

    Row i has the tokens after position ``first + i``, for positions below ``last``.
    """

    def token(at: Array, carry: tuple[State, Array, Array]) -> tuple[State, Array, Array]:
        (caches, before), tokens, finite = carry
        logits, caches = step(decoder, model, caches, before[:, None], at)
        best = jnp.argmax(jnp.where(jnp.arange(logits.shape[1]) < vocabulary, logits, -jnp.inf), axis=1).astype(jnp.int32)
        after = jnp.where(at + 1 < ends, jnp.take(prompts, at + 1, axis=1, mode="clip"), best)
        return (caches, after), tokens.at[at - first].set(after), finite & jnp.isfinite(logits).all()

    # A loop of as many steps as are wanted: a scan would take a fixed number.
    return jax.lax.fori_loop(first, last, token, (state, jnp.zeros((_STRETCH, len(prompts)), jnp.int32), jnp.bool_(True)))
