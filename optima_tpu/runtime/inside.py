"""Confines readers to a folder: no name leads out of it or blocks them.

Folders travel between people, so a name in one of their files is data: a list of checksums, an index of weights, the record of a
data set. :func:`inside` is the only way from such a name to a path. :func:`own` is the rule for files that a reader lists itself.
The stand-alone ``models/checkpoints/packed.py`` repeats the rule, since it imports nothing from here.
"""

import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path, PureWindowsPath

from optima_tpu.errors import UserError
from optima_tpu.runtime.buckets import in_bucket

_LONGEST_PART, _LONGEST = 255, 1024
"""Bytes of a file's name, as file systems allow, and of all names on the way to it."""

# What a shell makes of <(COMMAND): the person has opened these for this very process. Nobody waits for /dev/null.
_OPENED = re.compile(r"/dev/stdin|/dev/null|(/dev|/proc/self)/fd/\d+")


class OutsideError(UserError):
    """A name or link leads out of its folder. A run never mends it."""


def inside(folder: Path, name: str, named_by: Path) -> Path:
    """Returns the path in ``folder`` of a file that another file names.

    Args:
      name: with ``/`` between folders.
      named_by: the file that names it, for the message.

    Raises:
      OutsideError: the name is absolute or climbs, is no name at all, or a link leads from it out of the folder; or it names a
        pipe, a socket or a device.
    """
    if why := _why_outside(name):
        shown = name if len(name) < 200 else f"{name[:100]}...{name[-100:]}"
        raise OutsideError(
            f"{named_by} names {shown!r}, which is not a file of its own folder ({why}): nothing there was read or changed; get "
            f"the folder again from where it was made, or take that name out of {named_by.name}"
        )
    return own(folder, folder / name)


def _why_outside(name: str) -> str:
    try:
        parts = name.encode().split(b"/")
    except UnicodeEncodeError:
        return "it is no Unicode text"
    if name.startswith("/") or PureWindowsPath(name).drive:
        return "it is absolute"
    if "\0" in name or "\\" in name:
        return "it has a zero byte or a backslash"
    if len(name.encode()) > _LONGEST or any(len(part) > _LONGEST_PART for part in parts):
        return "it is too long"
    return "it has a part that is empty, . or .." if {b"", b".", b".."} & {*parts} else ""


def own(folder: Path, path: Path) -> Path:
    """Returns ``path``, a file or folder below ``folder``; it need not exist.

    Raises:
      OutsideError: a link leads from it out of the folder, or it is a pipe, a socket or a device. A folder of the hub's cache may
        have links to the blobs beside it.
    """
    if in_bucket(folder):
        return path
    step = folder
    for part in path.relative_to(folder).parts:
        step = step / part
        if step.is_symlink():
            target, home = Path(os.path.realpath(step)), Path(os.path.realpath(folder))
            # The hub's cache has models--ORG--NAME/snapshots/REVISION/FILE, which is a link to models--ORG--NAME/blobs/HASH.
            homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
            if not any(map(target.is_relative_to, homes)):
                raise OutsideError(f"{step} is a link to {target}, outside of the folder: copy that file into the folder")
    refuse_special(path)
    return path


def refuse_special(path: Path) -> None:
    """Refuses pipes, sockets and devices: a reader may wait for them forever.

    Pipes that this process was started with pass: ``/dev/stdin``, and what a shell makes of ``<(COMMAND)``. So does
      ``/dev/null``.

    Raises:
      OutsideError: it is one. A path that does not exist passes.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # whoever opens it says what is wrong with it
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or _OPENED.fullmatch(str(path))):
        raise OutsideError(f"expected a file, but {path} is a pipe, a socket or a device: copy its contents into a file")


def below(folder: Path, onerror: Callable[[OSError], None] | None = None) -> Iterator[Path]:
    """Yields all files below a folder, each :func:`own`; enters no links."""
    for parent, folders, names in os.walk(folder, onerror=onerror):
        for name in folders:
            own(folder, Path(parent, name))
        for name in names:
            yield own(folder, Path(parent, name))


def refuse_links(directory: Path) -> None:
    """Checks a run directory before a program reads or changes it.

    Raises:
      OutsideError: one of its folders is a link, a link leads out of it, or it holds a pipe, a socket or a device.
    """
    if in_bucket(directory) or not directory.is_dir():
        return
    for path in directory.iterdir():
        if path.is_symlink() and path.is_dir():
            raise OutsideError(f"{path} is a link to a folder, expected the folder itself: move {os.path.realpath(path)} there")
    for _ in below(directory):  # reading them is the check
        pass
