"""The programs that measure the gradient of the dense model's loss, for ``--target.weigh_by_loss``."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from optima_tpu.config.run_config import RunConfig
from optima_tpu.evaluate.predictions import STRETCH
from optima_tpu.method.statistics import Groups
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline.calibrate import linear_groups
from optima_tpu.pipeline.distill.blocks import head_gradient
from optima_tpu.pipeline.loss_gradient import GRADIENT, DrawnLabels, backward, parts_of, unrouted
from optima_tpu.pipeline.plan import estimate
from optima_tpu.pipeline.plan.compile import Compile
from optima_tpu.pipeline.plan.counting import counted
from optima_tpu.pipeline.plan.model import DeclaredModel
from optima_tpu.pipeline.plan.program import Program
from optima_tpu.pipeline.plan.topology import Machine
from optima_tpu.pipeline.programs import Call, Entering, block_call, windows_of_step
from optima_tpu.runtime.mesh import DATA, MODEL, bytes_on_device, struct_on


def gradient_programs(model: DeclaredModel, config: RunConfig, machine: Machine, compile_call: Compile) -> Iterator[Program]:
    """The pass back through a block of each kind, and the head's gradient; nothing where no token is weighed by the loss.

    Args:
      compile_call: takes every program.
    """
    if not config.recipe.target.weigh_by_loss:
        return
    decoder, length = model.decoder, config.calibration.window_length
    parts, axis = parts_of(decoder, config.calibration.fitted + config.calibration.held_out, length), decoder.mesh.shape[MODEL]
    batch = windows_of_step(decoder, len(parts[0]))
    steps, size = (
        sum(-(-len(part) // (batch * decoder.mesh.shape[DATA])) for part in parts),
        f"{batch} x {length} tokens a device",
    )
    for kind in decoder.config.kinds:
        alike = model.at(kind)
        name = f"block back to its outputs{f' (as in block {kind})' if len(decoder.config.kinds) > 1 else ''}"
        groups = unrouted(config.recipe.pruned_groups(linear_groups(alike.decoder), decoder.prefix(kind)))
        call = _back(alike.decoder, groups, length, len(parts[0]))
        found = compile_call(f"{name}: {size}", call)
        rough = 2 * estimate.forward_memory(alike, estimate.inputs_of(alike, linear_groups(alike.decoder)), length, batch)
        before = counted(block_call(alike.decoder, length, len(parts[0])), machine)  # the pass forward
        work = counted(call, machine).work.plus(before.work)
        blocks = sum(decoder.config.kind_of(index) == kind for index in range(decoder.config.blocks))
        yield Program(name, GRADIENT, blocks * steps, None, None, work, (found and found.memory) or rough, found)
    name = "head: gradient of the loss"
    call = _head(decoder, length, len(parts[0]))
    found = compile_call(f"{name}: {size}", call)
    # Of a stretch: logits, distribution, the random numbers of the labels, and the gradient.
    rough = bytes_on_device(*jax.tree.leaves(decoder.head_struct())) + 16 * batch * STRETCH * decoder.config.vocab // axis
    yield Program(name, GRADIENT, steps, None, None, counted(call, machine).work, (found and found.memory) or rough, found)


def _back(decoder: Decoder, groups: Groups, length: int, windows: int) -> Call:
    state, hidden, positions = Entering.of(decoder, length, windows)
    return Call(backward, (decoder.graph, groups, state, hidden, positions, hidden))


def _head(decoder: Decoder, length: int, windows: int) -> Call:
    hidden = Entering.of(decoder, length, windows).hidden
    places, valid = (
        struct_on(decoder.mesh, *each, P(DATA)) for each in ((hidden.shape[:2], jnp.int32), (hidden.shape[:1], jnp.bool_))
    )
    return Call(head_gradient, (DrawnLabels(0), decoder.head_struct(), hidden, hidden, places, valid))
