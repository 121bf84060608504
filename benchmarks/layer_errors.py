"""Prints the layer errors of the first blocks without pruning the others.

    python -m benchmarks.layer_errors 11 --solver mpax --accept per_layer --selector.shift_zero true
    python -m benchmarks.layer_errors 30 --selector sparsegpt --solver mpax --accept per_layer --beside cg,cg-undamped

Takes the settings of ``optima_tpu.launch`` after the number of blocks. Prints the mean over all layers of the relative error
``||X W' - X V'||^2 / ||X W'||^2``, for the selector's and for the final weights, and for the final weights on held-out windows.
A full run gives the same errors, because a block does not depend on later blocks. With all blocks, it also prints the
perplexity on ``--evaluation.source``, which is the same as in a full run.

``--beside`` also solves every layer with other solvers, on the same inputs and with the same mask, and counts the layers in which
such a solver leaves a larger error than the run's solver. Later blocks get the weights of the run's solver.
"""

import argparse
import dataclasses
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.stream_error import check_walk
from optima_tpu.config.parse import parse
from optima_tpu.errors import UserError
from optima_tpu.evaluate.perplexity import perplexity_of, token_nll
from optima_tpu.method.acceptance import PerRow
from optima_tpu.method.solvers import CG, Exact
from optima_tpu.pipeline.inputs import open_model_on_mesh, read_texts
from optima_tpu.pipeline.layer_groups import groups_of_blocks
from optima_tpu.pipeline.walk import Streams, Walk, prune_block
from optima_tpu.report.records import LayerReport

BESIDE = {"cg": CG(), "cg-undamped": CG(damping=0.0), "exact": Exact()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layer_errors",
        description=__doc__.split("\n\n")[0],
        epilog="All other options are settings of optima_tpu.launch.",
        allow_abbrev=False,
    )
    parser.add_argument("blocks", type=int, help="number of blocks to prune, from the first")
    parser.add_argument("--beside", default="", metavar="SOLVER[,SOLVER]", help=", ".join(BESIDE))
    arguments, settings = parser.parse_known_args(argv)
    try:
        compare(arguments.blocks, tuple(filter(None, arguments.beside.split(","))), settings)
    except UserError as error:
        sys.exit(f"error: {error}")


def compare(blocks: int, beside: Sequence[str], settings: Sequence[str]) -> None:
    """Walks the blocks and prints the comparison described above.

    Raises:
      UserError: a setting is wrong or not supported by this comparison.
    """
    if unknown := sorted(set(beside) - set(BESIDE)):
        raise UserError(f"expected --beside with some of {', '.join(BESIDE)}, got {', '.join(unknown)}")
    config = parse(list(settings))
    if config.recipe.target.dense_stream:
        raise UserError(
            "expected a recipe that minimises the error of a layer's own outputs, got one with a dense target: use "
            "--preset fast or --preset paper"
        )
    model = open_model_on_mesh(config)
    check_walk(config, model, blocks)
    decoder, windows, recipe = model.decoder, config.calibration.fitted, config.recipe
    calibration, evaluation, *_ = read_texts(config, model)
    hidden, other = decoder.embed(calibration.ids), decoder.embed(evaluation.ids)
    layers, by_rival, walk = [], defaultdict(list), Walk(decoder, recipe, groups_of_blocks(decoder), windows)
    others = {}
    for name in beside:
        rival = dataclasses.replace(recipe, solver=BESIDE[name], accept=PerRow())
        others[name] = dataclasses.replace(walk, recipe=rival)
    for index in range(blocks):
        dense_block = next(decoder.blocks([index]))
        for name, rival in others.items():
            by_rival[name] += prune_block(rival, index, dense_block, Streams(hidden.copy())).layers
        pruned, _, reports = prune_block(walk, index, dense_block, Streams(hidden))[:3]
        decoder.apply(index, pruned, other)
        layers += reports
        print(
            f"block {index}",
            *(f"{r.name} {r.error_before:.4f} {r.error_after:.4f} ({r.rows_refused}/{r.rows} refused)" for r in reports),
            sep="  ",
            flush=True,
        )
    _print_means(layers, by_rival)
    if blocks == decoder.config.blocks:
        value = perplexity_of(token_nll(decoder, other, evaluation.ids).sum(axis=1, dtype=np.float64), evaluation.ids)
        print(f"perplexity {value:.3f}, on {evaluation.how}")


def _print_means(layers: Sequence[LayerReport], by_rival: Mapping[str, Sequence[LayerReport]]) -> None:
    before, after = (statistics.fmean(getattr(r, name) for r in layers) for name in ("error_before", "error_after"))
    held_out = [r.held_out_after for r in layers if r.held_out_after is not None]
    print(
        f"mean over {len(layers)} layers: selector {before:.4f}, final {after:.4f}"
        + (f", held out {statistics.fmean(held_out):.4f}" if held_out else "")
    )
    for name, reports in by_rival.items():
        ratios = {f"block {r.block} {r.name}": r.error_after / s.error_after for r, s in zip(reports, layers)}
        worse = {layer: ratio for layer, ratio in ratios.items() if ratio > 1}
        print(
            f"{name}: mean error {statistics.fmean(r.error_after for r in reports):.4f}, "
            f"{statistics.geometric_mean(ratios.values()):.3f} of the run's (geometric mean over layers), "
            f"larger in {len(worse)} layers",
            *(f"{layer} {ratio:.4f}" for layer, ratio in worse.items()),
            sep="  ",
        )


if __name__ == "__main__":
    main()
