"""Atomic writes of files and folders.

A file or folder is either complete or absent, even after kill -9 or a power cut. On a file system it is written inside a new
folder beside its final path, synced to the disk, and renamed. The new folder's name is random, and no other user may enter the
folder: nobody can put a link into it, and two programs never share one. In a bucket (``optima_tpu.runtime.buckets``) a file is
one object, which appears whole. A folder is written under its own name, and counts as absent while a marker object exists
beside it.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from optima_tpu.errors import UserError
from optima_tpu.runtime.buckets import BucketError, copy, in_bucket, objects_in, reached, refuse_other, stored_digest, take_over
from optima_tpu.runtime.error_texts import system_number
from optima_tpu.runtime.inside import below
from optima_tpu.runtime.processes import first_only, is_first
from optima_tpu.runtime.signals import undoing, uninterrupted

PARTIAL = ".partial"
"""Suffix of a folder in which something is being written; in a bucket, of the marker beside an unfinished folder."""

_UNFINISHED = re.compile(r"(.*)\.[a-z0-9_]{8}\.partial")
"""The names that :func:`begin` gives to folders, after the name of what is written in them."""

_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
"""Why a folder cannot be renamed to a path at which something stands."""

LOCK = "run.lock"
"""Held by the process that works in a directory."""


@contextlib.contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """Turns an error of the system while writing ``path`` into a UserError.

    Args:
      remedy: what is still intact and what to do.

    Raises:
      UserError: the disk is full, the folder is not writable, the bucket refuses, ...; other exceptions pass unchanged.
    """
    try:
        with reached(path):
            yield
    except BucketError as error:
        what = "" if error.answer.startswith(f"{path}: ") else f"{path}: "
        raise UserError(f"could not write {what}{error.answer}; {remedy}") from error
    except UserError:
        raise
    except Exception as error:
        if (number := system_number(error)) is None:
            raise
        raise UserError(f"could not write {path}: {_elsewhere(error, path)}{os.strerror(number)}; {remedy}") from error


def _elsewhere(error: Exception, path: Path) -> str:
    """The other file that an error is about, as "FILE: "; else empty."""
    name = error.filename if isinstance(error, OSError) else None
    if not isinstance(name, (str, os.PathLike)) or path.is_relative_to(name):
        return ""
    if os.path.abspath(name).startswith(os.path.abspath(path)):
        return ""
    return f"{name}: "


def refuse_unreachable(directory: Path) -> None:
    """Tests before hours of work whether a run can write to a directory.

    Process 0 calls it. A local folder is checked when it is made; here only its path is checked.

    Raises:
      UserError: the bucket does not exist, or the user has no permission; or a local path has a bracket or a backslash, which
        breaks the patterns by which Orbax finds its files, or a byte that is not UTF-8.
    """
    if in_bucket(directory):
        with writing(directory, "check the bucket's name, and run `gcloud auth application-default login`"):
            (directory / (LOCK + PARTIAL)).write_bytes(b"")
            remove(directory / (LOCK + PARTIAL))
    elif match := re.search(r"[\[\\\ud800-\udfff]", str(directory.absolute())):
        raise UserError(
            f"expected a directory without {match[0]} in its path, since Orbax would not find its own files there, got "
            f"{directory.absolute()}; choose another --output"
        )


@contextlib.contextmanager
def only_program(directory: Path, leave_file: bool = True) -> Iterator[None]:
    """Locks an existing directory against other programs.

    The system releases the lock when process 0 ends, even by kill -9.

    A bucket has no such lock. There the program that comes last takes over, see :func:`still_only_program`.

    Args:
      leave_file: whether the file of the lock stays, as in a run directory.

    Raises:
      UserError: another program has locked the directory.
    """
    if in_bucket(directory):
        first_only(lambda: take_over(directory / LOCK))
        yield
        return
    lock = _lock(directory, timeout=0)

    def acquire():
        try:
            with writing(directory, "choose another --output"):
                lock.acquire()
        except filelock.Timeout:
            raise UserError(f"another process is at work in {directory}; wait for it, or choose another --output") from None

    def release():
        if not leave_file:  # still locked: whoever opened the file meanwhile sees that it has no name any more
            (directory / LOCK).unlink(missing_ok=True)
        lock.release()

    first_only(acquire)
    try:
        yield
    finally:
        if is_first():
            release()


@contextlib.contextmanager
def in_turn(directory: Path) -> Iterator[None]:
    """Makes a local folder and lets one program at a time work in it."""
    directory.mkdir(parents=True, exist_ok=True)
    with _lock(directory, timeout=-1):
        yield


def _lock(directory: Path, timeout: float) -> filelock.BaseFileLock:
    """A folder's lock. ``timeout``: seconds to wait; below 0 without limit."""
    # A soft lock would outlive a program that was killed, and nothing would remove it.
    return filelock.FileLock(directory / LOCK, timeout=timeout, fallback_to_soft=False)


def user_cache() -> Path:
    """Returns the path of the user's cache folder, which may not exist yet."""
    home = os.environ.get("OPTIMA_TPU_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "optima-tpu"
    return Path(home).expanduser()


def still_only_program(directory: Path) -> None:
    """Checks that no other program has taken over a directory.

    Call it before replacing something in the directory.

    Raises:
      UserError: the directory is in a bucket, and another program has entered :func:`only_program` since this one did.
    """
    if in_bucket(directory):
        refuse_other(directory / LOCK)


def sync(path: Path) -> None:
    """Waits until a file or a folder with its contents is on the disk."""
    if path.is_dir():
        for child in path.iterdir():
            sync(child)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def begin(path: Path) -> Path:
    """Returns a new path at which to write ``path`` until :func:`commit`.

    It has the name of ``path`` and is alone in a new folder, so that Orbax's temporary folders, which it names after what it
    writes, are in there too. In a bucket it is ``path`` itself, without what an interrupted write left there.
    """
    if in_bucket(path):
        if (marker := _marker(path)).exists():
            remove(path)
        marker.write_bytes(b"")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Only the new folder is closed to other users. What is written in it gets the modes of ordinary files.
    folder = Path(tempfile.mkdtemp(PARTIAL, f"{_short(path)}.", path.parent))
    return path.parent / folder.name / path.name


def commit(partial: Path, final: Path) -> None:
    """Syncs a completely written file or folder, then renames it to ``final``.

    An existing file ``final`` is replaced, an existing folder must be empty.

    Raises:
      UserError: another program has written a folder ``final`` since this one looked.
    """
    if in_bucket(final):
        remove(_marker(final))
        return
    sync(partial)
    try:
        os.replace(partial, final)
    except OSError as error:
        if error.errno not in _OCCUPIED:
            raise
        raise UserError(
            f"another program has written {final} meanwhile, and this one has written nothing: use that one, or choose another "
            "name"
        ) from error
    partial.parent.rmdir()
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the new name, not the folder's other contents
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _writing_anew(path: Path) -> Iterator[Path]:
    """Yields the path of :func:`begin`; commits it if the body succeeds."""
    partial = begin(path)

    def undo() -> None:
        for left in (partial, _marker(path)) if in_bucket(path) else (partial.parent,):
            remove(left)

    try:
        with undoing(undo):
            yield partial
        with uninterrupted():  # a command that is stopped has then written either nothing or all
            commit(partial, path)
    except BaseException:
        undo()
        raise


@contextlib.contextmanager
def making(folder: Path) -> Iterator[Path]:
    """Yields a new folder that becomes ``folder`` if the body succeeds."""
    with _writing_anew(folder) as partial:
        partial.mkdir(parents=True)
        yield partial


def _marker(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


def unfinished(path: Path) -> bool:
    """Whether :func:`begin` made a folder that is not committed yet."""
    return _UNFINISHED.fullmatch(path.name) is not None and path.is_dir() and not path.is_symlink()


def remove_unfinished(directory: Path) -> None:
    """Removes what killed programs left in a directory and its folders.

    Call it as the only program in the directory.
    """
    for left in _unfinished_in(directory):
        shutil.rmtree(left)


def left_over(path: Path) -> str:
    """Names what killed programs left in and beside a folder; empty if none.

    Nothing of it is removed: a program at work has such a folder too.
    """
    path = path.absolute()
    beside = [(each, _UNFINISHED.fullmatch(each.name)) for each in entries_on_disk(path.parent)]
    folders = [each for each, match in beside if match and match[1] == _short(path) and unfinished(each)]
    names = ", ".join(map(str, sorted(folders + _unfinished_in(path))))
    return names and f"left over: {names}: a stopped program was writing there; remove it, unless a program is at work"


def _short(path: Path) -> str:
    """How the name of what is written in it begins the name of a folder."""
    return path.name[:40]


def _unfinished_in(directory: Path) -> list[Path]:
    folders = [child for child in entries_on_disk(directory) if child.is_dir() and not child.is_symlink()]
    return [left for left in [*folders, *(child for folder in folders for child in folder.iterdir())] if unfinished(left)]


def complete(path: Path) -> bool:
    """Whether a file or folder of :func:`commit` exists and is complete."""
    return path.exists() and not (in_bucket(path) and _marker(path).exists())


def refuse_occupied(folder: Path, purpose: str) -> None:
    """Raises UserError unless the folder to ``purpose`` is new or empty."""
    if complete(folder) and (not folder.is_dir() or any(folder.iterdir())):
        what = "not empty" if folder.is_dir() else "a file"
        raise UserError(f"expected a new or empty folder to {purpose}, got {folder}, which is {what}; choose another folder")


def remove(path: Path) -> None:
    """Removes a file, a link or a folder, if it exists. Link targets stay."""
    if in_bucket(path):
        path.rmtree(missing_ok=True)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_if(folder: Path, holds: Callable[[Path], bool]) -> None:
    """Removes a folder if ``holds`` is true, even while it is replaced."""
    if not holds(folder):
        return
    if in_bucket(folder):
        remove(folder)
        return
    # Out of the other programs' sight first: one of them may have put a whole folder there since the check.
    aside = begin(folder)
    with contextlib.suppress(FileNotFoundError):
        os.replace(folder, aside)
        if not holds(aside):
            os.replace(aside, folder)
    remove(aside.parent)


def write_bytes(path: Path, data: bytes) -> tuple[int, str]:
    """Writes a whole file, or nothing. Returns its :func:`digest`."""
    if in_bucket(path):
        path.write_bytes(data)
        return stored_digest(path)
    with _writing_anew(path) as partial:
        partial.write_bytes(data)
    return len(data), hashlib.sha256(data).hexdigest()


def entries_on_disk(folder: Path) -> list[Path]:
    """What a folder holds, sorted; empty if it is missing or in a bucket."""
    return [] if in_bucket(folder) or not folder.is_dir() else sorted(folder.iterdir())


def files_in(folder: Path) -> Iterator[Path]:
    """Returns all files below a folder, sorted; none if it is missing.

    Raises:
      OSError: a folder can't be read.
      OutsideError: a link leads out of the folder, or there is a pipe, a socket or a device.
    """
    if in_bucket(folder):
        return iter(objects_in(folder))
    return iter(sorted(path for path in below(folder, _unless_missing) if path.is_file()))


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def digest(path: Path) -> tuple[int, str]:
    """Returns a file's size and SHA-256, or what a bucket's store reports."""
    if in_bucket(path):
        return stored_digest(path)
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), checksum


@contextlib.contextmanager
def written_here(path: Path) -> Iterator[Path]:
    """Yields a local file to write, and copies it to ``path`` if needed."""
    with _here(path) as here:
        yield here
        if here != path:
            copy(here, path)


@contextlib.contextmanager
def read_here(path: Path) -> Iterator[Path]:
    """Yields a local file to read: ``path`` or a copy of it."""
    with _here(path) as here:
        if here != path:
            copy(path, here)
        yield here


@contextlib.contextmanager
def _here(path: Path) -> Iterator[Path]:
    if not in_bucket(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / path.name
