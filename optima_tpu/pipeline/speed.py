"""Measures the speed of this program's forward pass, dense and cut."""

import functools
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from optima_tpu.config.run_config import RunConfig
from optima_tpu.errors import UserError
from optima_tpu.models.checkpoints.exported import Exported
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.model import Model
from optima_tpu.models.whole_model import empty_cache, load, step, windows_at_once
from optima_tpu.pipeline.cutting import PrunedModel
from optima_tpu.pipeline.keeping import Stage, StageWork, in_record
from optima_tpu.report.contents import Rates, Speed
from optima_tpu.report.file import environment
from optima_tpu.report.pace import Step
from optima_tpu.runtime.device_memory import device_budget
from optima_tpu.runtime.kept import KeptRecord
from optima_tpu.runtime.mesh import DATA, place

MEASURED = KeptRecord("speed.json", Speed)

_LENGTH, _NEW = 256, 16
"""Tokens of a window, and those of them that are written."""
_TURNS = 4
_SHARE = 0.25
"""The share of the devices' budget that one of the models may take: both are there at once, so that they can take turns."""


def speed(model: Model, cut: Decoder, budget: float) -> Speed:
    """Measures both models, with one window for each slice of the data axis.

    Every process calls it.

    Args:
      model: the dense one.
      cut: the same model without what was cut.
      budget: bytes that a run may use of each device.
    """
    dense = model.decoder
    limit = getattr(model.pretrained.config.get_text_config(), "max_position_embeddings", None)
    length = min(_LENGTH, limit or _LENGTH)
    new = min(_NEW, length // 2)
    dtype = dense.tensors.dtype(dense.root + dense.family.embedding)
    try:
        windows = windows_at_once(
            dense, 1, length, _SHARE * budget, "take a --mesh with a larger model axis, or a larger --device_memory"
        )
    except UserError as error:
        return Speed("", reason=str(error))
    how = f"{environment(dense.mesh).words}, {dtype}, batch {windows}, {length - new} tokens read and {new} written"
    both = [_turn(decoder, windows, length, new) for decoder in (dense, cut)]
    turns = [[turn() for turn in both] for _ in range(1 + _TURNS)][1:]  # the first one compiles
    fastest = [
        Rates(max(each.reading for each in rates), max(each.writing for each in rates)) for rates in zip(*turns, strict=True)
    ]
    return Speed(how, dense=fastest[0], cut=fastest[1])


def _turn(decoder: Decoder, windows: int, length: int, written: int) -> Callable[[], Rates]:
    """Loads a model; returns a function that times the tokens of a turn."""
    model, program = load(decoder, length), jax.jit(functools.partial(step, decoder), donate_argnums=1)
    tokens = np.random.default_rng(0).integers(0, decoder.config.vocab, (windows, length - written), np.int32)
    prompt, one = (place(decoder.mesh, each, P(DATA)) for each in (tokens, tokens[:, :1]))
    empty = jax.jit(functools.partial(empty_cache, decoder, windows, length))  # traces every kind of block, once

    def turn() -> Rates:
        caches = jax.block_until_ready(empty())
        ends = [time.perf_counter()]
        for at, chunk in ((0, prompt), *((at, one) for at in range(prompt.shape[1], length))):
            _, caches = jax.block_until_ready(program(model, caches, chunk, np.int32(at)))
            ends.append(time.perf_counter())
        read, *steps = np.diff(ends)
        # Of single tokens the fastest: what else a machine does at the same time stops some of them.
        return Rates(float(prompt.size / read), float(windows / min(steps)))

    return turn


def cuts(config: RunConfig) -> bool:
    """Whether the exported model may be without parts of the dense one."""
    parts = any(pattern.cuts for pattern in config.recipe.patterns)
    return config.export and (parts or bool(config.cut.counts))


def _measure_speed(work: StageWork, pruned: PrunedModel) -> Speed | None:
    opened = work.opened
    exported = Exported.open(opened.directory, pruned.checkpoint)
    if not exported.cuts.deleted:
        return None
    dense = opened.model.decoder
    narrow = Decoder.open(exported.config(), exported.source, dense.mesh, dense.batch)
    return speed(opened.model, narrow, device_budget(opened.config.device_memory))


SPEED = Stage("measuring the speed", _measure_speed, in_record(MEASURED), lambda opened: [Step("measuring the speed", 0)])
