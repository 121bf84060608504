"""The parts of a page: sections with text, plots and tables."""

import functools
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup, escape

from optima_tpu.runtime.program import program

NONE = "–"
"""The table cell for a missing number."""


class Key(NamedTuple):
    """A legend entry; ``series`` is None for a style of all colours."""

    label: str
    series: int | None = None
    dashed: bool = False


class Plots(NamedTuple):
    """Plots with one legend.

    Attributes:
      elements: (title, SVG).
      legend: legend entries; empty for maps.
      wide: each plot has its natural size and scrolls on a narrow page; otherwise plots are side by side where they fit.
      note: text below the plots.
    """

    elements: Sequence[tuple[str, Markup]]
    legend: Sequence[Key] = ()
    wide: bool = False
    note: str = ""


class Table(NamedTuple):
    """A table.

    Attributes:
      rows: cells as text, or as markup if part of the text is marked.
      note: text below the table.
      words: the cells are words, not numbers.
      total: the last row summarises the other rows.
      names: number of cells at the start of a row that name the row.
      runs: the other columns are runs, in the order of their colours.
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
      id: anchor for links.
      text: paragraphs; markup only for paragraphs that contain a command, see :func:`commands`.
      plots: plots with their legends.
      tables: tables that are always visible.
      folded: tables that a click opens.
      code: (label, text) of commands.
      files: (label, text) of files that a click opens.
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
    """Converts a paragraph to markup; text between backquotes becomes code."""
    return Markup(re.sub("`(.*?)`", r"<code>\1</code>", str(escape(text))))


def unbroken(text: str | Markup) -> Markup:
    """Markup in which no line ends inside the name of an option."""
    return Markup(re.sub(r"(?<![\w-])--[a-z][\w.-]*\w", r'<span class="option">\g<0></span>', str(escape(text))))


def command(name: str, *words: str) -> str:
    """A command of this program for a shell: "optima evaluate runs/x"."""
    return f"{program(name)} {shlex.join(words)}"


def without_folders(text: str) -> str:
    """Removes folders from a source: "file:/home/me/x.txt" is "file:x.txt".

    Each part of the text, between "; " as in the text on a mix, names at most one source, before any other "/". Names of data
    sets are kept: "tfds:mine/plain@/home/me/data" becomes "tfds:mine/plain@data". A source "hub:" has no folders.
    """
    # Folders may contain spaces. The text after the source has no "/", except in an option after its "?".
    return "; ".join(re.sub(r"\b(file:|npy:|tfds:[^@]*@)[^?]*/", r"\1", part) for part in text.split("; "))


@functools.cache
def template(name: str) -> jinja2.Template:
    """A template of this folder. A page escapes everything.

    Templates are cached, because jinja takes longer to compile a template than to fill it in.
    """
    # Names of models and paths come from the user.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=name.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"commands": commands, "unbroken": unbroken}
    return environment.get_template(name)
