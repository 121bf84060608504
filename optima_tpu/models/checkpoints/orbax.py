"""The checkpoint of a finished run, and all use of Orbax.

    RUN/checkpoint/             an Orbax checkpoint of the tensors that belong to no block; its custom metadata names the blocks'
    own

A block is written once: its Orbax checkpoint in the journal, or behind a training the one in RUN/distilled, is its part of the
whole. RUN/checkpoint gets its name in one step, after its contents are on the disk. No other module imports Orbax.
"""

import contextlib
import copy
import logging
import re
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self, TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from orbax.checkpoint import v1 as ocp

from optima_tpu.errors import UserError
from optima_tpu.models.checkpoints.source import Index, TensorSource
from optima_tpu.report.contents import LeftOut
from optima_tpu.report.records import BlockReport
from optima_tpu.report.run_record import RunRecord, read_run, recorded_command
from optima_tpu.runtime import signals
from optima_tpu.runtime.buckets import as_path, reached
from optima_tpu.runtime.checksums import damage
from optima_tpu.runtime.files import complete
from optima_tpu.runtime.inside import inside, refuse_links
from optima_tpu.runtime.kept import keeping
from optima_tpu.runtime.mesh import spread
from optima_tpu.runtime.processes import alone, from_first
from optima_tpu.runtime.records import Record, Share, check_record, json_values

T = TypeVar("T")

CHECKPOINT = "checkpoint"
_ITEMS = "items"
_ONE = threading.Lock()
"""Held by the one operation of Orbax that goes on. Orbax counts operations by a number of the whole process: a checkpoint that is
read in a thread, as the next block is, could let a save go on before its folders exist."""
_BLOCK = re.compile(r"(.*?\.\d+)\.")
"""The beginning of the name of a block's tensor, up to the block's number."""


class CheckpointedRun(RunRecord, frozen=True):
    """A run, with the report of each block.

    Attributes:
      sparsity: the sparsity of each block; None if it is the same in all blocks.
      left_out: the blocks and experts that the model is without.
    """

    blocks: tuple[BlockReport, ...]
    sparsity: tuple[Share | None, ...] | None
    left_out: LeftOut = LeftOut()


class _Metadata(Record, frozen=True):
    """The custom metadata of RUN/checkpoint.

    Attributes:
      parts: the checkpoints of the blocks, below RUN.
      stacked: the tensors of the source of which the parts are in the checkpoint, see ``stacks``.
    """

    run: CheckpointedRun
    parts: tuple[str, ...]
    stacked: tuple[str, ...]


def quiet_orbax() -> None:
    """Hides the messages of Orbax; errors are still raised."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # Orbax stops at the first array that it cannot write, and raises an error for this array. Errors of other arrays are then
    # never retrieved, which asyncio logs, or arrive after Orbax has closed its event loop.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    report = sys.unraisablehook
    sys.unraisablehook = lambda event: None if str(event.exc_value) == "Event loop is closed" else report(event)


def save_tree(path: Path, tree: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Writes a checkpoint of arrays on the host or on the mesh.

    Every process calls this function and writes what its devices hold.
    """
    with _ONE, _saving():
        ocp.save(path, tree, custom_metadata=dict(metadata))


def _saving() -> ocp.Context:
    """The Orbax context for saves.

    In one process, splitting the write of equal copies only compiles a slice for every shape and part.
    """
    context = ocp.Context()
    context.array.saving.use_replica_parallel = jax.process_count() > 1
    return context


def save_items(path: Path, tree: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Writes host arrays as PATH/items for MaxText, and reads them again.

    Raises:
      RuntimeError: an array differs from what was written.
    """
    with _ONE:
        ocp.save_checkpointables(path, {_ITEMS: tree}, custom_metadata=dict(metadata))
    for mark in path.rglob("commit_success.txt"):  # Orbax looks whether it exists, and writes the path of this machine into it
        mark.write_text("committed\n")
    if alone():
        signals.check()
    with _ONE, _by_itself():
        read_back = ocp.load_checkpointables(path, {_ITEMS: jax.tree.map(np.empty_like, tree)})[_ITEMS]
    differ = jax.tree.map(lambda a, b: a.dtype != b.dtype or not np.array_equal(a, b, equal_nan=True), tree, read_back)
    for name, wrong in jax.tree_util.tree_leaves_with_path(differ):
        if wrong:
            raise RuntimeError(f"{path / _ITEMS}: {jax.tree_util.keystr(name)} differs from what was written")


def read_metadata(path: Path) -> ocp.CheckpointMetadata:
    """Orbax's record of a checkpoint.

    It has ``metadata``, the tree of shapes and dtypes, and ``custom_metadata``.

    Raises:
      UserError: the checkpoint is damaged or was removed.
    """
    with _reading(path):
        record = ocp.metadata(path)
    if record.metadata is None:  # Orbax's result for files that it cannot interpret
        raise UserError(
            f"{path} is damaged: expected a checkpoint of arrays, got none; remove it and repeat the run's "
            "command, which writes it again"
        )
    return record


def read_custom(path: Path, kind: type[T]) -> T:
    """The custom metadata of a checkpoint, checked to have a declared type.

    Raises:
      UserError: the metadata have another type, or as :func:`read_metadata`.
    """
    return check_record(read_metadata(path).custom_metadata, kind, path)


def load_group(path: Path, group: str, wanted: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Reads arrays of one group of a checkpoint, in this process alone.

    Args:
      wanted: name -> something with the shape and dtype of the array.
    """
    # A numpy target gives a host array; without one, Orbax asks for the devices that the array was saved from.
    target = {name: np.empty(like.shape, like.dtype) for name, like in wanted.items()}
    if not target:
        return {}
    with _reading(path):
        return ocp.load(path, {group: target})[group]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Context in which this process reads a checkpoint by itself.

    If Orbax cannot read, the checksums say whether the checkpoint is to blame.

    Raises:
      UserError: the checkpoint is damaged, or was removed while this program was at work; other exceptions pass.
    """
    try:
        with reached(path), _ONE, _by_itself():
            yield
    except UserError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many types for missing or damaged files
        if why := damage(path) if path.exists() else "is missing":
            raise UserError(
                f"{path} can't be read ({why}): something changed or removed it after it was written; repeat the run's command, "
                "which writes it again"
            ) from error
        raise


def _by_itself() -> ocp.Context:
    """A context for reads that do not wait for other processes."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    if jax.process_count() > 1:
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.active_processes = {jax.process_index()}
    return context


def write_checkpoint(
    directory: Path,
    blocks: Callable[[], Mapping[Path, BlockReport]],
    source: TensorSource,
    mesh: Mesh,
    sparsity: Sequence[float | None] | None = None,
    left_out: LeftOut = LeftOut(),
) -> None:
    """Writes RUN/checkpoint: the names of finished blocks, and other tensors.

    The other tensors, unchanged from the source, are in memory at once: embedding, last norm and head, and what is not read
    here, such as the half for images. An existing checkpoint is complete and is not written again. Every process calls this
    function, and each writes a share of every tensor.

    Args:
      blocks: reads the report of every block of the model, in their order, by the checkpoint of the block, below RUN.
      source: what was pruned.
      mesh: the devices from which the arrays are written.
      sparsity: the sparsity of every block, if blocks differ; None for a block whose layers all have rules.
      left_out: the blocks of the dense model that the source is without.

    Raises:
      UserError: the disk is full or not writable. The finished blocks are intact.
    """
    final = directory / CHECKPOINT
    if from_first(lambda: complete(final)):
        return

    def placed(name: str) -> Array | np.ndarray:
        shape, dtype = source.shape(name), source.dtype(name)
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:  # 64-bit, which jax would make 32-bit
            return source.read(name)
        return jax.make_array_from_callback(
            shape, NamedSharding(mesh, spread(mesh, shape)), lambda index: source.read(name, index or (...,))
        )

    with keeping(final, "all finished blocks are intact; make room and repeat the command") as partial:
        reports, names = blocks(), set(source.names())
        saved = OrbaxTensors(reports)
        for name in saved.names():
            shape, dtype = saved.shape(name), saved.dtype(name)
            if name not in names or (shape, dtype) != (source.shape(name), source.dtype(name)):
                raise ValueError(f"the source has no {name} {shape} {dtype}, which a finished block has")
        run, shares = read_run(directory), None if sparsity is None else tuple(sparsity)
        metadata = _Metadata(
            CheckpointedRun(run.manifest, run.configuration, tuple(reports.values()), shares, left_out),
            tuple(str(entry.relative_to(directory)) for entry in reports),
            tuple(sorted(getattr(source, "stacks", ()))),
        )
        own = {"weights": {name: placed(name) for name in sorted(names.difference(saved.names()))}}
        save_tree(partial, own, json_values(metadata))


class _Opened(NamedTuple):
    """RUN/checkpoint, opened.

    Attributes:
      record: its custom metadata.
      tree: the tree of its arrays, as Orbax records them.
      parts: the checkpoints of the blocks, by their names in the metadata.
    """

    record: _Metadata
    tree: Mapping[str, Any]
    parts: dict[str, Path]

    @classmethod
    def of(cls, path: Path) -> "_Opened":
        stored = read_metadata(path)
        record = check_record(stored.custom_metadata, _Metadata, path)
        return cls(record, stored.metadata, {part: inside(path.parent, part, path) for part in record.parts})


def _leaves(trees: Mapping[Path, Mapping[str, Any]], group: str) -> dict[str, Any]:
    return {name: leaf for tree in trees.values() for name, leaf in (tree.get(group) or {}).items()}


def checkpointed_blocks(directory: Path) -> tuple[BlockReport, ...] | None:
    """Every block's report in RUN/checkpoint; None if it is not complete."""
    path = directory / CHECKPOINT
    if not complete(path):
        return None
    opened = _Opened.of(path)
    return opened.record.run.blocks if all(map(complete, opened.parts.values())) else None


def checkpoint_damage(directory: Path) -> str:
    """What is damaged in RUN/checkpoint and its parts; empty if nothing is."""
    path = directory / CHECKPOINT
    if reason := damage(path):
        return reason
    whys = ((name, damage(part) if part.exists() else "is missing") for name, part in _Opened.of(path).parts.items())
    return next((f"{part}: {why}" for part, why in whys if why), "")


def refuse_damaged_checkpoint(directory: Path) -> None:
    """Raises UserError if the checkpoint of a run is damaged.

    A link that leads out of the run is refused too. Reads all files.
    """
    refuse_links(directory)
    if complete(directory / CHECKPOINT) and (reason := checkpoint_damage(directory)):
        raise UserError(f"{directory / CHECKPOINT} is damaged ({reason}): repeat the run's command, which writes it again")


class TensorPart(NamedTuple):
    """The rows or the columns of a tensor that stay.

    Attributes:
      axis: 0 for rows, 1 for columns.
      total: the number of rows or columns of the whole tensor.
    """

    indices: np.ndarray
    axis: int
    total: int


class OrbaxTensors:
    """A ``TensorSource`` of Orbax checkpoints, read to the host on demand.

    Args:
      paths: the checkpoints, each with groups "weights", "masks" and "scales" by name.
      trees: checkpoints whose record was read before, and their trees.

    Raises:
      UserError: as :func:`read_metadata`.
    """

    def __init__(self, paths: Iterable[Path], trees: Mapping[Path, Mapping[str, Any]] = MappingProxyType({})):
        self._trees = {**trees, **{path: read_metadata(path).metadata for path in paths}}
        self._groups = {group: _leaves(self._trees, group) for group in ("weights", "masks", "scales")}
        self._cached: tuple[tuple[str, str], dict[str, np.ndarray]] = ("", ""), {}
        self._left: Mapping[str, TensorPart] = {}

    def without(self, left: Mapping[str, TensorPart], unmasked: Collection[str], gone: Collection[str] = ()) -> Self:
        """The same tensors, of which only parts are left.

        Args:
          left: the parts, by the name of the tensor. If columns are left, all other columns must be zero.
          unmasked: the weights that no longer count as pruned.
          gone: the tensors of which nothing is left.
        """
        reduced = copy.copy(self)
        reduced._left, reduced._cached = left, (("", ""), {})
        weights = {name: leaf for name, leaf in self._groups["weights"].items() if name not in gone}
        masks = {name: leaf for name, leaf in self._groups["masks"].items() if name not in unmasked}
        reduced._groups = self._groups | {"weights": weights, "masks": masks}
        return reduced

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._groups["weights"]))

    def shape(self, name: str) -> tuple[int, ...]:
        shape = list(self._groups["weights"][name].shape)
        if part := self._left.get(name):
            shape[part.axis] = len(part.indices)
        return tuple(shape)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self._groups["weights"][name].dtype)

    def read(self, name: str, index: Index = (...,)) -> np.ndarray:
        """A slice of a tensor; Orbax always reads the whole tensor.

        The tensors of a block are read together, and held until another block is requested: a read costs Orbax some 30 ms for
        any size, and a forward pass requests all tensors of a block, each of them in one slice for every device of the mesh.
        """
        return self._with_its_block("weights", name)[index]

    def mask(self, name: str) -> np.ndarray:
        """The mask of a pruned weight, [d_out, d_in] bool, True where kept.

        It is read and held as by :meth:`read`.
        """
        return self._with_its_block("masks", name)

    def load(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Reads several tensors together, which is faster than one by one."""
        return self._load("weights", set(names))

    def pruned(self) -> tuple[str, ...]:
        """The names of the pruned weights."""
        return tuple(sorted(self._groups["masks"]))

    def masks(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """The masks of pruned weights, [d_out, d_in] bool, True where kept."""
        return self._load("masks", set(names))

    def scales(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Scales [d_out, groups] of the named weights that are quantised."""
        return self._load("scales", set(names))

    def quantized(self) -> tuple[str, ...]:
        """The names of the quantised weights."""
        return tuple(sorted(self._groups["scales"]))

    def _with_its_block(self, group: str, name: str) -> np.ndarray:
        wanted = group, block_of(name)
        if self._cached[0] != wanted:
            together = {other for other in self._groups[group] if block_of(other) == block_of(name)}
            self._cached = wanted, self._load(group, together)
        return self._cached[1][name]

    def _load(self, group: str, names: set[str]) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        for path, tree in self._trees.items():
            arrays |= load_group(
                path, group, {name: leaf for name, leaf in _leaves({path: tree}, group).items() if name in names}
            )
        return {name: self._part(group, name, array) for name, array in arrays.items()}

    def _part(self, group: str, name: str, array: np.ndarray) -> np.ndarray:
        part = self._left.get(name)
        if part is None or (group == "scales" and part.axis == 1):  # one scale for a row
            return array
        left = np.take(array, part.indices, part.axis)
        if group == "weights" and part.axis == 1 and np.count_nonzero(left) != np.count_nonzero(array):
            raise RuntimeError(f"{name}: the checkpoint holds weights other than zero in inputs that were cut")
        return left


class CheckpointTensors(OrbaxTensors):
    """The tensors of a finished run, in RUN/checkpoint and its parts.

    Attributes:
      run: its record, and the report and the sparsity of each block.
      stacked: the names of the source's tensors that were taken apart, see ``stacks``.

    Raises:
      UserError: the run is not finished.
    """

    def __init__(self, directory: str | Path):
        path = as_path(directory).absolute() / CHECKPOINT
        refuse_links(path.parent)
        if not complete(path):
            stopped = read_run(directory)
            if (path.parent / "report.json").exists():
                raise UserError(
                    f"expected a run with its pruned model, got {directory}, which holds the report alone. A sweep "
                    "removes the models of its finished cells: repeat the sweep with --keep-checkpoints to make them "
                    "again. If the model was lost otherwise, repeat the run's own command"
                )
            command = recorded_command(stopped.configuration) or "its command"
            raise UserError(
                f"expected a finished run, got {directory}, which has no checkpoint yet; to finish it, repeat {command}"
            )
        opened = _Opened.of(path)
        self.run, self.stacked = opened.record.run, opened.record.stacked
        super().__init__(opened.parts.values(), {path: opened.tree})


def block_of(name: str) -> str:
    """A tensor's name up to its block's number; all of it outside blocks."""
    match = _BLOCK.match(name)
    return match[1] if match else name
