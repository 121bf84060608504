"""Reads and writes the record of a run: its manifest, which a resume must match, its settings, the source's small files."""

import functools
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from optima_tpu.config.flat import flat
from optima_tpu.errors import UserError
from optima_tpu.runtime.buckets import as_path
from optima_tpu.runtime.checksums import changes, keep, known, listed, refuse_changed
from optima_tpu.runtime.files import files_in
from optima_tpu.runtime.records import known_record, read_record

RUN, ASSETS = "run.json", "assets"


class _Selector(TypedDict):
    name: str


class _Recipe(TypedDict):
    pattern: str
    selector: _Selector
    layers: NotRequired[str]
    allocation: NotRequired[dict[str, Any] | None]
    tuning: NotRequired[dict[str, Any] | None]
    accept: NotRequired[dict[str, Any] | None]
    distill: NotRequired[dict[str, Any] | None]


class Manifest(TypedDict):
    """All that decides a run's weights, see ``inputs.manifest_of``. Only the declared entries are read on their own."""

    recipe: NotRequired[_Recipe]


class RunRecord(TypedDict):
    """The contents of run.json."""

    manifest: Manifest
    configuration: dict[str, Any]


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
    keep(directory, {RUN: _bytes(manifest, configuration)})


def _bytes(manifest: Mapping[str, Any], configuration: Mapping[str, Any]) -> bytes:
    return json.dumps({"manifest": manifest, "configuration": configuration}, indent=2, allow_nan=False).encode()


_AGAIN = "repeat the run's command, which writes the file again"


def read_run(directory: str | Path) -> RunRecord:
    """The manifest and the configuration of a run.

    Raises:
      UserError: the directory has no run, or its record is damaged.
    """
    directory = as_path(directory)
    if not (directory / RUN).exists():
        raise UserError(f"expected a run directory, got {directory}, which has no {RUN}: check the path")
    refuse_changed(directory, [RUN], _AGAIN)
    return read_record(directory / RUN, RunRecord)


def read_assets(directory: str | Path) -> dict[str, bytes]:
    """The source model's files that the run has kept, name -> contents. Raises UserError if one of them is damaged."""
    directory = as_path(directory)
    folder = directory / ASSETS
    refuse_changed(directory, [name for name in listed(directory) if name.startswith(f"{ASSETS}/")], _AGAIN)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files_in(folder)}


def refuse_another(directory: Path, manifest: Mapping[str, Any], configuration: Mapping[str, Any] | None = None) -> None:
    """Raises UserError if the run in ``directory`` has another manifest.

    Args:
      configuration: the settings of this command. If run.json is damaged, they may show by its checksum what it held.

    Raises:
      UserError: the manifests differ. The message names every differing key, nested keys with dots, and both values. Or run.json
        is damaged, and the run may be another one.
    """
    as_recorded = json.loads(json.dumps(manifest, allow_nan=False))  # turns tuples into lists, as in the file
    sums = known(directory)
    if RUN in sums and changes(directory, {RUN: sums[RUN]}):
        left = known_record(directory / RUN, RunRecord)
        if left and left["manifest"] == as_recorded:
            return
        for settings in (configuration or {}, left["configuration"] if left else {}):
            data = _bytes(manifest, settings)
            if (len(data), hashlib.sha256(data).hexdigest()) == sums[RUN]:
                return
        raise UserError(
            f"{directory / RUN} has changed since it was written, and this command is not the one that wrote it: repeat the "
            "original command, which writes the file again, or choose another --output"
        )
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
