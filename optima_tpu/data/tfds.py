"""Prepared data sets of TensorFlow Datasets, read without TensorFlow."""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optima_tpu.data.source import Documents, Part, Split, TextSource, check_field, split_options, text_of
from optima_tpu.errors import UserError, refusing
from optima_tpu.runtime.inside import below, inside
from optima_tpu.runtime.program import program

if TYPE_CHECKING:  # the library takes seconds to import
    from tensorflow_datasets.core.read_only_builder import ReadOnlyBuilder

_FORM = "tfds:NAME@DIR or tfds:NAME/CONFIG:VERSION@DIR, optionally with ?split=NAME, ?field=NAME or ?split=NAME&field=NAME"


@dataclasses.dataclass(frozen=True)
class TFDS(TextSource):
    """A prepared data set with random access: array_record or Parquet.

    A document is read by its index, and only if it is needed, so that each of several processes can read a part; all processes
    must see the directory. The documents keep the order in which they were prepared. ``python -m optima_tpu.data.build`` makes
    such a data set from text files.

    Attributes:
      name: NAME, NAME/CONFIG, NAME:VERSION or NAME/CONFIG:VERSION; without a version, the latest one in the directory.
      directory: what TFDS calls data_dir; it holds NAME/VERSION or NAME/CONFIG/VERSION.
      split: the split that calibration and evaluation both read, in the notation of TFDS: "train", "train[:90%]", "train+test".
        None: calibration reads "train"; evaluation reads "validation", without such a split "test", and without both "train".
    """

    name: str
    directory: Path
    split: str | None = None
    field: str = "text"
    here = True

    @staticmethod
    def parse(text: str) -> "TFDS":
        """Reads NAME@DIR, optionally with ?split=NAME, ?field=NAME or both."""
        path, options = split_options(text, ["split", "field"], _FORM)
        name, _, directory = path.partition("@")
        if not re.fullmatch(r"[a-zA-Z]\w*(/[\w+-][\w+.-]*)?(:\d+\.\d+\.\d+)?", name) or not directory:
            raise UserError(f"expected {_FORM}, got tfds:{text}")
        return TFDS(name, Path(directory).expanduser(), **options)

    def __str__(self) -> str:
        options = [f"split={self.split}"] if self.split else []
        options += [f"field={self.field}"] if self.field != "text" else []
        return f"tfds:{self.name}@{self.directory}" + ("?" + "&".join(options) if options else "")

    def documents(self, split: Split) -> Documents:
        """The documents in the order of the data set, read on access.

        Raises:
          UserError: there is no such data set, split or field, its format has no random access, or (later) a document is not
            text or can't be read.
        """
        builder = self._builder()
        check_field(self.field, builder.info.features, f"{self.name} in {self.directory}")
        self._paths(builder, split)
        with self._reading():  # NotImplementedError for a format, whatever array_record raises for a missing file
            records = builder.as_data_source(self._spec(builder, split))
        return Documents(functools.partial(self._text, records), len(records))

    def parts(self, split: Split) -> list[Part]:
        """The ranges of documents that are read, of the set's own splits."""
        builder = self._builder()
        return [
            Part(f"{Path(builder.data_dir).resolve()}@{part.splitname}", part.from_ or 0, part.to)
            for part in self._instructions(builder, split)
        ]

    def fingerprint(self, split: Split) -> str:
        """Hashes the description and the files' names, sizes and times."""
        builder = self._builder()
        folder = Path(builder.data_dir)
        digest = hashlib.sha256()
        with self._reading():
            for path in [folder / "dataset_info.json", folder / "features.json"]:
                digest.update(path.read_bytes())
            for path in self._paths(builder, split):
                status = os.stat(path)
                digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode())
        return digest.hexdigest()

    def _builder(self) -> "ReadOnlyBuilder":
        # The library imports TensorFlow only in functions that need it; the functions used here and in build.py do not.
        from tensorflow_datasets.core import read_only_builder, registered

        for _ in below(self.directory / self.name.partition(":")[0]):  # refuses links that lead out of it, and pipes
            pass
        with self._reading():  # every file of the description has its own kind of error
            self._refuse_foreign_classes()
            try:
                return read_only_builder.builder_from_files(self.name, data_dir=str(self.directory))
            except registered.DatasetNotFoundError as error:
                names = ", ".join(_prepared(self.directory)) or "none"
                raise UserError(
                    f"expected a prepared data set {self.name} in {self.directory}, which holds {names}: check both, or "
                    f"make one with {program('data')} {self.name}@{self.directory} FILE..."
                ) from error

    def _refuse_foreign_classes(self) -> None:
        """Raises UserError where features.json names a class outside TFDS."""
        folder = self.directory / re.split("[/:]", self.name)[0]
        for path in (*folder.glob("*/features.json"), *folder.glob("*/*/features.json")):
            for name in _classes(json.loads(path.read_bytes())):
                if not name.startswith("tensorflow_datasets."):  # the library would import its module
                    raise UserError(
                        f"{path}: expected features of TFDS alone, got {name}, a class that is never imported: make the data set "
                        "again"
                    )

    def _spec(self, builder: "ReadOnlyBuilder", split: Split) -> str:
        if self.split or split == "calibration":
            return self.split or "train"
        return next((name for name in ("validation", "test") if name in builder.info.splits), "train")

    def _instructions(self, builder: "ReadOnlyBuilder", split: Split) -> list[Any]:
        """The split as ranges [from_, to) of the data set's own splits."""
        from tensorflow_datasets.core import splits

        spec = self._spec(builder, split)
        has = f"it has {', '.join(builder.info.splits)}: write ?split=NAME"
        # Exception, because ValueError, AssertionError and KeyError come.
        with refusing(Exception, f"{self.name} in {self.directory} has no split {spec!r}, {has}"):
            return splits.AbstractSplit.from_spec(spec).to_absolute(builder.info.splits)

    def _paths(self, builder: "ReadOnlyBuilder", split: Split) -> list[Path]:
        """The split's files. Raises UserError if one is outside the folder."""
        folder = Path(builder.data_dir)
        names = {part.splitname for part in self._instructions(builder, split)}
        paths = [str(path).removeprefix(f"{folder}/") for name in names for path in builder.info.splits[name].filepaths]
        return sorted(inside(folder, path, folder / "dataset_info.json") for path in paths)

    def _text(self, records: Sequence[Mapping[str, Any]], number: int) -> str:
        with self._reading():  # array_record has no exceptions of its own for a damaged file
            value = records[number][self.field]
        if isinstance(value, bytes):
            with self._reading():
                return value.decode()
        return text_of(value, self.field, self.name, f"document {number}")

    def _reading(self) -> AbstractContextManager[None]:
        return refusing(Exception, f"{self} can't be read", "make the data set again, in the format array_record")


def _classes(value: Any, key: str = "") -> Iterator[str]:
    """Yields the Python classes that features.json names, in either layout."""
    if isinstance(value, str):
        yield from [value] if key in ("pythonClassName", "python_class_name", "type") else ()
        yield from _classes(json.loads(value)) if key == "json" else ()
    inner = value.items() if isinstance(value, dict) else [(key, each) for each in value] if isinstance(value, list) else ()
    for name, each in inner:
        yield from _classes(each, name)


def _prepared(directory: Path) -> Iterator[str]:
    """The data sets of a directory, by name."""
    paths = sorted(directory.glob("**/dataset_info.json")) if directory.is_dir() else []
    for path in paths[:20]:
        *name, version = path.parent.relative_to(directory).parts or [""]
        yield "/".join(name) + f":{version}"
