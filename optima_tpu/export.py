"""The command line of an export: ``python -m optima_tpu.export RUN OUT``."""

import argparse
import contextlib
import functools
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from optima_tpu.errors import UserError
from optima_tpu.runtime import command, printing, signals
from optima_tpu.runtime.buckets import as_path
from optima_tpu.runtime.program import Parser, program

if TYPE_CHECKING:
    from optima_tpu.models.checkpoints.packed import Packed


def make_parser() -> Parser:
    """The parser of the command line."""
    from optima_tpu.models.checkpoints import forms

    parser = Parser(
        prog=program("export"),
        description="Writes the folder that transformers loads, from a finished pruning run. The dense model is not needed.",
    )
    parser.add_argument("run_dir", metavar="RUN", help="output directory of the run")
    parser.add_argument("out", metavar="OUT", help="folder to write; must not exist, or must be empty, or holds this export")
    parser.add_argument("--max-shard-size", default="5GB", help="largest size of a weight file (default: %(default)s)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--packed",
        dest="form",
        action="store_const",
        const=forms.PackedForm.name,
        default=forms.Plain.name,
        help="store each pruned matrix as a bit mask and compressed values: a smaller folder that this program reads as it is, "
        "and that optima unpack makes the plain folder of",
    )
    form.add_argument(
        "--format",
        dest="form",
        choices=tuple(forms.FORMS),
        default=forms.Plain.name,
        help="; ".join(f"{name}: {form.text}" for name, form in forms.FORMS.items()) + " (default: %(default)s)",
    )
    parser.add_argument(
        "--unscanned",
        dest="scan_layers",
        action="store_false",
        help="with --format maxtext: every block has arrays of its own (scan_layers: false), where all blocks are stacked "
        "otherwise",
    )
    return parser


def read(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments. Raises UserError if one of them is wrong."""
    parser = make_parser()
    chosen, rest = parser.parse_known_args(arguments)
    if any(re.match(r"--quantize\b", word) for word in rest):
        raise UserError(
            f"--quantize is a setting of {program('prune')}, which chooses the integers: prune again with it and another "
            "--output, then export that run"
        )
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return chosen


def run(chosen: argparse.Namespace) -> None:
    """Exports a run, and prints what the folder is good for."""
    import jax

    from optima_tpu.models.checkpoints import forms
    from optima_tpu.models.checkpoints.export import export
    from optima_tpu.models.checkpoints.orbax import quiet_orbax
    from optima_tpu.models.checkpoints.packed import Packed
    from optima_tpu.report.file import weights_on_disk
    from optima_tpu.runtime.files import left_over

    if message := left_over(as_path(chosen.out)):
        print(message)
    jax.config.update("jax_platforms", "cpu")  # Orbax starts JAX, and an accelerator may be busy with another run
    quiet_orbax()
    options = forms.Options(chosen.max_shard_size, chosen.scan_layers)
    with _alone_in_run(as_path(chosen.run_dir).resolve(), as_path(chosen.out).resolve()):
        outcome = export(chosen.run_dir, chosen.out, options, form=chosen.form, say=printing.printed)
    signals.ended(0)
    if not outcome.anew:
        return
    print(f"wrote {chosen.out}")
    form = forms.FORMS[chosen.form]
    if form.next:
        print(form.next.replace("FOLDER", str(as_path(chosen.out).absolute())))
    if chosen.form == forms.PackedForm.name:
        print(sizes(Packed(Path(chosen.out))))
    elif form.compact:
        print(_weight_files(form.name, outcome.dense, weights_on_disk(as_path(chosen.out), form.weights)))


def _alone_in_run(run: Path, out: Path) -> contextlib.AbstractContextManager[None]:
    """Locks the run directory while its own folder hf/ is written."""
    from optima_tpu.models.checkpoints.export import FOLDER
    from optima_tpu.runtime.files import only_program

    return only_program(run) if run.is_dir() and out == run / FOLDER else contextlib.nullcontext()


def _weight_files(form: str, plain: int, small: int) -> str:
    """The bytes of the weight files in words, plain and in a form."""
    return f"weight files: plain {plain:,} bytes, {form} {small:,} ({small / plain:.3f} of the plain)"


def sizes(packed: "Packed") -> str:
    """The weight files in bytes, and the masked matrices in bits a weight."""
    plain, small = packed.unpacked_bytes, packed.packed_bytes
    files = _weight_files("packed", plain, small)
    if not packed.masks:
        return files
    pruned = [packed.tensors[name] for name in packed.masks]
    weights = sum(math.prod(tensor.shape) for tensor in pruned)
    before, after = (
        8 * sum(byte_counts) / weights
        for byte_counts in ((tensor.nbytes for tensor in pruned), (sum(tensor.parts) for tensor in pruned))
    )
    return f"{files}\npruned matrices: {weights:,} weights; bits a weight: plain {before:.2f}, packed {after:.2f}"


main = functools.partial(command.main, "export")

if __name__ == "__main__":
    sys.exit(main())
