"""Reads and writes the record of a run: manifest, settings, assets.

A command resumes a run only if their manifests are the same.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optima_tpu.config.choices import CHOICES
from optima_tpu.config.document import method_settings
from optima_tpu.config.flat import flat, options
from optima_tpu.config.parse import recorded_run
from optima_tpu.config.words import words_of
from optima_tpu.config.written import flags
from optima_tpu.errors import UserError
from optima_tpu.report.settings import ManifestEntries, RunSettings
from optima_tpu.runtime.buckets import as_path
from optima_tpu.runtime.checksums import WRITE_AGAIN, changes, keep, known, listed, read_intact, refuse_changed
from optima_tpu.runtime.files import files_in
from optima_tpu.runtime.inside import refuse_links
from optima_tpu.runtime.program import program
from optima_tpu.runtime.records import Record, check_record, encoded, known_record

RUN, ASSETS = "run.json", "assets"


class RunRecord(Record, frozen=True):
    """The contents of run.json.

    Attributes:
      manifest: all that decides the run's weights, see ``inputs.manifest_of``.
    """

    manifest: Mapping[str, Any]
    configuration: Mapping[str, Any]

    @property
    def settings(self) -> RunSettings:
        """The settings that are read on their own."""
        return check_record(self.configuration, RunSettings, RUN, inside="configuration")

    @property
    def decided(self) -> ManifestEntries:
        """The entries of the manifest that are read on their own."""
        return check_record(self.manifest, ManifestEntries, RUN, inside="manifest")


def default_folder(what: str, model: str) -> Path:
    """The default output folder of a command on a model: runs/WHAT-MODEL."""
    name = Path(model.removeprefix("wheel:")).expanduser().resolve()
    # All exports to GGUF name their file alike, and all runs their exported folder: take the next name above.
    if name.name == "model.gguf":
        name = name.parent
    if (name.parent / RUN).is_file():
        name = name.parent
    return Path("runs", f"{what}-{name.stem if name.suffix == '.gguf' else name.name.partition('@')[0]}")


def write_run(directory: Path, manifest: Mapping[str, Any], configuration: Mapping[str, Any]) -> None:
    """Writes the record of a new run atomically into an existing directory."""
    keep(directory, {RUN: _bytes(manifest, configuration)}, "choose another --output")


def _bytes(manifest: Mapping[str, Any], configuration: Mapping[str, Any]) -> bytes:
    return encoded(RunRecord(manifest, configuration), indent=2)


def read_run(directory: str | Path) -> RunRecord:
    """The manifest and the configuration of a run.

    Raises:
      UserError: the directory has no run, its record is damaged, or a link leads out of it.
    """
    directory = as_path(directory)
    refuse_links(directory)
    if not (directory / RUN).exists():
        instead = f"give {directory.parent}" if (directory.parent / RUN).exists() else "check the path"
        raise UserError(f"expected a run directory, got {directory}, which has no {RUN}: {instead}")
    return read_intact(directory / RUN, RunRecord)


def read_assets(directory: str | Path) -> dict[str, bytes]:
    """The source's files that the run has kept, name -> contents.

    Raises:
      UserError: a file is damaged.
    """
    directory = as_path(directory)
    folder = directory / ASSETS
    refuse_changed(directory, [name for name in listed(directory) if name.startswith(f"{ASSETS}/")], WRITE_AGAIN)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files_in(folder)}


def refuse_another(directory: Path, manifest: Mapping[str, Any], configuration: Mapping[str, Any] | None = None) -> None:
    """Raises UserError if the run in ``directory`` has another manifest.

    Args:
      configuration: the settings of this command, from ``config.run_config.to_dict``. If run.json is damaged, they may show by
        its checksum what it held.

    Raises:
      UserError: the manifests differ. The message names every setting that differs, with both values, what else has changed, and
        what to type. Or run.json is damaged, and the run may be another one.
    """
    as_recorded = json.loads(json.dumps(manifest, allow_nan=False))  # turns tuples into lists, as in the file
    sums = known(directory)
    if RUN in sums and changes(directory, {RUN: sums[RUN]}):
        left = known_record(directory / RUN, RunRecord)
        if left and left.manifest == as_recorded:
            return
        for settings in (configuration or {}, left.configuration if left else {}):
            data = _bytes(manifest, settings)
            if (len(data), hashlib.sha256(data).hexdigest()) == sums[RUN]:
                return
        raise UserError(
            f"{directory / RUN} has changed since it was written, and this command is not the one that wrote it: repeat the "
            "original command, which writes the file again, or choose another --output"
        )
    record = read_run(directory)
    if record.manifest != as_recorded:
        settings, others = _differences(record, as_recorded, configuration or {})
        lines = [f"{name} is {_show(recorded)} there, {_show(current)} here" for name, (recorded, current) in settings.items()]
        again = "" if others else recorded_command(record.configuration)
        resume = f"type {again}" if again else "undo what has changed and repeat the command that began it"
        raise UserError(
            f"{directory} holds another run: {'; '.join([*lines, *others])}. To resume it, {resume}. To leave it as it is, add "
            f"another --output, such as --output {shlex.quote(f'{directory}-2')}"
        )


_TEXT = "the calibration text has other tokens than there"
_ENTRIES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "model": (("model", "dtype"), "the files of the model have changed"),
    "recipe": (("dtype", "pattern", "layers", *CHOICES, "recapture", "borrow"), ""),
    "generated": (("calibration",), ""),
    "calibration": (("calibration",), _TEXT),
    "held_out": (("calibration",), _TEXT),
    "distillation": (("calibration", "distill"), _TEXT),
    "start": ((), "the pruned model that training starts from has changed"),
    "masks": (("selector",), "the masks of selector.path have changed"),
    "weights": (("selector",), "the weights of selector.path have changed"),
}
"""Entry of the manifest -> the settings that decide it, by the first parts of their names; and what has changed if the entry
differs and none of these settings does, empty for both values of the entry."""


def _differences(
    record: RunRecord, manifest: Mapping[str, Any], configuration: Mapping[str, Any]
) -> tuple[dict[str, tuple[Any, Any]], list[str]]:
    """The differences between a record and a command.

    Returns:
      Settings that differ, name -> (recorded, current), and what else differs between the manifests, in words.
    """
    old: Mapping[str, Any] = record.manifest
    was, now = _settings(record.configuration, old), _settings(configuration, manifest)
    other = {name: (was[name], now[name]) for name in sorted(was.keys() & now.keys()) if was[name] != now[name]}
    methods = {name for name in other if name in CHOICES}  # whose options are those of different methods
    settings: dict[str, tuple[Any, Any]] = {}
    words = []
    for key in sorted(old.keys() | manifest.keys()):
        recorded, current = flat({key: old[key]} if key in old else {}), flat({key: manifest[key]} if key in manifest else {})
        if recorded == current:
            continue
        deciding, changed = _ENTRIES.get(key, ((), ""))
        own = {name: both for name, both in other.items() if name.partition(".")[0] in deciding}
        settings |= {name: both for name, both in own.items() if name in methods or name.partition(".")[0] not in methods}
        if not own:
            values = [
                f"{name}: {_show(recorded.get(name, ...))} there, {_show(current.get(name, ...))} here"
                for name in sorted(recorded | current)
                if recorded.get(name, ...) != current.get(name, ...)
            ]
            words += [changed] if changed else values
    another = "model" in settings  # and with it, perhaps, another tokenizer
    return settings, [each for each in dict.fromkeys(words) if not (another and each == _TEXT)]


def _settings(configuration: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their dotted names, as a manifest has them.

    A method stands under the name of its setting. Patterns have their comparison group.
    """
    recipe = manifest.get("recipe", {})
    configuration = {
        **configuration,
        **{name: recipe[name] for name in ("pattern", "layers") if name in recipe and name in configuration},
    }
    return options({name: method_settings(value) if name in CHOICES else value for name, value in configuration.items()})


def recorded_command(configuration: Mapping[str, Any]) -> str:
    """The command of a recorded run; empty if no command has its settings."""
    try:
        name, words = recorded_words(configuration)
    except UserError:
        return ""
    return f"{program(name)} {shlex.join(words)}"


def recorded_words(configuration: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The name of the command that made a run, and the words behind it.

    Raises:
      UserError: no command takes a setting.
    """
    if (recovery := configuration.get("recover")) is None:
        return "prune", flags(recorded_run(configuration))
    skipped = ("model", "coordinator", "num_processes", "process_id")  # a process of its own, as in ``recorded_run``
    own = {name: value for name, value in recovery.items() if name not in skipped}
    return "recover", [str(recovery["model"]), *words_of(own)]


def _show(value: Any) -> str:
    if value is ...:
        return "absent"
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{40,}", text) else text
