"""Layer errors of the first blocks, without pruning the rest.

    python -m benchmarks.layer_errors 11 --solver mpax --accept per_layer --selector.shift_zero true

Takes the settings of ``optima_tpu.launch`` after the number of blocks, and prints the mean over all layers of the relative error
``||X W' - X V'||^2 / ||X W'||^2`` of the selector's and of the final weights. A full run gives the same: a block does not
depend on later ones.
"""

import statistics
import sys

from optima_tpu.calibrate import linear_groups
from optima_tpu.cli import parse
from optima_tpu.data import calibration_tokens, parse_source
from optima_tpu.models.decoder import Decoder
from optima_tpu.prune import walk_block
from optima_tpu.run import recipe_of
from optima_tpu.sharding import make_mesh
from optima_tpu.weights import load_tokenizer, open_model


def main(argv: list[str]) -> None:
    blocks, config = int(argv[0]), parse(argv[1:])
    pretrained = open_model(config.model, config.dtype)
    decoder = Decoder.open(pretrained.config, pretrained.tensors, make_mesh(config.mesh), config.batch)
    text = config.calibration
    hidden = decoder.embed(calibration_tokens(parse_source(text.source), load_tokenizer(pretrained), samples=text.samples,
                                              length=text.length, seed=text.seed).ids)
    groups, layers = linear_groups(decoder), []
    for index in range(blocks):
        _, _, reports = walk_block(decoder, index, hidden, groups, recipe_of(config))
        layers += reports
        print(f"block {index}", *(f"{r.name} {r.error_before:.4f} {r.error_after:.4f} ({r.rows_refused}/{r.rows} refused)"
                                  for r in reports), sep="  ", flush=True)
    before, after = (statistics.fmean(getattr(r, name) for r in layers) for name in ("error_before", "error_after"))
    print(f"mean over {len(layers)} layers: selector {before:.4f}, final {after:.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])
