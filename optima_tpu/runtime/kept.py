"""JSON records that a run keeps in its directory: written by one process with their checksums, read by all."""

import dataclasses
from pathlib import Path
from typing import Generic, TypeVar

from optima_tpu.runtime.checksums import AGAIN, keep
from optima_tpu.runtime.processes import first_only, from_first
from optima_tpu.runtime.records import encoded, known_record

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class KeptRecord(Generic[T]):
    """A record of a run directory.

    Attributes:
      name: of its file.
      kind: its type, as :func:`optima_tpu.runtime.records.read_record` reads it.
      remedy: what to do where it cannot be written, for the message.
    """

    name: str
    kind: type[T]
    remedy: str = AGAIN

    def read(self, directory: Path) -> T | None:
        """The record; None if it is missing or damaged. Every process calls it."""
        record: T | None = from_first(lambda: known_record(directory / self.name, self.kind))
        return record

    def write(self, directory: Path, record: T) -> None:
        """Writes the record whole or not at all, and its checksum. Every process calls it.

        Raises:
          UserError: the disk is full or not writable.
        """
        first_only(lambda: keep(directory, {self.name: encoded(record)}, self.remedy))
