"""Everything that is kept of a run, and how a run goes on after it was stopped. The only module that imports Orbax.

    RUN/run.json                what a resume must agree with, and the full configuration; written first
    RUN/assets/                 the source's configuration, tokenizer and licence files, byte for byte
    RUN/journal/block_0000/     one Orbax checkpoint for each finished block: its weights, masks and report
    RUN/activations/            the hidden states after the last finished block
    RUN/checkpoint/             one Orbax checkpoint of the whole pruned model

Each of these appears under its name in one step, after its contents are on the disk, so kill -9 at any moment leaves a
directory from which the same command goes on. The hidden states after a block are written before the block's journal
entry, and those after the block before it are removed after it: a finished block always has its hidden states.

Saves are synchronous: one takes a fraction of a second where a block takes many, and an asynchronous one would have to
be waited for before the old hidden states are removed.
"""

import functools
import hashlib
import importlib.metadata
import logging
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from jax import Array
from orbax.checkpoint import v1 as ocp

from optima_tpu.errors import UserError
from optima_tpu.files import LOCK, PARTIAL, commit, remove_partial, split_by_size, write_bytes, writing
from optima_tpu.manifest import ASSETS, RUN, read_run, refuse_another, write_run

_JOURNAL, _ACTIVATIONS, _CHECKPOINT = "journal", "activations", "checkpoint"
_ENTRY = re.compile(r"block_(\d{4,})")
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


@functools.cache  # the code that runs is the one that was read first, whatever happens to the files later
def code_version() -> str:
    """The installed version and a digest of the package's source files, "0.1.0+3f2a91c0b5d7".

    Part of a run's manifest: blocks that were pruned by different code do not belong in one model.
    """
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package).as_posix()}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    try:
        version = importlib.metadata.version("optima-tpu")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout; the digest still tells it apart
        version = "0"
    return f"{version}+{digest.hexdigest()[:12]}"


def prepare_directory(directory: str | Path, manifest: Mapping[str, Any]) -> Path:
    """The directory of a run, made if missing, once it is sure that this run may be kept there. Nothing is written into it.

    Raises:
      UserError: as :func:`open_journal`.
    """
    directory = Path(directory).absolute()
    with writing(directory, "choose another --output"):
        if (directory / RUN).exists():
            refuse_another(directory, manifest)
        # A run that was killed while it wrote its first file left nothing but its lock and that file's beginning.
        elif directory.exists() and any(child.name not in (LOCK, RUN + PARTIAL) for child in directory.iterdir()):
            raise UserError(f"{directory} holds files that are not a run of this program; choose another --output")
        directory.mkdir(parents=True, exist_ok=True)
    return directory


def open_journal(directory: str | Path, manifest: Mapping[str, Any], assets: Mapping[str, bytes],
                 configuration: Mapping[str, Any] | None = None) -> "Journal":
    """Starts a run in ``directory``, or goes on with the one that is there.

    Args:
      directory: created if missing.
      manifest: JSON values that decide the result and that a resume must repeat: model fingerprint, recipe, digest of
        the calibration tokens, code version. Not the mesh.
      assets: file name -> contents, kept for the export.
      configuration: JSON values that are recorded beside the manifest and not compared.

    Raises:
      UserError: the directory holds a run with another manifest (every differing key is named with both values) or
        something else than a run, or cannot be written. Nothing in it was touched.
    """
    directory = prepare_directory(directory, manifest)
    with writing(directory, "choose another --output"):
        if not (directory / RUN).exists():
            write_run(directory, manifest, configuration or {})
        for name, data in assets.items():
            path = directory / ASSETS / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(path, data)
        for folder in (_JOURNAL, _ACTIVATIONS):
            (directory / folder).mkdir(exist_ok=True)
    return Journal(directory)


def finished_blocks(directory: str | Path) -> int:
    """How many blocks of a run are done, counted from the first without a gap."""
    done = set(_entries(Path(directory) / _JOURNAL))
    return next(count for count in range(len(done) + 1) if count not in done)


class Journal:
    """The finished blocks of one run. Made by :func:`open_journal`; one process writes it at a time."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._finished = finished_blocks(directory)

    @property
    def finished(self) -> int:
        """Number of finished blocks, which is the index of the block to go on with."""
        return self._finished

    def save(self, index: int, weights: Mapping[str, Array | np.ndarray], masks: Mapping[str, Array | np.ndarray],
             report: Mapping[str, Any], activations: np.ndarray) -> None:
        """Makes a block durable. When this returns, the run can be stopped without losing it.

        Args:
          index: the block, equal to ``finished``.
          weights: HF name -> array in the source's dtype, on the host or sharded over a mesh.
          masks: HF name of a weight -> [d_out, d_in] bool, True where the weight was kept.
          report: JSON values.
          activations: [samples, length, d_model], the hidden states after the block, in the model's dtype.

        Raises:
          UserError: the disk is full or not writable. The blocks before are intact.
        """
        if index != self._finished:
            raise ValueError(f"block {index} cannot be saved after {self._finished} finished blocks")
        if stray := set(masks) - set(weights):
            raise ValueError(f"masks without weights: {sorted(stray)}")
        entry, states = self._entry(index), self._states(index)
        with writing(entry, f"the {index} finished blocks are intact; make room and repeat the command"):
            remove_partial(states)
            partial = states.with_name(states.name + PARTIAL)
            # safetensors writes the buffer as it lies in memory, whatever the strides.
            safetensors.numpy.save_file({"hidden_states": np.ascontiguousarray(activations)}, partial)
            commit(partial, states)

            remove_partial(entry)
            for later in [number for number in _entries(entry.parent) if number >= index]:
                shutil.rmtree(self._entry(later))  # after a gap, so that filling the gap does not bring it back
            partial = entry.with_name(entry.name + PARTIAL)
            tree = {"weights": dict(weights), "masks": dict(masks)}
            ocp.save(partial, tree, custom_metadata={"report": dict(report)})
            commit(partial, entry)
        self._finished += 1
        for old in states.parent.iterdir():
            if old != states:
                old.unlink()

    def weights(self, index: int) -> dict[str, np.ndarray]:
        """The pruned weights of a finished block by HF name."""
        return self._group(index, "weights")

    def masks(self, index: int) -> dict[str, np.ndarray]:
        """The masks of a finished block by the HF name of the weight, [d_out, d_in] bool, True where kept."""
        return self._group(index, "masks")

    def report(self, index: int) -> dict:
        """The report of a finished block, as it was saved."""
        return ocp.metadata(self._entry(index)).custom_metadata["report"]

    def activations(self) -> np.ndarray:
        """The hidden states after the last finished block, [samples, length, d_model].

        Raises:
          UserError: they were deleted, or no block is finished.
        """
        path = self._states(self._finished - 1)
        if not path.exists():
            raise UserError(f"expected the hidden states of the calibration samples in {path}, there are none and the "
                            "run cannot go on; choose another --output")
        with safetensors.safe_open(path, framework="np") as file:
            return file.get_tensor("hidden_states")

    def write_checkpoint(self, source) -> None:
        """Writes RUN/checkpoint: the finished blocks, and every other tensor as the source has it.

        One block is in memory at a time. A checkpoint that is already there is complete and is left alone.

        Args:
          source: the ``TensorSource`` that was pruned.

        Raises:
          UserError: the disk is full or not writable. The finished blocks are intact.
        """
        final = self.directory / _CHECKPOINT
        if final.exists():
            return
        names = set(source.names())
        with writing(final, "all finished blocks are intact; make room and repeat the command"):
            remove_partial(final)
            partial = final.with_name(final.name + PARTIAL)
            for index in range(self._finished):
                weights, masks = self.weights(index), self.masks(index)
                for name, array in weights.items():
                    if name not in names or (array.shape, array.dtype) != (source.shape(name), source.dtype(name)):
                        raise ValueError(f"block {index}: the source has no {name} {array.shape} {array.dtype}")
                # To Orbax an empty group is a leaf, under which it refuses to put the arrays of later blocks.
                if tree := {key: group for key, group in (("weights", weights), ("masks", masks)) if group}:
                    ocp.partial.save(partial, tree)
                names.difference_update(weights)
            for group in split_by_size(source, sorted(names), _UNTOUCHED_AT_ONCE).filename_to_tensors.values():
                ocp.partial.save(partial, {"weights": {name: np.asarray(source.read(name)) for name in group}})
            reports = [self.report(index) for index in range(self._finished)]
            ocp.partial.save(partial, {"blocks": np.asarray(self._finished)},
                             custom_metadata={"run": read_run(self.directory) | {"blocks": reports}})
            ocp.partial.finalize(partial)
            if set(ocp.metadata(partial).metadata["weights"]) != set(source.names()):
                raise RuntimeError(f"{partial} does not hold the tensors of the source")
            commit(partial, final)

    def _group(self, index: int, group: str) -> dict[str, np.ndarray]:
        return _load(self._entry(index), group, ocp.metadata(self._entry(index)).metadata.get(group) or {})

    def _entry(self, index: int) -> Path:
        return self.directory / _JOURNAL / f"block_{index:04d}"

    def _states(self, index: int) -> Path:
        return self.directory / _ACTIVATIONS / f"block_{index:04d}.safetensors"


class CheckpointTensors:
    """The tensors of a finished run as a ``TensorSource``, read from RUN/checkpoint alone, to the host, when asked for.

    Attributes:
      run: ``{"manifest": ..., "configuration": ..., "blocks": [report of each block]}``.

    Raises:
      UserError: the run is not finished.
    """

    def __init__(self, directory: str | Path):
        self._path = Path(directory).absolute() / _CHECKPOINT
        if not self._path.exists():
            read_run(directory)
            raise UserError(f"expected a finished run, got {directory} with {finished_blocks(directory)} finished "
                            "blocks and no checkpoint yet; repeat its command to finish it")
        metadata = ocp.metadata(self._path)
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
        return _load(self._path, "weights", {name: self._tree["weights"][name] for name in names})

    def pruned(self) -> tuple[str, ...]:
        """The names of the pruned weights."""
        return tuple(sorted(self._tree.get("masks") or ()))

    def masks(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """The masks of pruned weights, [d_out, d_in] bool, True where kept."""
        return _load(self._path, "masks", {name: self._tree["masks"][name] for name in names})


def _load(path: Path, group: str, wanted: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Reads arrays of one group of a checkpoint onto the host; ``wanted`` has the shape and dtype of each."""
    # A numpy target gives a host array; without one, Orbax asks for the devices that the array was saved from.
    target = {name: np.empty(like.shape, like.dtype) for name, like in wanted.items()}
    if not target:
        return {}
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return ocp.load(path, {group: target})[group]


def _entries(folder: Path) -> list[int]:
    return [int(match[1]) for path in folder.glob("block_*") if (match := _ENTRY.fullmatch(path.name))]
