"""The checkpoint of a finished run, and all that is said to Orbax.

    RUN/checkpoint/             one Orbax checkpoint of the whole pruned model

It appears under its name in one step, after its contents are on the disk. No other module imports Orbax.
"""

import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from orbax.checkpoint import v1 as ocp

from optima_tpu.errors import UserError
from optima_tpu.files import PARTIAL, commit, remove_partial, split_by_size, writing
from optima_tpu.manifest import read_run
from optima_tpu.processes import first_only, from_first
from optima_tpu.sharding import spread

CHECKPOINT = "checkpoint"
_UNTOUCHED_AT_ONCE = 1 << 30
"""Bytes of unpruned tensors that are read before they are written."""


def quiet_orbax() -> None:
    """Keeps Orbax's own messages off the terminal, for the command line to call. What fails is raised all the same."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # Orbax gives up at the first array it cannot write and raises for that one. The others' failures are then either
    # errors that nobody asks for, which asyncio logs, or answers that find Orbax's event loop gone.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    report = sys.unraisablehook
    sys.unraisablehook = lambda event: None if str(event.exc_value) == "Event loop is closed" else report(event)


def save_tree(path: Path, tree: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Writes a checkpoint of arrays on the host or on the mesh. Every process calls it and writes what its devices hold."""
    ocp.save(path, tree, custom_metadata=dict(metadata))


def read_metadata(path: Path):
    """Orbax's record of a checkpoint: ``metadata``, the tree of shapes and dtypes, and ``custom_metadata``."""
    with _by_itself():
        return ocp.metadata(path)


def load_group(path: Path, group: str, wanted: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Reads arrays of one group of a checkpoint onto the host, in this process alone.

    Args:
      wanted: name -> something with the shape and dtype of the array.
    """
    # A numpy target gives a host array; without one, Orbax asks for the devices that the array was saved from.
    target = {name: np.empty(like.shape, like.dtype) for name, like in wanted.items()}
    if not target:
        return {}
    with _by_itself():
        return ocp.load(path, {group: target})[group]


def _by_itself() -> ocp.Context:
    """Reading that does not wait for the other processes."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    if jax.process_count() > 1:
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.active_processes = {jax.process_index()}
    return context


def write_checkpoint(journal, source, mesh: Mesh) -> None:
    """Writes RUN/checkpoint: the finished blocks, and every other tensor as the source has it.

    One block is in memory at a time. A checkpoint that is already there is complete and is left alone. Every process calls
    it; each writes a share of every tensor.

    Args:
      journal: the ``Journal`` of the run, with every block of the model.
      source: the ``TensorSource`` that was pruned.
      mesh: whose devices the arrays pass.

    Raises:
      UserError: the disk is full or not writable. The finished blocks are intact.
    """
    final = journal.directory / CHECKPOINT
    if from_first(final.exists):
        return
    names, partial = set(source.names()), final.with_name(final.name + PARTIAL)

    def on_mesh(arrays: Mapping[str, np.ndarray]) -> dict[str, Array | np.ndarray]:
        def place(array):
            if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:  # 64 bits, which jax would halve
                return array
            sharding = NamedSharding(mesh, spread(mesh, array.shape))
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
        return {name: place(array) for name, array in arrays.items()}

    with writing(final, "all finished blocks are intact; make room and repeat the command"):
        first_only(lambda: remove_partial(final))
        for index in sorted(journal.finished):
            weights, masks = journal.weights(index), journal.masks(index)
            for name, array in weights.items():
                if name not in names or (array.shape, array.dtype) != (source.shape(name), source.dtype(name)):
                    raise ValueError(f"block {index}: the source has no {name} {array.shape} {array.dtype}")
            # To Orbax an empty group is a leaf, under which it refuses to put the arrays of later blocks.
            if tree := {key: on_mesh(group) for key, group in (("weights", weights), ("masks", masks)) if group}:
                ocp.partial.save(partial, tree)
            names.difference_update(weights)
        for group in split_by_size(source, sorted(names), _UNTOUCHED_AT_ONCE).filename_to_tensors.values():
            ocp.partial.save(partial, {"weights": on_mesh({name: np.asarray(source.read(name)) for name in group})})
        reports = [journal.report(index) for index in sorted(journal.finished)]
        ocp.partial.save(partial, {"blocks": np.asarray(len(reports))},
                         custom_metadata={"run": read_run(journal.directory) | {"blocks": reports}})
        ocp.partial.finalize(partial)

        def finish():
            if set(read_metadata(partial).metadata["weights"]) != set(source.names()):
                raise RuntimeError(f"{partial} does not hold the tensors of the source")
            commit(partial, final)

        first_only(finish)


class CheckpointTensors:
    """The tensors of a finished run as a ``TensorSource``, read from RUN/checkpoint alone, to the host, when asked for.

    Attributes:
      run: ``{"manifest": ..., "configuration": ..., "blocks": [report of each block]}``.

    Raises:
      UserError: the run is not finished.
    """

    def __init__(self, directory: str | Path):
        self._path = Path(directory).absolute() / CHECKPOINT
        if not self._path.exists():
            read_run(directory)
            raise UserError(f"expected a finished run, got {directory}, which has no checkpoint yet; repeat its "
                            "command to finish it")
        metadata = read_metadata(self._path)
        self._tree, self.run = metadata.metadata, metadata.custom_metadata["run"]
        self._held: tuple[str, np.ndarray] = "", np.empty(0)

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._tree["weights"]))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tree["weights"][name].shape)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self._tree["weights"][name].dtype)

    def read(self, name: str, index=(...,)) -> np.ndarray:
        """A tensor, cut to ``index`` after the whole of it was read: Orbax reads no less onto the host.

        The last one is held, since every device of a mesh asks for its own slice.
        """
        if self._held[0] != name:
            self._held = name, self.load([name])[name]
        return self._held[1][index]

    def load(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Several tensors at once, which is faster than one after the other."""
        return load_group(self._path, "weights", {name: self._tree["weights"][name] for name in names})

    def pruned(self) -> tuple[str, ...]:
        """The names of the pruned weights."""
        return tuple(sorted(self._tree.get("masks") or ()))

    def masks(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """The masks of pruned weights, [d_out, d_in] bool, True where kept."""
        return load_group(self._path, "masks", {name: self._tree["masks"][name] for name in names})
