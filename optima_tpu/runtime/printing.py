"""Prints to a standard output that may be a closed pipe or a full disk.

Imports nothing else of this package that takes long.
"""

import argparse
import os
import sys
from typing import Any

UNREAD = "nobody reads the output any more, as behind `| head`: write it to a file"


def printed(text: str = "", end: str = "\n") -> OSError | None:
    """Prints a text. Returns the error of the standard output, else None.

    After an error, what is printed goes nowhere: otherwise Python's own flush at the end of the process would fail, too.
    """
    if sys.stdout is None:  # a process without one prints nothing
        return None
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None


def refused() -> OSError | None:
    """The error of the standard output for the text so far, or None."""
    return printed(end="")


def status_of_text(error: OSError | None) -> int:
    """The exit status of a command that only prints: 0, or 2 if it could not.

    A reader that closes the pipe has read enough, so that is no error.

    Args:
      error: from :func:`printed`.
    """
    if error is None or isinstance(error, BrokenPipeError):
        return 0
    print(f"error: the output could not be written: {error.strerror}", file=sys.stderr, flush=True)
    return 2


class PrintsHelp(argparse.ArgumentParser):
    """A parser that ends by :func:`status_of_text` if its help fails."""

    def print_help(self, file: Any = None) -> None:
        if file is None and (error := printed(self.format_help(), end="")):
            sys.exit(status_of_text(error))
        elif file is not None:
            super().print_help(file)
