"""Measures how the time of an update grows with the width of a layer.

    taskset -c 0 python -m benchmarks.width --cpu --shapes 576x1536,896x4864,256x8192

The parts are ADMM, the solve, the exchanges, and the inverses in them, with the methods of a preset. Weights and correlated
inputs are random. The unit is the time of one product of all rows with a [d_in, d_in] matrix, measured beside the methods: what
does not grow with the width in this unit grows like the products of a solve. Compiling is not counted. Every number is the
fastest of ``--repeats`` runs.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optima_tpu.config.parse import parse
from optima_tpu.method.linalg.features import matmul
from optima_tpu.method.linalg.inverses import inverse, inverse_and_root
from optima_tpu.method.mask_swaps import kept_share, schur_diagonal
from optima_tpu.method.problem import LayerProblem
from optima_tpu.method.recipe import Recipe


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.width",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--shapes", default="576x1536,896x4864", help="ROWSxINPUTS of the layers, with commas between them")
    parser.add_argument("--preset", default="best", help="whose selector, solver and exchanges are timed")
    parser.add_argument("--cpu", action="store_true", help="count the CPU seconds of the process, not the time that passes")
    parser.add_argument("--repeats", type=int, default=1, help="timed runs of each")
    arguments = parser.parse_args(argv)
    clock = time.process_time if arguments.cpu else time.perf_counter
    recipe = parse(["--preset", arguments.preset, "--pattern", "0.5/row"]).recipe
    print("| rows x d_in | part | s | products |\n|---|---|---|---|")
    for shape in arguments.shapes.split(","):
        rows, size = map(int, shape.split("x"))
        for line in lines(recipe, random_problem(size, rows, recipe.damping), arguments.repeats, clock):
            print(f"| {shape} | {line} |", flush=True)


def lines(recipe: Recipe, problem: LayerProblem, repeats: int, clock: Callable[[], float]) -> Iterator[str]:
    """A line of the table for every part of the update."""
    selector, solver, pattern, hessian = recipe.selector, recipe.solver, recipe.pattern, problem.hessian
    assert selector is not None and solver is not None

    def timed(call: Callable[..., Any], *inputs: Any) -> tuple[float, Any]:
        compiled, seconds, result = jax.jit(call).lower(*inputs).compile(), [], None
        for _ in range(repeats):
            started = clock()
            result = jax.block_until_ready(compiled(*inputs))
            seconds.append(clock() - started)
        return min(seconds), result

    product = timed(matmul, problem.weight, hessian)[0]
    ridge = hessian + jnp.mean(jnp.diagonal(hessian)) * jnp.eye(len(hessian))
    invert, root = timed(functools.partial(inverse, ridge=1.0), ridge)[0], timed(inverse_and_root, ridge)[0]

    def line(part: str, seconds: float) -> str:
        return f"{part} | {seconds:.2f} | {seconds / product:.1f}"

    yield line("one product", product)
    yield line("one inverse", invert)
    yield line("one inverse with the factor of a certificate", root)
    masks, pruned = timed(lambda problem: selector(problem, pattern), problem)
    yield line("masks", masks)
    if recipe.refine is not None:
        prices = timed(lambda hessian: schur_diagonal(hessian, recipe.damping, kept_share(pattern, len(hessian))), hessian)[0]
        yield line("prices of exchanges", prices)
    yield line("the solve of one mask", timed(solver, problem, pruned)[0])
    solves = timed(recipe.update(pattern), problem, pruned)[0]
    yield line("solves, with prices and exchanges", solves)
    yield line("all", masks + solves)


def random_problem(size: int, rows: int, damping: float) -> LayerProblem:
    """Draws normal weights and correlated inputs.

    Half of the inputs' energy is common to many of them, with a spectrum like ``1 / rank``.
    """
    rng, common = np.random.default_rng(0), min(size, 1024)
    shared = rng.standard_normal((common, size), np.float32) * (np.arange(1, common + 1, dtype=np.float32) ** -0.5)[:, None]
    hessian = matmul(jnp.asarray(shared.T), jnp.asarray(shared))
    hessian = hessian / jnp.mean(jnp.diagonal(hessian)) + jnp.eye(size)
    weight = jnp.asarray(rng.standard_normal((rows, size), np.float32))
    return jax.block_until_ready(LayerProblem(weight, hessian, damping=damping))


if __name__ == "__main__":
    main()
