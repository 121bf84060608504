"""The command line of an export: ``python -m optima_tpu.export RUN_DIR OUT``."""

import argparse
import sys

import jax

from optima_tpu.models.checkpoints.export import export
from optima_tpu.models.checkpoints.orbax import quiet_orbax
from optima_tpu.runtime.command import guarded
from optima_tpu.runtime.program import program


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status, see :func:`guarded`."""
    return guarded(lambda: _export(arguments), "the same command does it again")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog=program("export"),
        description="Writes the folder that transformers loads, from a finished pruning run. The dense model is not needed.",
    )
    parser.add_argument("run_dir", help="output directory of the run")
    parser.add_argument("out", help="folder to write; must not exist, or must be empty")
    parser.add_argument("--max-shard-size", default="5GB", help="largest size of a weight file (default: %(default)s)")
    return parser


def _export(arguments: list[str] | None) -> None:
    chosen = make_parser().parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # Orbax starts JAX, and an accelerator may be busy with another run
    quiet_orbax()
    export(chosen.run_dir, chosen.out, chosen.max_shard_size)
    print(f"wrote {chosen.out}")


if __name__ == "__main__":
    sys.exit(main())
