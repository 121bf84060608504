"""The one exception that is meant for the person at the terminal, and how others are told in a line."""

from collections.abc import Iterable


class UserError(Exception):
    """A problem that the user can act on, in one line: what was expected, what came, what to do.

    The command line prints the message alone, without a traceback, and exits with status 2. Anything else that is
    raised is a defect of this program and keeps its traceback.
    """


def some(names: Iterable[str], count: int = 4) -> str:
    """The first few names, for a message."""
    names = sorted(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def one_line(error: BaseException) -> str:
    """What an exception says, in one line of at most 400 characters; its name where it says nothing."""
    return " ".join(str(error).split())[:400] or type(error).__name__
