"""Records and folders with checksums that a run keeps in its directory.

One process writes a JSON record, all processes write a folder.

A file or folder is written whole in one of five ways, on a disk or in a bucket:

    files.write_bytes   a file without a checksum, which people read
    checksums.keep      files with checksums, by one process
    KeptRecord.write    a JSON record with a checksum; every process calls it, and one writes
    keeping             a folder with checksums, by all processes; it replaces one of its name
    files.making        a new folder, by one process
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, TypeVar

from optima_tpu.runtime.checksums import AGAIN, keep, write_sums
from optima_tpu.runtime.files import begin, commit, remove, writing
from optima_tpu.runtime.processes import first_only, from_first
from optima_tpu.runtime.records import encoded, known_record

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class KeptRecord(Generic[T]):
    """A record of a run directory.

    Attributes:
      kind: its type, as :func:`optima_tpu.runtime.records.read_record` reads it.
      remedy: what to do where it cannot be written, for the message.
    """

    name: str
    kind: type[T]
    remedy: str = AGAIN

    def read(self, directory: Path) -> T | None:
        """The record; None if missing or damaged. Every process calls it."""
        record: T | None = from_first(lambda: known_record(directory / self.name, self.kind))
        return record

    def write(self, directory: Path, record: T) -> None:
        """Writes the record and its checksum. Every process calls it.

        Raises:
          UserError: the disk is full or not writable.
        """
        first_only(lambda: keep(directory, {self.name: encoded(record)}, self.remedy))


@contextlib.contextmanager
def keeping(path: Path, remedy: str, sums: bool = True) -> Iterator[Path]:
    """Yields a path where every process writes its part of a folder.

    After the body the folder gets its checksums, and then its name in one step. It replaces a folder of that name. If the body
    fails, the next start of the run removes what is left.

    Args:
      remedy: what is still intact and what to do, for the message.
      sums: False where each process writes the checksums of its own files, which process 0 need not read then.

    Raises:
      UserError: the disk is full or not writable. If only process 0 fails, every process raises it.
    """

    def started() -> Path:
        with writing(path, remedy):
            partial = begin(path)
            remove(path)
            return partial

    def finish() -> None:
        with writing(path, remedy):
            if sums:
                write_sums(partial)
            commit(partial, path)

    partial = from_first(started)
    with writing(path, remedy):
        yield partial
    first_only(finish)
