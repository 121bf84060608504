"""Hidden states on the hosts, where each process holds the samples of its own devices, and batches of them on the devices."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optima_tpu.runtime.mesh import DATA, padded


@dataclasses.dataclass(frozen=True)
class Activations:
    """Hidden states of samples ``first`` to ``last - 1``, on the hosts.

    Sample ``i`` belongs to slice ``i mod D`` of the ``D`` slices of the data axis, and is held by the processes that have a
    device of that slice: any range of samples is spread evenly, and a process holds only samples that its devices compute.

    Attributes:
      mesh: axes ("data", "model").
      first, last: which samples.
      values: [held, length, d_model], the samples that this process holds, in order; see :attr:`rows`.
    """

    mesh: Mesh
    first: int
    last: int
    values: np.ndarray

    @classmethod
    def of(cls, mesh: Mesh, values: np.ndarray) -> "Activations":
        """From all samples [samples, length, d_model]; the process keeps its own."""
        rows = held_rows(mesh, 0, len(values))
        return cls(mesh, 0, len(values), values if len(rows) == len(values) else values[rows])

    def __len__(self) -> int:
        return self.last - self.first

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """[held] int64, the samples that this process holds, ascending."""
        return held_rows(self.mesh, self.first, self.last)

    def part(self, first: int, last: int) -> "Activations":
        """Samples ``first`` to ``last - 1``, without a copy."""
        start, stop = np.searchsorted(self.rows, (first, last))
        return Activations(self.mesh, first, last, self.values[start:stop])

    def copy(self) -> "Activations":
        """A copy with memory of its own."""
        return dataclasses.replace(self, values=self.values.copy())

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Samples that this process holds, [len(rows), length, d_model]; zeros for rows after the last sample."""
        there = rows < self.last
        if there.all():
            return self.values[np.searchsorted(self.rows, rows)]
        found = np.zeros((len(rows), *self.values.shape[1:]), self.values.dtype)
        found[there] = self.values[np.searchsorted(self.rows, rows[there])]
        return found

    def put(self, rows: np.ndarray, output: Array) -> None:
        """Overwrites samples with the rows of an array on the mesh; rows after the last sample are dropped."""
        seen = set()
        for shard in output.addressable_shards:
            if str(shard.index) in seen:  # the same slice of samples on another device of the model axis
                continue
            seen.add(str(shard.index))
            mine = rows[shard.index[0]]
            kept = np.isin(mine, self.rows)
            positions = np.searchsorted(self.rows, mine[kept])
            self.values[(positions, *shard.index[1:])] = np.asarray(shard.data)[kept]

    @contextlib.contextmanager
    def put_behind(self) -> Iterator[Callable[[np.ndarray, Array], None]]:
        """Yields a :meth:`put` that is one call behind: it fetches one result while the devices compute the next."""
        waiting: list[tuple[np.ndarray, Array]] = []

        def put(rows: np.ndarray, output: Array) -> None:
            waiting.append((rows, output))
            if len(waiting) > 1:
                self.put(*waiting.pop(0))

        yield put
        for last in waiting:
            self.put(*last)

    def batches(self, size: int) -> Iterator["Batch"]:
        """Cuts the samples into batches of one shape, the last one padded with zeros.

        Args:
          size: the largest number of samples that a batch gives to one slice of the data axis.
        """
        slices = self.mesh.shape[DATA]
        size = min(size, padded(len(self), slices) // slices) * slices
        for first in range(self.first, self.last, size):
            rows = np.arange(first, first + size)
            rows = rows[np.argsort(rows % slices, kind="stable")]
            hidden = on_mesh(self.mesh, rows, self.take, self.values.shape[1:])
            yield Batch(self.mesh, rows, rows < self.last, hidden)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples on the mesh, sharded over the data axis.

    Attributes:
      rows: [size] which samples.
      there: [size] bool, False for the padding of the last batch.
      hidden: [size, length, d_model].
    """

    mesh: Mesh
    rows: np.ndarray
    there: np.ndarray
    hidden: Array

    @property
    def valid(self) -> Array:
        """:attr:`there` on the mesh, sharded like the samples."""
        return on_mesh(self.mesh, self.rows, lambda rows: self.there[np.isin(self.rows, rows)], ())

    def place(self, values: np.ndarray) -> Array:
        """One entry of ``values`` [samples, ...] for each row, sharded like the samples; zeros for padding."""

        def take(rows):
            found = np.zeros((len(rows), *values.shape[1:]), values.dtype)
            found[rows < len(values)] = values[rows[rows < len(values)]]
            return found

        return on_mesh(self.mesh, self.rows, take, values.shape[1:])


def held_rows(mesh: Mesh, first: int, last: int) -> np.ndarray:
    """The samples out of ``first`` to ``last - 1`` that this process holds, ascending, int64."""
    slices = [
        index
        for index, devices in enumerate(mesh.devices)
        if any(device.process_index == jax.process_index() for device in devices)
    ]
    rows = np.arange(first, last)
    return rows[np.isin(rows % mesh.shape[DATA], slices)]


def on_mesh(mesh: Mesh, rows: np.ndarray, take: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> Array:
    """``take(rows)``, of shape [len(rows), *shape], sharded over the data axis. Every process takes the rows of its devices."""
    parts: dict[str, np.ndarray] = {}  # devices of the model axis ask for the same rows one after the other

    def read(index):
        if str(index) not in parts:
            parts[str(index)] = take(rows[index[0]])
        return parts[str(index)]

    return jax.make_array_from_callback((len(rows), *shape), NamedSharding(mesh, P(DATA)), read)
