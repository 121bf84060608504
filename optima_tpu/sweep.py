"""The command line of a sweep: ``python -m optima_tpu.sweep FILE``."""

import argparse
import functools
import shlex
import sys
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

from optima_tpu.errors import UserError, plural
from optima_tpu.runtime import command, signals
from optima_tpu.runtime.program import Parser, program

if TYPE_CHECKING:
    from rich.console import Console

    from optima_tpu.pipeline.sweep.cells import Cell
    from optima_tpu.pipeline.sweep.grid import CellGrid

_PROGRAM = program("sweep")
_PRINTED = 8
"""Unusual findings that the terminal lists; table.md has all of them."""


class AskedSweep(NamedTuple):
    """The cells that a command line asks for.

    Attributes:
      options: the options of the sweep itself.
      settings: the settings of its runs.
      grid: all cells.
      cells: the cells to run.
    """

    options: argparse.Namespace
    settings: Sequence[str]
    grid: "CellGrid"
    cells: "tuple[Cell, ...]"


def read(argv: Sequence[str]) -> AskedSweep:
    """The sweep that a command line asks for.

    Raises:
      UserError: an option, the file or a setting is wrong.
    """
    from optima_tpu.pipeline.sweep.grid import read_grid

    parser = make_parser()
    options, settings = _parse(parser, list(argv))
    grid = read_grid(options.file, settings, options.output, parser.names)
    _refuse_devices(grid)
    return AskedSweep(options, settings, grid, _chosen(grid, options.only))


def run(request: AskedSweep) -> int:
    """Runs the cells and writes their tables. Returns 1 if cells failed."""
    options, settings, grid, chosen = request
    command.take_devices(grid.cells[0].config, alone=True)
    # Imported only now: the imports of these modules query the devices.
    from optima_tpu.models.checkpoints.orbax import quiet_orbax
    from optima_tpu.pipeline.sweep.runner import Sweep
    from optima_tpu.pipeline.sweep.tables import failure_lines, layout
    from optima_tpu.report.progress import Terminal, plain_table, say, show
    from optima_tpu.report.summary import labelled

    quiet_orbax()
    sweep = Sweep(grid, () if options.dry_run else chosen, options.keep_checkpoints, options.force)
    console = Terminal()
    if options.dry_run:
        _list(console, grid, chosen, sweep.finished)
        return 0
    if sweep.finished:
        say(console, f"resuming  {len(sweep.finished)} of {plural(len(grid.cells), 'cell')} done")
    words = shlex.join(_command(options, settings))
    sweep.run(console, words)
    files = sweep.write(words)
    failures = failure_lines(sweep.results)
    signals.ended(1 if failures else 0)
    console.print()
    table = layout(grid, sweep.results)
    show(console, plain_table(table.head, table.rows, table.names))
    remarks = sweep.remarks
    more = [f"{len(remarks) - _PRINTED} more in {files['table.md']}"] * (len(remarks) > _PRINTED)
    lines = [
        *labelled("published", sweep.published),
        *labelled("unusual", remarks[:_PRINTED] + more),
        *(f"failed  {line}" for line in failures),
    ]
    say(console, "\n".join([table.caption, "", *lines, *map(str, files.values())]))
    return 1 if failures else 0


def make_parser() -> Parser:
    """The parser of the sweep's own options."""
    from optima_tpu.pipeline.sweep import grid as grids

    parser = Parser(
        prog=_PROGRAM,
        usage=f"{_PROGRAM} FILE [--SETTING VALUE ...] [--output DIR] [--only TEXT] [--dry-run]",
        description="Runs a table of masks x updates x patterns over one model, or resumes it, and writes it as "
        "Markdown, CSV and JSON.\n\n" + grids.__doc__.partition("\n\n")[2].rstrip(),
        epilog="A setting of optima prune that no label sets overrides the file's, in all cells: --model org/name --mesh 4x2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="YAML file of the table, as shown above")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="directory for the tables and the cells (default: the file's output, or runs/tables/FILE-MODEL)",
    )
    parser.add_argument(
        "--only",
        metavar="TEXT",
        action="append",
        default=[],
        help="run only the cells whose "
        "name contains this text, such as 'sparsegpt + cg'; if repeated, the cells that contain any of the texts",
    )
    parser.add_argument("--dry-run", action="store_true", help="list the cells without running them")
    parser.add_argument(
        "--keep-checkpoints",
        action="store_true",
        help="keep the pruned models (default: keep only the reports of finished cells)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace files in the directory that have the names of tables and are none of a sweep",
    )
    return parser


def _parse(parser: Parser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits the arguments into options of the sweep and of its runs."""
    if not {"-h", "--help"} & set(argv) and (not argv or argv[0].startswith("-")):
        got = f"{argv[0]}{parser.nearest(argv[0], 'FILE ')}" if argv else "nothing"
        raise UserError(f"expected the file of the sweep as first argument, got {got}; see {_PROGRAM} --help")
    options, settings = parser.parse_known_args(argv)
    for word in settings:
        if word.partition("=")[0] in ("--config", "--print_config", "--print-config"):
            raise UserError(f"a sweep has no {word}: write the settings of its runs into {options.file}, under run")
    return options, settings


def _command(options: argparse.Namespace, settings: Sequence[str]) -> list[str]:
    """The command that makes the whole table."""
    output = ["--output", options.output] if options.output is not None else []
    return [*_PROGRAM.split(), options.file, *settings, *output]


def _chosen(grid: "CellGrid", only: Sequence[str]) -> "tuple[Cell, ...]":
    for text in only:
        if not any(text in str(cell) for cell in grid.cells):
            raise UserError(
                f"expected --only with a part of a cell's name, such as {str(grid.cells[0])!r}, got "
                f"{text!r}; --dry-run lists them all"
            )
    return tuple(cell for cell in grid.cells if not only or any(text in str(cell) for text in only))


def _refuse_devices(grid: "CellGrid") -> None:
    counts = {cell.config.cpu_devices for cell in grid.cells}
    if len(counts) > 1:
        raise UserError(f"expected one cpu_devices for all cells, which run in one process, got {', '.join(map(str, counts))}")
    first = grid.cells[0].config
    if (first.coordinator, first.num_processes, first.process_id) != (None, None, None):
        raise UserError(
            "expected a sweep in one process, got --coordinator, --num_processes or --process_id: run single cells "
            "in several processes with optima_tpu.launch (--dry-run lists their settings)"
        )


def _list(console: "Console", grid: "CellGrid", chosen: "Sequence[Cell]", finished: "Collection[Cell]") -> None:
    from optima_tpu.pipeline.sweep.cells import differences
    from optima_tpu.report.progress import say

    for number, (cell, different) in enumerate(zip(grid.cells, differences(grid.cells), strict=True), 1):
        state = "finished" if cell in finished else "to run" if cell in chosen else "not chosen"
        say(console, f"cell {number} of {len(grid.cells)}: {cell}: {state}\n    {different}")


main = functools.partial(command.main, "sweep")

if __name__ == "__main__":
    sys.exit(main())
