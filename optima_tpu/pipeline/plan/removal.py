"""Plans the work before the walk: cuts of blocks and experts, allocation."""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from optima_tpu.errors import plural
from optima_tpu.method.experts import PRICE_ROWS, PRICE_STEPS
from optima_tpu.models.checkpoints.fewer_experts import ExpertCut, expert_cut
from optima_tpu.models.decoder import Decoder, run_block
from optima_tpu.pipeline.calibrate import pass_batch
from optima_tpu.pipeline.cut_blocks import TRIED, expected_passes
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
from optima_tpu.pipeline.plan.compile import resident
from optima_tpu.pipeline.plan.counting import carried, counted_all
from optima_tpu.pipeline.plan.program import Program
from optima_tpu.pipeline.plan.share import Planned, Share, TextPass
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
        def returned(call: Call) -> dict[str, Any]:
            inputs = call.function.eval_shape(*call.arguments)[1]
            return jax.tree.map(lambda array: struct_on(decoder.mesh, array.shape, array.dtype, P(DATA)), inputs)

        program, entering = mixture_program(decoder, cut.names), Entering.of(decoder, length, windows)
        attention = Call(pass_batch, (attention_program(decoder), *entering, {}))
        known = returned(attention)
        passing = Call(pass_batch, (program, *entering, known))
        read, shares = map(returned(passing).__getitem__, program.names)
        valid = struct_on(decoder.mesh, entering.hidden.shape[:1], jnp.bool_, P(DATA))
        layer = program.names[0] + ".weight"
        shape = read.experts, *decoder.block_shapes[layer]
        return cls(
            Sent(read, shares, valid),
            struct_on(decoder.mesh, shape, parameter(decoder, layer).dtype, P(None, None, MODEL)),
            attention,
            passing,
            Call(run_block, (decoder.graph, *entering, known | {program.names[0]: read.rows})),
        )


def choosing(run: Planned) -> Share:
    """The choice of the blocks for ``--cut.blocks``."""
    choices, streams = run.config.cut.blocks, run.config.recipe.target.streams
    if not choices:
        return Share()
    stage, tried = "blocks that are left out", sum(expected_passes(run.dense_blocks, choices))
    passes = (
        # It reads the dense model for all choices, and half of it for each twice, but for the first once.
        TextPass(stage, tried / run.blocks * run.held_out, choices * (1 + TRIED) * run.held_out, dense=choices + 1 / 2),
        TextPass(stage, (streams - 1) * choices * run.calibrated / run.blocks, moves=False),
    )
    # The held-out windows before every block, behind all blocks, and of the tries. The walk has no hidden states yet.
    entering = run.held_out * run.model.state_bytes * (run.dense_blocks + 1 + TRIED) // run.machine.hosts
    share = -(-run.stored.hidden // run.machine.hosts)
    return Share(
        passes=passes,
        host={"choosing blocks": entering - share} if entering > share else {},
        assumptions=(
            f"each choice of --cut.blocks tries {plural(TRIED, 'block')}, and each try passes half of those that are left",
        ),
    )


def allocating(run: Planned) -> Share:
    """The measuring of blocks for ``--allocation``."""
    assumed = "measuring the blocks for --allocation is not counted; every block is planned with the pattern's sparsity"
    return Share(assumptions=(assumed,) * run.config.allocation.measures)


_REMOVING = "removing experts"


def removing(run: Planned) -> Share:
    """The removal of experts for ``--cut.experts``."""
    if not run.config.cut.experts:
        return Share()
    cut, text, decoder = expert_cut(run.config.cut.experts, run.dense.config), run.config.calibration, run.dense.decoder
    mixed = mixed_blocks(decoder, cut)
    kept = kept_of_mixture(decoder, cut.names.down, (text.fitted, text.window_length), run.budget)
    tokens = text.fitted * text.window_length
    # It reads the dense weights, and passes the text through the blocks without a mixture, too.
    other = TextPass(_REMOVING, tokens * (1 - sum(mixed) / len(mixed)), moves=not kept, dense=1)
    parts = [_removal(run, cut, kind, kept) for kind in decoder.config.kinds if mixed[kind]]
    down = decoder.at(mixed.index(True)).block_shapes[cut.names.down.replace("*", "0") + ".weight"]
    solved = sum(mixed) * cut.kept * math.prod(down) * run.dense.dtype.itemsize
    return Share(
        tuple(itertools.chain.from_iterable(part.programs for part in parts)),
        (other,),
        moved=tokens * run.dense.state_bytes if kept else sum(part.moved for part in parts),
        disk={"solved experts": solved} if run.config.cut.refit else {},
    )


def _removal(run: Planned, cut: ExpertCut, kind: int, kept: int) -> Share:
    """The programs that score and solve the experts of alike blocks.

    What they move is that of a removal whose passes compute the inputs of mixtures each time.

    Args:
      kept: bytes of a device that hold the inputs of mixtures from one pass to the next; 0 where every pass computes them.
    """
    config, dense, left, machine = run.config, run.dense, run.model, run.machine
    mesh, length, windows = dense.decoder.mesh, config.calibration.window_length, config.calibration.fitted
    every, batch = dense.decoder.config, windows_of_step(dense.decoder, windows)
    steps, size = -(-windows // (batch * mesh.shape[DATA])), f"{batch} x {length} tokens a device"
    calls = steps * sum(every.kind_of(index) == kind for index in range(every.blocks))
    priced, refit, model = config.cut.expert_score.priced, config.cut.refit, dense.at(kind)
    whole, fewer = (_Mixture.of(each.at(kind).decoder, cut, length, windows) for each in (dense, left))
    experts, width, inner = whole.down.shape
    sketch = struct_on(mesh, (experts, experts * min(PRICE_ROWS, width), inner), whole.down.dtype, P(None, MODEL))
    target = struct_on(mesh, (math.prod(whole.sent.shares.shape[:2]), width), jnp.float32, P(DATA, MODEL))
    again, left_again = ([] if kept else [each.passing] for each in (whole, fewer))
    scores = Call(expert_outputs, (mesh, whole.sent, whole.down, None))
    missed = Call(refit_sums, (mesh, target, fewer.sent, fewer.down, None))
    # The last step of the prices stands with the scores, and that of the refit with what experts miss.
    last = [Call(refit_gram, (mesh, whole.sent)), *again, Call(refit_squares, (mesh, whole.sent, sketch)), *again]
    last_left = [*again, *[scores][: len(again)], Call(refit_squares, (mesh, fewer.sent, fewer.down)), *left_again]
    parts = [
        ("scores of experts", 1, [scores, whole.attention, whole.passing, *last * priced, fewer.behind]),
        ("step of their prices", priced * PRICE_STEPS, [Call(refit_product, (mesh, whole.sent, sketch)), *again]),
        ("what experts miss", min(1, refit), [missed, fewer.passing, *last_left]),
        ("step of their refit", max(0, refit - 1), [Call(refit_product, (mesh, fewer.sent, fewer.down)), *left_again]),
    ]
    grams = 2 * 4 * cut.kept * inner**2
    states = _STATES * bytes_on_device(struct_on(mesh, (sketch if priced else fewer.down).shape, jnp.float32, P(None, MODEL)))
    resident_bytes = resident(model.decoder, (), False) + states + grams + kept
    rough = resident_bytes + model.forward_bytes(linear_groups(model.decoder), length, batch)
    # The pass behind the block reads what the others do; attention's output and what leaves the block are as large again.
    programs, moved = [], 2 * carried(fewer.passing)
    for name, times, together in parts:
        if times:
            name += f" (as in block {kind})" * (len(every.kinds) > 1)
            compiled = run.compile_call(f"{name}: {size}", together[0])
            work, unknown = counted_all(together, machine)
            memory = max(rough, resident_bytes + (compiled.memory if compiled and compiled.memory else 0))
            programs.append(Program(name, _REMOVING, calls * times, None, None, work, memory, compiled, unknown))
        moved += times * sum(carried(call) for call in together if call.function is pass_batch)
    return Share(tuple(programs), moved=calls * moved)
