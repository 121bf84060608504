"""report.json: everything a run says about itself, for programs and for two years later."""

import importlib.metadata
import json
import math
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import jax
from jax.sharding import Mesh

from optima_tpu.report.records import BlockReport, finite
from optima_tpu.report.summary import all_layers, by_kind, sparsity, unusual, worsened
from optima_tpu.runtime.buckets import in_bucket
from optima_tpu.runtime.files import files_in as files_below
from optima_tpu.runtime.files import write_bytes, writing
from optima_tpu.runtime.processes import everyones

_PACKAGES = ("optima-tpu", "jax", "jaxlib", "flax", "orbax-checkpoint", "mpax", "transformers", "numpy")


def environment(mesh: Mesh) -> dict[str, Any]:
    """Where a run took place: versions, devices, mesh. JSON types."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None  # run from a checkout
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": versions,
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
    }


def memory_peaks() -> dict[str, int | None]:
    """The most memory held so far, in bytes, of the process and of the device that held most. Every process calls it.

    "host_peak" is a resident set, with pages of mapped checkpoint files in it. "device_peak" is what the device's allocator
    counts; None on a CPU, which has no memory of its own.
    """
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    host = host if sys.platform == "darwin" else host * 1024  # macOS counts bytes, Linux KiB
    counts = [device.memory_stats() or {} for device in jax.local_devices()]
    device = max(count.get("peak_bytes_in_use", 0) for count in counts)
    host, device = (max(values) for values in zip(*everyones((host, device))))
    return {"host_peak": host, "device_peak": device or None}


def files_in(directory: Path, files: Mapping[str, str]) -> dict[str, str]:
    """What a report says that the run left, where it is now: a run directory may have been moved."""
    return {what: str(directory / PurePath(path).name) for what, path in files.items()}


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files in a folder. 0 where there is none."""

    def size(file: Path) -> int:
        found: Any = file.stat()
        return found.length if in_bucket(file) else found.st_size

    return sum(map(size, files_below(path))) if path.is_dir() else size(path) if path.exists() else 0


def write_report(
    path: Path,
    *,
    manifest: Mapping[str, Any],
    configuration: Mapping[str, Any],
    environment: Mapping[str, Any],
    model: Mapping[str, Any],
    calibration: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    perplexity: Mapping[str, float],
    blocks: Sequence[BlockReport],
    seconds: Mapping[str, float],
    memory: Mapping[str, int | None],
    files: Mapping[str, str],
    allocation: Mapping[str, Any] | None = None,
    distillation: Mapping[str, Any] | None = None,
    weighed: Sequence[str] = (),
    recipe: str = "",
    sizes: Mapping[str, Any] | None = None,
    tokens: Mapping[str, Any] | None = None,
    continuations: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the report in one step: afterwards it is complete, or the old one is still there.

    Args:
      path: RUN/report.json.
      manifest: what decides the result, see ``inputs.manifest_of``.
      configuration: from ``config.to_dict``.
      environment: from :func:`environment`.
      model: what was pruned: origin, fingerprint, architecture, blocks, and the number of all of its weights.
      calibration: the text the model had to reproduce, and how it was sampled.
      evaluation: the text perplexity was measured on.
      perplexity: "dense" and "pruned".
      blocks: of the whole model.
      seconds: by stage, from ``Progress.seconds``.
      memory: from :func:`memory_peaks`.
      files: what the run left -> path.
      allocation: from ``importance.Allocated.to_json``; None where every block has the pattern's sparsity.
      distillation: from ``distill.Outcome.to_json``; None where the pruned model was not trained.
      weighed: the layers in a block whose tokens the target weighs.
      recipe: what was done, in a line: of the settings only those that act on the model's family.
      sizes: bytes: "dense" of the source's tensors, "transformers" of the exported weights on disk, "left" by the name of
        each file and folder in the run directory.
      tokens: from ``token_changes``: which tokens of the evaluation text the pruned model predicts worse.
      continuations: what both models write after a few prompts.

    Returns:
      What was written. Numbers that JSON cannot hold are null.

    Raises:
      ValueError: a number given here is not finite.
    """
    layers = all_layers(blocks)
    weights, pruned = sum(math.prod(layer.shape) for layer in layers), sum(layer.pruned for layer in layers)
    worse = {name: [value if math.isfinite(value) else None for value in errors] for name, errors in worsened(blocks).items()}
    report = {
        "manifest": dict(manifest),
        "configuration": dict(configuration),
        "environment": dict(environment),
        "model": dict(model),
        "calibration": dict(calibration),
        "evaluation": dict(evaluation),
        "perplexity": dict(perplexity),
        "sparsity": sparsity(layers),
        "model_sparsity": pruned / model["weights"] if model.get("weights") else None,
        "allocation": allocation,
        "distillation": distillation,
        "weighed_layers": list(weighed),
        "recipe": recipe,
        "weights": weights,
        "pruned": pruned,
        "unusual": unusual(blocks) | {"worse_on_held_out": worse},
        "layer_kinds": [finite(kind._asdict()) for kind in by_kind(blocks)],
        "seconds": dict(seconds),
        "memory": dict(memory),
        "sizes": dict(sizes or {}),
        "tokens": tokens,
        "continuations": continuations,
        "files": dict(files),
        "blocks": [block.to_json() for block in blocks],
    }
    with writing(path, "all finished blocks are intact; make room and repeat the command"):
        write_bytes(path, (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
    return report
