"""The plan of a run: its programs, what each needs, and what the whole takes."""

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from optima_tpu.config.run_config import RunConfig
from optima_tpu.errors import UserError
from optima_tpu.method.footprint import footprint_of
from optima_tpu.method.layer_rules import check_layers
from optima_tpu.method.linalg.features import divided
from optima_tpu.method.patterns import Pattern
from optima_tpu.method.recipe import Recipe, pruned_groups, solved_together
from optima_tpu.method.row_sharding import ON_EVERY_DEVICE, Layout
from optima_tpu.method.statistics import Groups
from optima_tpu.models.generate import cache_structs, windows_at_once
from optima_tpu.pipeline.calibrate import linear_groups
from optima_tpu.pipeline.inputs import linear_shapes
from optima_tpu.pipeline.memory_plan import Pass, needed
from optima_tpu.pipeline.plan import estimate
from optima_tpu.pipeline.plan.compile import Compiled, compiled, lower_calibration, lower_pruning, resident, sequences_at_once
from optima_tpu.pipeline.plan.estimate import Storage, Work
from optima_tpu.pipeline.plan.model import Declared
from optima_tpu.pipeline.plan.topology import Target
from optima_tpu.pipeline.run import recipe_of
from optima_tpu.pipeline.self_calibration import generated_by
from optima_tpu.pipeline.walk import aimed_residuals, block_passes
from optima_tpu.runtime.device_memory import device_budget
from optima_tpu.runtime.mesh import DATA, MODEL


class Program(NamedTuple):
    """One program of a run.

    Attributes:
      name: what it does.
      calls: how often, in the whole run.
      rows: of the layers, on each device; None for the calibration.
      layout: how they are solved; None for the calibration.
      work: of one call, on each device.
      memory: bytes on a device while it runs, with what else is there.
      compiled: what the compiler says; None where nothing was compiled.
    """

    name: str
    calls: int
    rows: int | None
    layout: Layout | None
    work: Work
    memory: int
    compiled: Compiled | None

    @property
    def refused(self) -> bool:
        """Whether the compiler could not fit it into the chip."""
        return bool(self.compiled and self.compiled.refused)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
      programs: the calibration step, and the solver for each distinct shape.
      batch: sequences of one step on each slice of the data axis.
      storage: host memory and disk.
      seconds: by stage of the run.
      assumptions: what the seconds rest on.
      refused: why a run would refuse to begin; empty where it would not.
    """

    model: Declared
    target: Target
    programs: tuple[Program, ...]
    batch: int
    storage: Storage
    seconds: dict[str, float]
    assumptions: list[str]
    refused: str = ""

    @property
    def too_large(self) -> tuple[Program, ...]:
        """Programs that do not fit into the memory of a device."""
        return tuple(program for program in self.programs if program.refused or program.memory > self.target.chip.memory)

    def to_json(self) -> dict[str, Any]:
        """The plan in JSON types."""
        target, decoder = self.target, self.model.decoder
        return {
            "model": self.model.origin,
            "blocks": decoder.config.blocks,
            "target": target.name,
            "hosts": target.hosts,
            "mesh": dict(target.mesh.shape),
            "chip": target.chip._asdict(),
            "notes": list(target.notes),
            "batch": self.batch,
            "programs": [
                program._asdict()
                | {
                    "work": program.work._asdict(),
                    "seconds": program.work.seconds(target),
                    "layout": program.layout and dataclasses.asdict(program.layout),
                    "compiled": program.compiled and program.compiled._asdict(),
                }
                for program in self.programs
            ],
            "fits": not self.too_large and not self.refused,
            "refused": self.refused,
            "storage": self.storage._asdict(),
            "seconds": self.seconds,
            "assumptions": self.assumptions,
        }


class _Shape(NamedTuple):
    """What decides the program of a group of layers."""

    shapes: tuple[tuple[int, int], ...]
    patterns: tuple[Pattern, ...]
    layout: Layout
    residual: bool  # whether the drift of the residual stream is aimed at


def make_plan(config: RunConfig, model: Declared, target: Target, tell: Callable[[str], None] = lambda line: None) -> Plan:
    """Plans a run.

    Args:
      tell: called with a line before each compilation.

    Raises:
      UserError: pattern or layer rules do not fit the model.
    """
    decoder, recipe, text = model.decoder, recipe_of(config), config.calibration
    patterns = check_layers(config.layers, config.pattern, linear_shapes(decoder))
    held_out, names, residuals = text.held_out > 0, linear_groups(decoder), aimed_residuals(decoder, recipe)
    budget = device_budget(config.device_memory, None if target.here else target.chip.memory)
    kinds: dict[Groups, int] = collections.Counter()
    shapes: dict[_Shape, int] = collections.Counter()
    layers: dict[_Shape, tuple[tuple[str, ...], Groups]] = {}  # those of a shape, and whose Hessians lie beside theirs
    refused = ""
    for index in range(decoder.config.blocks):
        prefix = decoder.prefix(index)
        try:
            parts = block_passes(decoder, index, names, recipe, budget)
        except UserError as error:
            groups = pruned_groups(names, recipe, prefix)
            parts, refused = (Pass(groups, (ON_EVERY_DEVICE,) * len(groups)),), refused or str(error)
        for part in parts:
            kinds[part.groups] += 1
            for group, layout in zip(*part):
                for together in solved_together(group, recipe, prefix):
                    shape = _Shape(
                        tuple(decoder.block_shapes[name + ".weight"] for name in together),
                        tuple(patterns[prefix + name] for name in together),
                        layout,
                        any(name in residuals for name in together),
                    )
                    shapes[shape] += 1
                    layers.setdefault(shape, (together, tuple(other for other in part.groups if other != group)))

    if generated_by(config):
        try:
            windows_at_once(decoder, text.samples + text.held_out, cache_structs(decoder, text.length), budget)
        except UserError as error:
            refused = str(error)  # a run writes its text first
    block = estimate.sequence_flops(model, text.length)
    programs = [_calibration(config, model, target, block, groups, count, tell) for groups, count in kinds.items()]
    programs += [_pruning(model, target, recipe, shape, *layers[shape], count, held_out, tell) for shape, count in shapes.items()]
    steps = [program.calls * program.work.seconds(target) for program in programs]
    compiling = sum(program.compiled.seconds for program in programs if program.compiled)
    stored = estimate.storage(
        model,
        config,
        target.hosts,
        sum(
            math.prod(decoder.block_shapes[name + ".weight"]) * count
            for groups, count in kinds.items()
            for group in groups
            for name in group
        ),
    )
    seconds = estimate.run_seconds(
        model,
        config,
        target,
        stored,
        block,
        sum(steps[: len(kinds)]),
        sum(steps[len(kinds) :]),
        compiling if target.compiles else None,
    )
    return Plan(
        model,
        target,
        tuple(programs),
        sequences_at_once(decoder, text.samples),
        stored,
        seconds,
        estimate.assumptions(config, target),
        refused,
    )


def _calibration(
    config: RunConfig, model: Declared, target: Target, block: float, groups: Groups, blocks: int, tell: Callable[[str], None]
) -> Program:
    decoder, text = model.decoder, config.calibration
    sizes = tuple(decoder.block_shapes[names[0] + ".weight"][1] for names in groups)
    batch = sequences_at_once(decoder, text.samples)
    steps = sum(-(-count // (batch * target.mesh.shape[DATA])) for count in (text.samples, text.held_out))
    name, found = "calibration step", None
    # While the held-out sequences run through the block, the Hessians of the others are there.
    streams = config.target.matrices
    beside = resident(decoder, groups, False, streams) - resident(decoder, (), False) if text.held_out else 0
    memory = beside + estimate.calibration_memory(model, sizes, text.length, batch, streams)
    if target.compiles:
        tell(f"compiling the {name}: {batch} x {text.length} tokens a device")
        found = compiled(
            lambda: lower_calibration(decoder, groups, text.length, text.samples, recipe_of(config)), tell, target.options
        )
        memory = beside + found.memory if found.memory else memory
    added = aimed_residuals(decoder, recipe_of(config))
    drifting = tuple(decoder.block_shapes[name + ".weight"][1] for names in groups for name in names if name in added)
    work = estimate.calibration_work(model, block, sizes, text.length, batch, streams, drifting)
    return Program(name, blocks * steps, None, None, work, memory, found)


def _pruning(
    model: Declared,
    target: Target,
    recipe: Recipe,
    shape: _Shape,
    names: tuple[str, ...],
    others: Groups,
    calls: int,
    held_out: bool,
    tell: Callable[[str], None],
) -> Program:
    decoder, d_in, layout, mesh = model.decoder, shape.shapes[0][1], shape.layout, target.mesh
    every, parts = sum(d_out for d_out, _ in shape.shapes), mesh.shape[MODEL] if layout.split else 1
    rows = -(-every * parts // mesh.size)
    short = ", ".join(name.rpartition(".")[2].removesuffix("_proj") for name in names)
    name = f"{short} [{sum(d_out for d_out, _ in shape.shapes):,}, {d_in:,}]"
    matrices = recipe.target.matrices
    update = recipe.update(shape.patterns[0])
    work = estimate.prune_work(
        rows / parts,
        d_in,
        update,
        recipe.selector,
        held_out,
        parts,
        recipe.tuning.candidates(recipe.solver, recipe.target),
        matrices > 1,
        target.is_tpu,
        len(shape.shapes),
        mesh.size if target.is_tpu and divided(d_in, mesh.size) else 1,
    )
    memory = round(
        resident(decoder, others, held_out, matrices)
        + needed(
            d_in, every, layout.rows or rows, mesh, footprint_of(update, recipe.selector), layout.split, matrices, shape.residual
        )
    )
    found = None
    if target.compiles:
        tell(f"compiling the solver for {name}: {rows:,} rows a device")
        found = compiled(lambda: lower_pruning(decoder, names, shape.patterns, recipe, held_out, layout), tell, target.options)
        if found.memory:
            memory = resident(decoder, (*others, names), held_out, matrices) + found.memory - found.arguments
    return Program(name, calls, rows, layout, work, memory, found)
