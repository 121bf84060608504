"""A block pruned as in a run, beside the plan of the run."""

import time
from collections.abc import Iterator

import jax
import numpy as np

from benchmarks.accelerator.models import declared, with_weights
from benchmarks.accelerator.parts import Sizes
from benchmarks.plan_memory import resident, settle
from optima_tpu.config.run_config import RunConfig
from optima_tpu.models.activations import Activations
from optima_tpu.pipeline.inputs import on_model
from optima_tpu.pipeline.layer_groups import groups_of_blocks
from optima_tpu.pipeline.memory_plan import fitted
from optima_tpu.pipeline.plan.model import DeclaredModel
from optima_tpu.pipeline.plan.plan import make_plan
from optima_tpu.pipeline.plan.topology import GIB, local_machine
from optima_tpu.pipeline.walk import Streams, Walk, prune_block
from optima_tpu.report.progress import Terminal
from optima_tpu.runtime.device_memory import device_budget

_WALK = "calibration", "pruning", "pruned blocks forward", "hidden states to and from the devices"
"""The stages of a plan that prune the blocks."""


def block(sizes: Sizes, shape: str, preset: str) -> Iterator[tuple[object, ...]]:
    """Prunes a block twice; yields its times and memory beside its plan.

    A row is (shape, preset, seconds the first time, seconds, planned seconds, peak GiB, planned peak GiB).
    """
    config, model = _run(sizes, shape, preset)
    decoder, text = with_weights(model), config.calibration
    budget, groups = device_budget(None), groups_of_blocks(decoder)
    windows = text.fitted + text.held_out, text.window_length
    fit = fitted(decoder, groups, config.recipe, windows, budget)
    walk = Walk(decoder, config.recipe, groups, text.fitted, budget - fit.states, resident=fit.states > 0)
    drawn = np.random.default_rng(0).standard_normal((*windows, decoder.config.d_model), np.float32)
    entering = Activations.of(decoder.mesh, drawn.astype(model.dtype))
    del drawn
    seconds, before = [], 0
    for index in range(2):
        parameters = next(decoder.blocks([index]))
        hidden = entering.on_devices(decoder.batch) if walk.resident else entering.copy()
        streams = Streams(hidden, hidden.copy() if config.recipe.target.dense_stream else None)
        settle()
        before = resident()
        started = time.perf_counter()
        jax.block_until_ready(prune_block(walk, index, parameters, streams).parameters)
        seconds.append(time.perf_counter() - started)
    peak = _peak() or resident("VmHWM") - before
    planned, worst = _planned(config, model, compiling=False)
    yield shape, f"`{preset}`", *seconds, planned, peak / GIB, worst / GIB


def plan(sizes: Sizes, shape: str, preset: str) -> Iterator[tuple[object, ...]]:
    """Yields (shape, preset, planned seconds, GiB) of compiled programs."""
    planned, worst = _planned(*_run(sizes, shape, preset), compiling=True)
    yield shape, f"`{preset}`", planned, worst / GIB


def _run(sizes: Sizes, shape: str, preset: str) -> tuple[RunConfig, DeclaredModel]:
    config, model = declared(shape, sizes.dtype, "--preset", preset, *sizes.windows)
    return on_model(config, model.config, Terminal()), model


def _planned(config: RunConfig, model: DeclaredModel, compiling: bool) -> tuple[float, int]:
    """Returns a block's planned seconds and the planned peak of memory.

    The peak is of one device, or of all devices if they share the host's memory.
    """
    machine = local_machine(None, model.dtype, compiling)
    run_plan = make_plan(config, model.on(machine.mesh), machine)
    seconds = sum(run_plan.seconds.get(stage, 0.0) for stage in _WALK) / model.decoder.config.blocks
    return seconds, max(program.memory for program in run_plan.programs) * (machine.mesh.size if machine.platform == "cpu" else 1)


def _peak() -> int:
    """Returns a device's peak of bytes in use; 0 where devices do not say."""
    return max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices())
