"""The command ``optima report``: writes one page, prints a summary."""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from optima_tpu.errors import UserError
from optima_tpu.runtime import command, signals
from optima_tpu.runtime.buckets import as_path
from optima_tpu.runtime.outputs import refuse_foreign, refuse_no_folder
from optima_tpu.runtime.program import Parser, program

if TYPE_CHECKING:
    from optima_tpu.report.runs import FinishedRun


def read(arguments: Sequence[str]) -> tuple[argparse.Namespace, Path]:
    """The arguments and the page's path. Refuses a wrong argument."""
    chosen = make_parser().parse_args(arguments)
    return chosen, output_path(chosen.runs, chosen.output)


def run(request: tuple[argparse.Namespace, Path]) -> None:
    """Writes the page, and prints what it says in short."""
    chosen, path = request
    from optima_tpu.report.page import is_page, write_page
    from optima_tpu.report.progress import Terminal, say
    from optima_tpu.report.summary import print_summary

    console = Terminal()
    if chosen.output is not None or len(chosen.runs) > 1:
        refuse_foreign(path, is_page, chosen.force)
    runs = write_page(chosen.runs, path)
    signals.ended(0)
    if len(runs) == 1:
        print_summary(console, runs[0].report, runs[0].directory)
    else:
        _compare(console, runs)
    say(console, f"\nwrote {path}")


def output_path(runs: Sequence[str], output: str | None) -> Path:
    """The page's path: beside report.json, or ./report.html for several runs.

    Raises:
      UserError: ``output`` is a folder, or its folder does not exist.
    """
    from optima_tpu.report.page import PAGE
    from optima_tpu.report.runs import run_of

    if output is None:
        return run_of(runs[0]) / PAGE if len(runs) == 1 else Path(PAGE)
    path = as_path(output)
    if path.is_dir():
        raise UserError(f"expected --output with a file name, got the folder {path}; choose {path / PAGE}")
    refuse_no_folder("--output", path)
    return path


def _compare(console: Console, runs: "Sequence[FinishedRun]") -> None:
    from optima_tpu.report.progress import plain_table, say
    from optima_tpu.report.results import comparison

    section = comparison(runs)
    for line in section.text:
        say(console, f"{line}\n")
    for data in section.tables:
        console.print(plain_table(data.head, data.rows, data.names, data.words), markup=False, highlight=False)
        say(console, data.note)


def make_parser() -> Parser:
    """The parser of the command line."""
    from optima_tpu.report.page import PAGE

    parser = Parser(
        prog=program("report"),
        description="Writes one self-contained HTML page about finished runs: settings, results, time and memory, and the "
        "errors of every layer. Several runs are shown side by side. The page needs no network.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory, or its report.json")
    parser.add_argument("-o", "--output", metavar="FILE", help=f"output file (default: RUN/{PAGE}; ./{PAGE} for several runs)")
    parser.add_argument("--force", action="store_true", help="replace a file that this program did not write")
    return parser


main = functools.partial(command.main, "report")

if __name__ == "__main__":
    sys.exit(main())
