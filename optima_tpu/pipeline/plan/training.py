"""Plans the training of a pruned model: --distill and ``optima recover``."""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P

from optima_tpu.errors import UserError
from optima_tpu.evaluate.predictions import STRETCH
from optima_tpu.method.distillation import Distillation
from optima_tpu.models.decoder import Head
from optima_tpu.pipeline.distill.blocks import Trainer, head_gradient
from optima_tpu.pipeline.distill.train import SHARE, refuse_large
from optima_tpu.pipeline.distill.windows import TrainingParts
from optima_tpu.pipeline.layer_groups import linear_groups
from optima_tpu.pipeline.plan.compile import Compile
from optima_tpu.pipeline.plan.counting import counted
from optima_tpu.pipeline.plan.estimate import evaluation_tokens
from optima_tpu.pipeline.plan.model import DeclaredModel
from optima_tpu.pipeline.plan.program import Program
from optima_tpu.pipeline.plan.share import Planned, Share, TextPass
from optima_tpu.pipeline.plan.topology import WRITING, Machine
from optima_tpu.pipeline.programs import Call, Entering, windows_of_step
from optima_tpu.runtime.mesh import DATA, MODEL, bytes_on_device, struct_on


def training(run: Planned) -> Share:
    """The training of the pruned model, with its dense passes and checks."""
    method, text = run.config.distill, run.config.calibration
    if method is None:
        return Share()
    trainer, refused = Trainer(run.model.decoder, method, run.budget), ""
    try:
        refuse_large(trainer, *([] if run.recovering else ["--distill null"]))
    except UserError as error:
        refused = str(error)
    state, evaluated, hosts = text.window_length * run.model.state_bytes, evaluation_tokens(run.config), run.machine.hosts
    checked = (len(method.check_steps()) + 1 + method.trials) * run.held_out
    # The perplexity text measures the pruned model before it is trained, too.
    scored = (1 + method.reads_dense) * checked + evaluated
    passes = [TextPass(_BESIDE, checked + evaluated, scored, moves=False)]
    batch, steps, at_once = TrainingParts.of(method, method.pass_windows, state)
    if method.reads_dense:  # the dense model's states are computed before the steps that read them
        parts = -(-steps // at_once)
        times = method.passes if parts > 1 else 1  # what was the only part is still there in the next pass
        through = run.dense_blocks / run.blocks * (steps * batch * times + text.held_out) * text.window_length
        passes = [TextPass(_BESIDE, through, dense=parts * times), *passes]
    waiting, moving = 2 * (at_once * batch + text.held_out) * state, _moving(run.model, method)
    # A saved state: of what moves, weights and two moments in float32, and the best weights.
    one, blocks = (12 + run.model.end_itemsize) * moving, run.stored.disk["journal"]
    return Share(
        training_programs(run.model, trainer, text.window_length, run.machine, run.compile_call),
        tuple(passes),
        host={
            "text of the training": -(-waiting // hosts),
            "weights of the best check": -(-moving * run.model.end_itemsize // hosts),
        },
        disk={"trained blocks": blocks},
        # While a state is written, the one before is there; at the end one state and all trained blocks.
        removed={"states of the training": max(2 * one - blocks, one)},
        rewritten=lambda seconds: one * int(seconds / ((SHARE + 1) * one / WRITING)),
        refused=refused,
    )


def _moving(model: DeclaredModel, method: Distillation) -> int:
    """How many numbers a training moves."""
    return sum(
        len(indices) * math.prod(alike.block_shapes[name])
        for alike, indices in model.decoder.stretches
        for name in Trainer(alike, method).factors
    )


class _Step(NamedTuple):
    """One forward and backward pass of a training.

    Attributes:
      batch: windows on each slice of the data axis.
      length: tokens in a window.
      passes: how often the training runs it.
      updates: how often the training takes a step of Adam.
      hidden: the states between two blocks, [windows, length, d_model].
    """

    batch: int
    length: int
    passes: int
    updates: int
    hidden: Array


_BESIDE = "dense model and checks of the training"
_Part = tuple[str, int, int, Call]
"""Name and number of calls of a program, the bytes that it takes on a device besides its arguments by a simple model, and the
program."""


def training_programs(
    model: DeclaredModel, trainer: Trainer, length: int, machine: Machine, compile_call: Compile
) -> tuple[Program, ...]:
    """The programs of a step of training.

    They are the forward pass, backward pass and update of each kind of block, and the head's loss.

    Args:
      length: tokens in a window.
      compile_call: takes every program.
    """
    decoder, method = model.decoder, trainer.method
    windows = min(method.batch, method.pass_windows)
    batch = windows_of_step(decoder, windows)
    size = batch * machine.mesh.shape[DATA]
    hidden = Entering.of(decoder, length, windows).hidden
    steps = method.steps + method.trials
    step, head = _Step(batch, length, steps * -(-windows // size), steps, hidden), decoder.head_struct()
    parts = [_of_head(model, method, head, step)]
    for kind in decoder.config.kinds:
        parts += _of_block(model.at(kind), trainer.at(kind), step)
    # Beside the blocks and the head: every block's input, what leaves the last one, and what left the dense model's last one; and
    # what blocks keep for their backward passes.
    resident = trainer.bytes_on_device() + (decoder.config.blocks + 2) * bytes_on_device(hidden)
    resident += _kept(trainer, hidden) + bytes_on_device(*jax.tree.leaves(head))

    def program(name: str, calls: int, memory: int, call: Call) -> Program:
        compiled = compile_call(f"{name}: {batch} x {length} tokens a device", call)
        if compiled and compiled.memory:
            memory = compiled.memory - compiled.arguments
        work, unknown = counted(call, machine)
        return Program(name, "training", calls, None, None, work, resident + memory, compiled, unknown)

    return tuple(itertools.starmap(program, parts))


def _kept(trainer: Trainer, hidden: Array) -> int:
    """Bytes on a device that blocks keep for backward passes, at most."""
    config = trainer.decoder.config
    blocks = {kind: trainer.at(kind).struct() for kind in config.kinds}
    positions = {kind: config.positions(kind, hidden.shape[1]) for kind in config.kinds}
    kinds = [config.kind_of(index) for index in range(config.blocks)]
    return sum(trainer.kept([blocks[kind] for kind in kinds], hidden, [positions[kind] for kind in kinds]))


def _of_block(model: DeclaredModel, trainer: Trainer, step: _Step) -> list[_Part]:
    """Forward pass, backward pass and update of one kind of block."""
    decoder, block, kinds = model.decoder, trainer.struct(), model.decoder.config.kinds
    axis, kind = decoder.mesh.shape[MODEL], decoder.config.kind
    blocks = sum(decoder.config.kind_of(index) == kind for index in range(decoder.config.blocks))
    memory = model.forward_bytes(linear_groups(decoder), step.length, step.batch)
    share = bytes_on_device(*block.masters.values())
    gradient = 4 * sum(math.prod(array.shape) for array in block.masters.values()) // axis
    positions = Entering.of(decoder, step.length, len(step.hidden)).positions
    inside, number = (block.masters, block.fixed, step.hidden, positions), jax.ShapeDtypeStruct((), jnp.float32)
    where = f" (as in block {kind})" if len(kinds) > 1 else ""
    return [
        (f"block forward{where}", blocks * step.passes, memory, Call(trainer.forward, inside)),
        (  # it does the forward pass again, as it does on a CPU only where memory is short
            f"block backward{where}",
            blocks * step.passes,
            2 * memory + gradient,
            Call(trainer.backward, (trainer.again(*inside), step.hidden, block.masters)),
        ),
        (f"Adam of a block{where}", blocks * step.updates, share, Call(trainer.update, (block, block.masters, number, number))),
    ]


def _of_head(model: DeclaredModel, method: Distillation, head: Head, step: _Step) -> _Part:
    """The loss and its gradient with respect to what leaves the last block."""
    config, mesh, windows = model.decoder.config, model.decoder.mesh, len(step.hidden)
    # Of a stretch: logits and distributions of each model, and the gradient.
    arrays = 5 if method.reads_dense else 4
    tokens = struct_on(mesh, (windows, step.length), np.dtype(np.int32), P(DATA))
    valid = struct_on(mesh, (windows,), np.dtype(bool), P(DATA))
    logits = 4 * step.batch * STRETCH * config.vocab // mesh.shape[MODEL]
    return (
        "head: loss and gradient",
        step.passes,
        bytes_on_device(step.hidden) + arrays * logits,
        Call(head_gradient, (method.loss, head, step.hidden, step.hidden, tokens, valid)),
    )
