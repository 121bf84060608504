"""The exception for a user's mistakes, and texts for messages."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """A problem that the user can act on, as a message of one line.

    The message says what was expected, what came, and what to do.

    The command line prints the message alone, without a traceback, and exits with status 2. Any other exception is a defect
    of this program and keeps its traceback.
    """


@contextlib.contextmanager
def panics_refused(message: str) -> Iterator[None]:
    """Raises UserError where a library written in Rust panics.

    ``tokenizers`` panics when a regular expression of a file blows up. A panic is no ``Exception``, so ``except Exception``
    does not catch it. The class of a panic cannot be imported, and only the name of its module is fixed.

    Args:
      message: says which file the library read, and what to do.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":
            raise
        raise UserError(f"{message} ({one_line(error)})") from error


@contextlib.contextmanager
def refusing(kinds: type[Exception] | tuple[type[Exception], ...], what: str, remedy: str = "") -> Iterator[None]:
    """Turns exceptions of ``kinds`` into a UserError; a UserError passes.

    Args:
      what: the message, or its beginning.
      remedy: what to do. With it the message is "WHAT (the library's own words): REMEDY".
    """
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{what} ({one_line(error)}): {remedy}" if remedy else what) from error


@contextlib.contextmanager
def reading(path: object) -> Iterator[None]:
    """Turns an error of the system into a UserError about the file.

    Args:
      path: what is read; the error may name a file in it.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path} can't be read: {error.strerror or error}") from error


@contextlib.contextmanager
def naming(name: object) -> Iterator[None]:
    """Puts a name, such as a file's, before the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def some(names: Iterable[str], count: int = 4) -> str:
    """The first ``count`` names in sorted order, as text for a message."""
    names = sorted(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def plural(count: int, noun: str) -> str:
    """ "1 row", "2 rows", "1,234 matrices", "3 passes".

    Every count that may be 1 goes through this function.
    """
    endings = {"s": "ses", "x": "ces"}
    return f"{count:,} {noun if count == 1 else noun[:-1] + endings.get(noun[-1], f'{noun[-1]}s')}"


def did_you_mean(got: object, known: Iterable[str], before: str = "", cutoff: float = 0.6) -> str:
    """ "; did you mean sparsegpt?", ignoring case; empty if no name is near.

    Args:
      before: what stands before the name, such as "optima ".
      cutoff: the least likeness of the two names, as ``difflib`` measures it.
    """
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(got).lower(), names, n=1, cutoff=cutoff)
    return f"; did you mean {before}{names[near[0]]}?" if near else ""


def one_line(error: BaseException) -> str:
    """The message of an exception in one line, or the name of its class."""
    return " ".join(str(error).split())[:400] or type(error).__name__


def legible(text: str, most: int = 2000) -> str:
    """A text in one line, its control characters escaped, its middle cut.

    An escape is such as ``\\n`` or ``\\x1b``. Only a text of more than ``most`` characters loses its middle.
    """
    text = text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
