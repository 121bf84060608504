"""Compares a mixture of experts computed in groups with the dense way.

    python -m benchmarks.experts

In groups, an expert computes the tokens that chose it. The dense way, every expert computes every token.

For each number of experts, and of experts a token, it compares the calibration step of one mixture: its forward pass, and the
Hessians of the inputs of all experts. FLOPs are those of the products, counted from the shapes. Seconds are medians of runs that
alternate. Weights and hidden states are random, and so is the router: real routers are less even.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from optima_tpu.method.statistics import TokenStatistics
from optima_tpu.models.experts import Mixture, MixtureConfig
from optima_tpu.models.layers import project
from optima_tpu.models.rope import Rope
from optima_tpu.pipeline.grams import add_routed, gram
from optima_tpu.runtime.mesh import make_mesh

NAMES = ("gate_proj", "up_proj", "down_proj")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experts",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--shapes", default="8:2,32:4,128:8", help="experts and experts a token of each mixture")
    parser.add_argument("--width", type=int, default=256, help="d_model")
    parser.add_argument("--inner", type=int, default=96, help="width of an expert")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=4, help="windows of a step")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each")
    arguments = parser.parse_args(argv)
    tokens = arguments.windows * arguments.length
    print(
        f"d_model {arguments.width}, experts of {arguments.inner}, {tokens} tokens, float32. jax {jax.__version__}, "
        f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}.\n"
    )
    print("| experts | a token | GFLOP, dense way | GFLOP, groups | ms, dense way | ms, groups | ratio | difference |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in arguments.shapes.split(","):
        experts, few = map(int, shape.split(":"))
        ways, inputs = both_ways(arguments, experts, few)
        difference = largest_difference(*(jax.block_until_ready(way(*inputs)) for way in ways))
        pairs = [[seconds(way, inputs) for way in ways] for _ in range(arguments.repeats)]
        dense, grouped = (1e3 * statistics.median(times) for times in zip(*pairs))
        ratio = statistics.median(first / second for first, second in pairs)
        # The products of a token with one expert, and its share of the two Hessians of this expert.
        one = 2 * (3 * arguments.width * arguments.inner + arguments.width**2 + arguments.inner**2)
        work = [f"{tokens * one * count / 1e9:.2f}" for count in (experts, few)]
        print(f"| {experts} | {few} | {work[0]} | {work[1]} | {dense:.0f} | {grouped:.0f} | {ratio:.1f} | {difference:.0e} |")


def both_ways(arguments: argparse.Namespace, experts: int, few: int) -> tuple[tuple[Callable, Callable], tuple[Any, ...]]:
    """Returns the calibration step in both ways, and the inputs of both.

    The ways are (dense, groups). Each maps (parameters, hidden states) to (output, Hessians).
    """
    width, inner = arguments.width, arguments.inner
    sizes = dict(d_model=width, d_embedding=width, blocks=1, vocab=2, tied=True, heads=1, kv_heads=1, head_dim=width, eps=1e-6)
    rope = Rope.from_hf(dict(rope_type="default", rope_theta=1e4))
    config = MixtureConfig(**sizes, d_ff=inner, rope=rope, experts=experts, experts_per_token=few, normalise=True)
    graph, state = nnx.split(nnx.eval_shape(lambda: Mixture(config, NAMES)))
    rng, mesh = np.random.default_rng(0), make_mesh("1x1")
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / leaf.shape[1] ** 0.5, jnp.float32), state)
    hidden = jnp.asarray(rng.standard_normal((arguments.windows, arguments.length, width)), jnp.float32)
    valid, numbers = jnp.ones(arguments.windows, bool), tuple(range(experts))

    @jax.jit
    def grouped(state: nnx.State, x: Array) -> tuple[Array, list[Array]]:
        output, taps = nnx.capture(nnx.merge(graph, state), nnx.Intermediate)(x)
        hessians = []
        for name, size in (("up_proj", width), ("down_proj", inner)):
            (read,) = taps["experts"][0][name]["x"]
            zeros = TokenStatistics(jnp.zeros((experts, size, size)), jnp.zeros(experts, jnp.int32))
            hessians.append(add_routed(mesh, numbers, zeros, [read], valid, ()).hessian)
        return output, hessians

    @jax.jit
    def dense(state: nnx.State, x: Array) -> tuple[Array, list[Array]]:
        mixture = nnx.merge(graph, state)
        chosen, values = mixture.gate(x)
        shares = jnp.sum(jax.nn.one_hot(chosen, experts) * values[..., None], axis=-2)
        outputs, hessians = [], []
        for number, expert in enumerate(mixture.experts):
            share = shares[..., number, None]
            read = jnp.where(share > 0, x, 0)
            gate, up = (project(read, getattr(expert, name).weight[...]) for name in NAMES[:2])
            between = jax.nn.silu(gate) * up
            outputs.append(share * project(between, expert.down_proj.weight[...]))
            hessians.append((gram(read, mesh), gram(between, mesh)))
        return functools.reduce(jnp.add, outputs), [jnp.stack(each) for each in zip(*hessians)]

    return (dense, grouped), (state, hidden)


def seconds(way: Callable, inputs: tuple[Any, ...]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(way(*inputs))
    return time.perf_counter() - started


def largest_difference(first: Any, second: Any) -> float:
    """Returns the largest relative difference over all pairs of arrays."""
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return max(float(jnp.abs(a - b).max() / jnp.abs(a).max()) for a, b in pairs)


if __name__ == "__main__":
    main()
