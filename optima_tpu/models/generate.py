"""Text generation: all blocks on the devices at once, a cache of earlier tokens, one token of every window per step.

The steps are one compiled program, a scan over tokens around a scan over blocks that are alike. So the program grows with the
stretches of blocks that are alike, not with tokens or blocks. All windows of a step are at the same position.
"""

import functools
import math
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P
from rich.console import Console

from optima_tpu.errors import UserError
from optima_tpu.models.cache import Cache
from optima_tpu.models.decoder import Decoder, Head, forward, head_logits
from optima_tpu.models.family import Positions
from optima_tpu.report.progress import Progress
from optima_tpu.runtime.device_memory import GIB
from optima_tpu.runtime.mesh import DATA, MODEL, bytes_on_device, padded, place, struct_on
from optima_tpu.runtime.processes import fetch

_STRETCH = 128
"""Tokens of every window that one call of the compiled program writes. Progress is shown after each call."""

_LOGITS = 4  # arrays of logits in a step, on a device: capped, scaled, the random numbers, their sum

_CALIBRATION_ADVICE = (
    "to write its own calibration text, take a --mesh with a larger model axis, a --dtype of fewer bytes, shorter windows, a larger "
    "--device_memory, or only stored text: another --calibration.source (c4, file:PATH) and no --calibration.written"
)

Caches = tuple[dict[str, Array], ...]
"""For each of ``Decoder.stretches`` the arrays of its blocks, see :class:`Cache`."""

State = tuple[Caches, Array]
"""The caches, and the last token of every window [windows]."""


class Resident(NamedTuple):
    """A whole model on the mesh.

    Attributes:
      blocks: for each of ``Decoder.stretches`` the parameters of its blocks, each [blocks, ...].
      positions: the position data of its blocks, each [blocks, ...].
      embedding: the tensors that the family's ``embed`` reads, by name.
      head: turns the last block's output into logits.
    """

    blocks: tuple[nnx.State, ...]
    positions: tuple[Positions, ...]
    embedding: dict[str, Array]
    head: Head


class Sampling(NamedTuple):
    """How the tokens of a window are drawn.

    Attributes:
      start: the first token of every window.
      vocabulary: only ids below it are drawn; an embedding may have rows without a token.
      seed, temperature: see :func:`generate`.
      restart: the token after which ``start`` is written instead of a drawn token. It begins the next document of the same
        window, which still attends to the text before it, as in pretraining on packed documents.
    """

    start: int
    vocabulary: int
    seed: int | np.uint32
    temperature: float = 1.0
    restart: int | None = None


def generate(
    decoder: Decoder, sampling: Sampling, *, windows: int, length: int, budget: float = math.inf, progress: Progress | None = None
) -> np.ndarray:
    """Windows of tokens, each token drawn from the model's distribution of the next token:

        x[0] = start,    x[t] ~ softmax(logits(x[0], ..., x[t - 1]) / temperature)

    Token ``t`` of window ``i`` is drawn with ``fold_in(fold_in(key(seed), i), t)`` by the Gumbel-max trick. So a window does not
    depend on the number of windows, on how many are written at once or on the mesh, except through the rounding of the logits. If
    the sums of two tokens differ by only a few units in the last place, another mesh or another batch may draw the other token,
    and the window continues differently.

    Args:
      budget: bytes of memory to use on each device; they decide how many windows are written at once.
      progress: shows a stage, in which each step is some tokens of some windows.

    Returns:
      [windows, length] int32, the same in every process.

    Raises:
      UserError: the model does not fit the devices as a whole; or its logits are not finite.
    """
    mesh, size = decoder.mesh, windows_at_once(decoder, windows, length, budget)
    model = load(decoder, length)
    program = jax.jit(functools.partial(_write, decoder), donate_argnums=2)
    sampling = sampling._replace(seed=np.uint32(sampling.seed % 2**32))
    written = np.full((windows, length), sampling.start, np.int32)
    stretches, progress, began = -(-(length - 1) // _STRETCH), progress or Progress(Console(quiet=True)), time.monotonic()
    progress.stage(
        f"writing {windows} windows of {length} tokens with the dense model, {min(size, windows)} at once",
        stretches * -(-windows // size),
    )
    # One cache for all batches: the entries of an earlier batch are not read.
    caches = empty_cache(decoder, size, length)
    for first in range(0, windows, size):
        rows = np.arange(first, first + size)
        state: State = (caches, place(mesh, np.full(size, sampling.start, np.int32), P(DATA)))
        for stretch in range(stretches):
            begin = stretch * _STRETCH
            # The last stretch may run past the window: clamp its positions to the tables and drop the extra tokens.
            places = np.minimum(begin + np.arange(min(_STRETCH, length - 1), dtype=np.int32), length - 2)
            state, drawn, finite = program(sampling, model, state, place(mesh, rows, P(DATA)), places)
            drawn, finite = fetch((drawn, finite))
            if not finite:
                raise UserError(f"the logits of the dense model hold NaN or infinite values: {decoder.overflowed}")
            there, last = rows < windows, min(begin + _STRETCH, length - 1)
            written[rows[there], begin + 1 : last + 1] = drawn[: last - begin, there].T
            progress.advance()
        caches, _ = state
    progress.note(f"{written.size / (time.monotonic() - began):,.0f} tokens a second")
    return written


def load(decoder: Decoder, length: int) -> Resident:
    """The whole model on the mesh, for windows of ``length`` tokens. Blocks are read one after the other.

    Raises:
      UserError: see :meth:`Decoder.blocks`.
    """
    config = decoder.config
    stretches, read = [], decoder.blocks(range(config.blocks))
    for alike, indices in decoder.stretches:
        structs = _block_structs(alike, indices)
        blocks = dict(zip(structs, _zeros(structs.values())))
        for place_in, parameters in zip(range(len(indices)), read):
            blocks = _put(blocks, np.int32(place_in), parameters)
        stretches.append(alike.state(blocks))
    head = decoder.head()
    tied = {decoder.family.embedding: head.projection} if config.tied else {}
    ends = decoder.place_ends({decoder.root + name: P(MODEL, None) for name in _embedding_names(decoder) if name not in tied})
    embedding = tied | {name.removeprefix(decoder.root): array for name, array in ends.items()}
    return Resident(tuple(stretches), positions_on_mesh(decoder, length), embedding, head)


def step(
    decoder: Decoder, model: Resident, caches: Caches, tokens: Array, at: Array, end: Array | None = None
) -> tuple[Array, Caches]:
    """A few tokens of every window through the whole model. Traceable.

    Args:
      tokens: [windows, new] int32.
      at: the position of the first one, int32 scalar.
      end: the position of the first one that does not count, as it is read again later, int32 scalar; None if all count.

    Returns:
      (logits of the token after the last one [windows, vocab] float32, caches)
    """
    places = at + jnp.arange(tokens.shape[1])

    def block(alike, carry, of_block):
        hidden, arrays = carry
        index, state, positions = of_block
        cache = Cache(arrays, index, at, end)
        hidden, _ = forward(alike.graph, state, hidden, positions.at(at, tokens.shape[1])._replace(cache=cache))
        return (hidden, cache.arrays), None

    hidden, after = jnp.asarray(decoder.embedded(model.embedding.__getitem__, tokens, places)), []
    for (alike, indices), arrays, *of_blocks in zip(decoder.stretches, caches, model.blocks, model.positions, strict=True):
        scanned = (jnp.arange(len(indices)), *of_blocks)
        (hidden, arrays), _ = jax.lax.scan(functools.partial(block, alike), (hidden, arrays), scanned)
        after.append(arrays)
    return head_logits(model.head, hidden[:, -1:])[:, 0], tuple(after)


def draw(logits: Array, keys: Array, temperature: Array | float, vocabulary: Array | int) -> Array:
    """One token of each row of logits [windows, vocab], with one key each: [windows] int32, below ``vocabulary``."""
    allowed = jnp.where(jnp.arange(logits.shape[1]) < vocabulary, logits / temperature, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, allowed).astype(jnp.int32)


def _cache_structs(decoder: Decoder, length: int) -> tuple[dict[str, jax.ShapeDtypeStruct], ...]:
    """The caches of one window, from a trace of each kind of block."""
    names = {name: decoder.root + name for name in _embedding_names(decoder)}
    embedding = {
        name: jax.ShapeDtypeStruct(decoder.end_shapes[whole], decoder.tensors.dtype(whole)) for name, whole in names.items()
    }
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def traced(alike, state, embedding, tokens, positions):
        cache = Cache()
        hidden = jnp.asarray(decoder.embedded(embedding.__getitem__, tokens, jnp.arange(length)))
        forward(alike.graph, state, hidden, positions._replace(cache=cache))
        return cache.arrays

    def of_kind(kind: int) -> dict[str, jax.ShapeDtypeStruct]:
        alike, structs = decoder.at(kind), _block_structs(decoder.at(kind), range(kind, kind + 1))
        state = alike.state({name: jax.ShapeDtypeStruct(struct.shape[1:], struct.dtype) for name, struct in structs.items()})
        positions = decoder.config.positions(kind, length)
        return jax.eval_shape(functools.partial(traced, alike), state, embedding, tokens, positions)

    found = {kind: of_kind(kind) for kind in decoder.config.kinds}
    return tuple(
        {
            name: jax.ShapeDtypeStruct((len(indices), *struct.shape[1:]), struct.dtype)
            for name, struct in found[alike.config.kind].items()
        }
        for alike, indices in decoder.stretches
    )


def _write(
    decoder: Decoder, sampling: Sampling, model: Resident, state: State, rows: Array, places: Array
) -> tuple[State, Array, Array]:
    """The compiled program: a token of every window after each place. Returns (state, tokens [places, windows], all finite)."""
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(sampling.seed)))(rows)

    def token(state: State, at: Array) -> tuple[State, tuple[Array, Array]]:
        caches, before = state
        logits, caches = step(decoder, model, caches, before[:, None], at)
        drawn = jax.vmap(jax.random.fold_in, (0, None))(keys, at + 1)
        after = draw(logits, drawn, sampling.temperature, sampling.vocabulary)
        if sampling.restart is not None:
            after = jnp.where(before == sampling.restart, sampling.start, after)
        return (caches, after), (after, jnp.isfinite(logits).all())

    state, (tokens, finite) = jax.lax.scan(token, state, places)
    return state, tokens, finite.all()


def windows_at_once(
    decoder: Decoder, windows: int, length: int, budget: float, limit: int | None = None, advice: str = _CALIBRATION_ADVICE
) -> int:
    """How many windows are written at once: as many as fit, in batches of nearly equal size.

    Args:
      length: length of a window, in tokens.
      budget: see :func:`generate`.
      limit: the most windows to write at once; None sets none.
      advice: the end of the message if nothing fits.

    Raises:
      UserError: the model and one window on each slice of the data axis do not fit.
    """
    mesh, config = decoder.mesh, decoder.config
    blocks = [sum(map(bytes_on_device, _block_structs(*stretch).values())) for stretch in decoder.stretches]
    dtype = np.dtype(decoder.tensors.dtype(decoder.root + decoder.family.embedding))
    tables = (2 - config.tied) * bytes_on_device(struct_on(mesh, (config.vocab, config.d_embedding), dtype, P(MODEL, None)))
    positions = sum(array.nbytes for array in jax.tree.leaves(_positions(decoder, length)))
    # One more block is in memory while blocks are read, and while one is computed.
    whole = sum(blocks) + max(size / len(indices) for size, (_, indices) in zip(blocks, decoder.stretches)) + tables + positions
    slices = mesh.shape[DATA]
    each = sum(map(bytes_on_device, jax.tree.leaves(_caches_of(decoder, slices, length)))) + _LOGITS * 4 * config.vocab
    most = min(windows, limit or windows)
    if budget < math.inf:
        most = min(most, int((budget - whole) // each) * slices)
    if most < 1:
        raise UserError(
            f"the whole model and its cache take {(whole + each) / GIB:.3g} GiB of each device, more than the "
            f"{max(budget, 0) / GIB:.3g} GiB that there are for them: {advice}"
        )
    return padded(-(-windows // -(-windows // most)), slices)


def _embedding_names(decoder: Decoder) -> list[str]:
    """The tensors that the family's ``embed`` reads, by their names after the root."""
    return [decoder.family.embedding, *decoder.family.embedding_extras(decoder.config)]


def positions_on_mesh(decoder: Decoder, length: int) -> tuple[Positions, ...]:
    """``Resident.positions`` for windows of ``length`` tokens, on every device."""
    return jax.tree.map(lambda array: place(decoder.mesh, array, P()), _positions(decoder, length))


def _positions(decoder: Decoder, length: int) -> tuple[Positions, ...]:
    return tuple(
        jax.tree.map(lambda *arrays: np.stack(arrays), *(decoder.config.positions(index, length) for index in indices))
        for _, indices in decoder.stretches
    )


def _block_structs(decoder: Decoder, indices: range) -> dict[str, Array]:
    """The parameters of blocks that are alike, each [blocks, ...], on the mesh, in a dtype that represents those of all."""

    def struct(name: str, shape: tuple[int, ...]) -> Array:
        dtypes = {decoder.tensors.dtype(decoder.prefix(index) + name) for index in indices}
        spec = P(None, *decoder.sharding(name))
        return struct_on(decoder.mesh, (len(indices), *shape), jnp.result_type(*dtypes), spec)

    return {name: struct(name, shape) for name, shape in decoder.block_shapes.items()}


def _caches_of(decoder: Decoder, windows: int, length: int) -> tuple[dict[str, Array], ...]:
    """The caches of many windows, as structs on the mesh: windows sharded over data, what comes next, as a rule heads, over model."""

    def struct(one: jax.ShapeDtypeStruct) -> Array:
        return struct_on(decoder.mesh, (one.shape[0], windows, *one.shape[2:]), one.dtype, P(None, DATA, MODEL))

    return jax.tree.map(struct, _cache_structs(decoder, length))


def empty_cache(decoder: Decoder, windows: int, length: int) -> Caches:
    """Zero caches of many windows of ``length`` tokens, on the mesh."""
    structs, kind = jax.tree.flatten(_caches_of(decoder, windows, length))
    return jax.tree.unflatten(kind, _zeros(structs))


def _zeros(structs: Iterable[Array]) -> list[Array]:
    return _zeros_program(tuple((struct.shape, struct.dtype, struct.sharding) for struct in structs))()


@functools.lru_cache(maxsize=8)
def _zeros_program(specs: tuple[tuple[tuple[int, ...], np.dtype, jax.sharding.Sharding], ...]) -> Callable[[], list[Array]]:
    """The compiled program that makes arrays of zeros; the dense and the pruned model share it."""
    return jax.jit(
        lambda: [jnp.zeros(shape, dtype) for shape, dtype, _ in specs], out_shardings=[sharding for *_, sharding in specs]
    )


@functools.partial(jax.jit, donate_argnums=0)
def _put(blocks: dict[str, Array], index: Array, parameters: dict[str, Array]) -> dict[str, Array]:
    return {name: array.at[index].set(parameters[name].astype(array.dtype)) for name, array in blocks.items()}
