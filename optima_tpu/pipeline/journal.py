"""The finished blocks of a run, each of them safe as soon as it is done.

    RUN/run.json                what a resume must agree with, and the full configuration
    RUN/assets/                 the source's configuration, tokenizer, licence and model card, byte for byte
    RUN/journal/block_0000/     one Orbax checkpoint for each finished block: its weights, masks, scales and report.
    RUN/checkpoint
                                refers to them: no block is written a second time
    RUN/activations/block_0000/ the hidden states after one of the last blocks, one file for each process; with a dense target
                                the dense model's hidden states too. Removed when all blocks are finished
    RUN/sha256-all.json         the checksums of the files that are in none of these folders

Each file or folder gets its name in one step, after its contents are on the disk. (In a bucket it counts as finished from one
step on, see ``optima_tpu.runtime.files``.) So kill -9 at any moment leaves a directory that the same command can resume. Each
carries the SHA-256 of its files, in a bucket the CRC32C that the store computes. Opening the journal checks them, and the run
prunes a damaged block again.

Hidden states are written before the journal entry of their block, and older ones are removed after it. Hidden states that are
missing or damaged, or that later blocks need, are computed again from the finished blocks. Hidden states of many windows are
larger than a block, so they are written only when computing them again would take as long as the setting ``recompute`` says. That
is a forward pass through each block since the last save, a small part of what it took to prune them.

Orbax's own checkpoint manager (0.12) is not used, although each entry is an Orbax checkpoint. It too gives a step its name only
when it is written, but it lacks what a journal needs. It stores no checksum of the arrays: a flipped bit is loaded as if it had
been saved. It does not wait until its own records and the new name are on the disk. It removes old steps file by file under their
final names, so a step that was half removed when the program was killed still counts. When an earlier step is saved again, as for
a damaged block, it skips the save unless it is forced. Of arrays on the hosts it stores only the first process's, but each
process has its own hidden states. It has no lock against a second program, does not compare the recipe with the recipe of the
run that it resumes, and SIGTERM ends it in the middle of a save.

Saves are synchronous: saving a block takes a fraction of a second, pruning it takes many. An asynchronous save would have to
finish anyway before the old hidden states are removed. SIGTERM waits for the end of a save.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax import Array
from jax.sharding import Mesh

from optima_tpu.errors import UserError, plural
from optima_tpu.models.activations import Activations, HiddenStates, held_rows
from optima_tpu.models.checkpoints.orbax import OrbaxTensors, read_custom, read_metadata, save_tree
from optima_tpu.report.records import BlockReport
from optima_tpu.report.run_record import ASSETS, RUN, refuse_another, write_run
from optima_tpu.runtime.buckets import as_path, in_bucket
from optima_tpu.runtime.checksums import damage, intact, keep, write_sums
from optima_tpu.runtime.files import (
    LOCK,
    PARTIAL,
    read_here,
    refuse_unreachable,
    remove,
    still_only_program,
    unfinished,
    writing,
    written_here,
)
from optima_tpu.runtime.inside import refuse_links
from optima_tpu.runtime.kept import keeping
from optima_tpu.runtime.processes import everywhere, first_only, from_first, is_first, together
from optima_tpu.runtime.records import Record, json_values
from optima_tpu.runtime.signals import uninterrupted

HIDDEN, DENSE = "hidden_states", "dense_states"
"""Names of the two streams of hidden states: through the pruned blocks, and through the dense ones."""

JOURNAL, _ACTIVATIONS = "journal", "activations"
_ENTRY = re.compile(r"block_(\d{4,})")
_ANOTHER = "choose another --output"


class _Entry(Record, frozen=True):
    """The metadata of a block's checkpoint."""

    report: BlockReport


def refuse_unusable(directory: Path) -> None:
    """Checks a run's directory at the start. Every process calls it.

    Raises:
      UserError: as :func:`refuse_unreachable`, or the directory holds files that are not a run of any settings.
    """

    def check():
        refuse_unreachable(directory)
        with writing(directory, _ANOTHER):
            _refuse_other_files(directory.absolute())

    first_only(check)


def _refuse_other_files(directory: Path) -> None:
    refuse_links(directory)
    if not directory.exists() or (directory / RUN).exists():
        return
    # A run that was killed while it wrote its first file left only its lock and the beginning of this file.
    left = (LOCK, LOCK + PARTIAL)
    if not all(child.name in left or unfinished(child) for child in directory.iterdir()):
        raise UserError(f"{directory} holds files that are not a run of this program; choose another --output")


def prepare_directory(directory: str | Path, manifest: Mapping[str, Any], configuration: Mapping[str, Any] | None = None) -> Path:
    """Checks that a run may use ``directory``, creates it and returns it.

    Writes nothing into it.

    Raises:
      UserError: as :func:`open_journal`.
    """
    directory = as_path(directory).absolute()

    def prepare():
        with writing(directory, _ANOTHER):
            _refuse_other_files(directory)
            if (directory / RUN).exists():
                refuse_another(directory, manifest, configuration)
            directory.mkdir(parents=True, exist_ok=True)

    first_only(prepare)
    return directory


def open_journal(
    directory: str | Path,
    manifest: Mapping[str, Any],
    assets: Mapping[str, bytes],
    configuration: Mapping[str, Any] | None = None,
    recompute: int = 0,
) -> "Journal":
    """Starts a run in ``directory``, or resumes the run in it.

    The damaged blocks of the run are removed. Every process calls it.

    Args:
      directory: created if missing.
      manifest: JSON values that decide the result and that a resume must repeat: model fingerprint, recipe, digest of
        the calibration tokens, code version. Not the mesh.
      assets: file name -> contents, kept for the export.
      configuration: JSON values that are recorded beside the manifest and not compared.
      recompute: minutes of forward passes between two saves of hidden states; 0 saves them after every block.

    Raises:
      UserError: the directory holds a run with another manifest (the message names every differing key with both values), holds
        something else than a run, cannot be written, or is not visible to every process. Nothing in it was changed.
    """
    directory = prepare_directory(directory, manifest, configuration)  # checked again: not every caller has called it before

    def begin():
        with writing(directory, _ANOTHER):
            if not intact(directory, RUN):
                write_run(directory, manifest, configuration or {})
            files = {f"{ASSETS}/{name}": data for name, data in assets.items()}
            if lost := {name: data for name, data in files.items() if not intact(directory, name)}:
                keep(directory, lost, _ANOTHER)
            (directory / JOURNAL).mkdir(exist_ok=True)

    def seen():
        if not (directory / RUN).exists():
            raise UserError(
                f"expected the run directory that process 0 made, but {directory} does not exist on this host: give an --output "
                "on a file system that all hosts share"
            )

    first_only(begin)
    together(seen)
    journal = Journal(directory, recompute)

    def clear():
        for index in journal.damaged:  # so that the directory says what is left
            remove(journal.entry(index))

    first_only(clear)
    return journal


def finished_blocks(directory: str | Path) -> list[int]:
    """The indices of a run's saved blocks, ascending, damaged ones too."""
    names = {path.name for path in (as_path(directory) / JOURNAL).glob("block_*")}
    return sorted(int(match[1]) for name in names if (match := _ENTRY.fullmatch(name)) and name + PARTIAL not in names)


class Journal:
    """The finished blocks of one run, from :func:`open_journal`.

    One program at a time writes a journal.

    Attributes:
      recompute: minutes of passes between two saves of hidden states; a run that goes on repeats at most these.
      finished: the indices of the blocks that are saved and not damaged.
      damaged: {index: reason} of the damaged blocks, for messages. A damaged block does not count as finished.
      repeated: seconds of the passes that bring the last saved hidden states to where the walk is, at most: some count with the
        sums that they were made for. The walk adds to them.
    """

    def __init__(self, directory: Path, recompute: int = 0):
        self.directory, self.recompute = directory, recompute
        saved = from_first(lambda: {index: damage(self.entry(index)) for index in finished_blocks(directory)})
        self.damaged = {index: reason for index, reason in saved.items() if reason}
        self.finished = saved.keys() - self.damaged.keys()
        self.repeated = 0.0
        self._trees: dict[int, Mapping[str, Any]] = {}  # what Orbax records of the arrays of each block that was read

    def save(
        self,
        index: int,
        weights: Mapping[str, Array],
        masks: Mapping[str, Array],
        report: BlockReport,
        streams: Sequence[HiddenStates] = (),
        scales: Mapping[str, Array] = MappingProxyType({}),
    ) -> None:
        """Saves a block durably. Every process calls it.

        When this returns, the run can be stopped without losing the block. Hidden states are written only if ``repeated`` has
        reached ``recompute``.

        Args:
          weights: HF name -> array in the source's dtype, on the host or sharded over the mesh.
          masks: HF name of a weight -> [d_out, d_in] bool, True where the weight was kept.
          streams: the hidden states after the block, in the model's dtype, and the dense model's of the same windows, if the run
            has them; empty where no walk goes on from them.
          scales: HF name of a quantised weight -> [d_out, groups] in the dtype of the weight.

        Raises:
          UserError: the disk is full or not writable, and the earlier blocks are intact; or something has removed earlier blocks.
        """
        if not scales.keys() <= masks.keys() <= weights.keys():
            raise ValueError(
                f"masks without weights, or scales without masks: {sorted(weights)}, {sorted(masks)}, {sorted(scales)}"
            )
        entry, states = self.entry(index), self._states(index)
        remedy = f"what is finished, {plural(len(self.finished), 'block')}, is intact; make room and repeat the command"

        due = from_first(lambda: self.repeated >= 60 * self.recompute) and bool(streams)

        def clear():
            still_only_program(self.directory)
            self._refuse_lost()
            with writing(states, remedy):
                remove(states)  # left by a damaged or unfinished block

        def write_states():
            with writing(states, remedy):
                _write_states(partial, streams)

        def forget_older():
            for old in states.parent.iterdir():
                if old != states:
                    remove(old)

        with uninterrupted():
            first_only(clear)
            if due:
                with keeping(states, remedy, sums=False) as partial:
                    together(write_states)
            with keeping(entry, remedy) as partial:
                tree = {"weights": dict(weights), "masks": dict(masks)} | ({"scales": dict(scales)} if scales else {})
                save_tree(partial, tree, json_values(_Entry(report)))
            self.finished.add(index)
            self.damaged.pop(index, None)
            self._trees.pop(index, None)
            if due:
                first_only(forget_older)
                self.repeated = 0.0

    def _refuse_lost(self) -> None:
        """Raises UserError if saved blocks are gone, except in a bucket."""
        if in_bucket(self.directory):
            return
        lost = [index for index in sorted(self.finished) if not self.entry(index).is_dir()]
        if lost or not (self.directory / JOURNAL).is_dir():
            raise UserError(
                f"{self.directory / JOURNAL} was removed, or a part of it, while this run was at work, and with it "
                f"{plural(len(lost), 'finished block')}; repeat the command, which prunes again what is lost"
            )

    def forget_states(self) -> None:
        """Removes the hidden states, once all blocks are finished."""
        first_only(lambda: remove(self.directory / _ACTIVATIONS))

    def weights(self, index: int) -> dict[str, np.ndarray]:
        """The pruned weights of a finished block by HF name."""
        tensors = self._tensors([index])
        return tensors.load(tensors.names())

    def masks(self, index: int) -> dict[str, np.ndarray]:
        """A block's masks by HF name, [d_out, d_in] bool, True where kept."""
        tensors = self._tensors([index])
        return tensors.masks(tensors.pruned())

    def tensors(self) -> OrbaxTensors:
        """The pruned weights of all finished blocks."""
        return self._tensors(sorted(self.finished))

    def _tensors(self, blocks: Sequence[int]) -> OrbaxTensors:
        for index in blocks:
            if index not in self._trees:
                self._trees[index] = read_metadata(self.entry(index)).metadata
        return OrbaxTensors((), {self.entry(index): self._trees[index] for index in blocks})

    def report(self, index: int) -> BlockReport:
        """The report of a finished block, as it was saved."""
        return read_custom(self.entry(index), _Entry).report

    def reports(self, entry: Callable[[int], Path]) -> dict[Path, BlockReport]:
        """All finished blocks' reports, by the path ``entry`` of each."""
        return {entry(index): self.report(index) for index in sorted(self.finished)}

    def last_activations(self, mesh: Mesh, before: int, windows: int, name: str = HIDDEN) -> tuple[int, Activations] | None:
        """The last block before ``before`` with intact hidden states.

        Returns the block and its hidden states; None if there is no such block.
        """
        for index in reversed(range(before)):
            if (states := self.activations(mesh, index, windows, name)) is not None:
                return index, states
        return None

    def activations(self, mesh: Mesh, index: int, windows: int, name: str = HIDDEN) -> Activations | None:
        """This process's hidden states after a block; None if not intact.

        Args:
          mesh: may differ from the mesh that they were saved from.
          name: ``HIDDEN``, or ``DENSE`` for the dense model's hidden states.
        """
        folder = self._states(index)
        if not from_first(lambda: folder.is_dir() and not damage(folder)):
            return None
        wanted = held_rows(mesh, 0, windows)
        values, filled = None, np.zeros(len(wanted), bool)
        for path in sorted(folder.glob("*.safetensors")):
            with read_here(path) as here, safetensors.safe_open(here, framework="np") as file:
                rows = file.get_tensor("rows")
                own = np.isin(rows, wanted)
                if name in file.keys():  # also if no row is its own: a process without windows still needs their shape
                    states, places = file.get_tensor(name), np.searchsorted(wanted, rows[own])
                    values = np.empty((len(wanted), *states.shape[1:]), states.dtype) if values is None else values
                    values[places], filled[places] = states[own], True
        if not everywhere(bool(filled.all())) or values is None:
            return None
        return Activations(mesh, 0, windows, values)

    def entry(self, index: int) -> Path:
        """The Orbax checkpoint of a finished block."""
        return self.directory / JOURNAL / f"block_{index:04d}"

    def _states(self, index: int) -> Path:
        return self.directory / _ACTIVATIONS / f"block_{index:04d}"


def _write_states(folder: Path, streams: Sequence[HiddenStates]) -> None:
    """Writes the windows that this process owns, and their checksum."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = _owned_rows(streams[0])
    if not len(rows) and not is_first():
        return
    path = folder / f"part_{jax.process_index():04d}.safetensors"
    # safetensors writes the memory buffer and ignores the strides.
    states = {name: np.ascontiguousarray(stream.take(rows)) for name, stream in zip((HIDDEN, DENSE), streams)}
    with written_here(path) as here:
        safetensors.numpy.save_file(states | {"rows": rows}, here)
    write_sums(folder, [path], f"{jax.process_index():04d}")


def _owned_rows(activations: HiddenStates) -> np.ndarray:
    """The windows that this process writes.

    It writes the slices of the data axis in which no other process has a lower number.
    """
    slices = [
        index
        for index, devices in enumerate(activations.mesh.devices)
        if min(device.process_index for device in devices) == jax.process_index()
    ]
    rows = activations.rows
    return rows[np.isin(rows % len(activations.mesh.devices), slices)]
