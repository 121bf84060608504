"""Checks of files that a command writes: it replaces only its own."""

from collections.abc import Callable
from pathlib import Path

from optima_tpu.errors import UserError
from optima_tpu.runtime.buckets import in_bucket
from optima_tpu.runtime.records import MOST_BYTES


def refuse_no_folder(option: str, path: Path) -> None:
    """Raises UserError if a file's folder is missing; buckets have none."""
    if not in_bucket(path) and not path.parent.is_dir():
        raise UserError(f"expected {option} in an existing folder, got {path}; make {path.parent} first")


def refuse_foreign(path: Path, own: Callable[[bytes], bool], force: bool) -> None:
    """Refuses to replace a file that this program did not write.

    Call it before the work.

    Args:
      own: whether a file's contents are this program's.
      force: replace it anyway.

    Raises:
      UserError: the file exists, and is not this program's.
    """
    if not force and path.is_file() and (path.stat().st_size > MOST_BYTES or not own(path.read_bytes())):
        raise UserError(f"expected a new file, got {path}, which this program did not write: choose another, or add --force")
