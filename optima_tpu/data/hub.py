"""Data sets on the Hugging Face hub: single files, or any split."""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

from optima_tpu.data.source import Documents, Part, Split, TextSource, check_field, split_options, text_of
from optima_tpu.errors import UserError, refusing

_FORM = "hub:ORG/NAME[/CONFIG]@SPLIT, such as hub:allenai/c4/en@train[:20000], optionally with ?field=NAME"


@dataclasses.dataclass(frozen=True)
class Hub(TextSource):
    """One split of a data set, read by the ``datasets`` library.

    Calibration and evaluation both read this split.

    The whole split is downloaded into the library's own cache, unless only its first documents are asked for: these are
    streamed.

    Attributes:
      repository: ORG/NAME; a local folder of this name takes precedence.
      config: the configuration; None where there is only one.
      first: the number of documents to stream; None takes all.
    """

    repository: str
    config: str | None
    split: str
    first: int | None = None
    field: str = "text"

    @staticmethod
    def parse(text: str) -> "Hub":
        """Reads the form of ``_FORM``, such as allenai/c4/en@train[:20000]."""
        path, options = split_options(text, ["field"], _FORM)
        match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([^/@]+))?@([\w.-]+)(?:\[:([1-9][0-9]{0,8})\])?", path)
        if not match:
            raise UserError(f"expected {_FORM}, got hub:{text}")
        repository, config, split, first = match.groups()
        return Hub(repository, config, split, int(first) if first else None, **options)

    def __str__(self) -> str:
        return (
            f"hub:{self.repository}"
            + (f"/{self.config}" if self.config else "")
            + f"@{self.split}"
            + (f"[:{self.first}]" if self.first else "")
            + (f"?field={self.field}" if self.field != "text" else "")
        )

    def documents(self, split: Split) -> Iterable[str]:
        """The documents in the order of the data set.

        Raises:
          UserError: the hub can't be reached, there is no such data set, configuration, split or column, or a document is
            not text.
        """
        rows = self._load(self._commit())
        columns = rows.column_names
        if columns is None:  # a stream does not know its columns before its first row is read
            return map(self._text, self._guarded(rows))
        check_field(self.field, columns, self.repository)
        if self.first:
            return map(self._text, self._guarded(rows))
        column = rows.select_columns([self.field])
        return Documents(lambda number: self._text(column[number]), len(column))

    def parts(self, split: Split) -> list[Part]:
        """The first documents of the split, or all."""
        return [part(self.repository, self.config, self.split)._replace(last=self.first)]

    def fingerprint(self, split: Split) -> str | None:
        """The data set's commit; without one its fingerprint, or None.

        ``datasets`` computes the fingerprint. A stream has none.
        """
        commit = self._commit()
        return commit if commit or self.first else self._load(None)._fingerprint

    def _commit(self) -> str | None:
        """The data set's newest commit; None for a local folder or offline."""
        if Path(self.repository).is_dir() or huggingface_hub.constants.HF_HUB_OFFLINE:
            return None
        with self._reading():
            # load_dataset alone retries for half a minute without a network; this asks once.
            return huggingface_hub.dataset_info(self.repository).sha

    def _load(self, commit: str | None) -> Any:
        """Returns a ``datasets.Dataset``, or for a stream IterableDataset."""
        import datasets  # takes seconds

        with self._reading():
            rows = datasets.load_dataset(
                self.repository, self.config, split=self.split, revision=commit, streaming=self.first is not None
            )
        return rows.take(self.first) if self.first else rows

    def _guarded(self, rows: Iterable[dict]) -> Iterator[dict]:
        with self._reading():  # a stream is read from the network to its end
            yield from rows

    def _text(self, row: dict) -> str:
        check_field(self.field, row, self.repository)
        return text_of(row[self.field], self.field, self.repository, "a row")

    def _reading(self) -> AbstractContextManager[None]:
        # Exception, because those of pyarrow, of fsspec and of the HTTP library come here too.
        return refusing(
            Exception,
            f"{self} can't be read",
            "check its name, configuration and split; without a network set HF_HUB_OFFLINE=1 to read the cache of `datasets`, or "
            "give a local file as file:PATH",
        )


def part(repository: str, config: str | None, split: str) -> Part:
    """The part that has all documents of a split."""
    return Part(f"{repository.lower()}@{split}", config=config)  # the hub ignores the case of a repository


def download(repository: str, name: str) -> Path:
    """Returns the local path of a data set's file, downloaded if needed.

    The file is in the hub's own cache.

    Raises:
      UserError: the file is not in the cache and the hub can't be reached or refuses it, or the file is damaged.
    """
    from optima_tpu.models.checkpoints.hub import refuse_damaged  # imports all families, which a wrong path need not wait for

    cached = try_to_load_from_cache(repository, name, repo_type="dataset")
    path = Path(cached) if isinstance(cached, str) else _downloaded(repository, name)
    refuse_damaged([path])
    return path


def _downloaded(repository: str, name: str) -> Path:
    elsewhere = (
        f"download the file elsewhere with `hf download --repo-type dataset {repository} {name}` and give it as file:PATH, or "
        "take a text of this machine, such as pydoc"
    )
    # Exception, because the HTTP library below has its own exceptions, whose names change with its version.
    with refusing(Exception, f"{name} of the data set {repository} is not in the hub's cache and can't be downloaded", elsewhere):
        # hf_hub_download alone retries for half a minute without a network; this asks once.
        get_hf_file_metadata(hf_hub_url(repository, name, repo_type="dataset"))
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
