"""The command line that unpacks a packed export: ``optima_tpu.unpack``."""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from optima_tpu.errors import UserError
from optima_tpu.runtime import command, signals
from optima_tpu.runtime.buckets import as_path, refuse_bucket
from optima_tpu.runtime.program import Parser, program


def make_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(
        prog=program("unpack"),
        description="Writes the folder that transformers loads, from a folder that optima export --packed wrote. Every file is "
        "the same as in the plain export, byte for byte.",
    )
    parser.add_argument("packed", help="packed folder")
    parser.add_argument("out", help="folder to write; must not exist, or must be empty")
    return parser


def read(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments. Raises UserError if one of them is wrong."""
    return make_parser().parse_args(arguments)


def run(chosen: argparse.Namespace) -> None:
    """Unpacks a folder, and prints where to."""
    from optima_tpu.runtime.files import left_over

    if message := left_over(as_path(chosen.out)):
        print(message)
    unpack(chosen.packed, chosen.out)
    signals.ended(0)
    print(f"wrote {chosen.out}")


def unpack(packed: str | Path, out: str | Path) -> None:
    """Writes the plain folder, which gets its name only when complete.

    At that time everything in the folder has been flushed to disk.

    Raises:
      UserError: the packed folder is damaged, ``out`` is in use, one of them is in a bucket, or the disk is full.
    """
    from optima_tpu.runtime.checksums import write_sums
    from optima_tpu.runtime.files import making, refuse_occupied, writing

    packed, out = as_path(packed), as_path(out).resolve()
    refuse_bucket(packed, "to unpack", "copy it to a disk and unpack it there")
    refuse_bucket(out, "to unpack to", "unpack to a disk, then copy the folder")
    if out.is_relative_to(packed.resolve()) and out != packed.resolve():
        raise UserError(f"expected a folder outside of the packed folder {packed} to unpack to, got {out}; choose another folder")
    refuse_occupied(out, "unpack to")
    # Imports transformers, which --help does not wait for.
    from optima_tpu.models.checkpoints.packed import INDEX, Packed, PackedError

    if not packed.exists():
        raise UserError(f"there is no {packed}: check the path")
    if packed.is_file():
        raise UserError(f"expected a packed folder, got the file {packed}: give {packed.parent}")
    if (packed / "run.json").is_file():
        raise UserError(f"{packed} is a run: {program('export')} {packed} OUT --packed makes a packed folder of it")
    lost_index = any(packed.glob("packed-*.safetensors"))
    if not (packed / INDEX).is_file() and (packed / "config.json").is_file() and not lost_index:
        raise UserError(f"{packed} is a plain folder already: there is nothing to unpack, use it as it is")
    with writing(out, "nothing was left there; make room or choose another folder, and repeat the command"):
        try:
            opened = Packed(packed)
            with making(out) as partial:
                opened.unpack(partial)
                write_sums(partial)
        except PackedError as error:
            raise UserError(str(error)) from error


main = functools.partial(command.main, "unpack")

if __name__ == "__main__":
    sys.exit(main())
