"""The attention kernel of TPUs, interpreted here, and where it is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.compiled import kernels, products
from optima_tpu.models import splash
from optima_tpu.models.cache import Cache
from optima_tpu.models.family import Positions
from optima_tpu.models.layers import attention
from optima_tpu.models.splash import Scores
from optima_tpu.pipeline.plan.topology import QUICK, has_libtpu, topology_machine
from tests.support.meshes import mesh

LENGTH, HEADS, KV_HEADS = 150, 4, 2


def draw(dtype, *, size: int, width: int):
    """Queries, keys, values, and the sinks of the heads."""
    rng = np.random.default_rng(0)
    shapes = (2, LENGTH, HEADS, size), (2, LENGTH, KV_HEADS, size), (2, LENGTH, KV_HEADS, width), (HEADS,)
    return tuple(jnp.asarray(2 * rng.standard_normal(shape), dtype) for shape in shapes)


def exact(q, k, v, sinks, *, window, cap):
    """Attention in float64."""
    q, k, v, sinks = (np.asarray(array, np.float64) for array in (q, k, v, sinks))
    k, v = (np.repeat(array, HEADS // KV_HEADS, axis=2) for array in (k, v))
    products = cap * np.tanh(np.einsum("bqhd,bshd->bhqs", q, k) * q.shape[-1] ** -0.5 / cap)
    before = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    shares = np.where((before >= 0) & (before < window[:, None]), np.exp(products), 0)
    return np.einsum("bhqs,bshd->bqhd", shares / (shares.sum(-1, keepdims=True) + np.exp(sinks)[:, None, None]), v)


def error(actual, wanted) -> float:
    actual, wanted = (np.asarray(array, np.float64) for array in (actual, wanted))
    return np.sqrt(np.mean((actual - wanted) ** 2) / np.mean(wanted**2))


def test_the_kernel_and_its_gradient_are_those_of_attention():
    """With a window for each token, a cap, sinks and narrow values, on a mesh.

    The length of the text is no multiple of the kernel's block.
    """
    arrays = draw(jnp.float32, size=24, width=16)
    window, grid = np.arange(LENGTH) % 40 + 1, mesh(2, 2)

    def both(attend):
        def run(*arrays):
            output, pull = jax.vjp(attend, *arrays)
            return output, *pull(jnp.cos(output))

        return jax.jit(run)(*arrays)

    ours = both(lambda q, k, v, sinks: attention(q, k, v, Positions(window=window), Scores(cap=20.0, sinks=sinks)))
    kernel = both(
        lambda q, k, v, sinks: splash.attention(grid, q, k, v, jnp.asarray(window), Scores(None, 20.0, sinks), interpret=True)
    )
    assert error(kernel[0], exact(*arrays, window=window, cap=20.0)) < 2e-6
    for actual, wanted in zip(kernel, ours, strict=True):
        assert error(actual, wanted) < 5e-6


def test_in_bfloat16_the_kernel_errs_by_the_rounding_of_the_queries():
    """Scaled queries round once more unless the scale is a power of two."""
    for size in (64, 48):
        q, k, v, _ = draw(jnp.bfloat16, size=size, width=16)
        wide = attention(*(array.astype(jnp.float32) for array in (q, k, v)), Positions())
        ours = error(attention(q, k, v, Positions()), wide)
        kernel = error(splash.attention(mesh(1, 1), q, k, v, None, interpret=True), wide)
        assert kernel < (1.1 if size == 64 else 2.5) * ours


@pytest.mark.parametrize(
    "dtype, axis, positions, taken",
    [
        (jnp.bfloat16, 2, Positions(), True),
        (jnp.float32, 1, Positions(window=np.ones(LENGTH, np.int32)), True),
        (jnp.float16, 1, Positions(), False),
        (jnp.bfloat16, 4, Positions(), False),
        (jnp.bfloat16, 1, Positions(cache=Cache()), False),
    ],
)
def test_the_kernel_takes_whole_texts_on_tpus(monkeypatch, dtype, axis, positions, taken):
    """The kernel takes no float16, no cache and no split key-value head."""
    q, k, *_ = draw(dtype, size=8, width=8)
    assert not splash.takes(mesh(1, axis), q, k, positions)
    monkeypatch.setattr(splash, "on_tpu", lambda mesh: True)
    assert splash.takes(mesh(1, axis), q, k, positions) == taken


@pytest.mark.slow
@pytest.mark.skipif(not has_libtpu(), reason="needs libtpu: pip install '.[tpu]'")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("size, width", [(64, 64), (80, 80), (192, 128), (256, 256)])
def test_the_compiler_of_a_tpu_that_is_not_here_takes_the_kernel(topology, dtype, size, width):
    """Forward and backward, with window, cap, sinks and highest precision."""
    grid = topology_machine(topology, "2x2").mesh

    def on_grid(*shape, spec=P("data", None, "model"), dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(grid, spec))

    def run(q, k, v, window, sinks):
        output, pull = jax.vjp(
            lambda *arrays: attention(*arrays, Positions(window=window), Scores(None, 50.0, sinks), grid), q, k, v
        )
        return output, pull(output)

    shapes = on_grid(4, 2000, 8, size), on_grid(4, 2000, 4, size), on_grid(4, 2000, 4, width)
    with jax.default_matmul_precision("highest"):
        lowered = jax.jit(run).lower(*shapes, on_grid(2000, spec=P(), dtype=jnp.int32), on_grid(8, spec=P()))
    text = lowered.compile(dict(QUICK)).as_text()
    assert sum(kernels(text).values()) == 3 and not products(text)
