"""Compiles the programs of a run for devices that need not be attached."""

import collections
import functools
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from optima_tpu.method.statistics import Groups, TokenSets
from optima_tpu.models.decoder import Decoder, forward, head_logits, run_block
from optima_tpu.pipeline.calibrate import (
    Capture,
    SumsProgram,
    add_batch,
    pass_batch,
    pass_programs,
    residual_names,
    statistics_of,
    sums_of,
)
from optima_tpu.pipeline.memory_plan import Kept
from optima_tpu.pipeline.plan.hlo import collectives, moved
from optima_tpu.pipeline.plan.topology import Machine
from optima_tpu.report.numbers import number
from optima_tpu.runtime.mesh import DATA, ROWS, bytes_on_device, struct_on


class Call(NamedTuple):
    """A program of a run: a jitted function, and arguments that have shapes, dtypes and shardings but no values."""

    function: Any
    arguments: tuple[Any, ...]

    def lower(self) -> jax.stages.Lowered:
        """The program for the devices of its arguments."""
        lowered: jax.stages.Lowered = self.function.lower(*self.arguments)
        return lowered


class Compiled(NamedTuple):
    """What the compiler reports about a program, for one device.

    Attributes:
      seconds: compilation time.
      memory: bytes that the running program allocates: arguments, results, temporaries and code; None if it was refused.
      arguments, results: the bytes of ``memory`` that are arguments, and those that are results in memory of their own.
      flops, accessed: FLOPs and bytes as the compiler counts them: the body of a loop counts once.
      inside, outside: number of collectives by name, inside loops and outside.
      refused: why the program does not fit into the memory of the chip; None if it fits.
      moved: bytes of the collectives' results on a device, by name; the body of a loop counts once.
    """

    seconds: float
    memory: int | None = None
    arguments: int = 0
    results: int = 0
    flops: float = 0.0
    accessed: float = 0.0
    inside: Mapping[str, int] = {}
    outside: Mapping[str, int] = {}
    refused: str | None = None
    moved: Mapping[str, int] = {}


Compile = Callable[[str, Call], Compiled | None]
"""Compiles a program, which comes behind what it is in words; None if nothing is compiled."""


def compiler(machine: Machine, tell: Callable[[str], None]) -> Compile:
    """Compiles for a machine, and tells what it compiles and what it found."""

    def compile_call(what: str, call: Call) -> Compiled | None:
        if not machine.compiles:
            return None
        tell(f"compiling the {what}")
        return compiled(call.lower, tell, machine.options)

    return compile_call


def compiled(
    lower: Callable[[], jax.stages.Lowered],
    tell: Callable[[str], None] = lambda line: None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compiles a program and reads what it needs. A program that does not fit into memory is a result, not an error.

    Args:
      tell: called with a line about the result.
      options: options of the compiler.
    """
    start = time.monotonic()
    try:
        program = lower().compile(None if options is None else dict(options))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refused = Compiled(time.monotonic() - start, refused=_reason(str(error)))
        tell(f"  does not fit: {refused.refused}; {refused.seconds:.0f} s")
        return refused
    seconds, memory = time.monotonic() - start, program.memory_analysis()
    cost = program.cost_analysis() or {}
    text = program.as_text() or ""
    inside, outside = collectives(text)
    assert memory is not None, "XLA counts the memory of its programs on every platform"
    total = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
        - memory.alias_size_in_bytes
    )
    tell(f"  {number(total / 2**30)} GiB, {number(memory.argument_size_in_bytes / 2**30)} of them arguments; {seconds:.0f} s")
    return Compiled(
        seconds,
        total,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        cost.get("flops", 0.0),
        cost.get("bytes accessed", 0.0),
        inside,
        outside,
        moved=moved(text),
    )


def _reason(message: str) -> str:
    """The part of the compiler's message that says how much memory the program needs."""
    found = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", message) or re.search(
        r"\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", message
    )
    return f"needs {found[1]}iB of {found[2]}iB" if found else message.splitlines()[0][:100]


def _parameter(decoder: Decoder, name: str) -> Array:
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
        """For a block of the decoder's kind, in a step over up to ``windows`` windows."""
        mesh, size = decoder.mesh, windows_of_step(decoder, windows) * decoder.mesh.shape[DATA]
        dtype, positions = decoder.tensors.dtype(decoder.root + decoder.family.embedding), decoder.config.positions
        return cls(
            decoder.state({name: _parameter(decoder, name) for name in decoder.block_shapes}),
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
        return tuple(call for place, call in enumerate(self.passes) if call not in self.passes[:place])

    def joined(self, passes: Sequence[Compiled], sums: Compiled) -> Compiled:
        """What the programs need together.

        While one of them runs, the devices hold the arguments of every pass, what the passes return for this batch and for the one before,
        and the sums.

        Args:
          passes: of :attr:`distinct`.
        """
        if refused := next((each for each in (*passes, sums) if each.memory is None), None):
            return refused
        found = [passes[self.distinct.index(call)] for call in self.passes]
        every = (*found, sums)
        # The compiler drops the parameters that a pass does not read; they are there all the same.
        arguments = [call.arguments[1:] for call in self.passes]
        resident = bytes_on_device(*jax.tree.leaves((arguments, self.sums.arguments[1]))) + sum(
            2 * each.results for each in found
        )
        temporary = max(each.memory - each.arguments - each.results for each in every if each.memory)

        def counted(of: Callable[[Compiled], Mapping[str, int]]) -> dict[str, int]:
            return dict(sum((collections.Counter(of(each)) for each in every), collections.Counter()))

        return Compiled(
            sum(each.seconds for each in (*passes, sums)),
            resident + sums.results + temporary,
            arguments=resident,
            flops=sum(each.flops for each in every),
            accessed=sum(each.accessed for each in every),
            inside=counted(lambda each: each.inside),
            outside=counted(lambda each: each.outside),
            moved=counted(lambda each: each.moved),
        )


def calibration_calls(decoder: Decoder, capture: Capture, known: Kept, kept: Kept, length: int, windows: int) -> CalibrationCalls:
    """The programs of a step over ``windows`` windows, with both streams for a dense target.

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
        found = jax.eval_shape(functools.partial(forward, decoder.graph), *shapes)[1]
        inputs.append(
            jax.tree.map(
                lambda array: struct_on(mesh, array.shape, array.dtype, P(DATA)), {name: found[name] for name in each.names}
            )
        )
    weights = {name: _parameter(decoder, name + ".weight") for name in adding.multiplied(decoder, energy=False)}
    factors = {name: struct_on(mesh, (size, length), jnp.float32, P(DATA)) for name in adding.by_loss}
    valid = struct_on(mesh, (size,), jnp.bool_, P(DATA))
    sums = Call(add_batch, (adding, sums_of(decoder, adding), tuple(inputs), weights, factors, valid))
    return CalibrationCalls(tuple(passes), sums)


def windows_of_step(decoder: Decoder, windows: int) -> int:
    """The number of windows of a step on one slice of the data axis."""
    return min(decoder.batch, -(-windows // decoder.mesh.shape[DATA]))


def pruning_call(
    decoder: Decoder, names: tuple[str, ...], patterns: tuple[Pattern, ...], recipe: Recipe, held_out: bool, layout: RowLayout
) -> Call:
    """``prune_group`` for the layers ``names`` of a block, as the walk calls it."""
    weights = tuple(_parameter(decoder, name + ".weight") for name in names)
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


def resident(decoder: Decoder, groups: Groups, held_out: bool, matrices: int = 1) -> int:
    """Bytes on a device while a block is pruned: its weights and all its Hessians, with ``matrices`` of each set of tokens."""
    hessians = [statistics_of(decoder, names, None).hessian for names in groups]
    return bytes_on_device(*(_parameter(decoder, name) for name in decoder.block_shapes), *hessians * matrices * (1 + held_out))
