"""Emulates the rounded products of accelerators in cg and ADMM, on a CPU.

    python -m benchmarks.passes 6 --tokens tokens.npy

`linalg.features.rough_matmul` computes the products that only choose: cg's inverse R'R and its product with a residual, which
give the direction of a step, and an iteration of ADMM. Here their factors are rounded: to 16 bits, as three passes of a TPU do;
to 11, as TF32 on a GPU; to 8, as one pass. Printed are cg's steps from Wanda's mask to a certified gap of 0.1%, and for ADMM's
mask how many entries differ and the error of the optimum on it.

With --inverses the factors are rounded in the products that invert a Hessian for ADMM and for the prices of exchanges, which
choose too, by halves as on a CPU. Printed is the error that the masks, the exchanges and the solve of the preset `best` end with.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from unittest import mock

import jax
import numpy as np

from optima_tpu.config.parse import parse
from optima_tpu.config.run_config import EMBEDDED
from optima_tpu.method import mask_swaps
from optima_tpu.method.linalg import features, inverses, traces
from optima_tpu.method.patterns import Unstructured
from optima_tpu.method.problem import LayerProblem
from optima_tpu.method.selectors import ADMM, Wanda, admm
from optima_tpu.method.solvers import CG
from optima_tpu.models.checkpoints import open_model
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline.calibrate import Stream, accumulate
from optima_tpu.pipeline.layer_groups import linear_groups
from optima_tpu.pipeline.sums import Capture
from optima_tpu.runtime.mesh import make_mesh

BITS = {"full": 24, "three passes": 16, "TF32": 11, "one pass": 8}
MASKS = ADMM(damping=0.1, levels=6, iterations=4, inverses=2)


def rounded(bits: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Makes a product whose factors have so many bits."""
    return lambda a, b: features.matmul(*(jax.lax.reduce_precision(array, 8, bits - 1) for array in (a, b)))


def round_to(bits: int) -> None:
    """From now on, products that only choose have factors of so many bits."""
    for module in (features, admm, inverses):
        module.rough_matmul = rounded(bits)
    jax.clear_caches()  # JAX keeps the parts of an inverse as it traced them


def round_inverses_to(bits: int) -> None:
    """From now on, inverses that only choose use factors of so many bits."""

    def inverse(matrix: jax.Array, ridge: float) -> jax.Array:
        with mock.patch.multiple(inverses, matmul=rounded(bits), rough_matmul=rounded(bits)):
            return inverses.inverse(matrix, ridge)

    traces.rough_matmul = rounded(bits)
    admm.inverse = mask_swaps.inverse = inverse
    jax.clear_caches()  # JAX keeps the parts of an inverse as it traced them


def print_inverses(problem: LayerProblem, name: str) -> None:
    """Prints the lines of a layer with rounded inverses."""
    recipe = parse(["--preset", "best"]).recipe
    selector, pattern = recipe.selector, Unstructured(0.5, "row")
    assert selector is not None, "best makes its own masks"
    problem = dataclasses.replace(problem, damping=recipe.damping)
    for way, bits in BITS.items():
        round_inverses_to(bits)
        mask = jax.jit(lambda problem: selector(problem, pattern))(problem)
        solved = jax.jit(lambda problem, mask: recipe.update(pattern)(problem, mask))(problem, mask)
        broken = int(np.sum(~np.isfinite(np.asarray(mask.weight)).all(axis=1)))
        print(f"| {name} | {way} | {broken} | {error(problem, solved.weight):.4%} |", flush=True)


def error(problem: LayerProblem, weight: jax.Array) -> float:
    """The squared change of the outputs as a share of their energy."""
    hessian, dense = (np.asarray(array, np.float64) for array in (problem.hessian, problem.weight))
    change = np.asarray(weight, np.float64) - dense
    return float(np.sum(change @ hessian * change) / np.sum(dense @ hessian * dense))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.passes", description=__doc__.split("\n\n")[0])
    parser.add_argument("block", type=int, help="index of the block")
    parser.add_argument("--model", default=EMBEDDED.model, help="as in optima prune")
    parser.add_argument("--tokens", required=True, help="a .npy file of token ids [windows, length]")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--inverses", action="store_true", help="round in the inverses that choose, and not in the products")
    options = parser.parse_args(argv)
    pretrained, pattern = open_model(options.model, "float32"), Unstructured(0.5, "row")
    decoder = Decoder.open(pretrained.config, pretrained.tensors, make_mesh(None), 2)
    hidden = decoder.embed(np.load(options.tokens)[: options.windows])
    for index, parameters in enumerate(decoder.blocks(range(options.block + 1))):
        if index < options.block:
            decoder.apply(index, parameters, hidden)
    groups = linear_groups(decoder)
    all_statistics = accumulate(decoder, options.block, Capture(groups), (Stream(parameters, hidden),))
    if options.inverses:
        print("| layer | factors of | rows without a mask | error behind exchanges and solve |\n|---|---|---:|---:|")
        for names, statistics in zip(groups, all_statistics):
            print_inverses(LayerProblem(parameters[names[-1] + ".weight"], statistics.hessian), names[-1])
        return
    print(
        "| layer | factors of | steps at 0.01 | steps at 0.1 | mask that differs | error of its optimum "
        "|\n|---|---|---:|---:|---:|---:|"
    )
    for names, statistics in zip(groups, all_statistics):
        problem = LayerProblem(parameters[names[-1] + ".weight"], statistics.hessian, damping=0.1)
        masks: list[np.ndarray] = []  # the first one is that of full products
        for way, bits in BITS.items():
            round_to(bits)
            steps = []
            for damping in (0.01, 0.1):
                damped = dataclasses.replace(problem, damping=damping)
                solution = jax.jit(lambda problem: CG()(problem, Wanda()(problem, pattern)))(damped)
                assert solution.converged.all()
                steps.append(f"{np.mean(solution.steps):.1f}")
            pruned = jax.jit(lambda problem: MASKS(problem, pattern))(problem)
            masks.append(np.asarray(pruned.keep))
            round_to(24)
            best = jax.jit(CG(tolerance=1e-6))(problem, pruned).weight
            print(
                f"| {names[-1]} | {way} | {' | '.join(steps)} | {np.mean(masks[-1] != masks[0]):.3%} | "
                f"{error(problem, best):.4%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
