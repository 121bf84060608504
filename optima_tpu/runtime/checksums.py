"""Checksums of what a program writes and later reads back.

A folder that appears in one step holds a file with the checksums of the files in it, written last: SHA-256, or in a bucket the
CRC32C that the store computes. Under its own name that file lists a checksum of its other entries. The files of a run directory
that are beside such folders have their checksums in one file of the same name, which is replaced whenever one of them is written.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from optima_tpu.errors import UserError
from optima_tpu.runtime.buckets import BucketError
from optima_tpu.runtime.files import digest, entries_on_disk, files_in, write_bytes, writing
from optima_tpu.runtime.inside import OutsideError, inside, own
from optima_tpu.runtime.records import DAMAGED, Count, read_record

T = TypeVar("T")

SUMS = "sha256-{}.json"
"""The name of a file of checksums; the label is "all", or in the folder of several processes the number of each."""
ALL = SUMS.format("all")

Sums = dict[str, tuple[Count, str]]
"""Name below the folder -> size and checksum."""

MISSING = "its checksums are missing"
_CHANGED = "has changed since it was written"


def write_sums(folder: Path, files: Iterable[Path] | None = None, label: str = "all") -> None:
    """Writes checksums of ``files``, by default of all, into their folder."""
    files = list(files_in(folder) if files is None else files)
    sums = dict(zip((path.relative_to(folder).as_posix() for path in files), _digests(files)))
    record = folder / SUMS.format(label)
    record.write_text(json.dumps(sums | {record.name: _own(sums)}))


AGAIN = "make room and repeat the command"
WRITE_AGAIN = "repeat the run's command, which writes the file again"


def keep(folder: Path, files: Mapping[str, bytes], remedy: str = AGAIN) -> None:
    """Writes files, each whole or not at all, and then their checksums.

    Args:
      files: name below the folder -> contents.
      remedy: what is still intact and what to do where one cannot be written, for the message.

    Raises:
      UserError: the disk is full or not writable, or the bucket refuses.
    """
    sums = {}
    for name, data in files.items():
        path = folder / name
        with writing(path, remedy):
            path.parent.mkdir(parents=True, exist_ok=True)
            sums[name] = write_bytes(path, data)
    with writing(folder / ALL, remedy):
        _write(folder, known(folder) | sums)


def forget(folder: Path, names: Iterable[str]) -> None:
    """Removes the checksums of files that are removed on purpose."""
    sums, names = known(folder), set(names)
    if sums.keys() & names:
        _write(folder, {name: entry for name, entry in sums.items() if name not in names})


def listed(folder: Path) -> Sums:
    """The checksums in the folder's file; empty if there is no such file.

    Raises:
      UserError: the file is damaged, or names a file outside of the folder.
    """
    if not (folder / ALL).exists():
        return {}
    sums, unchanged = _read(folder / ALL)
    if not unchanged:
        raise UserError(f"{folder / ALL} {_CHANGED}: write the folder again, or remove {ALL} to take the folder as it is")
    return sums


def known(folder: Path, record: str = ALL) -> Sums:
    """As :func:`listed`, but reads what it can of a damaged file.

    A file without an entry counts as damaged.
    """
    try:
        return _read(folder / record)[0]
    except (BucketError, OutsideError):
        raise
    except UserError:
        return {}


def intact(folder: Path, name: str) -> bool:
    """Whether a file exists, is listed, and has its listed checksum."""
    sums = known(folder)
    return name in sums and not _wrong(folder, {name: sums[name]})


def changes(folder: Path, sums: Sums | None = None) -> dict[str, str]:
    """Maps each damaged file of a folder to a reason, such as "is missing".

    Args:
      sums: the checksums; by default those in the folder, where a damaged or missing file of checksums is damage too.
    """
    if sums is not None:
        return _wrong(folder, sums)
    records = _records(folder)
    reasons = {} if records else {ALL: "is missing, so no file can be checked"}
    for record in records:
        try:
            sums, unchanged = _read(record)
        except (BucketError, OutsideError):
            raise
        except UserError as error:
            reasons[record.name] = f"cannot be read ({error})"
        else:
            reasons |= _wrong(folder, sums) or ({} if unchanged else {record.name: _CHANGED})
    return reasons


def _records(folder: Path) -> list[Path]:
    """The files of checksums in a folder. Raises OSError if unreadable."""
    records = sorted(folder.glob(SUMS.format("*")))
    if not records:
        entries_on_disk(folder)  # glob finds nothing in a folder that this user may not read
    return records


def damage(folder: Path) -> str:
    """Names the first damage in a folder with checksums; empty if intact."""
    if not _records(folder):
        return MISSING
    return next((f"{name} {why}" for name, why in changes(folder).items()), "")


def refuse_changed(folder: Path, names: Iterable[str], remedy: str) -> None:
    """Raises UserError if a listed file differs from its checksum."""
    sums = listed(folder)
    for name, why in changes(folder, {name: sums[name] for name in names if name in sums}).items():
        raise UserError(f"{folder / name} {why}: {remedy}")


def read_intact(path: Path, kind: type[T], again: str = WRITE_AGAIN, remedy: str = DAMAGED) -> T:
    """Reads a JSON file as ``read_record``, but refuses a changed one.

    Args:
      again: the end of the message about a file that has changed.
    """
    refuse_changed(path.parent, [path.name], again)
    return read_record(path, kind, remedy)


def _wrong(folder: Path, sums: Sums) -> dict[str, str]:
    paths = {name: inside(folder, name, folder / ALL) for name in sums}
    existing = {name: path for name, path in paths.items() if path.is_file()}
    digests = dict(zip(existing, _digests(existing.values())))
    reasons = {}
    for name, (size, written) in sums.items():
        if name not in digests:
            reasons[name] = "is missing"
        elif digests[name][0] != size:
            reasons[name] = f"has {digests[name][0]} bytes where {size} were written"
        elif digests[name][1] != written:
            reasons[name] = _CHANGED
    return reasons


def _own(sums: Sums) -> tuple[int, str]:
    """A record's entry for itself: how many others, and their SHA-256."""
    return len(sums), hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def _read(record: Path) -> tuple[Sums, bool]:
    """The entries for other files, and whether the record is unchanged.

    A record without an entry for itself counts as unchanged.

    Raises:
      OutsideError: an entry is of a file outside of the folder. Whoever reads the entries may remove or write these files.
    """
    sums = read_record(own(record.parent, record), Sums)
    itself = sums.pop(record.name, None)
    for name in sums:
        inside(record.parent, name, record)
    return sums, itself in (None, _own(sums))


def _digests(paths: Iterable[Path]) -> list[tuple[int, str]]:
    """One thread hashes 2 GB in a second, a disk may read more."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(digest, paths))


def _write(folder: Path, sums: Sums) -> None:
    write_bytes(folder / ALL, json.dumps(sums, indent=0).encode())
