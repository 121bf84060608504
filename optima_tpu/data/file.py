"""Text files on this machine: plain text, JSON lines and Parquet."""

import dataclasses
import gzip
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from optima_tpu.data.source import Part, Split, TextSource, check_field, split_options, text_of
from optima_tpu.errors import UserError, one_line, refusing

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


_LONGEST = 1 << 30
"""Characters of one document, or of one line, at most."""

_LEAST, _RATIO = 1 << 26, 100
"""A packed file may hold the first number of characters, or as many times its own size as the second."""


@dataclasses.dataclass(frozen=True)
class File(TextSource):
    """The text of one file, without splits.

    Calibration and evaluation both read all of the file.

    Attributes:
      path: a .txt[.gz] file is one document; in .jsonl[.gz], .json[.gz] (one object on each line, as in C4) and .parquet each
        record is one document.
      field: the field or column that holds the text.
    """

    path: Path
    field: str = "text"
    here = True

    @staticmethod
    def parse(text: str) -> "File":
        """Reads PATH or PATH?field=NAME."""
        path, options = split_options(text, ["field"], "file:PATH or file:PATH?field=NAME")
        return File(Path(path).expanduser(), **options)

    def __str__(self) -> str:
        return f"file:{self.path}" + (f"?field={self.field}" if self.field != "text" else "")

    def documents(self, split: Split) -> Iterator[str]:
        """The documents in the order of the file.

        Raises:
          UserError: no such file, an unknown format, a damaged file, a record without the field or without text in it.
        """
        self.check()
        parquet = self.path.name.endswith(".parquet")
        read = self._parquet if parquet else self._text if self.path.name.endswith((".txt", ".txt.gz")) else self._lines
        what = f"expected {'a Parquet file' if parquet else 'UTF-8 text'} in {self.path}, but it can't be read"
        kinds = (OSError, EOFError, zlib.error, UnicodeError, pyarrow.ArrowException)
        with refusing(kinds, what, "download or convert it again"):
            yield from read()

    def check(self) -> None:
        """Raises UserError for a missing file or an unknown format."""
        if not self.path.is_file():
            what = "is a folder" if self.path.is_dir() else "is a device or a pipe" if self.path.exists() else "does not exist"
            raise UserError(f"expected a text file, but {self.path} {what}: check the path")
        if not self.path.name.endswith(SUFFIXES):
            raise UserError(f"expected a file that ends in one of {', '.join(SUFFIXES)}, got {self.path}: rename or convert it")

    def parts(self, split: Split) -> list[Part]:
        """The whole file, named by its resolved path."""
        return [Part(str(self.path.resolve()))]

    def fingerprint(self, split: Split) -> str:
        """Hashes the file's bytes."""
        self.check()
        # Time stamps are not exact enough, and hashing is fast compared with tokenising.
        with refusing(OSError, f"{self.path} can't be read", "check its permissions"), open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _open(self):
        # A document keeps its own line ends, and only \n separates records; a byte order mark is not part of the text.
        reader = gzip.open if self.path.suffix == ".gz" else open
        return reader(self.path, "rt", encoding="utf-8-sig", newline="\n")

    def _most(self) -> int:
        """The most characters that the file may hold."""
        packed = self.path.suffix in (".gz", ".parquet")  # text is packed to a fifth, not to a hundredth
        return max(_LEAST, _RATIO * self.path.stat().st_size) if packed else _LONGEST

    def _refuse_longer(self, most: int) -> UserError:
        return UserError(
            f"expected at most {most} characters in {self.path}, of {self.path.stat().st_size} bytes, got more: split it"
        )

    def _text(self) -> Iterator[str]:
        most = min(self._most(), _LONGEST)
        with self._open() as file:
            text = file.read(most + 1)
        if len(text) > most:
            raise self._refuse_longer(most)
        yield text

    def _records(self) -> Iterator[str]:
        """Yields the lines. Refuses too long lines and packed files."""
        most, total = self._most(), 0
        longest = min(most, _LONGEST)
        with self._open() as file:
            while line := file.readline(longest + 1):
                total += len(line)
                if len(line) > longest or (self.path.suffix == ".gz" and total > most):
                    raise self._refuse_longer(min(most, longest))
                yield line

    def _lines(self) -> Iterator[str]:
        for number, line in enumerate(self._records(), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"expected a JSON object on every line of {self.path}, line {number} holds none ({one_line(error)})"
                ) from error
            if not isinstance(record, dict):
                raise UserError(
                    f"expected a JSON object on every line of {self.path}, line {number} is a {type(record).__name__}"
                )
            check_field(self.field, record, self.path)
            yield self._checked(record[self.field], f"line {number}")

    def _parquet(self) -> Iterator[str]:
        most, total = self._most(), 0
        schema = pyarrow.parquet.read_schema(self.path)
        check_field(self.field, schema.names, self.path)
        if pyarrow.types.is_nested(kind := schema.field(self.field).type):
            raise UserError(f"expected text in field {self.field!r} of {self.path}, it holds {kind}: choose another field")
        # As a dictionary: a file of some kilobytes may repeat a long text a billion times.
        with pyarrow.parquet.ParquetFile(self.path, read_dictionary=[self.field]) as file:
            groups = map(file.metadata.row_group, range(file.num_row_groups))
            parts = (group.column(index) for group in groups for index in range(group.num_columns))
            if any(part.total_uncompressed_size > most for part in parts if part.path_in_schema == self.field):
                raise self._refuse_longer(most)
            batches = file.iter_batches(columns=[self.field])
            for number, value in enumerate(itertools.chain.from_iterable(map(_values, batches)), start=1):
                text = self._checked(value, f"row {number}")
                total += len(text)
                if total > most:
                    raise self._refuse_longer(most)
                yield text

    def _checked(self, value: object, record: str) -> str:
        text = text_of(value, self.field, self.path, record)
        text.encode()  # raises UnicodeError for half a surrogate pair, which JSON can spell but which is not text
        return text


def _values(batch: pyarrow.RecordBatch) -> Iterator[object]:
    """The values of a batch's only column, with one object for equal ones."""
    column = batch.column(0)
    if not pyarrow.types.is_dictionary(column.type):
        yield from column.to_pylist()
        return
    texts = column.dictionary.to_pylist()
    yield from (None if index is None else texts[index] for index in column.indices.to_pylist())
