"""Run directories in Google Cloud Storage: ``gs://BUCKET/FOLDER``.

Such a path is an ``etils.epath.Path``, which has the methods of pathlib and calls gcsfs. Orbax's TensorStore accesses the bucket
directly. Both find the credentials that ``gcloud auth application-default login`` or the machine provides.

A bucket has no renames, no locks and no folders. But an object appears whole or not at all, and every later read sees it.
``optima_tpu.runtime.files`` uses this to tell finished folders from unfinished ones. Other stores are refused, because Orbax does
not write to them.
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
"""Bytes of one part of a large transfer: gcsfs waits for each part, and its default of 5 MiB would be slow."""


class BucketPath(PosixGPath):
    """A path in a bucket."""

    def resolve(self, strict: bool = False) -> Self:
        return self  # epath would put the working directory before it


def as_path(path: str | os.PathLike) -> Path:
    """Returns a path on this machine, with ~ expanded, or a :class:`BucketPath`.

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
    # No cached listings: gcsfs does not notice what other processes and TensorStore write.
    conf["gcs"] = {"use_listings_cache": False, "block_size": _BLOCK} | conf.get("gcs", {})
    return BucketPath(path)


def in_bucket(path: Path) -> TypeGuard[BucketPath]:
    """Whether a path of :func:`as_path` is in a bucket, not on this machine."""
    return isinstance(path, BucketPath)


def copy(source: Path, target: Path) -> None:
    """Copies a file into a bucket, or out of one."""
    epath.Path(source).copy(target, overwrite=True)


def objects_in(folder: Path) -> list[Path]:
    """All objects below a folder, with one request for each thousand of them."""
    store, name = url_to_fs(str(folder))
    return [BucketPath(f"gs://{found}") for found in store.find(name)]


def stored_digest(path: Path) -> tuple[int, str]:
    """Size and CRC32C of an object as the store reports them, without reading the object."""
    store, name = url_to_fs(str(path))
    kept = store.info(name)
    return kept["size"], f"crc32c {kept['crc32c']}"


def refusal(error: Exception) -> str:
    """The error of a bucket, or of the connection to it, in one line; empty for an error of another kind."""
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in ("gcsfs", "google") or "gs://" in str(error):
        return f"{type(error).__name__}: {one_line(error)}"
    return ""


def take_over(lock: Path) -> None:
    """Writes into ``lock`` that this program now owns the folder of ``lock``. The program that owned it stops by itself."""
    lock.write_text(_THIS_PROGRAM)


def refuse_other(lock: Path) -> None:
    """Raises UserError if another program has taken over since."""
    if lock.exists() and lock.read_text() != _THIS_PROGRAM:
        raise UserError(f"another program has taken over {lock.parent}: it continues, and this one stops")
