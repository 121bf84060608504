"""Programs that threads compile before the walk calls them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optima_tpu.config.parse import parse
from optima_tpu.method.prune_group import prune_group
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline import ahead
from optima_tpu.pipeline.ahead import compiled_ahead, side_by_side
from optima_tpu.pipeline.layer_groups import groups_of_blocks
from optima_tpu.pipeline.programs import Call
from optima_tpu.pipeline.walk import Streams, Walk, prune_block, solver_calls
from tests.support.meshes import mesh
from tests.support.tiny_models import tiny_llama


@functools.partial(jax.jit, static_argnums=0)
def twice(name, x):
    if name == "broken":
        raise ValueError("this cannot be traced")
    return 2 * x


def call(name="twice"):
    return Call(twice, (name, jax.ShapeDtypeStruct((3, 7), jnp.float32)))


def waiting(programs):
    """Compiles all programs and returns how many threads did."""
    with compiled_ahead(programs) as programs_ahead:
        for kind in programs:
            programs_ahead.wait(kind)
        programs_ahead.wait("a step without programs")
        return {id(future) for futures in programs_ahead.compiling.values() for future in futures}


def test_equal_programs_are_compiled_once():
    assert len(waiting({"a": [call(), call()], "b": [call(), call("other")]})) == 2


def test_a_program_that_cannot_be_compiled_raises_where_it_is_called():
    assert len(waiting({"a": [call("broken")]})) == 1
    with pytest.raises(ValueError, match="cannot be traced"):
        twice("broken", np.ones((3, 7), np.float32))


def test_processes_with_gpus_compile_in_one_order(monkeypatch):
    monkeypatch.setattr(ahead.jax, "process_count", lambda: 2)
    assert waiting({"a": [call()]})
    monkeypatch.setattr(ahead.jax, "default_backend", lambda: "gpu")
    assert not waiting({"a": [call()]})


@pytest.mark.parametrize(("preset", "shape"), [("fast", (2, 4)), ("best", (1, 1))])
def test_the_walk_calls_what_was_compiled(preset, shape):
    decoder = Decoder.open(*tiny_llama(), mesh(*shape), batch=2)
    windows = np.random.default_rng(1).integers(0, 64, (6, 23)).astype(np.int32)
    hidden, recipe = decoder.embed(windows), parse(["--preset", preset]).recipe
    walk = Walk(decoder, recipe, tuple(groups[2:] for groups in groups_of_blocks(decoder)), windows=4)  # two of the four
    streams = Streams(hidden, decoder.embed(windows) if recipe.target.dense_stream else None)
    calls = solver_calls(walk, [0, 1], 6)
    compiled = sum(map(len, calls.values()))
    prune_group.clear_cache()
    with compiled_ahead(calls) as programs_ahead:
        for kind in calls:
            programs_ahead.wait(kind)
    assert prune_group._cache_size() == 0  # of programs that were called
    programs = []

    def listener(event, duration, **about):
        if "backend_compile" in event:
            programs.append(about.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        prune_block(walk, 0, next(iter(decoder.blocks([0]))), streams)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert 0 < prune_group._cache_size() <= compiled
    assert "jit(prune_group)" not in programs


def test_programs_side_by_side_take_as_long_as_the_longest_or_as_the_cores_need():
    assert side_by_side([1, 2, 3], 1) == 6 and side_by_side([1, 2, 3], None) == 3
    assert side_by_side([1] * 20, 4) == 5 and side_by_side([], 2) == 0
