"""The command line that compares checksums: ``optima_tpu.verify``."""

import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from optima_tpu.errors import UserError, plural
from optima_tpu.runtime import command
from optima_tpu.runtime.buckets import as_path
from optima_tpu.runtime.light import lightly
from optima_tpu.runtime.program import Parser, program

if TYPE_CHECKING:
    from optima_tpu.pipeline.repair import Verified


def make_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(
        prog=program("verify"),
        description="Compares every file of a run directory or of an exported folder with the checksum that was written with it, "
        "and names the files that are damaged, missing, or were added later. Changes nothing. The exit status is 0 only if every "
        "file matches and none was added.",
    )
    parser.add_argument("folder", help="run directory, finished or stopped, or an exported folder such as its hf/")
    return parser


def read(arguments: Sequence[str]) -> Path:
    """The folder. Raises UserError if there is none."""
    folder = as_path(make_parser().parse_args(arguments).folder)
    if not folder.is_dir():
        raise UserError(f"expected a run directory or an exported folder, but {folder} is no folder: check the path")
    return folder


def run(folder: Path) -> int:
    """Prints the files that differ. Returns 0 if all match and are listed."""
    start = time.monotonic()
    result: Verified = lightly("optima_tpu.pipeline.repair:verified", folder)
    for name, why in result.damaged.items():
        print(f"damaged: {folder / name} {why}")
    for name in result.unlisted:
        print(
            f"not listed: {folder / name} was added after the folder was written, and a program that loads the folder may read it"
        )
    if result.left_over:
        print(result.left_over)
    seconds = max(time.monotonic() - start, 1e-3)
    verdict = f"{len(result.damaged)} damaged" if result.damaged else "all match"
    verdict += f", {len(result.unlisted)} not listed" if result.unlisted else ""
    print(f"{plural(result.files, 'file')}, {result.size / 1e9:.2f} GB, {verdict} ({result.size / 1e9 / seconds:.2f} GB/s)")
    if result.damaged:
        print(f"to mend it: {result.remedy}")
    if result.unlisted:
        print("remove the files that are not listed, unless you added them yourself")
    return 1 if result.damaged or result.unlisted else 0


main = functools.partial(command.main, "verify")

if __name__ == "__main__":
    sys.exit(main())
