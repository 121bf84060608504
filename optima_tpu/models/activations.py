"""Hidden states of windows, on hosts or devices, and batches of them."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optima_tpu.runtime.mesh import DATA, MODEL, divisible, padded


@dataclasses.dataclass(frozen=True)
class Activations:
    """Hidden states of windows ``first`` to ``last - 1``, on the hosts.

    Window ``i`` belongs to slice ``i mod D`` of the ``D`` slices of the data axis, and is held by the processes that have a
    device of that slice: any range of windows is spread evenly, and a process holds only windows that its devices compute.

    Attributes:
      first, last: which windows.
      values: [held, length, d_model], the windows that this process holds, in order; see :attr:`rows`.
    """

    mesh: Mesh
    first: int
    last: int
    values: np.ndarray

    @classmethod
    def of(cls, mesh: Mesh, values: np.ndarray) -> "Activations":
        """Takes the process's part of all windows [windows, length, width]."""
        rows = held_rows(mesh, 0, len(values))
        return cls(mesh, 0, len(values), values if len(rows) == len(values) else values[rows])

    def __len__(self) -> int:
        return self.last - self.first

    @property
    def length(self) -> int:
        """The number of tokens in a window."""
        return self.values.shape[1]

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """[held] int64, the windows that this process holds, ascending."""
        return held_rows(self.mesh, self.first, self.last)

    def part(self, first: int, last: int) -> "Activations":
        """Windows ``first`` to ``last - 1``, without a copy."""
        start, stop = np.searchsorted(self.rows, (first, last))
        return Activations(self.mesh, first, last, self.values[start:stop])

    def copy(self) -> "Activations":
        """A copy with memory of its own."""
        return dataclasses.replace(self, values=self.values.copy())

    def room(self, width: int) -> "Activations":
        """Room for arrays of another width, for the same windows."""
        return dataclasses.replace(self, values=np.empty((*self.values.shape[:-1], width), self.values.dtype))

    def on_devices(self, batch: int) -> "Resident":
        """Copies all windows to the devices.

        The copy serves batches of up to ``batch`` windows on a slice of the data axis.
        """
        if self.first:
            raise ValueError(f"expected all windows, got those from {self.first} on")
        slices = self.mesh.shape[DATA]
        rows = _by_slice(self.mesh, np.arange(slices * (padded(len(self), slices) // slices + batch)))
        held = on_mesh(self.mesh, rows, self.take, self.values.shape[1:])
        return Resident(
            self.mesh, self.first, self.last, [jax.device_put(held, _held_sharding(self.mesh, self.values.shape[-1]))]
        )

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Returns windows of this process, [len(rows), length, d_model].

        Rows after the last window are zeros.
        """
        valid = rows < self.last
        if valid.all():
            return self.values[np.searchsorted(self.rows, rows)]
        windows = np.zeros((len(rows), *self.values.shape[1:]), self.values.dtype)
        windows[valid] = self.values[np.searchsorted(self.rows, rows[valid])]
        return windows

    def put(self, rows: np.ndarray, output: Array) -> None:
        """Overwrites windows with the rows of an array on the mesh.

        Rows after the last window are dropped.
        """
        seen = set()
        for shard in output.addressable_shards:
            if str(shard.index) in seen:  # the same slice of windows on another device of the model axis
                continue
            seen.add(str(shard.index))
            windows = rows[shard.index[0]]
            kept = np.isin(windows, self.rows)
            positions = np.searchsorted(self.rows, windows[kept])
            self.values[(positions, *shard.index[1:])] = np.asarray(shard.data)[kept]

    @contextlib.contextmanager
    def put_behind(self) -> Iterator[Callable[[np.ndarray, Array], None]]:
        """Yields a :meth:`put` that is one call behind.

        It fetches one result while the devices compute the next.
        """
        waiting: list[tuple[np.ndarray, Array]] = []

        def put(rows: np.ndarray, output: Array) -> None:
            waiting.append((rows, output))
            if len(waiting) > 1:
                self.put(*waiting.pop(0))

        yield put
        for last in waiting:
            self.put(*last)

    def batches(self, size: int) -> Iterator["Batch"]:
        """Cuts the windows into batches of one shape, padded with zeros.

        Args:
          size: the largest number of windows that a batch gives to one slice of the data axis.
        """
        for rows in _rows_of_batches(self.mesh, self.first, self.last, size):
            hidden = on_mesh(self.mesh, rows, self.take, self.values.shape[1:])
            yield Batch(self.mesh, rows, rows < self.last, hidden)


def count_batches(mesh: Mesh, samples: int, size: int) -> int:
    """How many batches :meth:`Activations.batches` cuts windows into."""
    return sum(1 for _ in _rows_of_batches(mesh, 0, samples, size))


def _rows_of_batches(mesh: Mesh, first: int, last: int, size: int) -> Iterator[np.ndarray]:
    """The windows of each batch, in the order of the devices."""
    slices = mesh.shape[DATA]
    size = min(size, padded(last - first, slices) // slices) * slices
    for start in range(first, last, size):
        yield _by_slice(mesh, np.arange(start, start + size))


def _by_slice(mesh: Mesh, rows: np.ndarray) -> np.ndarray:
    """Sorts ascending windows as the slices of the data axis hold them."""
    return rows[np.argsort(rows % mesh.shape[DATA], kind="stable")]


@dataclasses.dataclass(frozen=True)
class Resident:
    """Hidden states that stay on the devices.

    Its methods are those of :class:`Activations`, but no pass over the blocks moves states to the hosts or back.

    Attributes:
      first, last: which windows.
      held: one array [slices * per_slice, length, d_model], which :meth:`put` replaces. Windows are sharded over the data
        axis, and features over the model axis if it divides them: a batch is gathered when it is taken. Slice ``s`` has the
        windows ``s``, ``s + slices``, ... in order, then room for the padding of a batch. Parts of the windows share the list.
    """

    mesh: Mesh
    first: int
    last: int
    held: list[Array]

    def __len__(self) -> int:
        return self.last - self.first

    @property
    def length(self) -> int:
        """The number of tokens in a window."""
        return self.held[0].shape[1]

    @property
    def rows(self) -> np.ndarray:
        """As :attr:`Activations.rows`."""
        return held_rows(self.mesh, self.first, self.last)

    def part(self, first: int, last: int) -> "Resident":
        """Windows ``first`` to ``last - 1``, without a copy."""
        return Resident(self.mesh, first, last, self.held)

    def copy(self) -> "Resident":
        """A copy with memory of its own."""
        return dataclasses.replace(self, held=[jnp.copy(self.held[0])])

    def room(self, width: int) -> "Resident":
        """Room for arrays of another width, for the same windows."""
        held = self.held[0]
        empty = jnp.zeros((*held.shape[:-1], width), held.dtype, device=_held_sharding(self.mesh, width))
        return dataclasses.replace(self, held=[empty])

    def take(self, rows: np.ndarray) -> np.ndarray:
        """As :meth:`Activations.take`, on the host."""
        held = self.held[0]
        on_host = Activations(self.mesh, self.first, self.last, np.empty((len(self.rows), *held.shape[1:]), held.dtype))
        on_host.put(_by_slice(self.mesh, np.arange(len(held))), held)
        return on_host.take(rows)

    def put(self, rows: np.ndarray, output: Array) -> None:
        """Overwrites a batch's windows; drops rows after the last window."""
        self.held[0] = _put(self.mesh, self.held[0], output, int(rows.min()), self.last)

    @contextlib.contextmanager
    def put_behind(self) -> Iterator[Callable[[np.ndarray, Array], None]]:
        """Yields :meth:`put`, which waits for nothing."""
        yield self.put

    def batches(self, size: int) -> Iterator["Batch"]:
        """The batches of :meth:`Activations.batches`."""
        slices, per_slice = self.mesh.shape[DATA], len(self.held[0]) // self.mesh.shape[DATA]
        for rows in _rows_of_batches(self.mesh, self.first, self.last, size):
            if rows.max() // slices >= per_slice:
                raise ValueError(f"expected batches of at most the size that room was made for, got {len(rows) // slices}")
            hidden = _taken(self.mesh, len(rows) // slices, self.held[0], int(rows.min()), self.last)
            yield Batch(self.mesh, rows, rows < self.last, hidden)


HiddenStates = Activations | Resident


@functools.partial(jax.jit, static_argnums=(0, 1))
def _taken(mesh: Mesh, size: int, held: Array, first: int, last: int) -> Array:
    """Takes ``size`` windows of each slice, from window ``first`` on.

    Returns [slices * size, length, d_model], with zeros for windows from ``last`` on.
    """

    def local(held: Array, first: int | Array, last: int | Array) -> Array:
        start, valid = _start_and_valid(mesh, size, first, last)
        windows = jax.lax.dynamic_slice_in_dim(held, start, size)
        return jnp.where(valid[:, None, None], windows, 0)

    spec = _held_sharding(mesh, held.shape[-1]).spec
    taken = jax.shard_map(local, mesh=mesh, in_specs=(spec, P(), P()), out_specs=spec, check_vma=False)(held, first, last)
    return jax.lax.with_sharding_constraint(taken, NamedSharding(mesh, P(DATA)))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _put(mesh: Mesh, held: Array, output: Array, first: int, last: int) -> Array:
    """Replaces the windows before ``last`` that :func:`_taken` takes."""

    def local(held: Array, output: Array, first: int | Array, last: int | Array) -> Array:
        start, valid = _start_and_valid(mesh, len(output), first, last)
        before = jax.lax.dynamic_slice_in_dim(held, start, len(output))
        return jax.lax.dynamic_update_slice_in_dim(held, jnp.where(valid[:, None, None], output, before), start, 0)

    spec = _held_sharding(mesh, held.shape[-1]).spec
    put = jax.shard_map(local, mesh=mesh, in_specs=(spec, spec, P(), P()), out_specs=spec, check_vma=False)
    return put(held, output, first, last)


def _held_sharding(mesh: Mesh, width: int) -> NamedSharding:
    return NamedSharding(mesh, divisible(mesh, (mesh.shape[DATA], 1, width), P(DATA, None, MODEL)))


def _start_and_valid(mesh: Mesh, size: int, first: int | Array, last: int | Array) -> tuple[Array, Array]:
    """Where a batch begins on this slice, and which windows it has.

    Returns:
      (the index of its first window on the slice, [size] whether each of its windows is before ``last``)
    """
    slices = mesh.shape[DATA]
    window = first + (jax.lax.axis_index(DATA) - first) % slices
    return window // slices, window + slices * jnp.arange(size) < last


@dataclasses.dataclass(frozen=True)
class Batch:
    """Windows on the mesh, sharded over the data axis.

    Attributes:
      rows: [size] which windows.
      filled: [size] bool, False for the padding of the last batch.
      hidden: [size, length, d_model].
    """

    mesh: Mesh
    rows: np.ndarray
    filled: np.ndarray
    hidden: Array

    @property
    def valid(self) -> Array:
        """:attr:`filled` on the mesh, sharded like the windows."""
        return on_mesh(self.mesh, self.rows, lambda rows: self.filled[np.isin(self.rows, rows)], ())

    def place(self, values: np.ndarray) -> Array:
        """One row of ``values`` [windows, ...] for each window of the batch.

        The rows are sharded like the windows; padding gets zeros.
        """

        def take(rows):
            entries = np.zeros((len(rows), *values.shape[1:]), values.dtype)
            entries[rows < len(values)] = values[rows[rows < len(values)]]
            return entries

        return on_mesh(self.mesh, self.rows, take, values.shape[1:])


def held_rows(mesh: Mesh, first: int, last: int) -> np.ndarray:
    """Which of the windows ``first`` to ``last - 1`` this process holds."""
    slices = [
        index
        for index, devices in enumerate(mesh.devices)
        if any(device.process_index == jax.process_index() for device in devices)
    ]
    rows = np.arange(first, last)
    return rows[np.isin(rows % mesh.shape[DATA], slices)]


def on_mesh(mesh: Mesh, rows: np.ndarray, take: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> Array:
    """``take(rows)`` [len(rows), *shape], sharded over the data axis.

    Every process takes the rows of its own devices.
    """
    parts: dict[str, np.ndarray] = {}  # devices of the model axis ask for the same rows one after the other

    def read(index):
        if str(index) not in parts:
            parts[str(index)] = take(rows[index[0]])
        return parts[str(index)]

    return jax.make_array_from_callback((len(rows), *shape), NamedSharding(mesh, P(DATA)), read)
