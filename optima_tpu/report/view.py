"""What a page is made of: sections of words, plots and tables."""

import re
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

from optima_tpu.runtime.program import program

NONE = "–"
"""What stands in a table where there is no number."""


class Tile(NamedTuple):
    """A number that a person looks for first."""

    name: str
    value: str
    note: str


class Key(NamedTuple):
    """What a colour, or a kind of line, stands for; ``series`` is None for a kind of line that all colours have."""

    label: str
    series: int | None = None
    dashed: bool = False


class Plots(NamedTuple):
    """Plots with one legend.

    Attributes:
      elements: (title, SVG).
      legend: nothing for maps.
      wide: each in its natural size, scrolled where the page is narrower; else as many side by side as there is room for.
      note: below them.
    """

    elements: Sequence[tuple[str, Markup]]
    legend: Sequence[Key] = ()
    wide: bool = False
    note: str = ""


class Table(NamedTuple):
    """A table.

    Attributes:
      caption: above it.
      head: names of the columns.
      rows: of texts; markup only where something in a text is marked.
      note: below it.
      words: the cells are words, not numbers.
      total: the last row sums up the others.
      names: so many cells at the beginning of a row are its name.
      runs: the other columns are the runs, in the order of their colours.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    words: bool = False
    total: bool = False
    names: int = 1
    runs: bool = False


class Section(NamedTuple):
    """A part of the page, laid out in the order of these attributes.

    Attributes:
      id: for links to it.
      title: above it.
      text: paragraphs; markup only where a command is in them, see :func:`commands`.
      plots: with their legends.
      tables: open ones.
      folded: tables that a click opens.
      code: (what it is, text) of commands.
      files: (what it is, text) of files, folded.
    """

    id: str
    title: str
    text: Sequence[str | Markup] = ()
    plots: Sequence[Plots] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = ()
    code: Sequence[tuple[str, str]] = ()
    files: Sequence[tuple[str, str]] = ()


def commands(text: str) -> Markup:
    """A paragraph in which what stands between backquotes is a command or a setting."""
    return Markup(re.sub("`(.*?)`", r"<code>\1</code>", str(escape(text))))


def command(name: str, *words: str) -> str:
    """A command of this program for a shell: "optima evaluate runs/x"."""
    return f"{program(name)} {shlex.join(words)}"


def without_folders(text: str) -> str:
    """ "40 windows of file:/home/me/x.txt" as "40 windows of file:x.txt", for a text that names one source, before any other "/".

    The names of data sets stay whole: "tfds:mine/plain@/home/me/data" is "tfds:mine/plain@data", and "hub:" has no folders.
    """
    # Folders may have spaces; what follows the source has no "/", but an option behind its "?" may.
    return re.sub(r"\b(file:|npy:|tfds:[^@]*@)[^?]*/", r"\1", text)


def figure(elements: Sequence[tuple[str, str]], legend: Sequence[Key] = (), *, wide: bool = False, note: str = "") -> Plots:
    """Plots from titles and SVG texts of ``report.plots``, which are safe to put into a page."""
    return Plots([(title, Markup(text)) for title, text in elements], legend, wide, note)
