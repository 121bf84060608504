"""Measures what ``borrow`` gains for experts that few tokens reach.

    python -m benchmarks.mixture c4.jsonl mixture
    python -m benchmarks.few_tokens mixture
    python -m benchmarks.few_tokens mixture --pattern 2:4 --windows 16 --variant "--preset best"

With ``borrow``, an expert also counts tokens of the mean over all tokens. Prunes the experts of a trained mixture block by
block, as a run does, and leaves attention dense. For each variant it prints two tables. First, the loss of the pruned model on
held-out documents, for each number of calibration windows and each draw. Second, by the number of calibration tokens that
reached an expert, the error of its gate and up on the held-out tokens that reach it: with ``borrow 0``, and as a ratio to that
for the others (geometric mean over experts, for each draw). With a dense-model target it is the error against the dense model.
"""

import argparse
import itertools
import math
import shlex
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.mixture import LENGTH
from optima_tpu.config.parse import parse
from optima_tpu.config.run_config import RunConfig
from optima_tpu.evaluate.perplexity import perplexity, token_nll
from optima_tpu.pipeline.layer_groups import groups_of_blocks
from optima_tpu.pipeline.sweep.runner import Shared
from optima_tpu.pipeline.walk import Streams, Walk, prune_block

VARIANTS = ("--preset fast", "--preset fast --solver.damping 0.3", "--preset best")


class Found(NamedTuple):
    """What was measured of one pruned mixture.

    Attributes:
      loss: of the pruned model on held-out windows.
      tokens: [matrices] int, calibration tokens that reached the expert of each gate and up.
      errors: [matrices], held-out error of each; NaN where no held-out token reached it.
    """

    loss: float
    tokens: np.ndarray
    errors: np.ndarray


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.few_tokens",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", help="what benchmarks.mixture wrote")
    parser.add_argument("--pattern", default="0.5/row", help="pattern of the experts")
    parser.add_argument("--borrow", default="0,0.03125,0.125,0.5,2", help="values that are compared; the first is the reference")
    parser.add_argument("--windows", default="4,16,64", help=f"numbers of calibration windows of {LENGTH} tokens")
    parser.add_argument("--seeds", default="0,1", help="draws of calibration windows")
    parser.add_argument("--held-out", type=int, default=128, help="held-out windows")
    parser.add_argument("--variant", action="append", metavar="SETTINGS", help="method settings of a run; repeatable")
    arguments = parser.parse_args(argv)
    shared, borrows = Shared(), arguments.borrow.split(",")
    folder = arguments.folder
    text = f"--calibration.source file:{folder}/calibration.jsonl --evaluation.source file:{folder}/held_out.jsonl"
    text += f" --calibration.length {LENGTH} --calibration.held_out 0 --evaluation.windows {arguments.held_out}"
    for variant in arguments.variant or VARIANTS:
        results: dict[tuple[str, ...], Found] = {}
        for key in itertools.product(arguments.windows.split(","), arguments.seeds.split(","), borrows):
            settings = "--calibration.windows {} --calibration.seed {} --borrow {}".format(*key)
            where = f"--model {arguments.folder}/model --pattern {arguments.pattern} --layers self_attn.*=dense"
            config = parse(shlex.split(f"{variant} {where} {text} {settings}"))
            results[key] = pruned(config, shared)
        dense = math.log(perplexity(shared.model(config).decoder, shared.texts(config).evaluation.ids))
        print(f"\n`{variant} --pattern {arguments.pattern}`; the loss of the dense mixture is {dense:.4f}\n")
        print_tables(results, borrows)


def pruned(config: RunConfig, shared: Shared) -> Found:
    """Prunes the mixture, with the evaluation text as held-out windows."""
    decoder, texts, windows = shared.model(config).decoder, shared.texts(config), config.calibration.fitted
    tokens = np.concatenate([texts.calibration.ids, texts.evaluation.ids])
    streams = Streams(*(decoder.embed(tokens) for _ in range(config.recipe.target.streams)))
    walk, reports = Walk(decoder, config.recipe, groups_of_blocks(decoder), windows), []
    for index in range(decoder.config.blocks):
        layers = prune_block(walk, index, next(decoder.blocks([index])), streams).layers
        reports += [layer for layer in layers if layer.name.endswith(("gate_proj", "up_proj"))]
    nll = token_nll(decoder, streams.pruned, tokens)[windows:]
    errors = [layer.held_out_after if layer.dense_after is None else layer.dense_after for layer in reports]
    return Found(
        float(nll.sum(dtype=np.float64)) / texts.evaluation.ids[:, 1:].size,
        np.array([layer.tokens for layer in reports]),
        np.array(errors, np.float64),
    )


def print_tables(results: dict[tuple[str, ...], Found], borrows: Sequence[str]) -> None:
    """Prints the two tables described above, as Markdown."""
    first, *others = borrows
    windows, seeds = (list(dict.fromkeys(each)) for each in list(zip(*results))[:2])
    print(f"| windows | {' | '.join(f'borrow {borrow}' for borrow in borrows)} |\n|---|{'---|' * len(borrows)}")
    for count in windows:
        losses = (", ".join(f"{results[count, seed, borrow].loss:.4f}" for seed in seeds) for borrow in borrows)
        print(f"| {count} | {' | '.join(losses)} |")
    print(f"\n| tokens | matrices | borrow {first} | {' | '.join(f'borrow {borrow}' for borrow in others)} |")
    print(f"|---|---|---|{'---|' * len(others)}")
    draws = [{borrow: _joined([results[count, seed, borrow] for count in windows]) for borrow in borrows} for seed in seeds]
    edges = [0, 1, 32, 64, 128, 256, 512, 1024, 2048, max(max(each.tokens) for each in results.values()) + 1]
    for low, high in itertools.pairwise(edges):
        cells, counts = [], []
        for draw in draws:
            within = (low <= draw[first].tokens) & (draw[first].tokens < high)
            within &= np.all([np.isfinite(each.errors) & (each.errors > 0) for each in draw.values()], axis=0)
            logs = {borrow: np.log(each.errors[within]) for borrow, each in draw.items()}
            cells.append([np.exp(np.mean(each - logs[first])) if each.size else np.nan for each in logs.values()])
            cells[-1][0] = float(np.mean(draw[first].errors[within])) if within.any() else np.nan
            counts.append(int(within.sum()))
        if any(counts):
            (reference, *ratios) = zip(*cells)
            texts = [
                ", ".join(f"{each:.2%}" for each in reference),
                *(", ".join(f"{each:.3f}" for each in row) for row in ratios),
            ]
            print(f"| {low} to {high - 1} | {', '.join(map(str, counts))} | {' | '.join(texts)} |")


def _joined(results: Sequence[Found]) -> Found:
    return Found(0.0, *(np.concatenate(each) for each in list(zip(*results))[1:]))


if __name__ == "__main__":
    main()
