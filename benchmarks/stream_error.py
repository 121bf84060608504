"""Compares recipes by their drift from the dense model over the first blocks.

    python -m benchmarks.stream_error --blocks 8 --variant="" --variant="--selector wanda" -- --preset best --pattern 2:4

This is a quick test before a whole run. For each variant, after every block, it prints the relative error of the hidden state,
averaged over tokens,

    ||x_pruned - x_dense||^2 / ||x_dense||^2

on the held-out windows of the calibration text and on the text of ``--evaluation.source``. No weight is fitted to either text.
Use another evaluation text than for the final results: a recipe that is chosen on a text looks too good on the same text. A full
run gives the same errors, because a block does not depend on later blocks.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np

from optima_tpu.config.parse import parse
from optima_tpu.config.run_config import RunConfig
from optima_tpu.errors import UserError
from optima_tpu.method.layer_rules import check_layers
from optima_tpu.method.selectors import Imported
from optima_tpu.models.activations import Activations
from optima_tpu.models.model import Model
from optima_tpu.pipeline.inputs import Texts, linear_shapes
from optima_tpu.pipeline.layer_groups import groups_of_blocks
from optima_tpu.pipeline.sweep.runner import Shared
from optima_tpu.pipeline.walk import Streams, Walk, prune_block


def main(argv: Sequence[str] | None = None) -> None:
    parser = variants_parser("stream_error", __doc__)
    parser.add_argument("--blocks", type=int, default=8, help="number of blocks to prune, from the first")
    arguments = parser.parse_args(argv)
    variants, shared = arguments.variant or [""], Shared()
    try:
        configs = [parse([*arguments.settings, *shlex.split(variant)]) for variant in variants]
        for config in configs:  # check all variants before the first one, which takes minutes
            check_walk(config, shared.model(config), arguments.blocks)
            if not config.calibration.held_out:
                raise UserError("expected calibration.held_out of at least 1, got 0: errors are measured on held-out windows")
            shared.texts(config)
    except UserError as error:
        sys.exit(f"error: {error}")
    for variant, config in zip(variants, configs):
        print(variant or "(no further settings)", flush=True)
        started = time.perf_counter()
        errors = stream_errors(config, shared.model(config), shared.texts(config), arguments.blocks)
        for index, (held_out, other) in enumerate(errors):
            print(
                f"  block {index}: held out {held_out:.2%}, evaluation text {other:.2%}, {time.perf_counter() - started:.0f} s",
                flush=True,
            )


def variants_parser(benchmark: str, text: str | None) -> argparse.ArgumentParser:
    """Makes the parser of a benchmark that compares recipes.

    ``text`` is the benchmark's docstring. Its first paragraph becomes the description.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{benchmark}", description=(text or "").split("\n\n")[0])
    parser.add_argument("--variant", action="append", metavar="SETTINGS", help="further settings of one recipe; repeatable")
    parser.add_argument("settings", nargs="*", help="settings of optima_tpu.launch for all variants, after --")
    return parser


def check_walk(config: RunConfig, model: Model, blocks: int) -> None:
    """Raises UserError for a recipe of several walks, or too many blocks."""
    if isinstance(config.recipe.selector, Imported) or config.allocation.measures:
        raise UserError(
            "expected a selector other than imported and the same sparsity for every block, got another recipe: leave out "
            "--selector imported and --allocation"
        )
    if not 1 <= blocks <= model.decoder.config.blocks:
        raise UserError(f"expected 1 to {model.decoder.config.blocks} blocks, as the model has, got {blocks}")
    check_layers(config.recipe.layers, config.recipe.pattern, linear_shapes(model.decoder))


def stream_errors(config: RunConfig, model: Model, texts: Texts, blocks: int) -> Iterator[tuple[float, float]]:
    """Yields (held-out error, evaluation text's error) after every block."""
    decoder, windows, recipe = model.decoder, config.calibration.fitted, config.recipe
    walk = Walk(decoder, recipe, groups_of_blocks(decoder), windows)
    hidden, other = (decoder.embed(text.ids) for text in (texts.calibration, texts.evaluation))
    dense, other_dense = hidden.copy(), other.copy()
    for index in range(blocks):
        dense_block = next(decoder.blocks([index]))
        before = dense.copy() if recipe.target.dense_stream else None
        pruned = prune_block(walk, index, dense_block, Streams(hidden, before)).parameters
        decoder.apply(index, pruned, other)
        for states in (dense, other_dense):
            decoder.apply(index, dense_block, states)
        yield mean_error(hidden.part(windows, len(hidden)), dense.part(windows, len(dense))), mean_error(other, other_dense)


def mean_error(pruned: Activations, dense: Activations) -> float:
    """The error described above. Works in a single process.

    ``evaluate.distance`` divides sums over all tokens instead; a few tokens with massive activations dominate these sums.
    """
    ours, theirs = (np.asarray(states.values, np.float32) for states in (pruned, dense))
    return float(np.mean(np.sum((ours - theirs) ** 2, axis=-1) / np.sum(theirs**2, axis=-1)))


if __name__ == "__main__":
    main()
