"""Writing that survives: a file or folder is either complete or not there, also after kill -9 or a power cut.

On a file system it is written under another name, waited for, and renamed. In a bucket (``optima_tpu.runtime.buckets``) a file is one
object, which appears whole; a folder is written under its own name, and counts as not there while an object beside it says so.
That object has the name that the unfinished folder has on a file system.
"""

import contextlib
import glob
import hashlib
import json
import math
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import filelock
import numpy as np
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory

from optima_tpu.errors import UserError
from optima_tpu.runtime.buckets import copy, in_bucket, objects_in, refusal, refuse_other, stored_digest, take_over
from optima_tpu.runtime.processes import first_only

PARTIAL = ".partial"
"""Suffix of what is still being written. Such a name may be deleted by whoever writes the real one."""

_ORBAX = (".partial_save*", ".orbax-checkpoint-tmp*")  # what Orbax puts behind the name of a folder while it writes to it

LOCK = "run.lock"
"""Held by the process that works in a directory."""

# TensorStore and safetensors report a failed system call in the text of an error of their own.
_ERROR_NUMBER = re.compile(r"os[ _]error(?:_code=')? ?(\d+)")


@contextlib.contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """Turns what the operating system refuses while ``path`` is written into one line for the person.

    Args:
      path: what is being written.
      remedy: what is still intact and what to do.

    Raises:
      UserError: the disk is full, the folder is not writable, the bucket refuses, ...; other exceptions pass unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number is None and (match := _ERROR_NUMBER.search(str(error))):
            number = int(match[1])
        if number is None and in_bucket(path) and (answer := refusal(error)):
            raise UserError(f"could not write {path}: {answer}; {remedy}") from error
        if number is None:
            raise
        raise UserError(f"could not write {path}: {os.strerror(number)}; {remedy}") from error


def refuse_unreachable(directory: Path) -> None:
    """Tries to write into a bucket, which takes a moment and may spare hours. A folder is looked at when it is made.

    Raises:
      UserError: there is no such bucket, or no permission; or the path has characters with which Orbax, which looks for its
        files by patterns below it, finds none of them.
    """
    if not in_bucket(directory) and (found := re.search(r"[\[\\]", str(directory.absolute()))):
        raise UserError(
            f"expected a directory without {found[0]} in its path, in which Orbax would not find its own files, got "
            f"{directory.absolute()}; choose another --output"
        )

    def attempt():
        with writing(directory, "look at the bucket's name, and at `gcloud auth application-default login`"):
            (directory / (LOCK + PARTIAL)).write_bytes(b"")
            remove(directory / (LOCK + PARTIAL))

    if in_bucket(directory):
        first_only(attempt)


@contextlib.contextmanager
def only_program(directory: Path) -> Iterator[None]:
    """Keeps other programs out of an existing directory. The system ends it with process 0, also by kill -9.

    A bucket has nothing that ends with a program. There the last one that comes is let in, see :func:`still_only_program`.

    Raises:
      UserError: another program is in it.
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

    first_only(acquire)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def in_turn(directory: Path) -> Iterator[None]:
    """Lets one program after the other into a folder on a file system, which is made where there is none."""
    directory.mkdir(parents=True, exist_ok=True)
    with _lock(directory, timeout=-1):
        yield


def _lock(directory: Path, timeout: float) -> filelock.BaseFileLock:
    """The lock of a folder, which ends with its program; ``timeout`` in seconds, below 0 as long as it takes."""
    # The soft kind would outlive a program that was killed, and nobody would remove it.
    return filelock.FileLock(directory / LOCK, timeout=timeout, fallback_to_soft=False)


def user_cache() -> Path:
    """OPTIMA_TPU_CACHE, or optima-tpu in XDG_CACHE_HOME, which is ~/.cache where it is not set. It may not be there yet."""
    home = os.environ.get("OPTIMA_TPU_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "optima-tpu"
    return Path(home).expanduser()


def still_only_program(directory: Path) -> None:
    """To be called before something in a directory is replaced.

    Raises:
      UserError: the directory is in a bucket, and another program has entered :func:`only_program` since this one did.
    """
    if in_bucket(directory):
        refuse_other(directory / LOCK)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Puts off SIGTERM until what is inside is done: a save is finished and not begun anew after the restart."""
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield
        return
    waiting = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if waiting:
            signal.raise_signal(signal.SIGTERM)


def sync(path: Path) -> None:
    """Waits until a file, or a folder with everything in it, is on the disk."""
    if path.is_dir():
        for child in path.iterdir():
            sync(child)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def staged(path: Path) -> Path:
    """The name under which a file or folder is written until :func:`commit`."""
    return path if in_bucket(path) else path.with_name(path.name + PARTIAL)


def begin(path: Path) -> Path:
    """Removes what an interrupted write of ``path`` left, Orbax's own temporary folders beside ours included.

    Returns:
      :func:`staged`, to which it may be written now.
    """
    partial = path.with_name(path.name + PARTIAL)
    if in_bucket(path):
        if partial.exists():
            remove(path)
        partial.write_bytes(b"")
    else:
        remove(partial)
        for suffix in _ORBAX:
            for left in path.parent.glob(glob.escape(partial.name) + suffix):
                remove(left)
    return staged(path)


def commit(partial: Path, final: Path) -> None:
    """Gives a completely written file or folder its name, once its contents are on the disk.

    An existing file ``final`` is replaced, an existing folder must be empty.
    """
    if in_bucket(final):
        remove(final.with_name(final.name + PARTIAL))
        return
    sync(partial)
    os.replace(partial, final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the new name, not the folder's other contents
    finally:
        os.close(descriptor)


def complete(path: Path) -> bool:
    """Whether a file or folder that is written from :func:`begin` to :func:`commit` is there."""
    return path.exists() and not (in_bucket(path) and path.with_name(path.name + PARTIAL).exists())


def remove(path: Path) -> None:
    """Removes a file, or a folder with everything in it, if it is there."""
    if in_bucket(path):
        path.rmtree(missing_ok=True)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file, or nothing."""
    if in_bucket(path):
        path.write_bytes(data)
        return
    partial = staged(path)
    partial.write_bytes(data)
    commit(partial, path)


def read_record(path: Path) -> Any | None:
    """What a small record holds; None where it is not there, or damaged: then it is made again like one that never was."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def files_in(folder: Path) -> Iterator[Path]:
    """Every file in a folder and the folders in it, sorted; none where there is no folder."""
    return iter(objects_in(folder) if in_bucket(folder) else sorted(path for path in folder.rglob("*") if path.is_file()))


def digest(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file, of an object in a bucket its size and the checksum that the store has of it."""
    if in_bucket(path):
        return stored_digest(path)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), found


@contextlib.contextmanager
def written_here(path: Path) -> Iterator[Path]:
    """A file on this machine, for libraries that write to no other, that is ``path`` or becomes it at the end."""
    with _here(path) as here:
        yield here
        if here != path:
            copy(here, path)


@contextlib.contextmanager
def read_here(path: Path) -> Iterator[Path]:
    """A file on this machine, for libraries that read no other, that is ``path`` or a copy of it."""
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


class Tensors(Protocol):
    """Named tensors that are not read yet."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype: ...


def split_by_size(source: Tensors, names: Iterable[str], limit: int | str, pattern: str = "{suffix}") -> StateDictSplit:
    """Assigns tensors to files of at most ``limit`` bytes ("5GB"), in order. A larger tensor gets a file of its own."""
    sizes = {name: math.prod(source.shape(name)) * source.dtype(name).itemsize for name in names}
    return split_state_dict_into_shards_factory(sizes, get_storage_size=int, max_shard_size=limit, filename_pattern=pattern)
