"""Measures the time of every solver on one block of a real model, as ratios.

    python -m benchmarks.solver 10 --out solver.md

All are timed in one process. There are two baselines: the paper's own call of MPAX, which is not compiled as a whole, and the
same method compiled and in rounds (``mpax``). All solve the same rows with the same Hessians and masks. Their objectives are
compared with the exact optimum in float64.
"""

import argparse
import dataclasses
import importlib.metadata
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from mpax import create_qp, raPDHG
from mpax.utils import TerminationStatus

from optima_tpu.config.run_config import EMBEDDED
from optima_tpu.data import Draw, calibration_tokens, parse_source
from optima_tpu.errors import UserError
from optima_tpu.method.patterns import Unstructured
from optima_tpu.method.problem import LayerProblem, Pruned
from optima_tpu.method.selectors import Wanda
from optima_tpu.method.solvers import CG, MPAX, Exact
from optima_tpu.models.checkpoints import load_tokenizer, open_model
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline.calibrate import Stream, accumulate
from optima_tpu.pipeline.layer_groups import linear_groups
from optima_tpu.pipeline.sums import Capture
from optima_tpu.runtime.mesh import make_mesh

PAPER, REFERENCE = "mpax", "exact"
SOLVERS = {
    "cg": CG(),
    "cg, undamped": CG(),
    # The fewest steps with which cg still has a smaller objective than the paper's method.
    "cg, 3 steps": CG(max_steps=3, cycle=3),
    PAPER: MPAX(),
    "mpax, unit_diagonal": MPAX(unit_diagonal=True),
    "mpax, unit_diagonal, primal_importance 1e-3": MPAX(unit_diagonal=True, primal_importance=1e-3),
    REFERENCE: Exact(),
}
UNDAMPED = "cg, undamped"
SLOW = 60.0  # seconds; a run that takes longer is not repeated


class Group(NamedTuple):
    """The matrices of a block that read one input, with their rows stacked."""

    rows: tuple[int, ...]  # number of rows of each matrix
    problem: LayerProblem
    pruned: Pruned


class Timing(NamedTuple):
    """The result of one solver on the block.

    Attributes:
      seconds: median elapsed time of the runs.
      compiling: seconds of compilation before the first run; None if every run compiles.
      runs: number of timed runs.
      weights: the solution of each group, [rows, d_in].
      converged: share of rows that converged.
    """

    seconds: float
    compiling: float | None
    runs: int
    weights: list[Array]
    converged: float


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.solver",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("block", type=int, help="index of the block")
    parser.add_argument("--model", default=EMBEDDED.model, help="as in optima_tpu.launch")
    parser.add_argument("--source", default=EMBEDDED.calibration.source, help="calibration text")
    parser.add_argument("--windows", type=int, default=EMBEDDED.calibration.windows, help="calibration windows")
    parser.add_argument("--length", type=int, default=EMBEDDED.calibration.length, help="tokens in each")
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of every row to prune, chosen by Wanda")
    parser.add_argument(
        "--rows",
        type=int,
        default=None,
        help="number of rows of each matrix for the paper's call, which compiles again for every mini-batch and takes "
        "minutes; 0 leaves the call out (default: all rows)",
    )
    parser.add_argument("--repeats", type=int, default=5, help=f"timed runs of each solver (one if it takes over {SLOW:g} s)")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args(argv)
    if arguments.out and not arguments.out.parent.is_dir():
        raise UserError(f"expected --out with a file in an existing folder, got {arguments.out}; create the folder first")
    text = "\n".join(report(*load_block(arguments), arguments))
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def load_block(arguments) -> tuple[list[tuple[list[Array], Array]], str]:
    """Returns each input's matrices and Hessian, and a line on the block."""
    pretrained = open_model(arguments.model)
    decoder = Decoder.open(pretrained.config, pretrained.tensors, make_mesh(None))
    if not 0 <= arguments.block < decoder.config.blocks:
        raise UserError(f"expected a block index from 0 to {decoder.config.blocks - 1}, got {arguments.block}")
    draw = Draw(arguments.windows, arguments.length, seed=0)
    tokens = calibration_tokens(parse_source(arguments.source), load_tokenizer(pretrained), draw)
    hidden = decoder.embed(tokens.ids)
    for index in range(arguments.block):
        decoder.apply(index, next(decoder.blocks([index])), hidden)
    parameters, names = next(decoder.blocks([arguments.block])), linear_groups(decoder)
    layers = [
        ([parameters[name + ".weight"] for name in group], hessian)
        for group, (hessian, *_) in zip(
            names, accumulate(decoder, arguments.block, Capture(names), (Stream(parameters, hidden),))
        )
    ]
    return layers, (
        f"Block {arguments.block} of {pretrained.origin} after its dense predecessors, Wanda "
        f"{arguments.sparsity:.0%}, {arguments.windows} x {arguments.length} tokens of {arguments.source}."
    )


def make_group(weights: list[Array], hessian: Array, arguments, rows: int | None = None) -> Group:
    """Prunes the matrices that read one input by Wanda, and stacks them.

    ``rows`` limits each matrix to its first rows. Wanda compares within rows, so their masks stay the same.
    """
    problems = [LayerProblem(weight[:rows].astype(jnp.float32), hessian) for weight in weights]
    pruned = [Wanda()(problem, Unstructured(arguments.sparsity)) for problem in problems]
    problem = LayerProblem(jnp.concatenate([p.weight for p in problems]), hessian)
    stacked = Pruned(*(jnp.concatenate(arrays) for arrays in zip(*pruned)))
    return Group(tuple(p.weight.shape[0] for p in problems), problem, stacked)


def measure(name: str, groups: list[Group], repeats: int) -> Timing:
    """Times a solver with its damping, after one warm-up run.

    Compilation is timed by itself. A first run of more than SLOW seconds is not repeated.
    """
    solver, started = SOLVERS[name], time.perf_counter()
    damping = 0.0 if name == UNDAMPED else solver.damping
    groups = [group._replace(problem=dataclasses.replace(group.problem, damping=damping)) for group in groups]
    programs = [jax.jit(solver).lower(group.problem, group.pruned).compile() for group in groups]
    compiling = time.perf_counter() - started

    def run():
        started = time.perf_counter()
        solutions = [program(group.problem, group.pruned) for program, group in zip(programs, groups)]
        return jax.block_until_ready(solutions), time.perf_counter() - started

    solutions, first = run()
    seconds = [first] if first > SLOW else [run()[1] for _ in range(repeats)]
    converged = np.concatenate([solution.converged for solution in solutions])
    return Timing(statistics.median(seconds), compiling, len(seconds), [s.weight for s in solutions], float(converged.mean()))


def measure_paper_call(groups: list[Group]) -> Timing:
    """Times one run of the paper's call over all matrices, after a warm-up."""

    def matrices():
        for group in groups:
            first = 0
            for rows in group.rows:
                part = slice(first, first + rows)
                first += rows
                yield group.problem.weight[part], group.problem.hessian, group.pruned.keep[part]

    paper_call(*next(matrices()))
    inputs = jax.block_until_ready(list(matrices()))
    started = time.perf_counter()
    solutions = jax.block_until_ready([paper_call(*arrays) for arrays in inputs])
    seconds = time.perf_counter() - started
    weights, first = [], 0
    for group in groups:
        weights.append(jnp.concatenate([weight for weight, _ in solutions[first : first + len(group.rows)]]))
        first += len(group.rows)
    return Timing(seconds, None, 1, weights, float(np.concatenate([converged for _, converged in solutions]).mean()))


def paper_call(weight: Array, hessian: Array, keep: Array) -> tuple[Array, Array]:
    """Solves one matrix as the code published with the paper does.

    Returns (weights [d_out, d_in], converged [d_out]).

    For each mini-batch, the code defines a new function and applies ``jax.vmap`` but not ``jax.jit``, so MPAX's loops are traced
    and compiled every time. These details are the paper's: the size of a mini-batch, the slack of 1e-4 above the lower bound of
    pruned entries (which are set to zero afterwards), and two constraints without effect.
    """
    size = weight.shape[1]
    batch = max(1, 128 * 12 * 2**20 // size**2)
    lower = jnp.where(keep, -jnp.inf, -weight)
    upper = jnp.where(keep, jnp.inf, -weight + 1e-4)
    zero, ones = jnp.zeros((1, size)), jnp.ones((1, size))
    changes, converged = [], []
    for first in range(0, weight.shape[0], batch):

        def single_optimize(lower_bound, upper_bound):
            program = create_qp(
                hessian,
                jnp.zeros(size),
                zero,
                jnp.zeros(1),
                ones,
                jnp.full(1, -1e5),
                lower_bound,
                upper_bound,
                use_sparse_matrix=False,
            )
            result = raPDHG(eps_abs=1e-2, eps_rel=1e-2, iteration_limit=100_000).optimize(program)
            return result.primal_solution, result.termination_status

        change, status = jax.vmap(single_optimize)(lower[first : first + batch], upper[first : first + batch])
        changes.append(change)
        converged.append(status == TerminationStatus.OPTIMAL)
    return jnp.where(keep, weight + jnp.concatenate(changes), 0.0), jnp.concatenate(converged)


def total_objective(groups: list[Group], weights: list[Array]) -> float:
    """Sums ``(v - w) H (v - w)'`` over all rows of the block, in float64."""
    total = 0.0
    for group, weight in zip(groups, weights):
        change = np.asarray(weight, np.float64) - np.asarray(group.problem.weight, np.float64)
        total += float(np.sum(change * (change @ np.asarray(group.problem.hessian, np.float64))))
    return total


def report(layers: list[tuple[list[Array], Array]], origin: str, arguments) -> list[str]:
    """Runs all measurements and returns the lines of the Markdown report."""

    def timed(name: str, run: Callable[..., Timing], *inputs) -> Timing:
        print(f"{name} ...", file=sys.stderr, flush=True)
        return run(*inputs)

    groups = [make_group(weights, hessian, arguments) for weights, hessian in layers]
    timings = {name: timed(name, measure, name, groups, arguments.repeats) for name in SOLVERS}
    optimum = total_objective(groups, timings[REFERENCE].weights)
    paper, some, some_optimum = None, groups, optimum
    if arguments.rows is not None and arguments.rows > 0:
        some = [make_group(weights, hessian, arguments, arguments.rows) for weights, hessian in layers]
        some_optimum = total_objective(some, measure(REFERENCE, some, 1).weights)
    if arguments.rows != 0:
        paper = timed("the paper's call", measure_paper_call, some)

    def line(name: str, timing: Timing, value: float) -> str:
        compiling = "every run" if timing.compiling is None else f"{timing.compiling:.1f}"
        to_paper = f"{timing.seconds / paper.seconds:.3g}" if paper else "not run"
        return (
            f"| {name} | {timing.seconds:.3g} | {timing.runs} | {compiling} | {to_paper} | "
            f"{timing.seconds / timings[PAPER].seconds:.3g} | {value:.2e} | {timing.converged:.1%} |"
        )

    table = [line(name, timing, total_objective(groups, timing.weights) / optimum - 1) for name, timing in timings.items()]
    masks = total_objective(groups, [group.pruned.weight for group in groups]) / optimum - 1
    count = sum(sum(group.rows) for group in groups)
    notes = [
        f"{count} rows in {sum(len(group.rows) for group in groups)} matrices. jax {jax.__version__}, mpax "
        f"{importlib.metadata.version('mpax')}, {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores. "
        f"Objectives are undamped; `{REFERENCE}` is the optimum, and the masks without an update are at {masks:.2e}."
    ]
    if paper:
        taken = sum(sum(group.rows) for group in some)
        value = total_objective(some, paper.weights) / some_optimum - 1
        table.append(line(f"paper's call, {taken} rows", paper, value))
        if taken < count:
            notes.append(
                f"The paper's call solved the first {arguments.rows} rows of each matrix, the solvers all rows. "
                "Its seconds are not scaled up, so the ratios to it are too large."
            )
    return [
        origin,
        *notes,
        "",
        "| solver | seconds (median) | runs | compile, s | time / paper's call | time / mpax | "
        "objective / optimum - 1 | rows converged |",
        "|---|---|---|---|---|---|---|---|",
        *table,
        "",
        *(f"- {name}: `{solver!r}`" for name, solver in SOLVERS.items()),
    ]


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
