"""The plan of a run: the needs of each program and of the whole run."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from optima_tpu.config.run_config import RunConfig
from optima_tpu.pipeline.ahead import side_by_side
from optima_tpu.pipeline.inputs import pruned_layers
from optima_tpu.pipeline.plan import estimate
from optima_tpu.pipeline.plan.compile import Compile, compiler
from optima_tpu.pipeline.plan.model import DeclaredModel, Serving
from optima_tpu.pipeline.plan.program import Program
from optima_tpu.pipeline.plan.removal import allocating, choosing, removing
from optima_tpu.pipeline.plan.share import Planned, Share, Storage
from optima_tpu.pipeline.plan.texts import perplexity, with_windows, writing
from optima_tpu.pipeline.plan.topology import WRITING, Machine
from optima_tpu.pipeline.plan.training import training
from optima_tpu.pipeline.plan.walk import BlockWalk, forward_passes, walk_of, walking
from optima_tpu.pipeline.programs import windows_of_step
from optima_tpu.runtime.device_memory import device_budget

Powers = Sequence[Callable[[Planned], Share]]

RUN: tuple[Powers, Powers] = (writing, perplexity, choosing, removing, allocating), (training,)
"""What a run does before the walk over its blocks and behind it, in this order. A new power is a function in one of them."""
RECOVERY: tuple[Powers, Powers] = (perplexity,), (training,)
"""The same of `optima recover`, whose blocks are pruned already."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
      programs: the calibration step, the solver for each distinct shape, and those of a training step.
      batch: number of windows of one step on each slice of the data axis.
      storage: host memory and disk.
      seconds: by stage of the run.
      assumptions: the assumptions behind ``seconds``, in words.
      refused: why a run would refuse to begin; empty if it would begin.
      serving: what programs hold that run the dense and the cut model, for one window of the calibration; None if nothing is cut.
    """

    model: DeclaredModel
    machine: Machine
    programs: tuple[Program, ...]
    batch: int
    storage: Storage
    seconds: dict[str, float]
    assumptions: list[str]
    refused: str = ""
    serving: tuple[Serving, Serving] | None = None

    @property
    def written(self) -> float:
        """Bytes that the run writes, in multiples of the model's own."""
        return self.seconds["writing"] * WRITING / self.model.bytes

    @property
    def largest(self) -> Program:
        """The program that needs most memory, of a plan that has one."""
        return max(self.programs, key=lambda program: program.memory)

    @property
    def too_large(self) -> tuple[Program, ...]:
        """Programs that do not fit into the memory of a device."""
        return tuple(program for program in self.programs if program.refused or program.memory > self.machine.chip.memory)

    def to_json(self) -> dict[str, Any]:
        """The plan in JSON types."""
        machine, decoder = self.machine, self.model.decoder
        return {
            "model": self.model.origin,
            "blocks": decoder.config.blocks,
            "target": machine.name,
            "hosts": machine.hosts,
            "mesh": dict(machine.mesh.shape),
            "chip": machine.chip._asdict(),
            "notes": list(machine.notes),
            "batch": self.batch,
            "programs": [
                program._asdict()
                | {
                    "work": program.work._asdict(),
                    "seconds": program.work.seconds(machine),
                    "layout": program.layout and dataclasses.asdict(program.layout),
                    "compiled": program.compiled and program.compiled._asdict(),
                    "unknown": sorted(program.unknown),
                }
                for program in self.programs
            ],
            "fits": not self.too_large and not self.refused,
            "refused": self.refused,
            "serving": self.serving and dict(zip(("dense", "cut"), (each._asdict() for each in self.serving))),
            "storage": self.storage._asdict() | {"written": self.written},
            "seconds": self.seconds,
            "assumptions": self.assumptions,
        }


def make_plan(
    config: RunConfig,
    model: DeclaredModel,
    machine: Machine,
    tell: Callable[[str], None] = lambda line: None,
    recovering: bool = False,
    compile_call: Compile | None = None,
) -> Plan:
    """Plans a run.

    Args:
      recovering: plan what `optima recover` does: the blocks are pruned already, and ``config.distill`` trains them.
      tell: called with a line before each compilation.
      compile_call: takes every program; None compiles each for the machine.

    Raises:
      UserError: pattern or layer rules do not fit the model.
    """
    config, dense, model = with_windows(config, model), model, model.left_by(config.cut)
    decoder, text, patterns = model.decoder, config.calibration, pruned_layers(config, model.decoder)
    budget = device_budget(config.device_memory, None if machine.here else machine.chip.memory)
    walk = BlockWalk({}, {}) if recovering else walk_of(config, decoder, patterns, budget)
    forward = forward_passes(model, machine, config, walk.kinds)
    stored = estimate.storage(model, config, machine, patterns, forward.kept, bool(patterns) and not recovering)
    planned = Planned(config, dense, model, machine, budget, compile_call or compiler(machine, tell), stored, recovering)
    before, behind = ([power(planned) for power in powers] for powers in (RECOVERY if recovering else RUN))
    shares = [*before, walking(planned, walk, forward), *behind]
    programs = tuple(itertools.chain.from_iterable(share.programs for share in shares))
    stored = estimate.with_shares(stored, shares)._replace(resident=walk.states > 0)
    timed = estimate.RunTime(planned._replace(stored=stored), forward, shares)
    narrow = model.narrow(config.recipe)
    return Plan(
        dense,
        machine,
        programs,
        windows_of_step(decoder, config.distill.batch if recovering and config.distill else text.fitted),
        stored,
        timed.stages(_compiling(programs, machine) if machine.compiles else None),
        estimate.assumptions(config, machine, shares, frozenset[str]().union(*(program.unknown for program in programs))),
        next((share.refused for share in shares if share.refused), ""),
        None if narrow.opened is dense.opened else (dense.serving(text.window_length), narrow.serving(text.window_length)),
    )


def _compiling(programs: Iterable[Program], machine: Machine) -> float:
    """Seconds of compiling, in parallel for the programs of the pruning."""
    took = [(program.stage == "pruning", program.compiled.seconds) for program in programs if program.compiled]
    ahead = side_by_side([seconds for pruning, seconds in took if pruning], os.cpu_count() if machine.here else None)
    return ahead + sum(seconds for pruning, seconds in took if not pruning)
