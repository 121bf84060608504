"""Command line that compares a model with torch: ``optima_tpu.check``."""

import argparse
import functools
import sys
from collections.abc import Sequence

from optima_tpu.errors import UserError
from optima_tpu.runtime import command
from optima_tpu.runtime.bounds import Bound
from optima_tpu.runtime.program import Parser, program


def make_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(
        prog=program("check"),
        description="Opens a model and runs one window of random tokens in float32, by its code in torch and by this program: by "
        "its family where it has one here, and in the general way, which takes that code onto JAX. Says how far the logits are "
        "apart, which layers would be pruned, and the memory of a block. Writes nothing. The exit status is 0 only if a way "
        "agrees with torch.",
    )
    parser.add_argument("model", help="a Hugging Face folder, or a hub id (org/name)")
    parser.add_argument("--length", type=int, default=128, help="tokens of the window (default: 128)")
    return parser


def read(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments.

    Raises:
      UserError: one of them is wrong, or there is no such model.
    """
    chosen = make_parser().parse_args(arguments)
    Bound(2, 1 << 20).refuse("--length", chosen.length)
    from optima_tpu.config.model_spec import refuse_missing  # imports JAX, except in a rehearsal

    refuse_missing(chosen.model)
    if chosen.model.startswith("wheel:") or chosen.model.endswith(".gguf"):
        raise UserError(f"expected a folder or a hub id, whose files torch reads too, got {chosen.model}")
    return chosen


def run(chosen: argparse.Namespace) -> int:
    """Prints how far each way is from torch. Returns 0 if one way agrees."""
    from optima_tpu.models.general import checked

    agreement = checked(chosen.model, chosen.length)
    print("\n".join(agreement.lines))
    return 0 if agreement.agrees else 1


main = functools.partial(command.main, "check")

if __name__ == "__main__":
    sys.exit(main())
