"""Writes report.json, the complete record of a run for programs."""

import importlib.metadata
import math
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import jax
from jax.sharding import Mesh

from optima_tpu.report.contents import Environment, MemoryPeaks, Report
from optima_tpu.report.findings import unusual
from optima_tpu.report.layer_means import sparsity
from optima_tpu.report.records import BlockReport
from optima_tpu.runtime.checksums import keep
from optima_tpu.runtime.files import files_in as files_below
from optima_tpu.runtime.processes import everyones
from optima_tpu.runtime.records import encoded, parse_record

REPORT = "report.json"

_PACKAGES = ("optima-tpu", "jax", "jaxlib", "flax", "orbax-checkpoint", "mpax", "transformers", "numpy")


def environment(mesh: Mesh) -> Environment:
    """Versions, devices and mesh of this process's run."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None  # run from a checkout
    return Environment(
        python=platform.python_version(),
        system=platform.platform(),
        packages=versions,
        platform=jax.default_backend(),
        device=jax.devices()[0].device_kind,
        devices=jax.device_count(),
        processes=jax.process_count(),
        mesh=dict(mesh.shape),
    )


def memory_peaks() -> MemoryPeaks:
    """Peak memory over all processes; every process must call it."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    host = host if sys.platform == "darwin" else host * 1024  # macOS counts bytes, Linux KiB
    counts = [device.memory_stats() or {} for device in jax.local_devices()]
    device = max(count.get("peak_bytes_in_use", 0) for count in counts)
    host, device = (max(values) for values in zip(*everyones((host, device))))
    return MemoryPeaks(host, device or None)


def files_in(directory: Path, files: Mapping[str, str]) -> dict[str, str]:
    """The current paths of a report's files: a run may have been moved."""
    return {what: str(directory / PurePath(path).name) for what, path in files.items()}


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of a folder's files; 0 for a missing path."""
    files = files_below(path) if path.is_dir() else [path] if path.exists() else []
    return sum(file.stat().st_size for file in files)


def weights_on_disk(folder: Path, suffixes: Sequence[str] = (".safetensors",)) -> int:
    """Bytes of the files of weights in an exported folder, by their suffix."""
    return sum(size_on_disk(path) for path in files_below(folder) if path.suffix in suffixes)


def write_report(path: Path, entries: Mapping[str, Any], blocks: Sequence[BlockReport]) -> Report:
    """Writes the report atomically: an error leaves the old file whole.

    Args:
      path: RUN/report.json.
      entries: the fields of :class:`Report` that do not follow from the blocks.
      blocks: one report for each block of the model.

    Returns:
      The report as it is read again.
    """
    layers = [layer for block in blocks for layer in block.layers]
    weights, pruned = sum(math.prod(layer.shape) for layer in layers), sum(layer.pruned for layer in layers)
    report = Report(
        **entries,
        sparsity=sparsity(layers),
        model_sparsity=(pruned + entries["removed"]) / entries["model"].weights,
        weights=weights,
        pruned=pruned,
        unusual=unusual(layers),
        blocks=tuple(blocks),
    )
    data = encoded(report, indent=2)
    keep(path.parent, {path.name: data}, "all finished blocks are intact; make room and repeat the command")
    return parse_record(data, Report, path)
