"""Draws the paper's figures from finished runs: ``optima_tpu.figures``.

layer-errors RUN [RUN ...] -o layer_errors.png     its Figure 2: every layer's error after the update over its error before
windows SWEEP -o windows.png                       its Figure 3: perplexity against calibration windows
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from optima_tpu.errors import UserError
from optima_tpu.runtime import command, signals
from optima_tpu.runtime.outputs import refuse_foreign, refuse_no_folder
from optima_tpu.runtime.program import Parser, program

_SUFFIXES = (".png", ".svg", ".pdf")


def read(arguments: Sequence[str]) -> tuple[argparse.Namespace, Path]:
    """The arguments and the figure's path. Refuses a wrong argument."""
    chosen = make_parser().parse_args(arguments)
    return chosen, check_output(chosen.output)


def run(request: tuple[argparse.Namespace, Path]) -> None:
    """Draws the figure, and prints where it is."""
    chosen, path = request
    from optima_tpu.report import curves, figures  # matplotlib is slow, and --help and errors need not wait

    refuse_foreign(path, curves.is_figure, chosen.force)
    if chosen.figure == "layer-errors":
        errors = curves.layer_errors(chosen.runs, chosen.against)
        drawn, remarks = figures.layer_errors(errors), errors.remarks
    else:
        counts = curves.windows(chosen.sweep)
        drawn, remarks = figures.windows(counts), counts.remarks
    figures.write(drawn, path)
    signals.ended(0)
    for remark in remarks:
        print(remark)
    print(f"wrote {path}")


def check_output(path: str | Path) -> Path:
    """Checks that a figure can be written to ``path``, and returns ``path``.

    Raises:
      UserError: the folder is missing, or the suffix is not one of .png, .svg and .pdf.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(f"expected --output to end in one of {', '.join(_SUFFIXES)}, got {path}")
    refuse_no_folder("--output", path)
    if path.is_dir():
        raise UserError(f"expected --output to be a file, got the folder {path}")
    return path


def make_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(prog=program("figures"), description="Draws the paper's figures from finished runs.")
    commands = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    layers = commands.add_parser(
        "layer-errors",
        help="every layer's error after the update over its error before (the paper's Figure 2)",
        description="Plots for every layer, block by block, the error after the update divided by the error before it, on the "
        "same stream: on the calibration text, and dashed on held-out text. Below 1 the update helps; exactly 1 "
        "means that the update was not accepted.",
    )
    layers.add_argument("runs", nargs="+", metavar="RUN", help="run directory, or its report.json")
    layers.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="RUN",
        help="divide by the final errors of other runs instead: one run for all, or one for each RUN",
    )
    windows = commands.add_parser(
        "windows",
        help="perplexity against the number of calibration windows (the paper's Figure 3)",
        description="Plots the perplexity of the pruned model against the number of calibration windows, for each mask and "
        "update of a sweep with several such numbers: mean and standard deviation over seeds.",
    )
    windows.add_argument("sweep", metavar="SWEEP", help="directory of a sweep, or its results.json")
    for figure in (layers, windows):
        figure.add_argument("-o", "--output", required=True, metavar="FILE", help="file to write: .png, .svg or .pdf")
        figure.add_argument("--force", action="store_true", help="replace a file that this program did not write")
    return parser


main = functools.partial(command.main, "figures")

if __name__ == "__main__":
    sys.exit(main())
