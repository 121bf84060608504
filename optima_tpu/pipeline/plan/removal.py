"""The programs that remove experts before the walk, for ``--cut.experts``."""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from optima_tpu.config.run_config import RunConfig
from optima_tpu.method.experts import PRICE_ROWS, PRICE_STEPS
from optima_tpu.models.checkpoints.fewer_experts import ExpertCut
from optima_tpu.models.decoder import Decoder, forward, run_block
from optima_tpu.pipeline.calibrate import pass_batch
from optima_tpu.pipeline.experts import (
    attention_program,
    expert_outputs,
    mixed_blocks,
    mixture_program,
    refit_gram,
    refit_product,
    refit_squares,
    refit_sums,
)
from optima_tpu.pipeline.grams import Sent
from optima_tpu.pipeline.layer_groups import linear_groups
from optima_tpu.pipeline.memory_plan import kept_of_mixture
from optima_tpu.pipeline.plan import estimate
from optima_tpu.pipeline.plan.compile import Compile, resident
from optima_tpu.pipeline.plan.counting import Work, counted
from optima_tpu.pipeline.plan.model import DeclaredModel
from optima_tpu.pipeline.plan.program import REMOVING, Program
from optima_tpu.pipeline.plan.topology import Machine
from optima_tpu.pipeline.programs import Call, Entering, parameter, windows_of_step
from optima_tpu.runtime.mesh import DATA, MODEL, bytes_on_device, struct_on

_STATES = 7
"""Arrays as large as down of the experts that stay: its weights, and what conjugate gradients hold."""


class _Mixture(NamedTuple):
    """A block with a mixture, in a step over the calibration text.

    Attributes:
      sent: what :attr:`passing` returns.
      down: of all experts.
      attention: the pass through the block that returns the output of attention.
      passing: the pass from there on that returns the inputs of the experts' down.
      behind: the pass from there on through all of the block.
    """

    sent: Sent
    down: Array
    attention: Call
    passing: Call
    behind: Call

    @classmethod
    def of(cls, decoder: Decoder, cut: ExpertCut, length: int, windows: int) -> "_Mixture":
        program, (state, hidden, positions) = mixture_program(decoder, cut.names), Entering.of(decoder, length, windows)
        # Shapes alone: with shardings on a mesh that is not here, JAX would ask how every product is sharded.
        shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), (state, hidden, positions))
        sown = jax.eval_shape(functools.partial(forward, decoder.graph), *shapes)[1]
        read, shares, attended = (
            jax.tree.map(lambda array: struct_on(decoder.mesh, array.shape, array.dtype, P(DATA)), sown[name])
            for name in (*program.names, decoder.attended)
        )
        valid, layer = struct_on(decoder.mesh, hidden.shape[:1], jnp.bool_, P(DATA)), program.names[0] + ".weight"
        shape = read.experts, *decoder.block_shapes[layer]
        return cls(
            Sent(read, shares, valid),
            struct_on(decoder.mesh, shape, parameter(decoder, layer).dtype, P(None, None, MODEL)),
            Call(pass_batch, (attention_program(decoder), state, hidden, positions, {})),
            Call(pass_batch, (program, state, hidden, positions, {decoder.attended: attended})),
            Call(run_block, (decoder.graph, state, hidden, positions, {decoder.attended: attended, program.names[0]: read.rows})),
        )


class Beside(NamedTuple):
    """What the removal takes beside its programs.

    Attributes:
      seconds: in which the dense weights are read, and hidden states move to and from the devices.
      solved: bytes of the solved weights in the run directory.
    """

    seconds: float = 0.0
    solved: int = 0

    @classmethod
    def of(cls, dense: DeclaredModel, cut: ExpertCut, config: RunConfig, machine: Machine, budget: float) -> "Beside":
        text, refit, decoder = config.calibration, config.cut.refit, dense.decoder
        mixed, widths = mixed_blocks(decoder, cut), [decoder.config.d_model]
        if not kept_of_mixture(decoder, cut.names.down, (text.fitted, text.window_length), budget):
            # Into and out of every block; of one with a mixture into the pass through attention, and with its output into each other.
            priced, refitted = config.cut.expert_score.priced * (PRICE_STEPS + 2), (2 + refit) * bool(refit)
            both = [decoder.config.d_model, decoder.input_width(decoder.attended)]
            widths = 2 * len(mixed) * widths + sum(mixed) * (both + (1 + priced + refitted) * both + both[1:])
        moved = sum(widths) * text.fitted * text.window_length * dense.dtype.itemsize
        seconds = dense.all_blocks_bytes() / estimate.READING + moved / estimate.TRANSFER
        down = decoder.at(mixed.index(True)).block_shapes[cut.names.down.replace("*", "0") + ".weight"]
        return cls(seconds / machine.hosts, bool(refit) * sum(mixed) * cut.kept * math.prod(down) * dense.dtype.itemsize)


def removal_programs(
    dense: DeclaredModel, cut: ExpertCut, config: RunConfig, machine: Machine, budget: float, compile_call: Compile
) -> Iterator[Program]:
    """What scores the experts of a block, and solves those that stay.

    Args:
      budget: bytes of a device, from ``device_memory.device_budget``.
      compile_call: takes every program.
    """
    mesh, length, windows = dense.decoder.mesh, config.calibration.window_length, config.calibration.fitted
    left, mixed, batch = dense.without_experts(cut), mixed_blocks(dense.decoder, cut), windows_of_step(dense.decoder, windows)
    count, size = -(-windows // (batch * mesh.shape[DATA])), f"{batch} x {length} tokens a device"
    kept = kept_of_mixture(dense.decoder, cut.names.down, (windows, length), budget)
    priced, refit = config.cut.expert_score.priced, config.cut.refit
    for kind in dense.decoder.config.kinds:
        if not mixed[kind]:
            continue
        model, blocks = dense.at(kind), sum(dense.decoder.config.kind_of(index) == kind for index in range(len(mixed)))
        whole, fewer = (_Mixture.of(each.at(kind).decoder, cut, length, windows) for each in (dense, left))
        experts, width, inner = whole.down.shape
        sketch = struct_on(mesh, (experts, experts * min(PRICE_ROWS, width), inner), whole.down.dtype, P(None, MODEL))
        target = struct_on(mesh, (math.prod(whole.sent.shares.shape[:2]), width), jnp.float32, P(DATA, MODEL))
        again, left_again = ([] if kept else [each.passing] for each in (whole, fewer))
        scores = Call(expert_outputs, (mesh, whole.sent, whole.down, None))
        # The last step of the prices stands with the scores, and that of the refit with what experts miss.
        last = [Call(refit_gram, (mesh, whole.sent)), *again, Call(refit_squares, (mesh, whole.sent, sketch)), *again]
        missed = [
            fewer.passing,
            *again,
            *[scores][: len(again)],
            Call(refit_squares, (mesh, fewer.sent, fewer.down)),
            *left_again,
        ]
        parts = [
            ("scores of experts", 1, scores, [whole.attention, whole.passing, *last * priced, fewer.behind]),
            ("step of their prices", priced * PRICE_STEPS, Call(refit_product, (mesh, whole.sent, sketch)), again),
            ("what experts miss", min(1, refit), Call(refit_sums, (mesh, target, fewer.sent, fewer.down, None)), missed),
            ("step of their refit", max(0, refit - 1), Call(refit_product, (mesh, fewer.sent, fewer.down)), left_again),
        ]
        grams = 2 * 4 * cut.kept * inner**2
        states = _STATES * bytes_on_device(struct_on(mesh, (sketch if priced else fewer.down).shape, jnp.float32, P(None, MODEL)))
        held = resident(model.decoder, (), False) + states + grams + kept
        rough = held + estimate.forward_memory(model, linear_groups(model.decoder), length, batch)
        for name, times, call, beside in parts:
            if times:
                name += f" (as in block {kind})" * (len(dense.decoder.config.kinds) > 1)
                found = compile_call(f"{name}: {size}", call)
                work = functools.reduce(Work.plus, (counted(each, machine).work for each in (call, *beside)))
                memory = max(rough, held + (found.memory if found and found.memory else 0))
                yield Program(name, REMOVING, blocks * count * times, None, None, work, memory, found)
