"""The programs of a run, as calls with structs instead of values."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from optima_tpu.method.patterns import Pattern
from optima_tpu.method.problem import Given
from optima_tpu.method.prune_group import prune_group
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.row_sharding import RowLayout, RowSharding
from optima_tpu.method.statistics import TokenSets
from optima_tpu.models.decoder import Decoder, forward, head_logits, run_block
from optima_tpu.pipeline.calibrate import pass_batch, pass_programs
from optima_tpu.pipeline.memory_plan import Kept
from optima_tpu.pipeline.sums import Capture, SumsProgram, add_batch, residual_names, statistics_of, sums_of
from optima_tpu.runtime.mesh import DATA, ROWS, struct_on


class Call(NamedTuple):
    """A jitted function of a run, and its arguments as structs."""

    function: Any
    arguments: tuple[Any, ...]

    def lower(self) -> jax.stages.Lowered:
        """The program for the devices of its arguments."""
        lowered: jax.stages.Lowered = self.function.lower(*self.arguments)
        return lowered


def parameter(decoder: Decoder, name: str) -> Array:
    dtype = decoder.tensors.dtype(decoder.prefix(decoder.config.kind) + name)
    return struct_on(decoder.mesh, decoder.block_shapes[name], dtype, decoder.sharding(name))


class Entering(NamedTuple):
    """What a program that runs a block gets, as structs on the mesh.

    Attributes:
      state: the block's parameters.
      hidden: the hidden states of a step, [windows, length, d_model].
      positions: from ``Decoder.positions``.
    """

    state: Any
    hidden: Array
    positions: Any

    @classmethod
    def of(cls, decoder: Decoder, length: int, windows: int) -> "Entering":
        """Structs for a block, in a step over up to ``windows`` windows."""
        mesh, size = decoder.mesh, windows_of_step(decoder, windows) * decoder.mesh.shape[DATA]
        dtype, positions = decoder.tensors.dtype(decoder.root + decoder.family.embedding), decoder.config.positions
        return cls(
            decoder.state({name: parameter(decoder, name) for name in decoder.block_shapes}),
            struct_on(mesh, (size, length, decoder.config.d_model), dtype, P(DATA)),
            jax.tree.map(lambda array: struct_on(mesh, array.shape, array.dtype, P()), positions(decoder.config.kind, length)),
        )


def block_call(decoder: Decoder, length: int, windows: int, known: Iterable[str] = ()) -> Call:
    """A step of ``Decoder.apply`` over up to ``windows`` windows.

    Args:
      known: the layers whose inputs are known.
    """
    state, hidden, positions = Entering.of(decoder, length, windows)
    inputs = {
        name: struct_on(decoder.mesh, (*hidden.shape[:2], decoder.input_width(name)), hidden.dtype, P(DATA)) for name in known
    }
    return Call(run_block, (decoder.graph, state, hidden, positions, inputs))


def head_call(decoder: Decoder, length: int, windows: int) -> Call:
    """The logits of a step."""
    return Call(jax.jit(head_logits), (decoder.head_struct(), Entering.of(decoder, length, windows).hidden))


class CalibrationCalls(NamedTuple):
    """The programs of one step of ``calibrate.accumulate``.

    Attributes:
      passes: for each stream its pass through the block. Two that are equal are one program.
      sums: adds what the passes return.
    """

    passes: tuple[Call, ...]
    sums: Call

    @property
    def distinct(self) -> tuple[Call, ...]:
        """The passes that are programs of their own."""
        return tuple(call for index, call in enumerate(self.passes) if call not in self.passes[:index])


def calibration_calls(decoder: Decoder, capture: Capture, known: Kept, kept: Kept, length: int, windows: int) -> CalibrationCalls:
    """The programs of a step, with both streams for a dense target.

    Args:
      known: the inputs that earlier passes have kept.
      kept: the inputs that this pass keeps.
    """
    mesh, adding = decoder.mesh, SumsProgram.of(decoder, capture)
    state, hidden, positions = Entering.of(decoder, length, windows)
    size, dtype = len(hidden), hidden.dtype

    def entering(width: int) -> Array:
        return struct_on(mesh, (size, length, width), dtype, P(DATA))

    passes, inputs = [], []
    for each, names in zip(pass_programs(decoder, capture, kept), known):
        passes.append(
            Call(pass_batch, (each, state, hidden, positions, {name: entering(decoder.input_width(name)) for name in names}))
        )
        # Shapes alone: with shardings on a mesh that is not here, JAX would ask how every product is sharded.
        shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), passes[-1].arguments[1:])
        layer_inputs = jax.eval_shape(functools.partial(forward, decoder.graph), *shapes)[1]
        inputs.append(
            jax.tree.map(
                lambda array: struct_on(mesh, array.shape, array.dtype, P(DATA)),
                {name: layer_inputs[name] for name in each.names},
            )
        )
    weights = {name: parameter(decoder, name + ".weight") for name in adding.multiplied(decoder, energy=False)}
    valid = struct_on(mesh, (size,), jnp.bool_, P(DATA))
    sums = Call(add_batch, (adding, sums_of(decoder, adding), tuple(inputs), weights, valid))
    return CalibrationCalls(tuple(passes), sums)


def windows_of_step(decoder: Decoder, windows: int) -> int:
    """The number of windows of a step on one slice of the data axis."""
    return min(decoder.batch, -(-windows // decoder.mesh.shape[DATA]))


def pruning_call(
    decoder: Decoder,
    names: tuple[str, ...],
    patterns: tuple[Pattern | None, ...],
    recipe: Recipe,
    held_out: bool,
    layout: RowLayout,
) -> Call:
    """``prune_group`` for layers of a block, as the walk calls it."""
    weights = tuple(parameter(decoder, name + ".weight") for name in names)
    given = tuple(Given(struct_on(decoder.mesh, weight.shape, jnp.bool_, ROWS)) for weight in weights)
    (places,) = residual_names(decoder, (names,), recipe.target)
    unseen = statistics_of(decoder, names, places, energy=True) if held_out else None
    arguments = (
        weights,
        TokenSets(statistics_of(decoder, names, places), unseen),
        None if recipe.selector.chooses else given,
        recipe,
        patterns,
        RowSharding(decoder.mesh, layout),
    )
    return Call(prune_group, arguments)
