"""From a finished run to a folder that ``transformers`` loads: ``python -m optima_tpu.export RUN_DIR OUT``.

    OUT/model.safetensors           or model-00001-of-0000N.safetensors with their index: every tensor in the source's
                                    dtype, the pruned weights exactly zero, the others as the source had them
    OUT/config.json, tokenizer...   the source's own files, byte for byte
    OUT/pruning_masks.npz           which weights were kept, one bit each; see read_masks
    OUT/optima_tpu.json             recipe, sparsity and error of every layer
    OUT/README.md                   model card
    OUT/sha256-all.json             the checksums of these files

or to the same folder packed, with packed-model.safetensors and packed.json in place of weights and masks; see ``packed.py``. The
form ``compressed-tensors`` stores the integers and scales of a quantised run in the place of its weights, and
``compressed-tensors-w8a8`` asks for quantised activations too; see ``compressed_tensors.py``. The form ``gguf`` stores weights,
configuration and tokenizer in model.gguf; see ``gguf_export.py``. The form ``maxtext`` is not for ``transformers``; see
``maxtext.py``.

The weights are dense: no current library reads a packed 2:4 file, and a ``sparsity_config`` makes some refuse to load.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import safetensors
import safetensors.numpy

from optima_tpu.config.choices import CHOICES
from optima_tpu.errors import UserError
from optima_tpu.method.layer_rules import parse_layers, pattern_of
from optima_tpu.method.patterns import Pattern, parse_pattern
from optima_tpu.method.quantization import Quantizer
from optima_tpu.models.checkpoints.compressed_tensors import compressed, quantization_config
from optima_tpu.models.checkpoints.gguf_export import GGUFModel, Stored
from optima_tpu.models.checkpoints.maxtext import STEP, Layout, layout_of
from optima_tpu.models.checkpoints.orbax import CheckpointTensors, block_of, refuse_damaged_checkpoint, save_items
from optima_tpu.models.checkpoints.packed import MASKS, SHAPE, Packer, write_masks
from optima_tpu.models.checkpoints.source import Pretrained, read_config
from optima_tpu.models.checkpoints.stacks import Stacked, stacks_of
from optima_tpu.report.contents import Facts
from optima_tpu.report.file import REPORT
from optima_tpu.report.model_card import HUB_ID, model_card
from optima_tpu.report.run_record import Manifest, read_assets, read_run
from optima_tpu.runtime import signals
from optima_tpu.runtime.buckets import as_path, in_bucket
from optima_tpu.runtime.checksums import ALL, changes, damage, known, refuse_changed, write_sums
from optima_tpu.runtime.files import complete, files_in, making, remove, split_by_size, writing, written_here
from optima_tpu.runtime.processes import alone
from optima_tpu.runtime.records import known_record, read_record

SIDECAR = "optima_tpu.json"
FOLDER = "hf"
"""The name of the export in the directory of its run."""
PLAIN, PACKED, COMPRESSED, W8A8, GGUF, MAXTEXT = FORMATS = (
    "plain",
    "packed",
    "compressed-tensors",
    "compressed-tensors-w8a8",
    "gguf",
    "maxtext",
)
"""The forms of an export."""
GGUF_FILE = "model.gguf"


class Sidecar(TypedDict):
    """What is read of optima_tpu.json."""

    manifest: Manifest
    files: list[str]


def export(
    run_directory: str | Path,
    out: str | Path,
    max_shard_size: int | str = "5GB",
    report: Mapping[str, Any] | None = None,
    form: str = PLAIN,
    scan_layers: bool = True,
) -> None:
    """Writes the folder. It gets its name only after everything in it has been written, checked and flushed to disk.

    Args:
      run_directory: a finished run; only its checkpoint, assets and report.json (if there is one) are read.
      out: a new or empty folder, or one that holds only remains of this run's export; in a bucket, also remains of an export that
        was killed.
      max_shard_size: bytes, or a text such as "5GB". One shard is in memory at a time.
      report: the run's report for the model card; None takes report.json, if the run has one.
      form: one of ``FORMATS``. ``optima unpack`` makes the plain folder of the packed one, byte for byte. With maxtext the whole
        model is in memory.
      scan_layers: whether the blocks are stacked, for the form maxtext.

    Raises:
      UserError: the run is not finished, ``out`` is in use, the disk is full, ``out`` is in a bucket though the form is packed, the
        form is compressed-tensors and the run did not quantise, or it is gguf or maxtext and cannot hold the model.
      RuntimeError: the written weights do not match the masks. ``out`` is not created.
    """
    out, run_directory = as_path(out).resolve(), as_path(run_directory)
    if form not in FORMATS:
        raise UserError(f"expected the format to be one of {', '.join(FORMATS)}, got {form!r}")
    if form == PACKED and in_bucket(out):
        raise UserError(f"expected a folder on a disk for a packed export, got {out}: export to a disk, then copy the folder")
    refuse_damaged_checkpoint(run_directory.absolute())
    source, run = CheckpointTensors(run_directory), run_directory.resolve()
    if out.is_relative_to(run) and out != run / FOLDER:
        raise UserError(f"expected a folder outside of the run directory {run} to export to, got {out}; choose another folder")
    patterns, assets = _patterns(source), read_assets(run_directory)
    stacks = stacks_of(json.loads(assets["config.json"]).get("architectures"))
    if stacks and form != PLAIN:
        raise UserError(f"expected --format {PLAIN} for a model that stores its experts in one tensor, got {form}: not supported")
    stacked, integers = Stacked(source, stacks), form in (COMPRESSED, W8A8)
    quantizer = _quantizer(source, run_directory, form) if integers or (form == GGUF and source.quantized()) else None
    file = _gguf(source, assets, run_directory, quantizer) if form == GGUF else None
    layout = _layout(source, assets, scan_layers) if form == MAXTEXT else None
    with writing(out, "nothing was left there; make room or choose another folder, and repeat the command"):
        if _is_damaged_export(out, source.run["manifest"], own=out.parent == run):
            remove(out)
        if complete(out) and any(out.iterdir()):
            raise UserError(f"expected a new or empty folder to export to, got {out}, which is not empty; choose another folder")
        with making(out) as partial:
            for name, data in assets.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_bytes(data)
            packer = Packer(partial) if form == PACKED else None
            if file is not None:
                shards, zeros = [GGUF_FILE], _write_gguf(source, patterns, partial, file)
            elif layout is not None:
                shards, zeros = [], _write_items(source, patterns, partial, layout)
            else:
                compress = (
                    None if quantizer is None else functools.partial(compressed, bits=quantizer.bits, activations=form == W8A8)
                )
                shards, zeros = _write_shards(source, stacked, patterns, partial, max_shard_size, packer, compress)
            if integers and quantizer is not None:
                _say_quantized(partial / "config.json", source, quantizer, form == W8A8)
            if packer is None:
                with written_here(partial / MASKS) as here:
                    write_masks(here, ((name, source.mask(name)) for name in source.pruned()))
            sidecar = _sidecar(source, zeros)
            if layout is None:
                facts = _facts(run_directory) if report is None else report
                (partial / "README.md").write_text(model_card(out.name, sidecar, assets, facts), encoding="utf-8")
            others = {str(path.relative_to(partial)) for path in files_in(partial) if path.suffix != ".safetensors"}
            sidecar["files"] = sorted({*shards, MASKS, *others})
            (partial / SIDECAR).write_text(json.dumps(sidecar, indent=2, allow_nan=False))
            if packer is not None:
                for name in sorted({SIDECAR, *others}):
                    packer.add_file(partial / name, name)
                packer.finish()
            write_sums(partial)


def _facts(run_directory: Path) -> Facts:
    """What the report of a run says on its model; nothing if the run has no report."""
    if not (run_directory / REPORT).exists():
        return {}
    refuse_changed(run_directory, [REPORT], "repeat the run's command, which writes the file again")
    return read_record(run_directory / REPORT, Facts)


def is_export_of(run_directory: str | Path, out: str | Path) -> bool:
    """Whether ``out`` already holds the whole export of this run, so that a repeated command need not write it again.

    Reads all of it, to compare the checksums.
    """
    out = as_path(out)
    written = _written(out, read_run(run_directory)["manifest"])
    # A packed export names the files of the plain one, and holds others.
    return complete(out) and written is not None and written <= known(out).keys() and not damage(out)


def _is_damaged_export(out: Path, manifest: Mapping[str, Any], own: bool) -> bool:
    """Whether a folder holds a damaged or partial export of that run, and no other files.

    Args:
      own: the folder is in the run's own directory. Then the checksums are enough to recognise it, if optima_tpu.json is damaged.
    """
    sums, written = known(out), _written(out, manifest)
    if written is None and own and SIDECAR in sums and changes(out, {SIDECAR: sums[SIDECAR]}):
        written = set(sums)
    there = {str(path.relative_to(out)) for path in files_in(out)}
    return complete(out) and written is not None and there <= written | {SIDECAR, ALL} and bool(damage(out))


def _written(out: Path, manifest: Mapping[str, Any]) -> set[str] | None:
    """The files that the export of the run with that manifest wrote to a folder; None if the folder is not such an export."""
    sidecar = known_record(out / SIDECAR, Sidecar)
    return set(sidecar["files"]) if sidecar and sidecar["manifest"] == manifest else None


def read_masks(path: str | Path) -> dict[str, np.ndarray]:
    """The masks of an exported folder: name of a pruned weight -> [d_out, d_in] bool, True where it was kept.

    See :func:`optima_tpu.models.checkpoints.packed.write_masks` for the file.

    Args:
      path: pruning_masks.npz, or the folder it is in.
    """
    path = Path(path)
    with np.load(path / MASKS if path.is_dir() else path) as file:
        names = [name.removesuffix(SHAPE) for name in file.files if name.endswith(SHAPE)]
        return {name: np.unpackbits(file[name], axis=1, count=file[name + SHAPE][1]).view(bool) for name in names}


def _write_shards(
    source: CheckpointTensors,
    stacked: Stacked,
    patterns: Mapping[str, Pattern],
    folder: Path,
    limit: int | str,
    packer: Packer | None,
    compress: Callable[[str, np.ndarray, np.ndarray], dict[str, np.ndarray]] | None,
) -> tuple[list[str], dict[str, int]]:
    """Writes and checks the weights. A ``packer`` packs each file, which is then removed.

    Args:
      stacked: how the tensors stand in the files.
      compress: makes the tensors that are stored in the place of a quantised weight, from its name, values and scales; None stores
        the weight.

    Returns:
      The names of the files, and the number of zeros in each pruned weight, counted in the file.
    """
    try:
        split = split_by_size(stacked, stacked.names(), limit, "model{suffix}.safetensors")
    except ValueError as error:
        raise UserError(f"expected a shard size such as 5GB, got {limit!r}: {error}") from None
    masked = set(source.pruned())
    zeros: dict[str, int] = {}
    weight_map: dict[str, str] = {}
    size = 0
    for file_name, names in split.filename_to_tensors.items():
        if alone():
            signals.check()
        members = [member for name in names for member in stacked.members(name)]
        tensors = source.load(members)
        masks = source.masks(name for name in members if name in masked)
        for name, keep in masks.items():
            tensors[name] = _exact_zeros(name, tensors[name], keep)
        # safetensors writes the buffer in memory order: without this a transposed view would be saved wrongly.
        tensors = {name: np.ascontiguousarray(stacked.joined(name, tensors)).reshape(stacked.shape(name)) for name in names}
        if compress is not None:
            for name, scale in source.scales(names).items():
                zeros[name] = _zeros(name, tensors[name] == 0, masks[name], patterns)
                tensors |= compress(name, tensors.pop(name), scale)
        weight_map |= dict.fromkeys(tensors, file_name)
        size += sum(array.nbytes for array in tensors.values())
        with written_here(folder / file_name) as here:
            safetensors.numpy.save_file(tensors, here, metadata={"format": "pt"})
            # safetensors makes files that only their owner can read, but the folder is meant to be shared.
            here.chmod(_readable(here.parent))
            zeros |= _check(here, tensors, stacked, masks, patterns)
            if packer is not None:
                packer.add_weights(here, masks)
                here.unlink()
    if split.is_sharded:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return list(split.filename_to_tensors), zeros


def _gguf(source: CheckpointTensors, assets: Mapping[str, bytes], run_directory: Path, quantizer: Quantizer | None) -> GGUFModel:
    """What the GGUF file of a run says. Refuses a model that such a file cannot hold."""
    origin = str(run_directory)
    config, _ = read_config(assets["config.json"], origin)
    bits = {} if quantizer is None else dict.fromkeys(source.quantized(), quantizer.bits)
    return GGUFModel.of(Pretrained(config, source, assets, "", origin), bits)


def _write_gguf(source: CheckpointTensors, patterns: Mapping[str, Pattern], folder: Path, file: GGUFModel) -> dict[str, int]:
    """Writes model.gguf, and compares it, read again, with the checkpoint.

    Returns:
      The number of zeros in each pruned weight, counted in the file.
    """
    zeros = {}
    with written_here(folder / GGUF_FILE) as here:
        file.write(here, (stored for stored, _ in _in_blocks(source, file.kinds)))
        tensors = file.reopened(here)
        for (name, values, scale), keep in _in_blocks(source, file.kinds):
            written = tensors.read(name)
            if keep is not None:
                zeros[name] = _zeros(name, written == 0, keep, patterns)
            if not _same_values(written, values, scale):
                raise RuntimeError(f"{GGUF_FILE}: {name} differs from the checkpoint")
    return zeros


def _in_blocks(source: CheckpointTensors, names: Iterable[str]) -> Iterator[tuple[Stored, np.ndarray | None]]:
    """Each tensor, with its mask if it is pruned. The tensors of one block of the model are in memory at a time."""
    masked = set(source.pruned())
    for _, block in itertools.groupby(names, block_of):
        if alone():
            signals.check()
        group = list(block)
        tensors, masks, scales = source.load(group), source.masks(name for name in group if name in masked), source.scales(group)
        for name in group:
            keep = masks.get(name)
            values = tensors[name] if keep is None else _exact_zeros(name, tensors[name], keep)
            yield Stored(name, values, scales.get(name)), keep


def _same_values(written: np.ndarray, values: np.ndarray, scale: np.ndarray | None) -> bool:
    """Whether a tensor was read back in float32: a matrix exactly, a quantised one with its integers, a vector within rounding."""
    values = values.astype(np.float32)
    if scale is not None:
        factors = np.repeat(scale.astype(np.float32), values.shape[1] // scale.shape[1], axis=1)
        return np.array_equal(np.round(written / factors), np.round(values / factors))
    # A Gemma's norms are stored plus 1.
    return _same_bytes(written, values) if values.ndim > 1 else np.allclose(written, values, rtol=0, atol=2**-22)


def _layout(source: CheckpointTensors, assets: Mapping[str, bytes], scan_layers: bool) -> Layout:
    """The layout of a run's model in MaxText."""
    config, _ = read_config(assets["config.json"], "the run's assets")
    return layout_of(config, source, scan_layers)


def _write_items(source: CheckpointTensors, patterns: Mapping[str, Pattern], folder: Path, layout: Layout) -> dict[str, int]:
    """Writes and checks MaxText's arrays and settings. Returns the number of zeros in each pruned weight."""
    masked = set(source.pruned())
    zeros: dict[str, int] = {}
    tree: dict[str, Any] = {}
    for leaf in layout.leaves:
        tensors, masks = source.load(leaf.names), source.masks(masked & set(leaf.names))
        for name, keep in masks.items():
            tensors[name] = _exact_zeros(name, tensors[name], keep)
            zeros[name] = _zeros(name, tensors[name] == 0, keep, patterns)
            if np.count_nonzero(leaf.convert(tensors[name])) != tensors[name].size - zeros[name]:
                raise RuntimeError(f"{name}: its zeros are others in MaxText's layout")
        *above, last = leaf.path
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[last] = leaf.array(tensors)
    scanned = layout.settings["scan_layers"]
    save_items(
        folder / STEP, {"step": np.zeros((), np.int32), "params": {"params": tree}, "opt_state": {}}, {"scan_layers": scanned}
    )
    for name, text in layout.files().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return zeros


def _readable(folder: Path) -> int:
    """The mode of an ordinary new file in a folder."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    return mode


def _exact_zeros(name: str, weight: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """The weight with +0.0 at every pruned entry; raises RuntimeError if an entry was neither 0.0 nor -0.0."""
    if np.any(weight[~keep] != 0):
        raise RuntimeError(f"{name}: the checkpoint holds weights other than zero where the mask prunes")
    return np.where(keep, weight, np.zeros((), weight.dtype))


def _check(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    stacked: Stacked,
    masks: Mapping[str, np.ndarray],
    patterns: Mapping[str, Pattern],
) -> dict[str, int]:
    """Reads a shard again, and compares it with the tensors that were written, with the masks and with the patterns."""
    zeros: dict[str, int] = {}
    with safetensors.safe_open(path, framework="np") as file:
        for name, expected in tensors.items():
            written = file.get_tensor(name)
            if (written.dtype, written.shape) != (expected.dtype, expected.shape) or not _same_bytes(written, expected):
                raise RuntimeError(f"{path.name}: {name} differs from the checkpoint")
            parts = stacked.split(name, written).items()
            zeros |= {each: _zeros(each, part == 0, masks[each], patterns) for each, part in parts if each in masks}
    return zeros


def _zeros(name: str, zero: np.ndarray, keep: np.ndarray, patterns: Mapping[str, Pattern]) -> int:
    """The number of zeros of a pruned weight. Raises RuntimeError if they do not match mask and pattern."""
    pattern = patterns.get(name)
    if np.any(~keep & ~zero) or not (pattern is None or pattern.holds(zero)):
        raise RuntimeError(f"the zeros of {name} do not match mask and pattern {pattern}")
    return int(zero.sum())


def _quantizer(source: CheckpointTensors, run_directory: Path, form: str) -> Quantizer:
    """The quantizer of a run, with the bits and the group of its integers.

    Raises:
      UserError: the run did not quantise, or not as the form needs it.
    """
    recorded = source.run["manifest"]["recipe"].get("quantize")
    cls = CHOICES["quantize"].get(recorded["name"]) if recorded else None
    if recorded is None or cls is None or not source.quantized():
        raise UserError(
            f"expected a run with --quantize int4 or int8 to export as {form}, got {run_directory}, whose weights are no "
            "integers; take --format plain or packed"
        )
    quantizer: Quantizer = cls(group=recorded["group"])
    if form == W8A8 and (quantizer.bits, quantizer.group) != (8, None):
        raise UserError(
            f"expected a run with --quantize int8 --quantize.group null to export as {W8A8}, whose programs take a scale for each "
            f"row, got {run_directory} with {quantizer}; take --format {COMPRESSED}"
        )
    return quantizer


def _say_quantized(path: Path, source: CheckpointTensors, quantizer: Quantizer, activations: bool) -> None:
    """Adds the quantisation to a folder's config.json."""
    quantized = set(source.quantized())
    others = (name for name in source.names() if name.endswith(".weight") and len(source.shape(name)) == 2)
    modules = (name.removesuffix(".weight") for name in others if name not in quantized)
    said = quantization_config(quantizer, modules, activations)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": said}, indent=2) + "\n")


def _patterns(source: CheckpointTensors) -> dict[str, Pattern]:
    """The pattern of every pruned weight, without unstructured masks from elsewhere, which were checked there."""
    recipe = source.run["manifest"]["recipe"]
    default, rules = parse_pattern(recipe["pattern"]), parse_layers(recipe.get("layers", ""))
    foreign = recipe["selector"]["name"] == "imported" or "start" in source.run["manifest"]
    allocated = source.run["sparsity"]
    patterns: dict[str, Pattern] = {}
    for name in source.pruned():
        layer = _report_on(name, source)
        mine = None if allocated is None else allocated[layer["block"]]
        own = default if mine is None else default.at(mine)
        pattern = pattern_of(rules, own, name.removesuffix(".weight"), layer["name"])
        if pattern is not None and not (foreign and pattern.free):
            patterns[name] = pattern
    return patterns


def _report_on(name: str, source: CheckpointTensors) -> dict[str, Any]:
    """The record of the layer that a pruned weight belongs to."""
    return next(
        layer
        for block in source.run["blocks"]
        for layer in block["layers"]
        if name.endswith(f".{layer['block']}.{layer['name']}.weight")
    )


def _same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8))  # NaN included


def _sidecar(source: CheckpointTensors, zeros: Mapping[str, int]) -> dict[str, Any]:
    """Recipe, and for each pruned weight its zeros counted from the file and its layer report."""
    origin = source.run["configuration"].get("model")
    layers = []
    for name, count in zeros.items():
        size = int(np.prod(source.shape(name)))
        counted = {"name": name, "shape": list(source.shape(name)), "pruned": count, "sparsity": count / size}
        layers.append(_report_on(name, source) | counted)
    # For a local model only the folder's name, because this file may be published.
    model = origin if origin is None or HUB_ID.fullmatch(origin) else Path(origin).name
    return {"model": model, "manifest": source.run["manifest"], "layers": layers}
