"""A whole model on the mesh: all blocks at once, with a cache.

A step computes a few new tokens of every window. It is a scan over blocks that are alike. So its program grows with the
stretches of blocks that are alike, not with the blocks. All windows of a step are at the same position.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from optima_tpu.errors import UserError
from optima_tpu.models.cache import Cache
from optima_tpu.models.decoder import Decoder, Head, forward, head_logits
from optima_tpu.models.family import Positions
from optima_tpu.runtime.device_memory import GIB
from optima_tpu.runtime.mesh import DATA, MODEL, bytes_on_device, padded, place, struct_on

_LOGITS = 4  # arrays of logits in a step, on a device: capped, scaled, the random numbers, their sum

Caches = tuple[dict[str, Array], ...]
"""For each of ``Decoder.stretches`` the arrays of its blocks, see :class:`Cache`."""


class WholeModel(NamedTuple):
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


def load(decoder: Decoder, length: int) -> WholeModel:
    """Reads the whole model to the mesh, for windows of ``length`` tokens.

    Blocks are read one after the other.

    Raises:
      UserError: see :meth:`Decoder.blocks`.
    """
    config = decoder.config
    stretches, read = [], decoder.blocks(range(config.blocks))
    for alike, indices in decoder.stretches:
        structs = _block_structs(alike, indices)
        blocks = dict(zip(structs, _zeros(structs.values())))
        for at, parameters in zip(range(len(indices)), read):
            blocks = _put(blocks, np.int32(at), parameters)
        stretches.append(alike.state(blocks))
    head = decoder.head()
    tied = {decoder.family.embedding: head.projection} if config.tied else {}
    ends = decoder.place_ends({decoder.root + name: P(MODEL, None) for name in _embedding_names(decoder) if name not in tied})
    embedding = tied | {name.removeprefix(decoder.root): array for name, array in ends.items()}
    return WholeModel(tuple(stretches), positions_on_mesh(decoder, length), embedding, head)


def step_structs(decoder: Decoder, windows: int, length: int) -> tuple[WholeModel, Caches, Array, Array]:
    """What :func:`step` takes for one token, as structs; reads no weight."""
    on_mesh, tensors, root = functools.partial(struct_on, decoder.mesh), decoder.tensors, decoder.root
    embedding = {
        name: on_mesh(decoder.end_shapes[root + name], tensors.dtype(root + name), P(MODEL, None))
        for name in _embedding_names(decoder)
    }
    blocks = tuple(alike.state(_block_structs(alike, indices)) for alike, indices in decoder.stretches)
    positions = jax.tree.map(lambda array: on_mesh(array.shape, array.dtype, P()), _positions(decoder, length))
    model, number = WholeModel(blocks, positions, embedding, decoder.head_struct()), np.dtype(np.int32)
    return model, _caches_of(decoder, windows, length), on_mesh((windows, 1), number, P(DATA)), on_mesh((), number, P())


def step(
    decoder: Decoder, model: WholeModel, caches: Caches, tokens: Array, at: Array, end: Array | None = None
) -> tuple[Array, Caches]:
    """A few tokens of every window through the whole model. Traceable.

    Args:
      tokens: [windows, new] int32.
      at: the position of the first one, int32 scalar.
      end: the position of the first one that does not count, as it is read again later, int32 scalar; None if all count.

    Returns:
      (logits of the token after the last one [windows, vocab] float32, caches)
    """

    def block(alike, carry, of_block):
        hidden, arrays = carry
        index, state, positions = of_block
        cache = Cache(arrays, index, at, end)
        hidden, _ = forward(alike.graph, state, hidden, positions.at(at, tokens.shape[1])._replace(cache=cache))
        return (hidden, cache.arrays), None

    hidden, after = jnp.asarray(decoder.embedded(model.embedding.__getitem__, tokens, at + jnp.arange(tokens.shape[1]))), []
    for (alike, indices), arrays, *of_blocks in zip(decoder.stretches, caches, model.blocks, model.positions, strict=True):
        scanned = (jnp.arange(len(indices)), *of_blocks)
        (hidden, arrays), _ = jax.lax.scan(functools.partial(block, alike), (hidden, arrays), scanned)
        after.append(arrays)
    return head_logits(model.head, hidden[:, -1:])[:, 0], tuple(after)


def _cache_structs(decoder: Decoder, length: int) -> tuple[dict[str, jax.ShapeDtypeStruct], ...]:
    """The caches of one window, from a trace of each kind of block."""
    names = {name: decoder.root + name for name in _embedding_names(decoder)}
    embedding = {
        name: jax.ShapeDtypeStruct(decoder.end_shapes[full_name], decoder.tensors.dtype(full_name))
        for name, full_name in names.items()
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

    of_each = {kind: of_kind(kind) for kind in decoder.config.kinds}
    return tuple(
        {
            name: jax.ShapeDtypeStruct((len(indices), *struct.shape[1:]), struct.dtype)
            for name, struct in of_each[alike.config.kind].items()
        }
        for alike, indices in decoder.stretches
    )


def cache_bytes(decoder: Decoder, length: int) -> int:
    """Bytes of what all blocks keep of the tokens of one window."""
    return sum(math.prod(struct.shape) * struct.dtype.itemsize for struct in jax.tree.leaves(_cache_structs(decoder, length)))


def windows_at_once(decoder: Decoder, samples: int, length: int, budget: float, advice: str, limit: int | None = None) -> int:
    """How many windows are written at once: as many as fit.

    The batches have nearly equal sizes.

    Args:
      length: length of a window, in tokens.
      budget: bytes of memory to use on each device.
      advice: the end of the message if nothing fits.
      limit: the most windows to write at once; None sets none.

    Raises:
      UserError: the model and one window on each slice of the data axis do not fit, or the model cannot write text.
    """
    mesh, config = decoder.mesh, decoder.config
    if not config.generates:
        raise UserError(
            "a model that is run by its code in torch keeps nothing of earlier tokens, so it cannot write text: take another "
            "--calibration.source than self, no --calibration.written, and no --tasks that generate"
        )
    blocks = [sum(map(bytes_on_device, _block_structs(*stretch).values())) for stretch in decoder.stretches]
    dtype = np.dtype(decoder.tensors.dtype(decoder.root + decoder.family.embedding))
    tables = (2 - config.tied) * bytes_on_device(struct_on(mesh, (config.vocab, config.d_embedding), dtype, P(MODEL, None)))
    positions = sum(array.nbytes for array in jax.tree.leaves(_positions(decoder, length)))
    # One more block is in memory while blocks are read, and while one is computed.
    fixed = sum(blocks) + max(size / len(indices) for size, (_, indices) in zip(blocks, decoder.stretches)) + tables + positions
    slices = mesh.shape[DATA]
    each = sum(map(bytes_on_device, jax.tree.leaves(_caches_of(decoder, slices, length)))) + _LOGITS * 4 * config.vocab
    most = min(samples, limit or samples)
    if budget < math.inf:
        most = min(most, int((budget - fixed) // each) * slices)
    if most < 1:
        raise UserError(
            f"the whole model and its cache take {(fixed + each) / GIB:.3g} GiB of each device, more than the "
            f"{max(budget, 0) / GIB:.3g} GiB that there are for them: {advice}"
        )
    return padded(-(-samples // -(-samples // most)), slices)


def _embedding_names(decoder: Decoder) -> list[str]:
    """The tensors that the family's ``embed`` reads, named after the root."""
    return [decoder.family.embedding, *decoder.family.embedding_extras(decoder.config)]


def positions_on_mesh(decoder: Decoder, length: int) -> tuple[Positions, ...]:
    """``WholeModel.positions`` for ``length`` tokens, on every device."""
    return jax.tree.map(lambda array: place(decoder.mesh, array, P()), _positions(decoder, length))


def _positions(decoder: Decoder, length: int) -> tuple[Positions, ...]:
    return tuple(
        jax.tree.map(lambda *arrays: np.stack(arrays), *(decoder.config.positions(index, length) for index in indices))
        for _, indices in decoder.stretches
    )


def _block_structs(decoder: Decoder, indices: range) -> dict[str, Array]:
    """The parameters of alike blocks as structs on the mesh.

    Each is [blocks, ...], in a dtype that represents those of all blocks.
    """

    def struct(name: str, shape: tuple[int, ...]) -> Array:
        dtypes = {decoder.tensors.dtype(decoder.prefix(index) + name) for index in indices}
        spec = P(None, *decoder.sharding(name))
        return struct_on(decoder.mesh, (len(indices), *shape), jnp.result_type(*dtypes), spec)

    return {name: struct(name, shape) for name, shape in decoder.block_shapes.items()}


def _caches_of(decoder: Decoder, windows: int, length: int) -> tuple[dict[str, Array], ...]:
    """The caches of many windows, as structs on the mesh.

    Windows are sharded over the data axis. The next dimension, as a rule heads, is sharded over the model axis.
    """

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
    """The compiled program that makes zeros, for dense and pruned models."""
    return jax.jit(
        lambda: [jnp.zeros(shape, dtype) for shape, dtype, _ in specs], out_shardings=[sharding for *_, sharding in specs]
    )


@functools.partial(jax.jit, donate_argnums=0)
def _put(blocks: dict[str, Array], index: Array, parameters: dict[str, Array]) -> dict[str, Array]:
    return {name: array.at[index].set(parameters[name].astype(array.dtype)) for name, array in blocks.items()}
