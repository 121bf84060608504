"""Measures how fast a model writes, and how long devices wait for the host."""

import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator.devices import known_chip
from benchmarks.accelerator.models import declared, with_weights
from benchmarks.accelerator.parts import Sizes
from benchmarks.accelerator.rates import fastest
from optima_tpu.models.activations import Activations
from optima_tpu.models.generate import Prompt, Sampling, _stretches, plan_generation
from optima_tpu.models.whole_model import load
from optima_tpu.pipeline.plan.topology import TRANSFER, local_machine

_PROMPT, _NEW = 32, 128


def generation(sizes: Sizes, case: tuple[str, int]) -> Iterator[tuple[object, ...]]:
    """Yields (shape, windows at once, tokens/s, limit, % of the limit).

    The limit is the memory's bandwidth, in tokens/s.
    """
    shape, windows = case
    _, model = declared(shape, sizes.dtype)
    decoder = with_weights(model)
    prompts = [Prompt(tuple(range(_PROMPT)), _NEW)] * windows
    plan = plan_generation(decoder, prompts, Sampling(decoder.config.vocab), advice="take a smaller model", limit=windows)
    (batch,) = plan.batches
    weights, seconds, started = load(decoder, batch.room), [], time.perf_counter()
    for _, tokens in _stretches(decoder, weights, plan, batch):
        seconds.append((time.perf_counter() - started) / len(tokens))
        started = time.perf_counter()
    read = model.all_blocks_bytes() + decoder.config.vocab * decoder.config.d_model * model.dtype.itemsize
    chip = known_chip() or local_machine(None, model.dtype, compiling=False).chip
    rate, limit = windows / min(seconds[1:]), windows * chip.bandwidth / read
    yield shape, windows, rate, limit, 100 * rate / limit


def host(sizes: Sizes) -> Iterator[tuple[object, ...]]:
    """Yields (what, value, unit, what the plan assumes)."""
    first = jax.devices()[0]
    yield "a call of an empty program", 1e6 * fastest(jax.jit(lambda x: x + 1), jnp.zeros(()), repeats=100), "µs", None
    array = np.ones(sizes.moved // 4, np.float32)
    assumed = TRANSFER / 1e9
    yield "to a device", array.nbytes / 1e9 / fastest(lambda: jax.device_put(array, first)), "GB/s", assumed
    device_array, taken = jax.device_put(array, first), []
    for _ in range(5):
        fresh = jax.block_until_ready(device_array + 1)  # an array keeps its copy on the host
        started = time.perf_counter()
        np.array(fresh)
        taken.append(time.perf_counter() - started)
    yield "from a device", array.nbytes / 1e9 / min(taken), "GB/s", assumed
    config, model = declared(sizes.blocks[0], sizes.dtype, *sizes.windows)
    decoder, length = with_weights(model), config.calibration.length or 2048
    hidden = Activations.of(decoder.mesh, np.ones((8 * decoder.mesh.shape["data"], length, decoder.config.d_model), model.dtype))
    parameters = next(decoder.blocks([0]))
    for where, states in (("hosts", hidden), ("devices", hidden.on_devices(decoder.batch))):

        def through(states=states):
            decoder.apply(0, parameters, states)
            return jax.block_until_ready(getattr(states, "held", None))

        yield f"a block of {sizes.blocks[0]}, hidden states on the {where}", 1e3 * fastest(through), "ms", None
