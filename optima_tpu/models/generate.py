"""Continues prompts of different lengths, in batches of a few shapes.

It writes the likeliest tokens, or draws them. Every window begins at position 0 and all windows of a step are at the same
position. So positions and masks are those of one pass over the finished text, and there is no padding before a prompt. While a
short prompt is continued, the rest of a longer one in its batch is still read, a token a step.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P

from optima_tpu.errors import UserError
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.family import LENGTHS
from optima_tpu.models.whole_model import Caches, WholeModel, empty_cache, load, positions_on_mesh, step, windows_at_once
from optima_tpu.runtime.mesh import DATA, place
from optima_tpu.runtime.processes import fetch

_STRETCH = 32
"""Tokens of every window that one call of the compiled program writes, at most. Then the caller says which answers are enough."""

_CHUNK = 32
"""Tokens of every prompt that one call of the compiled program reads. All ``LENGTHS`` from 64 on are multiples of it."""

State = tuple[Caches, Array]
"""The caches, and the last token of every window [windows]."""


class Sampling(NamedTuple):
    """How a token is chosen.

    Token ``t`` of prompt ``i`` is drawn from ``softmax(logits / temperature)`` with ``fold_in(fold_in(key(seed), i), t)`` by the
    Gumbel-max trick. So a text does not depend on the number of prompts, on how many are continued at once or on the mesh, except
    through the rounding of the logits. If the sums of two tokens differ by only a few units in the last place, another mesh or
    another batch may draw the other token, and the text goes on differently.

    Attributes:
      vocabulary: only ids below it are written; an embedding may have rows without a token.
      temperature: 0 takes the likeliest token, of equally likely ones that of the smaller id.
      seed: of what is drawn.
      follow: a token, and the one that is written after it instead of a chosen one. This begins the next document of the same
        text, which still attends to the text before it, as in pretraining on packed documents.
    """

    vocabulary: int
    temperature: float = 0.0
    seed: int | np.uint32 = 0
    follow: tuple[int, int] | None = None


class Prompt(NamedTuple):
    """A text to continue: token ids, at least one, and the most new tokens."""

    tokens: tuple[int, ...]
    new: int


class PromptBatch(NamedTuple):
    """Prompts that are continued at once.

    Attributes:
      prompts: their indices.
      rows: windows of the batch; those without a prompt repeat the last one.
      room: length of the cache, in tokens.
      read: tokens of every window that are read before the first one is written, as a rule all but one of the shortest prompt.
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
class GenerationPlan:
    """Prompts in batches of a few shapes, with their compiled programs.

    Decoders of one shape share the programs.

    Attributes:
      prompts: in the caller's order.
      sampling: how every token is chosen.
      batches: the batches with the longest cache first.
      decoder: of the shape that the programs are for.
      read: reads a chunk of every window into the cache.
      write: writes a stretch of every window.
    """

    prompts: Sequence[Prompt]
    sampling: Sampling
    batches: tuple[PromptBatch, ...]
    decoder: Decoder
    read: Callable[..., Caches]
    write: Callable[..., tuple[State, Array, Array]]

    @classmethod
    def of(cls, decoder: Decoder, prompts: Sequence[Prompt], sampling: Sampling, batches: tuple[PromptBatch, ...]) -> Self:
        read = jax.jit(functools.partial(_read, decoder), donate_argnums=1)
        write = jax.jit(functools.partial(_write, decoder, sampling.temperature > 0), donate_argnums=2)
        return cls(prompts, sampling, batches, decoder, read, write)

    def serving(self, decoder: Decoder) -> Self:
        """The plan for ``decoder``; has new programs if its sizes differ."""
        return self if decoder.sizes == self.decoder.sizes else self.of(decoder, self.prompts, self.sampling, self.batches)

    @property
    def steps(self) -> int:
        """How often :func:`generate` calls ``advance``."""
        return sum(len(batch.stretches) for batch in self.batches)


def plan_generation(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    advice: str,
    budget: float = math.inf,
    limit: int | None = None,
    room: int | None = None,
) -> GenerationPlan:
    """Sorts prompts into batches. A batch holds prompts of nearly one length.

    The length of the cache follows from a prompt alone, not from the others of its batch: the least of ``LENGTHS`` that holds it
    with all that may be written. So LongRoPE, whose factors depend on that length, gives the same answers in every batch.

    Args:
      advice: what to do if the model does not fit, the end of the message.
      budget: bytes of memory to use on each device.
      limit: the most prompts in a batch.
      room: the length of every cache, instead.

    Raises:
      UserError: the model does not fit the devices as a whole, with one prompt on each slice of the data axis.
    """
    rooms: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        rooms.setdefault(room or _room(len(prompt.tokens) + prompt.new), []).append(number)
    batches = []
    for length, members in sorted(rooms.items(), reverse=True):
        members.sort(key=lambda number: (-len(prompts[number].tokens), -prompts[number].new))
        rows = windows_at_once(decoder, len(members), length, budget, advice, limit)
        for first in range(0, len(members), rows):
            part = members[first : first + rows]
            # Whole chunks fit the cache.
            read = min(length // _CHUNK * _CHUNK, *(len(prompts[number].tokens) - 1 for number in part))
            last = max(len(prompts[number].tokens) + prompts[number].new for number in part) - 1
            batches.append(PromptBatch(tuple(part), rows, length, read, last - read))
    return GenerationPlan.of(decoder, prompts, sampling._replace(seed=np.uint32(sampling.seed % 2**32)), tuple(batches))


def generate(
    decoder: Decoder,
    plan: GenerationPlan,
    enough: Callable[[int, list[int]], bool] = lambda number, tokens: False,
    advance: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """The tokens that the model writes after each prompt.

    Args:
      decoder: of the plan's model, or of one that it was cut to.
      enough: (number of the prompt, the tokens written after it) -> whether no more are wanted. A batch ends when this holds for
        all of its prompts. Every process must give the same answer.
      advance: called :attr:`GenerationPlan.steps` times.

    Returns:
      For each prompt, at most ``Prompt.new`` tokens; fewer where they were enough. The same in every process.

    Raises:
      UserError: the model's logits are not finite.
    """
    plan, written = plan.serving(decoder), [list[int]() for _ in plan.prompts]
    room = plan.batches[0].room
    model = load(decoder, room)
    for batch in plan.batches:
        if batch.room != room:
            room, model = batch.room, model._replace(positions=positions_on_mesh(decoder, batch.room))
        going, steps = dict(enumerate(batch.prompts)), len(batch.stretches)
        for first, tokens in _stretches(decoder, model, plan, batch):
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


def _stretches(decoder: Decoder, model: WholeModel, plan: GenerationPlan, batch: PromptBatch) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first step's position, tokens [steps, rows]) of each stretch.

    Tokens of a prompt are repeated as they are.
    """
    numbers = np.array([*batch.prompts, *batch.prompts[-1:] * (batch.rows - len(batch.prompts))])
    padded_prompts, ends = np.zeros((batch.rows, batch.room), np.int32), np.zeros(batch.rows, np.int32)
    for row, number in enumerate(numbers):
        prompt = plan.prompts[number].tokens
        padded_prompts[row, : len(prompt)], ends[row] = prompt, len(prompt)
    windows = _Windows(*(place(decoder.mesh, array, P(DATA)) for array in (padded_prompts, ends, numbers)))
    caches = empty_cache(decoder, batch.rows, batch.room)
    # The last chunk may read past the shortest prompt: later steps read these tokens again.
    for chunk in range(0, batch.read, _CHUNK):
        caches = plan.read(model, caches, windows.prompts, np.int32(chunk), np.int32(batch.read))
    state = (caches, place(decoder.mesh, padded_prompts[:, batch.read], P(DATA)))
    for first in batch.stretches:
        last = min(first + _STRETCH, batch.read + batch.written)
        state, tokens, finite = plan.write(plan.sampling, model, state, windows, np.int32(first), np.int32(last))
        tokens, finite = fetch((tokens, finite))
        if not finite:
            raise UserError(f"the logits of a model hold NaN or infinite values after a prompt: {decoder.overflowed}")
        yield first, tokens[: last - first]


def _room(size: int) -> int:
    return next(length for length in LENGTHS if length >= max(size, 2 * _CHUNK))


class _Windows(NamedTuple):
    """The prompts [windows, room] of a batch, their lengths and numbers."""

    prompts: Array
    ends: Array
    numbers: Array


def _read(decoder: Decoder, model: WholeModel, caches: Caches, prompts: Array, first: Array, end: Array) -> Caches:
    """Reads the prompts' tokens ``first`` to ``first + _CHUNK - 1``. Compiled.

    Returns the caches with these tokens. Tokens from ``end`` on do not count.
    """
    tokens = jax.lax.dynamic_slice_in_dim(prompts, first, _CHUNK, axis=1)
    return step(decoder, model, caches, tokens, first, end)[1]


def _write(
    decoder: Decoder,
    drawn: bool,
    sampling: Sampling,
    model: WholeModel,
    state: State,
    windows: _Windows,
    first: Array,
    last: Array,
) -> tuple[State, Array, Array]:
    """Writes the tokens after positions ``first`` to ``last - 1``. Compiled.

    Returns:
      (state, tokens [_STRETCH, windows], whether all logits are finite). Row i has the tokens after position ``first + i``.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(sampling.seed), windows.numbers) if drawn else None

    def token(at: Array, carry: tuple[State, Array, Array]) -> tuple[State, Array, Array]:
        (caches, before), tokens, finite = carry
        logits, caches = step(decoder, model, caches, before[:, None], at)
        after = choose(logits, sampling, None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, at + 1))
        if sampling.follow is not None:
            after = jnp.where(before == sampling.follow[0], sampling.follow[1], after)
        after = jnp.where(at + 1 < windows.ends, jnp.take(windows.prompts, at + 1, axis=1, mode="clip"), after)
        return (caches, after), tokens.at[at - first].set(after), finite & jnp.isfinite(logits).all()

    # A loop of as many steps as are wanted: a scan would take a fixed number.
    return jax.lax.fori_loop(first, last, token, (state, jnp.zeros((_STRETCH, len(windows.ends)), jnp.int32), jnp.bool_(True)))


def choose(logits: Array, sampling: Sampling, keys: Array | None) -> Array:
    """Chooses a token for each row of logits [windows, vocab].

    Each is drawn with its own key; without keys it is the likeliest one. Returns [windows] int32.
    """
    logits = logits if keys is None else logits / sampling.temperature
    allowed = jnp.where(jnp.arange(logits.shape[1]) < sampling.vocabulary, logits, -jnp.inf)
    chosen = jnp.argmax(allowed, axis=1) if keys is None else jax.vmap(jax.random.categorical)(keys, allowed)
    return chosen.astype(jnp.int32)
