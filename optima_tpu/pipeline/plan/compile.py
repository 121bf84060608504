"""Compiles the programs of a run for devices that need not be attached."""

import collections
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from optima_tpu.method.statistics import Groups
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline.plan.hlo import collectives, moved
from optima_tpu.pipeline.plan.topology import Machine
from optima_tpu.pipeline.programs import CalibrationCalls, Call, parameter
from optima_tpu.pipeline.sums import statistics_of
from optima_tpu.report.numbers import number
from optima_tpu.runtime.mesh import bytes_on_device


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
"""Compiles a program, which follows its description in words; returns None if nothing is compiled."""


def compiler(machine: Machine, tell: Callable[[str], None]) -> Compile:
    """A function that compiles for a machine, and prints what it compiles."""

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
    """Compiles a program and reads what it needs.

    A program that does not fit into memory is a result, not an error.

    Args:
      tell: called with a line about the result.
      options: options of the compiler.
    """
    start = time.monotonic()
    try:
        program = lower().compile(None if options is None else dict(options))
    except jax.errors.JaxRuntimeError as error:
        if error.error_code_string != "RESOURCE_EXHAUSTED":
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
    """How much memory a program needs, by the compiler's message."""
    match = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", message) or re.search(
        r"\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", message
    )
    return f"needs {match[1]}iB of {match[2]}iB" if match else message.splitlines()[0][:100]


def joined(calls: CalibrationCalls, passes: Sequence[Compiled], sums: Compiled) -> Compiled:
    """What the passes and the sums of a calibration step need together.

    While one of the programs runs, the devices hold the arguments of every pass, the results of the passes for this batch and
    for the batch before, and the sums.

    Args:
      passes: of :attr:`CalibrationCalls.distinct`.
    """
    if refused := next((each for each in (*passes, sums) if each.memory is None), None):
        return refused
    by_pass = [passes[calls.distinct.index(call)] for call in calls.passes]
    every = (*by_pass, sums)
    # The compiler drops the parameters that a pass does not read; they are there all the same.
    arguments = [call.arguments[1:] for call in calls.passes]
    resident = bytes_on_device(*jax.tree.leaves((arguments, calls.sums.arguments[1]))) + sum(2 * each.results for each in by_pass)
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


def resident(decoder: Decoder, groups: Groups, held_out: bool, matrices: int = 1) -> int:
    """Bytes on a device of a block and its Hessians, while it is pruned.

    Args:
      matrices: number of Hessians of each group and each set of tokens; the held-out windows are a second set.
    """
    hessians = [statistics_of(decoder, names, None).hessian for names in groups]
    return bytes_on_device(*(parameter(decoder, name) for name in decoder.block_shapes), *hessians * matrices * (1 + held_out))
