"""Writing that survives: a file or folder is either complete or not there, also after kill -9 or a power cut."""

import contextlib
import math
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import filelock
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory

from optima_tpu.errors import UserError
from optima_tpu.processes import first_only

PARTIAL = ".partial"
"""Suffix of what is still being written. Such a name may be deleted by whoever writes the real one."""

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
      UserError: the disk is full, the folder is not writable, ...; other exceptions pass unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number is None and (match := _ERROR_NUMBER.search(str(error))):
            number = int(match[1])
        if number is None:
            raise
        raise UserError(f"could not write {path}: {os.strerror(number)}; {remedy}") from error


@contextlib.contextmanager
def only_program(directory: Path) -> Iterator[None]:
    """Keeps other programs out of an existing directory. The system ends it with process 0, also by kill -9.

    Raises:
      UserError: another program is in it.
    """
    lock = filelock.FileLock(directory / LOCK, timeout=0)

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


def commit(partial: Path, final: Path) -> None:
    """Gives a completely written file or folder its name, once its contents are on the disk.

    An existing file ``final`` is replaced, an existing folder must be empty.
    """
    sync(partial)
    os.replace(partial, final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the new name, not the folder's other contents
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file, or nothing."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_bytes(data)
    commit(partial, path)


def remove_partial(path: Path) -> None:
    """Removes what an interrupted write of ``path`` left, Orbax's own temporary folders beside ours included."""
    for left in path.parent.glob(path.name + PARTIAL + "*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def split_by_size(source, names: Iterable[str], limit: int | str, pattern: str = "{suffix}") -> StateDictSplit:
    """Assigns tensors to files of at most ``limit`` bytes ("5GB"), in order. A larger tensor gets a file of its own."""
    sizes = {name: math.prod(source.shape(name)) * source.dtype(name).itemsize for name in names}
    return split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, max_shard_size=limit, filename_pattern=pattern)
