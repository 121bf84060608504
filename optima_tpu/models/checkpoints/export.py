"""Exports a finished run as a folder that ``transformers`` loads.

``python -m optima_tpu.export RUN OUT`` writes:

    OUT/model.safetensors           or model-00001-of-0000N.safetensors with their index: every tensor in the source's
                                    dtype, the pruned weights exactly zero, the others as the source had them
    OUT/config.json, tokenizer...   the source's own files, byte for byte; where parts were cut, config.json has their new numbers
    OUT/pruning_masks.npz           which weights were kept, one bit each; see read_masks
    OUT/optima_tpu.json             recipe, sparsity and error of every layer
    OUT/README.md                   model card
    OUT/sha256-all.json             the checksums of these files

Another ``--format`` writes another form of the model; see ``forms/``.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from msgspec import structs

from optima_tpu.errors import UserError, plural
from optima_tpu.models.checkpoints.exported import Exported
from optima_tpu.models.checkpoints.forms import FORMS, Form, MaxText, Options, PackedForm, Plain
from optima_tpu.models.checkpoints.orbax import refuse_damaged_checkpoint
from optima_tpu.models.checkpoints.packed import INDEX, MASKS, SHAPE
from optima_tpu.models.checkpoints.source import total_bytes
from optima_tpu.report.contents import ExportedLayer, ExportForm, Report, RunFacts, Sidecar, parts_left
from optima_tpu.report.file import REPORT
from optima_tpu.report.licence import CARD
from optima_tpu.report.model_card import HUB_ID, Card, model_card
from optima_tpu.report.run_record import read_run
from optima_tpu.runtime.bounds import byte_count
from optima_tpu.runtime.buckets import as_path, refuse_bucket
from optima_tpu.runtime.checksums import ALL, changes, damage, known, read_intact, write_sums
from optima_tpu.runtime.files import complete, files_in, making, refuse_occupied, remove_if, writing
from optima_tpu.runtime.inside import own, refuse_special
from optima_tpu.runtime.records import encoded, known_record

SIDECAR = "optima_tpu.json"
FOLDER = "hf"
"""The name of the export in the directory of its run."""


class ExportOutcome(NamedTuple):
    """What an export did.

    Attributes:
      dense: the bytes of the run's tensors in their own dtypes, zeros included.
      anew: whether it wrote the folder, which did not hold the whole export before.
    """

    dense: int
    anew: bool


def export(
    run_directory: str | Path,
    out: str | Path,
    options: Options = Options(),
    report: RunFacts | None = None,
    form: str = Plain.name,
    say: Callable[[str], object] = lambda text: None,
) -> ExportOutcome:
    """Writes the folder, unless it holds this export already.

    It gets its name only after everything in it has been written, checked and flushed to disk.

    Args:
      run_directory: a finished run; only its checkpoint, assets and report.json (if there is one) are read.
      out: a new or empty folder, or one that holds only this export or its remains; in a bucket, also remains of an export that
        was killed.
      report: the run's report for the model card; None takes report.json, if the run has one.
      form: one of ``FORMS``.
      say: called with a line about what is written, before it is written.

    Raises:
      UserError: the run is not finished, it cannot have this form, ``out`` is in use or cannot hold this form, or the disk is
        full.
      RuntimeError: the written weights do not match the masks. ``out`` is not created.
    """
    out, run_directory = as_path(out).resolve(), as_path(run_directory)
    written_as, packed = _asked(form, options, out), form == PackedForm.name
    refuse_damaged_checkpoint(run_directory.absolute())
    run, directory = Exported.open(run_directory), run_directory.resolve()
    if out.is_relative_to(directory) and out != directory / FOLDER:
        raise UserError(
            f"expected a folder outside of the run directory {directory} to export to, got {out}; choose another folder"
        )
    writer, dense, manifest = FORMS[form](run, written_as), total_bytes(run.source), run.source.run.manifest
    with writing(out, "nothing was left there; make room or choose another folder, and repeat the command"):
        if _is_whole(out, manifest, packed, written_as):
            say(f"{out} holds this export already, whole by its checksums: nothing is left to do")
            return ExportOutcome(dense, False)
        remove_if(out, lambda folder: _is_damaged_export(folder, manifest, own=out.parent == directory))
        refuse_occupied(out, "export to")
        for line in _announced(run, form, dense):
            say(line)
        with making(out) as partial:
            _write(partial, writer, written_as, report or _facts(run_directory))
    return ExportOutcome(dense, True)


def _asked(form: str, options: Options, out: Path) -> ExportForm:
    """The form to record. Raises UserError if options or folder do not fit."""
    if form not in FORMS:
        raise UserError(f"expected the format to be one of {', '.join(FORMS)}, got {form!r}")
    if not options.scan_layers and form != MaxText.name:
        raise UserError(f"--unscanned belongs to --format {MaxText.name}: the format {form} has no stacked blocks; leave it out")
    if not FORMS[form].buckets:
        refuse_bucket(out, f"for a {form} export", "export to a disk, then copy the folder")
    # A packed folder is written as the plain one, which it is unpacked to byte for byte.
    plain = Plain.name if form == PackedForm.name else form
    return ExportForm(plain, byte_count("a shard size", options.max_shard_size), options.scan_layers)


def _announced(run: Exported, form: str, dense: int) -> Iterator[str]:
    """Yields lines about what will be written."""
    tensors = plural(len(run.source.names()), "tensor")
    yield f"writing and checking {tensors} of {dense:,} bytes as {form}, which takes minutes for a large model"
    if run.cuts.deleted:
        yield f"{parts_left(run.cuts.deleted)} are left, and the others are not written"
    if run.cuts.further:
        further = plural(len(run.cuts.further), "tensor")
        yield f"{further} for predicting tokens behind the next one did not lose these parts, and leave"
    yield from run.cuts.zeros_stay


def _write(folder: Path, writer: Form, written_as: ExportForm, facts: RunFacts | None) -> None:
    """Writes all files of an export into an empty folder."""
    run = writer.run
    for name, data in run.assets.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    zeros = writer.write(folder)
    sidecar = _sidecar(run, zeros, written_as)
    (folder / CARD).write_text(model_card(Card(sidecar, run.assets, facts, writer.library, writer.card)), encoding="utf-8")
    others = {str(path.relative_to(folder)) for path in files_in(folder) if path.suffix != ".safetensors"}
    files = sorted({*writer.shards, *([MASKS] if list(run.source.pruned()) else []), *others})
    (folder / SIDECAR).write_bytes(encoded(structs.replace(sidecar, files=tuple(files)), indent=2))
    writer.finish({SIDECAR, *others})
    write_sums(folder)


def _facts(run_directory: Path) -> RunFacts | None:
    """What a run's report says on its model; None if there is no report."""
    if not (run_directory / REPORT).exists():
        return None
    return read_intact(run_directory / REPORT, Report)


def is_export_of(run_directory: str | Path, out: str | Path) -> bool:
    """Whether ``out`` already holds the whole export of this run.

    A repeated command then need not write the export again. Reads all files, to compare their checksums.
    """
    return _is_whole(as_path(out), read_run(run_directory).manifest)


def _is_whole(out: Path, manifest: Mapping[str, Any], packed: bool = False, form: ExportForm | None = None) -> bool:
    """Whether a folder holds the whole export of the run with this manifest.

    A command that was killed after its last step leaves such a folder.

    Args:
      packed: whether in the packed form, whose entry "form" is the plain one's.
      form: the entry "form" of its optima_tpu.json; None takes any.
    """
    sidecar = known_record(out / SIDECAR, Sidecar) if complete(out) else None
    return (
        sidecar is not None
        and sidecar.manifest == manifest
        and form in (None, sidecar.form)
        and (out / INDEX).exists() == packed
        and not damage(out)
    )


def _is_damaged_export(out: Path, manifest: Mapping[str, Any], own: bool) -> bool:
    """Whether a folder holds only a damaged or partial export of that run.

    Args:
      own: the folder is in the run's own directory. Then the checksums are enough to recognise it, if optima_tpu.json is damaged.
    """
    sums, written = known(out), _written(out, manifest)
    if written is None and own and SIDECAR in sums and changes(out, {SIDECAR: sums[SIDECAR]}):
        written = set(sums)
    files = {str(path.relative_to(out)) for path in files_in(out)}
    return complete(out) and written is not None and files <= written | {SIDECAR, ALL} and bool(damage(out))


def _written(out: Path, manifest: Mapping[str, Any]) -> set[str] | None:
    """The files that this run's export wrote; None for any other folder."""
    sidecar = known_record(out / SIDECAR, Sidecar)
    return set(sidecar.files) if sidecar and sidecar.manifest == manifest else None


def read_masks(path: str | Path) -> dict[str, np.ndarray]:
    """The masks of an exported folder, by the names of the pruned weights.

    A mask is [d_out, d_in] bool, True where a weight was kept. :func:`optima_tpu.models.checkpoints.packed.write_masks` has the
    layout of the file.

    Args:
      path: pruning_masks.npz, or the folder it is in.
    """
    path = Path(path)
    path = own(path, path / MASKS) if path.is_dir() else path
    refuse_special(path)
    with np.load(path) as file:
        names = [name.removesuffix(SHAPE) for name in file.files if name.endswith(SHAPE)]
        return {name: np.unpackbits(file[name], axis=1, count=file[name + SHAPE][1]).view(bool) for name in names}


def _sidecar(run: Exported, zeros: Mapping[str, int], form: ExportForm) -> Sidecar:
    """The contents of optima_tpu.json, without the list of files."""
    source, cuts = run.source, run.cuts

    def layer(name: str, shape: tuple[int, ...], pruned: int, cut_from: tuple[int, int] | None = None) -> ExportedLayer:
        counted = {"name": name, "shape": shape, "pruned": pruned, "sparsity": pruned / math.prod(shape)}
        return ExportedLayer(**structs.asdict(run.report_on(name)) | counted, cut_from=cut_from)

    layers = [layer(name, source.shape(name), count) for name, count in zeros.items()]
    unmasked = ((name, source.shape(name)) for name in sorted(cuts.whole))
    layers += [layer(name, shape, 0, (shape[0], cuts.parts[name].total)) for name, shape in unmasked]
    # For a local model only the folder's name, because this file may be published.
    origin = source.run.settings.model
    model = origin if HUB_ID.fullmatch(origin) else Path(origin).name
    return Sidecar(model, source.run.manifest, cuts.deleted, tuple(layers), form, (), source.run.left_out)
