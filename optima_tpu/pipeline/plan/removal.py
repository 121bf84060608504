"""The programs that remove experts before the walk, for ``--cut.experts``."""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from optima_tpu.config.run_config import RunConfig
from optima_tpu.method.experts import PRICE_STEPS, ExpertStatistics, price_rows
from optima_tpu.models.checkpoints.fewer_experts import ExpertCut
from optima_tpu.models.decoder import Decoder, forward
from optima_tpu.pipeline.calibrate import linear_groups, pass_batch
from optima_tpu.pipeline.experts import Mixed, add_statistics, mixed_blocks, mixture_program, refit_product, refit_sums
from optima_tpu.pipeline.grams import Sent
from optima_tpu.pipeline.plan import estimate
from optima_tpu.pipeline.plan.compile import Compile, resident
from optima_tpu.pipeline.plan.counting import Work, counted
from optima_tpu.pipeline.plan.model import DeclaredModel
from optima_tpu.pipeline.plan.program import REMOVING, Program
from optima_tpu.pipeline.plan.topology import Machine
from optima_tpu.pipeline.programs import Call, Entering, block_call, windows_of_step
from optima_tpu.runtime.mesh import DATA, MODEL, bytes_on_device, struct_on

_STATES = 7
"""Arrays as large as down of the experts that stay: its weights, and what conjugate gradients hold."""


class _Mixture(NamedTuple):
    """A block with a mixture, in a step over the calibration text.

    Attributes:
      mixed: what :attr:`passing` returns, with down.
      passing: the pass through the block that returns what its experts read.
      whole: the pass through all of the block.
    """

    mixed: Mixed
    passing: Call
    whole: Call

    @classmethod
    def of(cls, decoder: Decoder, cut: ExpertCut, length: int, windows: int) -> "_Mixture":
        program, (state, hidden, positions) = mixture_program(decoder, cut.names), Entering.of(decoder, length, windows)
        # Shapes alone: with shardings on a mesh that is not here, JAX would ask how every product is sharded.
        shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), (state, hidden, positions))
        sown = jax.eval_shape(functools.partial(forward, decoder.graph), *shapes)[1]
        read, shares = (
            jax.tree.map(lambda array: struct_on(decoder.mesh, array.shape, array.dtype, P(DATA)), sown[name])
            for name in program.names
        )
        valid = struct_on(decoder.mesh, hidden.shape[:1], jnp.bool_, P(DATA))
        shape = read.experts, *decoder.block_shapes[program.names[0] + ".weight"]
        down = struct_on(decoder.mesh, shape, jnp.float32, P(None, None, MODEL))
        passing = Call(pass_batch, (program, state, hidden, positions, {}))
        return cls(Mixed(Sent(read, shares, valid), down, None), passing, block_call(decoder, length, windows))


class Beside(NamedTuple):
    """What the removal takes beside its programs.

    Attributes:
      seconds: in which the dense weights are read, and hidden states move to and from the devices.
      solved: bytes of the solved weights in the run directory.
    """

    seconds: float = 0.0
    solved: int = 0

    @classmethod
    def of(cls, dense: DeclaredModel, cut: ExpertCut, config: RunConfig, machine: Machine) -> "Beside":
        text, refit, decoder = config.calibration, config.cut.refit, dense.decoder
        mixed = mixed_blocks(decoder, cut)
        # Into every pass over the text, and out of the block that has lost experts.
        priced = config.cut.expert_score.priced * (PRICE_STEPS + 2)
        passes = 2 * len(mixed) + sum(mixed) * (1 + priced + (1 + refit) * bool(refit))
        moved = passes * text.fitted * text.window_length * decoder.config.d_model * dense.dtype.itemsize
        seconds = dense.all_blocks_bytes() / estimate.ASSUMED.reading + moved / estimate.ASSUMED.transfer
        down = decoder.at(mixed.index(True)).block_shapes[cut.names.down.replace("*", "0") + ".weight"]
        return cls(seconds / machine.hosts, bool(refit) * sum(mixed) * cut.kept * math.prod(down) * dense.dtype.itemsize)


def removal_programs(
    dense: DeclaredModel, cut: ExpertCut, config: RunConfig, machine: Machine, compile_call: Compile
) -> Iterator[Program]:
    """What scores the experts of a block, and solves those that stay.

    Args:
      compile_call: takes every program.
    """
    mesh, length, windows = dense.decoder.mesh, config.calibration.window_length, config.calibration.fitted
    left, mixed, batch = dense.without_experts(cut), mixed_blocks(dense.decoder, cut), windows_of_step(dense.decoder, windows)
    steps, size = -(-windows // (batch * mesh.shape[DATA])), f"{batch} x {length} tokens a device"
    for kind in dense.decoder.config.kinds:
        if not mixed[kind]:
            continue
        model, blocks = dense.at(kind), sum(dense.decoder.config.kind_of(index) == kind for index in range(len(mixed)))
        whole, fewer = (_Mixture.of(each.at(kind).decoder, cut, length, windows) for each in (dense, left))
        sums = ExpertStatistics(*(struct_on(mesh, (cut.total,), dtype, P()) for dtype in (jnp.int32, *[jnp.float32] * 3)))
        experts, width, inner = whole.mixed.down.shape
        sketch = struct_on(mesh, (experts, experts * price_rows(experts, width), inner), jnp.float32, P(None, MODEL))
        prices = Call(refit_product, (mesh, whole.mixed.sent, sketch))
        first = Call(refit_sums, (mesh, whole.mixed, fewer.mixed))
        product = Call(refit_product, (mesh, fewer.mixed.sent, fewer.mixed.down))
        parts = [
            ("scores of experts", 1, Call(add_statistics, (mesh, sums, whole.mixed)), (whole.passing, fewer.whole)),
            ("prices of experts", config.cut.expert_score.priced * (PRICE_STEPS + 2), prices, (whole.passing,)),
            ("what experts miss", min(1, config.cut.refit), first, (whole.passing, fewer.passing)),
            ("step of their refit", config.cut.refit, product, (fewer.passing,)),
        ]
        down, groups = fewer.mixed.down, linear_groups(model.decoder)
        grams = 2 * 4 * cut.kept * down.shape[2] ** 2
        states = _STATES * bytes_on_device(sketch if config.cut.expert_score.priced else down)
        held = resident(model.decoder, (), False) + states + grams
        rough = held + estimate.forward_memory(model, estimate.inputs_of(model, groups), length, batch)
        for name, times, call, before in parts:
            if times:
                name += f" (as in block {kind})" * (len(dense.decoder.config.kinds) > 1)
                found = compile_call(f"{name}: {size}", call)
                work = functools.reduce(Work.plus, (counted(each, machine).work for each in (call, *before)))
                memory = max(rough, held + (found.memory if found and found.memory else 0))
                yield Program(name, REMOVING, blocks * steps * times, None, None, work, memory, found)
