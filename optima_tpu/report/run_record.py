"""Reads and writes the record of a run: its manifest, which a resume must match, its settings, the source's small files."""

import functools
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optima_tpu.config.flat import flat
from optima_tpu.errors import UserError
from optima_tpu.runtime.buckets import as_path
from optima_tpu.runtime.files import files_in, write_bytes

RUN, ASSETS = "run.json", "assets"


@functools.cache  # later changes of the files do not change the running code
def code_version() -> str:
    """The installed version and a digest of the package's source files, "0.1.0+3f2a91c0b5d7".

    Part of a run's manifest, so that one model never mixes blocks pruned by different code.
    """
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package).as_posix()}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    try:
        version = importlib.metadata.version("optima-tpu")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout; the digest still identifies the code
        version = "0"
    return f"{version}+{digest.hexdigest()[:12]}"


def write_run(directory: Path, manifest: Mapping[str, Any], configuration: Mapping[str, Any]) -> None:
    """Writes the record of a new run atomically into an existing directory."""
    record = {"manifest": manifest, "configuration": configuration}
    write_bytes(directory / RUN, json.dumps(record, indent=2, allow_nan=False).encode())


def read_run(directory: str | Path) -> dict:
    """The manifest and the configuration of a run: ``{"manifest": {...}, "configuration": {...}}``.

    Raises:
      UserError: the directory has no run, or its record is damaged.
    """
    path = as_path(directory) / RUN
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"expected a run directory, got {directory}, which has no {RUN}: check the path") from None
    except ValueError:
        raise UserError(f"{path} is damaged and the run cannot be resumed; choose another --output") from None


def read_assets(directory: str | Path) -> dict[str, bytes]:
    """The source model's files that the run has kept, name -> contents."""
    folder = as_path(directory) / ASSETS
    return {str(path.relative_to(folder)): path.read_bytes() for path in files_in(folder)}


def refuse_another(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Raises UserError if the run in ``directory`` has another manifest.

    Raises:
      UserError: the manifests differ. The message names every differing key, nested keys with dots, and both values.
    """
    as_recorded = json.loads(json.dumps(manifest, allow_nan=False))  # turns tuples into lists, as in the file
    there, here = flat(read_run(directory)["manifest"]), flat(as_recorded)
    different = [
        f"{key}: {_show(there, key)} there, {_show(here, key)} here"
        for key in sorted(there | here)
        if there.get(key, ...) != here.get(key, ...)
    ]
    if different:
        raise UserError(
            f"{directory} holds another run ({'; '.join(different)}); choose another --output, or repeat "
            "the original command to resume it"
        )


def _show(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "absent"
    text = values[key] if isinstance(values[key], str) else json.dumps(values[key])
    return text[:12] if re.fullmatch(r"[0-9a-f]{40,}", text) else text
