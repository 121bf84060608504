"""Run directories in Google Cloud Storage: ``gs://BUCKET/FOLDER``.

Such a path is an ``etils.epath.Path``, which has the methods of pathlib and calls gcsfs. Orbax's TensorStore accesses the bucket
directly. Both find the credentials that ``gcloud auth application-default login`` or the machine provides.

A bucket has no renames, no locks and no folders. But an object appears whole or not at all, and every later read sees it.
``optima_tpu.runtime.files`` uses this to tell finished folders from unfinished ones. Other stores are refused, because Orbax does
not write to them.

A bucket fails now and then. gcsfs tries six times in half a minute, TensorStore 33 times in a quarter of an hour, and neither
waits longer than two minutes for a byte. What fails then is a :class:`BucketError`, which is no statement about the object: a
file that could not be looked at is neither missing nor damaged. gcsfs compares the MD5 of what it transfers with that of the
store.
"""

import contextlib
import errno
import importlib.util
import json
import logging
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Self, TypeGuard

from etils.epath.gpath import PosixGPath
from etils.epath.stat_utils import StatResult
from fsspec.config import conf
from fsspec.core import url_to_fs

from optima_tpu.errors import UserError, one_line
from optima_tpu.runtime.error_texts import http_status, names_bucket

_THIS_PROGRAM = uuid.uuid4().hex

_DETAILS = re.compile(r" \[(tensorstore_spec|http_response_body|http_response_code|curl_code)=.*")
"""What TensorStore puts behind its messages."""

_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of the disk that an object is copied from or to."""

_SILENCE = 120
"""Seconds in which no byte comes, or goes, until a request counts as failed."""


class BucketError(UserError):
    """A bucket or the connection to it failed, and retries did not help.

    Nothing is known about the object.

    Attributes:
      answer: the object, and what the bucket said.
    """

    def __init__(self, answer: str, remedy: str):
        super().__init__(f"{answer}; {remedy}")
        self.answer = answer


@contextlib.contextmanager
def reached(path: Path) -> Iterator[None]:
    """Turns errors of a bucket's clients into :class:`BucketError`."""
    if not in_bucket(path):
        yield
        return
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    except Exception as error:
        if not _of_client(error):
            raise
        status, text = http_status(error), _DETAILS.sub("", one_line(error))
        forbidden = status in (401, 403)
        remedy = (
            "check your permissions there, or run `gcloud auth application-default login`" if forbidden else "try again later"
        )
        raise BucketError(f"{path}: {f'HTTP status {status}' if status else type(error).__name__}: {text}", remedy) from error


class _Status(StatResult):
    """What epath says about an object, by the name of pathlib too."""

    @property
    def st_size(self) -> int:
        return self.length


class BucketPath(PosixGPath):
    """A path in a bucket. A failed request raises :class:`BucketError`."""

    def resolve(self, strict: bool = False) -> Self:
        return self  # epath would put the working directory before it

    def exists(self) -> bool:
        with reached(self):
            return super().exists()

    def is_dir(self) -> bool:  # epath takes whatever fails for no folder
        try:
            return self.stat().is_directory
        except FileNotFoundError:
            return False

    def is_file(self) -> bool:
        try:
            return not self.stat().is_directory
        except FileNotFoundError:
            return False

    def stat(self) -> _Status:
        with reached(self):
            return _Status(**vars(super().stat()))

    def iterdir(self) -> Iterator[Self]:
        with reached(self):
            return iter(list(super().iterdir()))

    def glob(self, pattern: str) -> Iterator[Self]:
        with reached(self):
            return iter(list(super().glob(pattern)))

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a bucket has no folders."""

    def rmtree(self, missing_ok: bool = False) -> None:
        with reached(self):
            super().rmtree(missing_ok)

    def unlink(self, missing_ok: bool = False) -> None:
        with reached(self):
            super().unlink(missing_ok)

    def read_bytes(self) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            copy(self, here := Path(folder) / "object")
            return here.read_bytes()

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes) -> int:
        store, name = url_to_fs(str(self))
        with reached(self):
            store.pipe_file(name, data)
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        return self.write_bytes(data.encode())


def as_path(path: str | os.PathLike) -> Path:
    """Returns a local path, with ~ expanded, or a :class:`BucketPath`.

    Raises:
      UserError: the path is in a store of another kind or names no folder, or a package is missing.
    """
    scheme, separator, rest = os.fspath(path).partition("://")
    if scheme.startswith("gs:/"):
        raise UserError(f"expected a folder or gs://BUCKET/FOLDER, got {path}, which has one slash")
    if not separator:
        return Path(path).expanduser()
    if scheme != "gs":
        raise UserError(f"expected a folder or gs://BUCKET/FOLDER, got {path}: runs cannot be saved to other stores")
    if not all(rest.rstrip("/").partition("/")):
        raise UserError(f"expected gs://BUCKET/FOLDER, got {path}")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{path} needs a package that is not installed: pip install gcsfs")
    os.environ.setdefault("EPATH_USE_TF", "false")  # otherwise epath would use an installed TensorFlow, not gcsfs
    # Otherwise every call queries the kind of the bucket, which needs an extra permission and is not used here.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # TensorStore waits without limit otherwise, and so does gcsfs.
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(_SILENCE))
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    from aiohttp import ClientTimeout  # comes with gcsfs

    timeout = ClientTimeout(total=None, sock_connect=30, sock_read=_SILENCE)
    # No cached listings: gcsfs does not notice what other processes and TensorStore write.
    ours = {"use_listings_cache": False, "consistency": "md5", "requests_timeout": timeout}
    conf["gcs"] = ours | conf.get("gcs", {})
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs every error that it raises, too
    return BucketPath(path)


def in_bucket(path: Path) -> TypeGuard[BucketPath]:
    """Whether a path of :func:`as_path` is in a bucket."""
    return isinstance(path, BucketPath)


def refuse_bucket(path: Path, purpose: str, remedy: str) -> None:
    """Raises UserError if a folder that must be on a disk is in a bucket."""
    if in_bucket(path):
        raise UserError(f"expected a folder on a disk {purpose}, got {path}: {remedy}")


def copy(source: Path, target: Path) -> None:
    """Copies a file into a bucket, or out of one."""
    remote = target if in_bucket(target) else source
    store, name = url_to_fs(str(remote))
    with reached(remote):
        if remote is target:
            store.put_file(str(source), name)
        else:
            try:
                store.get_file(name, str(target), concurrency=1)
            except NotImplementedError:  # gcloud joins large files of parts, and such an object has no MD5
                store.get_file(name, str(target), concurrency=1, consistency="none")


def objects_in(folder: Path) -> list[Path]:
    """Lists all objects below a folder; one request lists a thousand."""
    store, name = url_to_fs(str(folder))
    with reached(folder):
        return [BucketPath(f"gs://{key}") for key in store.find(name)]


def stored_digest(path: Path) -> tuple[int, str]:
    """Returns an object's size and CRC32C as its store reports them."""
    store, name = url_to_fs(str(path))
    with reached(path):
        kept = store.info(name)
        return kept["size"], f"crc32c {kept['crc32c']}"


def _of_client(error: Exception) -> bool:
    """Whether an error seems to come from the bucket or its clients."""
    if isinstance(error, OSError) and error.errno in _LOCAL:
        return False
    if isinstance(error, (OSError, json.JSONDecodeError)):
        return True
    return type(error).__module__.partition(".")[0] in ("gcsfs", "google", "aiohttp") or names_bucket(error)


def take_over(lock: Path) -> None:
    """Writes into ``lock`` that this program now owns its folder."""
    lock.write_text(_THIS_PROGRAM)


def refuse_other(lock: Path) -> None:
    """Raises UserError if another program has taken over since."""
    if lock.exists() and lock.read_text() != _THIS_PROGRAM:
        raise UserError(f"another program has taken over {lock.parent}: it continues, and this one stops")
