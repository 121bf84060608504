"""Measures the seconds of each stage of a block, as means over some blocks.

    python -m benchmarks.block_time --blocks 6 --variant="--preset fast" --variant="--preset best" -- --calibration.windows 32

The first block of a variant is not counted: it compiles the programs. Each stage waits for its results, so that nothing overlaps.
On a machine that does other work, ``taskset -c 0 python -m benchmarks.block_time --cpu`` counts the CPU seconds of one core.
"""

import collections
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax

from benchmarks.stream_error import check_walk, variants_parser
from optima_tpu.config.parse import parse
from optima_tpu.config.run_config import RunConfig
from optima_tpu.errors import UserError
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.model import Model
from optima_tpu.pipeline import walk
from optima_tpu.pipeline.inputs import Texts
from optima_tpu.pipeline.layer_groups import groups_of_blocks
from optima_tpu.pipeline.sums import Capture
from optima_tpu.pipeline.sweep.runner import Shared


def main(argv: Sequence[str] | None = None) -> None:
    parser = variants_parser("block_time", __doc__)
    parser.add_argument("--blocks", type=int, default=6, help="number of blocks that count, after the first")
    parser.add_argument("--cpu", action="store_true", help="count the CPU seconds of the process, not the time that passes")
    arguments = parser.parse_args(argv)
    clock = time.process_time if arguments.cpu else time.perf_counter
    variants, shared = arguments.variant or [""], Shared()
    try:
        configs = [parse([*arguments.settings, *shlex.split(variant)]) for variant in variants]
        for config in configs:
            check_walk(config, shared.model(config), arguments.blocks + 1)
    except UserError as error:
        sys.exit(f"error: {error}")
    totals = []
    for variant, config in zip(variants, configs):
        seconds = block_seconds(config, shared.model(config), shared.texts(config), arguments.blocks, clock)
        totals.append(seconds.pop("block"))
        print(f"{variant or '(no further settings)'}: {totals[-1]:.2f} s a block, {totals[-1] / totals[0]:.2f} times the first")
        for stage, part in seconds.items():
            print(f"  {stage:32} {part:.2f} s")


def block_seconds(
    config: RunConfig, model: Model, texts: Texts, blocks: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """The mean seconds of each stage, and of the whole "block"."""
    decoder, recipe, seconds = model.decoder, config.recipe, collections.defaultdict(float)
    counts = False  # not in the first block

    def timed(call: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def measured(*arguments: Any, **options: Any) -> Any:
            started = clock()
            result = jax.block_until_ready(call(*arguments, **options))
            seconds[name(*arguments)] += counts * (clock() - started) / blocks
            return result

        return measured

    def calibrated(_: Any, index: int, capture: Capture, *streams: Any) -> str:
        return f"calibrate {', '.join(names[0] for names in capture.groups)}"

    def pruned(weights: Sequence[jax.Array], *rest: Any) -> str:
        return f"prune {'+'.join(str(len(weight)) for weight in weights)} x {weights[0].shape[1]}"

    with (
        mock.patch.object(walk, "_calibrate", timed(walk._calibrate, calibrated)),
        mock.patch.object(walk, "prune_group", timed(walk.prune_group, pruned)),
        mock.patch.object(Decoder, "apply", timed(Decoder.apply, lambda *arguments: "forward through the pruned block")),
    ):
        planned = walk.Walk(decoder, recipe, groups_of_blocks(decoder), config.calibration.fitted)
        hidden = decoder.embed(texts.calibration.ids)
        streams = walk.Streams(hidden, hidden.copy() if recipe.target.dense_stream else None)
        for index in range(blocks + 1):
            counts, parameters, started = index > 0, next(decoder.blocks([index])), clock()
            jax.block_until_ready(walk.prune_block(planned, index, parameters, streams).parameters)
            seconds["block"] += counts * (clock() - started) / blocks
    return dict(seconds)


if __name__ == "__main__":
    main()
