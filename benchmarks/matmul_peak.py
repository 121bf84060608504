"""Measures the throughput of cg's loop relative to large matrix products.

    python -m benchmarks.matmul_peak

Uses random Hessians in float32. The time of the iterations is the difference between a run of several cycles and a run of one
cycle, which excludes the factorisation before the loop. Every cycle multiplies with a [d_in, d_in] matrix twice in each of its
iterations and twice for its certificate. The reference are large square products in the same precision, the fastest of several
sizes. Both alternate within one process.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from optima_tpu.method.linalg.features import matmul
from optima_tpu.method.patterns import Unstructured
from optima_tpu.method.problem import LayerProblem
from optima_tpu.method.selectors import Wanda
from optima_tpu.method.solvers import CG


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.matmul_peak",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[1536, 4096], help="d_in")
    parser.add_argument("--rows", type=int, default=1024, help="rows of the problem")
    parser.add_argument("--cycles", type=int, default=3, help="cycles of the longer run; the shorter run has one")
    parser.add_argument("--peak", type=int, nargs="+", default=[1024, 2048, 3072], help="sizes of the reference products")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each; the fastest one counts")
    arguments = parser.parse_args(argv)

    squares = [jax.random.normal(jax.random.key(0), (size, size)) for size in arguments.peak]
    product = jax.jit(matmul)
    lines = []
    for size in arguments.sizes:
        few, many = (jax.jit(CG(max_steps=4 * cycles, tolerance=1e-12)) for cycles in (1, arguments.cycles))
        inputs = random_problem(size, arguments.rows)
        taken = int(many(*inputs).steps.max()) - int(few(*inputs).steps.max())
        assert taken == 4 * (arguments.cycles - 1), f"the run stopped early, after {taken} more iterations"
        best = {}
        for _ in range(arguments.repeats):
            for name, run in (
                ("few", functools.partial(few, *inputs)),
                ("many", functools.partial(many, *inputs)),
                *((square.shape[0], lambda square=square: product(square, square)) for square in squares),
            ):
                best[name] = min(best.get(name, float("inf")), seconds(run))
        peak = max(2 * width**3 / best[width] for width in arguments.peak)
        products = 10 * (arguments.cycles - 1)
        loop = products * 2 * arguments.rows * size**2 / (best["many"] - best["few"])
        lines.append(f"| {size} | {loop / 1e9:.1f} | {peak / 1e9:.1f} | {loop / peak:.0%} | {best['few']:.2f} |")
    print(
        f"{arguments.rows} rows, float32, jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}.\n"
    )
    print(
        "\n".join(
            (
                "| d_in | inner loop, GFLOP/s | matrix product, GFLOP/s | share | factorisation and one cycle, s |",
                "|---|---|---|---|---|",
                *lines,
            )
        )
    )


def random_problem(size: int, rows: int):
    """Draws a half pruned problem with an ill-conditioned Hessian."""
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, size + 1, dtype=np.float32) ** -0.5
    inputs = (rng.standard_normal((2 * size, size), np.float32) * spectrum) @ rng.standard_normal((size, size), np.float32)
    hessian = jnp.asarray(inputs.T @ inputs / len(inputs))
    problem = LayerProblem(jnp.asarray(rng.standard_normal((rows, size), np.float32)), hessian, damping=1e-4)
    return jax.block_until_ready((problem, Wanda()(problem, Unstructured(0.5))))


def seconds(run: Callable) -> float:
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
