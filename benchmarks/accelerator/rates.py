"""Measures the shares of the first device's peak that parts of a run reach."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.accelerator.devices import known_chip
from benchmarks.accelerator.models import declared, with_weights
from benchmarks.accelerator.parts import Sizes
from optima_tpu.method.linalg.features import matmul, rough_matmul
from optima_tpu.method.linalg.inverses import inverse
from optima_tpu.models.decoder import run_block
from optima_tpu.pipeline.grams import add_gram, panels
from optima_tpu.pipeline.plan.counting import counted
from optima_tpu.pipeline.plan.topology import local_machine
from optima_tpu.pipeline.programs import block_call
from optima_tpu.runtime.mesh import make_mesh

_PRECISIONS = {
    "bfloat16": ("narrow", "bfloat16", lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32)),
    "float32, highest": ("wide", "float32", matmul),
    "float32, high": ("rough", "float32", rough_matmul),
}
"""Precision -> the peak of ``Chip`` that it is compared with, the dtype of the factors, the product."""


def fastest(function: Callable[..., Any], *arrays: Any, repeats: int = 5) -> float:
    """Seconds of the fastest of some calls, after one that compiles."""
    jax.block_until_ready(function(*arrays))
    best = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function(*arrays))
        best = min(best, time.perf_counter() - started)
    return best


def rates(sizes: Sizes) -> Iterator[tuple[object, ...]]:
    """Yields the rates of the parts beside a large product and the peak.

    A row is (part, precision, TFLOP/s, % of a large product here, % of the published peak).
    """
    tokens, rows, inputs = sizes.layer
    chip, large = known_chip(), {}

    def row(part: str, precision: str, flops: float, seconds: float) -> tuple[object, ...]:
        rate, peak = flops / seconds, getattr(chip, _PRECISIONS[precision][0]) if chip else None
        return part, precision, rate / 1e12, 100 * rate / large[precision], peak and 100 * rate / peak

    def drawn(seed: int, shape: tuple[int, ...], dtype: str) -> Array:
        return jax.random.normal(jax.random.key(seed), shape, dtype)

    for precision, (_, dtype, product) in _PRECISIONS.items():
        square = drawn(0, (inputs, inputs), dtype)
        seconds = fastest(jax.jit(product), square, square)
        large[precision] = 2 * inputs**3 / seconds
        yield row("a large product", precision, 2 * inputs**3, seconds)

    mesh = make_mesh(None) if jax.device_count() == 1 else jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1])
    counted_products = 2 * tokens * sum((last - first) * (inputs - first) for first, last in panels(inputs))
    for precision in ("bfloat16", "float32, highest"):
        x, sums = drawn(1, (1, tokens, inputs), _PRECISIONS[precision][1]), jnp.zeros((inputs, inputs))
        gram = jax.jit(lambda sums, x: add_gram(sums, x, mesh))
        yield row(f"Hessian of {inputs} inputs", precision, counted_products, fastest(gram, sums, x))

    weights, hessian = drawn(2, (rows // 8, inputs), "float32"), drawn(3, (inputs, inputs), "float32")
    for precision in ("float32, highest", "float32, high"):
        product = jax.jit(_PRECISIONS[precision][2])
        yield row(
            f"solver's product, {rows // 8} rows", precision, 2 * (rows // 8) * inputs**2, fastest(product, weights, hessian)
        )
    definite = hessian @ hessian.T / inputs + jnp.eye(inputs)
    made = jax.jit(lambda matrix: inverse(matrix, 1.0))
    yield row(f"inverse of {inputs} inputs", "float32, high", 2 * inputs**3, fastest(made, definite))

    for precision in ("bfloat16", "float32, highest"):
        _, model = declared(sizes.blocks[-1], _PRECISIONS[precision][1], "--batch", "1")
        decoder = with_weights(model.on(mesh))
        length = min(2048, tokens)
        work = counted(block_call(decoder, length, 1), local_machine(None, model.dtype, compiling=False)).work
        hidden = drawn(4, (1, length, decoder.config.d_model), _PRECISIONS[precision][1])
        state = decoder.state(next(decoder.blocks([0])))
        seconds = fastest(run_block, decoder.graph, state, hidden, decoder.positions(0, length))
        yield row(f"forward pass of a block of {sizes.blocks[-1]}", precision, work.narrow + work.wide + work.rough, seconds)
