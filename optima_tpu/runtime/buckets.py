"""Run directories in Google Cloud Storage: ``gs://BUCKET/FOLDER``.

Such a path is an ``etils.epath.Path``, which has the methods of pathlib and asks gcsfs to carry them out. Orbax's TensorStore
goes to the bucket itself. Both find the credentials that ``gcloud auth application-default login`` or the machine provides.

A bucket has no renames, no locks and no folders. What it has: an object appears whole or not at all, and who asks afterwards
sees it. ``optima_tpu.runtime.files`` makes finished folders of that. Other stores are refused: Orbax writes to no other.
"""

import importlib.util
import os
import uuid
from pathlib import Path
from typing import Self, TypeGuard

from etils import epath
from etils.epath.gpath import PosixGPath
from fsspec.config import conf
from fsspec.core import url_to_fs

from optima_tpu.errors import UserError, one_line

_THIS_PROGRAM = uuid.uuid4().hex
_BLOCK = 64 << 20
"""Bytes of one part of a large object on its way; gcsfs waits for each, and its own 5 MiB would be slow."""


class BucketPath(PosixGPath):
    """A path in a bucket."""

    def resolve(self, strict: bool = False) -> Self:
        return self  # epath would put the working directory before it


def as_path(path: str | os.PathLike) -> Path:
    """A path on this machine, with ~ replaced, or a :class:`BucketPath`.

    Raises:
      UserError: it is in a store of another kind, names no folder, or a package is missing.
    """
    scheme, separator, rest = os.fspath(path).partition("://")
    if scheme.startswith("gs:/"):
        raise UserError(f"expected a folder or gs://BUCKET/FOLDER, got {path}, which has one slash")
    if not separator:
        return Path(path).expanduser()
    if scheme != "gs":
        raise UserError(f"expected a folder or gs://BUCKET/FOLDER, got {path}: a run can be kept in no other store")
    if not all(rest.rstrip("/").partition("/")):
        raise UserError(f"expected gs://BUCKET/FOLDER, got {path}")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{path} needs a package that is not installed: pip install gcsfs")
    os.environ.setdefault("EPATH_USE_TF", "false")  # or an installed TensorFlow would be asked in the place of gcsfs
    # Or every call asks for the kind of the bucket, which needs a permission of its own and is of no use here.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # Other processes and TensorStore write there too, which no listing that gcsfs remembers knows of.
    conf["gcs"] = {"use_listings_cache": False, "block_size": _BLOCK} | conf.get("gcs", {})
    return BucketPath(path)


def in_bucket(path: Path) -> TypeGuard[BucketPath]:
    """Whether a path of :func:`as_path` is not on this machine."""
    return isinstance(path, BucketPath)


def copy(source: Path, target: Path) -> None:
    """Copies a file into a bucket, or out of one."""
    epath.Path(source).copy(target, overwrite=True)


def objects_in(folder: Path) -> list[Path]:
    """Every object whose name begins with that of a folder, by one request for a thousand of them."""
    store, name = url_to_fs(str(folder))
    return [BucketPath(f"gs://{found}") for found in store.find(name)]


def stored_digest(path: Path) -> tuple[int, str]:
    """Size and CRC32C of an object, as the store keeps them: nothing is read."""
    store, name = url_to_fs(str(path))
    kept = store.info(name)
    return kept["size"], f"crc32c {kept['crc32c']}"


def refusal(error: Exception) -> str:
    """What a bucket, or something on the way to it, answered, in one line; empty for an error of another kind."""
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in ("gcsfs", "google") or "gs://" in str(error):
        return f"{type(error).__name__}: {one_line(error)}"
    return ""


def take_over(lock: Path) -> None:
    """Writes into an object that from now on this program is the one that works beside it. The one that did stops by itself."""
    lock.write_text(_THIS_PROGRAM)


def refuse_other(lock: Path) -> None:
    """Raises UserError if another program has taken over since."""
    if lock.exists() and lock.read_text() != _THIS_PROGRAM:
        raise UserError(f"another program has begun to work in {lock.parent}: it goes on, and this one stops")
