"""Writes report.json, the complete record of a run for programs and for later comparison."""

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

from optima_tpu.report.contents import Environment
from optima_tpu.report.records import BlockReport
from optima_tpu.report.summary import all_layers, by_kind, sparsity, unusual, worsened
from optima_tpu.runtime.checksums import keep
from optima_tpu.runtime.files import files_in as files_below
from optima_tpu.runtime.processes import everyones
from optima_tpu.runtime.records import encoded, json_values

REPORT = "report.json"

_PACKAGES = ("optima-tpu", "jax", "jaxlib", "flax", "orbax-checkpoint", "mpax", "transformers", "numpy")

_KEYS = (
    *("manifest", "configuration", "environment", "model", "calibration", "evaluation", "perplexity"),
    *("sparsity", "model_sparsity", "allocation", "distillation", "neurons", "weighed_layers", "recipe", "weights", "pruned"),
    *("unusual", "layer_kinds", "seconds", "memory", "sizes", "tokens", "continuations", "files", "blocks"),
)
"""The keys of the file, in its order."""


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


def memory_peaks() -> dict[str, int | None]:
    """Peak memory in bytes, of the process and of the device that used most. Every process must call it.

    "host_peak" is the largest resident set of a process; it includes mapped pages of checkpoint files. "device_peak" is what the
    device's allocator counts; None on a CPU, which has no separate device memory.
    """
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    host = host if sys.platform == "darwin" else host * 1024  # macOS counts bytes, Linux KiB
    counts = [device.memory_stats() or {} for device in jax.local_devices()]
    device = max(count.get("peak_bytes_in_use", 0) for count in counts)
    host, device = (max(values) for values in zip(*everyones((host, device))))
    return {"host_peak": host, "device_peak": device or None}


def files_in(directory: Path, files: Mapping[str, str]) -> dict[str, str]:
    """The files of a report with their current paths, because a run directory may have been moved."""
    return {what: str(directory / PurePath(path).name) for what, path in files.items()}


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 if the path does not exist."""
    files = files_below(path) if path.is_dir() else [path] if path.exists() else []
    return sum(file.stat().st_size for file in files)


def weights_on_disk(folder: Path) -> int:
    """Bytes of the files of weights in an exported folder."""
    return sum(size_on_disk(path) for path in files_below(folder) if path.suffix in (".safetensors", ".gguf"))


def write_report(path: Path, entries: Mapping[str, Any], blocks: Sequence[BlockReport]) -> dict[str, Any]:
    """Writes the report atomically: afterwards the file is either the complete new report or the old one.

    Args:
      path: RUN/report.json.
      entries: JSON values by their keys:

        - manifest: everything that determines the result, see ``inputs.manifest_of``.
        - configuration: from ``config.to_dict``.
        - environment: from :func:`environment`.
        - model: the model that was pruned: origin, fingerprint, architecture, number of blocks, number of all its weights.
        - calibration: the calibration text and how its windows were drawn.
        - evaluation: the text that perplexity was measured on.
        - perplexity: "dense" and "pruned".
        - allocation: from ``importance.Allocated.to_json``; None if every block has the pattern's sparsity.
        - distillation: from ``distill.Outcome.to_json``; None if the pruned model was not trained.
        - neurons: of each MLP: "total", and "left", the numbers that blocks have left; None if no neurons were cut.
        - weighed_layers: names, inside a block, of the layers for which the target weighs tokens.
        - recipe: one line on the method, with only those settings that have an effect on the model's family.
        - seconds: by stage, from ``Progress.seconds``: of the last start of the run.
        - memory: from :func:`memory_peaks`.
        - sizes: bytes: "source" of the source's weight files, "dense" of its tensors, "transformers" of the exported weights on
          disk, "left" by the name of each file and folder in the run directory.
        - tokens: from ``token_changes``: the tokens of the evaluation text that the pruned model predicts worse.
        - continuations: the texts that both models write after a few prompts.
        - files: label -> path of each file that the run wrote.
      blocks: one report for each block of the model.

    Returns:
      The written values. Numbers that are not finite, which JSON does not have, are null.
    """
    layers = all_layers(blocks)
    weights, pruned = sum(math.prod(layer.shape) for layer in layers), sum(layer.pruned for layer in layers)
    values = {
        **entries,
        "sparsity": sparsity(layers),
        "model_sparsity": pruned / entries["model"]["weights"] if entries["model"].get("weights") else None,
        "weights": weights,
        "pruned": pruned,
        "unusual": unusual(blocks) | {"worse_on_held_out": worsened(blocks)},
        "layer_kinds": [kind._asdict() for kind in by_kind(blocks)],
        "blocks": [block.to_json() for block in blocks],
    }
    if stray := values.keys() - set(_KEYS):
        raise ValueError(f"a report has no place for {sorted(stray)}")
    report: dict[str, Any] = json_values({key: values[key] for key in _KEYS})
    keep(path.parent, {path.name: encoded(report, indent=2)}, "all finished blocks are intact; make room and repeat the command")
    return report
