"""Loads packed checkpoints; the devices themselves put the zeros in.

Only masks and kept elements are transferred to the devices.
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from optima_tpu.errors import UserError, one_line
from optima_tpu.models.checkpoints.folder import PackedSource
from optima_tpu.models.checkpoints.source import whole_slices
from optima_tpu.runtime.mesh import padded

_DEVICES = "devices"
_LENGTHS = 64
"""The kept elements of a shard are padded to one of this many lengths. XLA compiles a program for each length that occurs."""
_RANKS = 2**31  # the device counts kept elements in int32


def place_packed(folder: Path, sharding: Sharding | Callable[[str, tuple[int, ...]], Sharding] | None) -> dict[str, Array]:
    """See :func:`optima_tpu.load_packed`."""
    source = PackedSource(folder)
    for name in source.names():
        if (dtype := source.dtype(name)) != jax.dtypes.canonicalize_dtype(dtype):
            raise UserError(f"{folder} stores {name} as {dtype}, which JAX rounds unless JAX_ENABLE_X64=1 is set: set it")
    same = SingleDeviceSharding(jax.local_devices()[0]) if sharding is None else sharding
    choose = same if callable(same) else lambda name, shape: same
    return {name: _placed(source, name, choose(name, source.shape(name))) for name in source.names()}


def _placed(source: PackedSource, name: str, sharding: Sharding) -> Array:
    """A tensor on devices.

    Of a sparse tensor each shard's mask and kept elements are transferred; other tensors are transferred as they are.
    """
    full_shape, dtype = source.shape(name), source.dtype(name)
    try:
        shape, indices = sharding.shard_shape(full_shape), sharding.addressable_devices_indices_map(full_shape)
    except ValueError as error:
        raise UserError(f"{name} of shape {full_shape} does not fit its sharding: {one_line(error)}") from error
    slices = {device: whole_slices(index or (), full_shape) for device, index in indices.items()}
    expandable = shape and 0 < math.prod(shape) < _RANKS and dtype != np.bool_
    kept = source.kept(name) if expandable else None
    if kept is None:
        return jax.make_array_from_callback(full_shape, sharding, lambda index: source.read(name, index or ()), dtype=dtype)
    if not slices:  # no device of this process has a part
        return jax.make_array_from_single_device_arrays(full_shape, sharding, [], dtype=dtype)
    # The devices of this process only, so that no process waits for another.
    mesh = Mesh(np.array(list(slices)), (_DEVICES,))
    bits, elements = (_stacked(mesh, parts) for parts in _shards(*kept, list(slices.values())))
    by_device = {shard.device: shard.data for shard in _expand(bits, elements, mesh, shape, dtype).addressable_shards}
    arrays = [by_device[device] for device in slices]
    if sharding.memory_kind in (None, mesh.devices.flat[0].default_memory().kind):
        return jax.make_array_from_single_device_arrays(full_shape, sharding, arrays)
    # The memory of the hosts: shard by shard, so that no process waits for another.
    moved = [
        jax.device_put(array, SingleDeviceSharding(device, memory_kind=sharding.memory_kind))
        for array, device in zip(arrays, slices)
    ]
    return jax.make_array_from_single_device_arrays(full_shape, sharding, moved)


def _shards(
    keep: np.ndarray, elements: np.ndarray, slices: Sequence[tuple[slice, ...]]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Each shard's mask as bits, and its kept elements padded to one length.

    Args:
      keep: the mask of the whole tensor.
      elements: [kept] its elements.
      slices: each shard, without steps. Shards that are the same share their arrays.
    """
    starts = np.cumsum([0, *np.count_nonzero(keep.reshape(len(keep), -1), axis=1)])
    shards: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for index in slices:
        if str(index) not in shards:
            rows, part = keep[index[0]], keep[index]
            own_elements = elements[starts[index[0].start] : starts[index[0].stop]]
            if part.size < rows.size:
                inside = np.zeros(rows.shape, bool)
                inside[:, *index[1:]] = True
                own_elements = own_elements[np.compress(rows.reshape(-1), inside)]
            shards[str(index)] = np.packbits(part), own_elements
    size = math.prod(part.stop - part.start for part in slices[0])
    room = padded(max(1, *(len(own_elements) for _, own_elements in shards.values())), -(-size // _LENGTHS))
    full = {name: (bits, np.pad(own_elements, (0, room - len(own_elements)))) for name, (bits, own_elements) in shards.items()}
    masks, kept = zip(*(full[str(index)] for index in slices), strict=True)
    return list(masks), list(kept)


def _stacked(mesh: Mesh, parts: Sequence[np.ndarray]) -> Array:
    """One array on each device of the mesh, as one array [devices, ...]."""

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        return parts[(index and index[0].start) or 0][np.newaxis]

    return jax.make_array_from_callback((len(parts), *parts[0].shape), NamedSharding(mesh, P(_DEVICES)), part)


@functools.partial(jax.jit, static_argnames=("mesh", "shape", "dtype"))
def _expand(bits: Array, elements: Array, mesh: Mesh, shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """Puts the zeros into the shard of each device of the mesh.

    All shards have one shape; their first axes are one axis of the result.

    Args:
      bits: [devices, bytes] uint8, the masks as ``numpy.packbits`` packs them.
      elements: [devices, kept] unsigned integers, as wide as the dtype.
    """

    def local(bits: Array, elements: Array) -> Array:
        shifted = bits[0, :, None] >> (7 - jnp.arange(8, dtype=jnp.uint8))  # [bytes, 8]
        ones = jax.lax.population_count(shifted).astype(jnp.int32)  # in the byte, up to and with each bit
        before = jnp.cumsum(ones[:, -1]) - ones[:, -1]  # in the bytes before
        values = jnp.take(elements[0], before[:, None] + ones - 1, mode="clip")
        # A product, exact for integers: a CPU would branch for a where, and guess every second time wrongly.
        flat = (values * (shifted & 1).astype(values.dtype)).reshape(-1)[: math.prod(shape)]
        return jax.lax.bitcast_convert_type(flat, dtype).reshape(shape)

    return jax.shard_map(local, mesh=mesh, in_specs=(P(_DEVICES), P(_DEVICES)), out_specs=P(_DEVICES))(bits, elements)
