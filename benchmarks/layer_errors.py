"""Layer errors of the first blocks, without pruning the rest.

    python -m benchmarks.layer_errors 11 --solver mpax --accept per_layer --selector.shift_zero true
    python -m benchmarks.layer_errors 11 --selector sparsegpt --solver mpax --accept per_layer --beside cg,cg-undamped

Takes the settings of ``optima_tpu.launch`` after the number of blocks, and prints the mean over all layers of the relative error
``||X W' - X V'||^2 / ||X W'||^2`` of the selector's and of the final weights. A full run gives the same: a block does not
depend on later ones.

``--beside`` solves every layer with other solvers too, on the same inputs and from the same mask, and counts the layers in
which one of them leaves a larger error than the solver of the run, which is the one that later blocks see.
"""

import dataclasses
import statistics
import sys
from collections import defaultdict

from optima_tpu.accept import PerRow
from optima_tpu.calibrate import linear_groups
from optima_tpu.cli import parse
from optima_tpu.inputs import open_model_on_mesh, read_texts
from optima_tpu.prune import walk_block
from optima_tpu.run import recipe_of
from optima_tpu.solvers import CG, Exact

BESIDE = {"cg": CG(), "cg-undamped": CG(damping=0.0), "exact": Exact(damping=0.0)}


def main(argv: list[str]) -> None:
    beside = argv.pop(argv.index("--beside") + 1).split(",") if "--beside" in argv else []
    blocks, config = int(argv[0]), parse([argument for argument in argv[1:] if argument != "--beside"])
    if config.target.matrices > 1:
        sys.exit("expected a recipe that aims at a layer's own outputs, whose errors are compared here: name a method, such as "
                 "--preset fast")
    model = open_model_on_mesh(config)
    decoder, samples = model.decoder, config.calibration.samples
    recipe = recipe_of(config)
    others = {name: dataclasses.replace(recipe, solver=BESIDE[name], accept=PerRow()) for name in beside}
    hidden = decoder.embed(read_texts(config, model).calibration.ids[:samples])
    groups, layers, found = linear_groups(decoder), [], defaultdict(list)
    for index in range(blocks):
        for name, other in others.items():
            found[name] += walk_block(decoder, index, hidden.copy(), groups, other)[2]
        reports = walk_block(decoder, index, hidden, groups, recipe)[2]
        layers += reports
        print(f"block {index}", *(f"{r.name} {r.error_before:.4f} {r.error_after:.4f} ({r.rows_refused}/{r.rows} refused)"
                                  for r in reports), sep="  ", flush=True)
    before, after = (statistics.fmean(getattr(r, name) for r in layers) for name in ("error_before", "error_after"))
    print(f"mean over {len(layers)} layers: selector {before:.4f}, final {after:.4f}")
    for name, reports in found.items():
        ratios = {f"block {r.block} {r.name}": r.error_after / s.error_after for r, s in zip(reports, layers)}
        worse = {layer: ratio for layer, ratio in ratios.items() if ratio > 1}
        print(f"{name}: mean error {statistics.fmean(r.error_after for r in reports):.4f}, "
              f"{statistics.geometric_mean(ratios.values()):.3f} of the run's (geometric mean over layers), "
              f"larger in {len(worse)} layers", *(f"{layer} {ratio:.4f}" for layer, ratio in worse.items()), sep="  ")


if __name__ == "__main__":
    main(sys.argv[1:])
