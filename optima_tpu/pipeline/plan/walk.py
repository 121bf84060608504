"""The walk over the blocks in a plan: its programs and forward passes."""

import collections
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from optima_tpu.config.run_config import RunConfig
from optima_tpu.errors import UserError, plural
from optima_tpu.method.patterns import Pattern
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.row_sharding import ON_EVERY_DEVICE, RowLayout
from optima_tpu.method.statistics import Groups
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline.layer_groups import groups_of_blocks
from optima_tpu.pipeline.memory_plan import Kept, Pass, aimed_residuals, block_passes, fitted, group_load
from optima_tpu.pipeline.plan.compile import joined, resident
from optima_tpu.pipeline.plan.counting import Work, carried, counted, counted_all
from optima_tpu.pipeline.plan.model import DeclaredModel
from optima_tpu.pipeline.plan.program import Program
from optima_tpu.pipeline.plan.share import Planned, Share
from optima_tpu.pipeline.plan.topology import Machine
from optima_tpu.pipeline.programs import Call, block_call, calibration_calls, head_call, pruning_call, windows_of_step
from optima_tpu.pipeline.sums import Capture
from optima_tpu.runtime.mesh import DATA, MODEL


class _Shape(NamedTuple):
    """All that decides the program of a group of layers."""

    shapes: tuple[tuple[int, ...], ...]
    patterns: tuple[Pattern, ...]
    layout: RowLayout
    residual: bool  # whether the target includes the residual-drift correction


class _Layers(NamedTuple):
    """The layers that share a :class:`_Shape`."""

    block: int  # one of those that have them
    names: tuple[str, ...]
    others: Groups  # groups whose Hessians are on the devices at the same time
    calls: int = 0


class _Kind(NamedTuple):
    """All that decides the program of a calibration pass.

    Attributes:
      block: the first block of its kind.
      known: the inputs that earlier passes have kept.
      kept: the inputs that this pass keeps.
      last: whether it is the last pass of its block.
    """

    block: int
    groups: Groups
    known: Kept
    kept: Kept
    last: bool

    def advances(self, recipe: Recipe) -> bool:
        """Whether the pass also moves the dense stream behind the block."""
        return recipe.target.dense_stream and self.last

    @property
    def after(self) -> Kept:
        """The inputs that are known behind the pass."""
        return Kept(*(tuple(dict.fromkeys((*old, *new))) for old, new in zip(self.known, self.kept)))


class BlockWalk(NamedTuple):
    """What a run does with all blocks.

    Attributes:
      kinds: the calibration passes that differ -> how many of each.
      layers: the groups of layers whose programs differ.
      states: bytes of hidden states that stay on each device.
      refused: why a run would refuse it; empty if it would not.
    """

    kinds: Mapping[_Kind, int]
    layers: Mapping[_Shape, _Layers]
    states: int = 0
    refused: str = ""


class ForwardPasses(NamedTuple):
    """Forward passes of one window through the average block and the head.

    Attributes:
      whole: work of a device in the whole block.
      pruned: work of a device in the pruned block, for which the inputs of some layers may be known.
      head: work of a device in the head.
      moved: bytes that enter and leave the devices for the pruned block.
      kept: the size of the kept inputs of layers, in sizes of the hidden states.
    """

    whole: Work
    pruned: Work
    head: Work
    moved: float
    kept: float


def walk_of(config: RunConfig, decoder: Decoder, patterns: Mapping[str, Pattern], budget: float) -> BlockWalk:
    recipe, text = config.recipe, config.calibration
    residuals, groups = aimed_residuals(decoder, recipe), groups_of_blocks(decoder)
    blocks: Iterable[tuple[Pass, ...]]
    states, refused = 0, ""
    try:
        blocks, _, states = fitted(decoder, groups, recipe, (text.fitted + text.held_out, text.window_length), budget)
    except UserError as error:
        blocks, refused = _fitting(decoder, groups, recipe, budget), str(error)
    kinds: dict[_Kind, int] = collections.Counter()
    layers: dict[_Shape, _Layers] = {}
    for index, parts in enumerate(blocks):
        prefix, alike, known = decoder.prefix(index), decoder.at(index), Kept()
        for position, part in enumerate(parts):
            kind = _Kind(alike.config.kind, part.groups, known, part.kept, position == len(parts) - 1)
            kinds[kind] += 1
            known = kind.after
            for group, layout in zip(part.groups, part.layouts):
                for together in recipe.solved_together(group, prefix):
                    shape = _Shape(
                        tuple(alike.block_shapes[name + ".weight"] for name in together),
                        tuple(patterns[prefix + name] for name in together),
                        layout,
                        any(name in residuals for name in together),
                    )
                    if shape not in layers:
                        others = tuple(other for other in part.groups if other != group)
                        layers[shape] = _Layers(alike.config.kind, together, others)
                    layers[shape] = layers[shape]._replace(calls=layers[shape].calls + 1)
    return BlockWalk(kinds, layers, states, refused)


def _fitting(decoder: Decoder, groups: Sequence[Groups], recipe: Recipe, budget: float) -> Iterator[tuple[Pass, ...]]:
    """The passes of every block; one pass for a block that does not fit."""
    for index, each in enumerate(groups):
        try:
            yield block_passes(decoder, index, each, recipe, budget)
        except UserError:
            pruned = recipe.pruned_groups(each, decoder.prefix(index))
            yield (Pass(pruned, (ON_EVERY_DEVICE,) * len(pruned)),)


def forward_passes(model: DeclaredModel, machine: Machine, config: RunConfig, kinds: Mapping[_Kind, int]) -> ForwardPasses:
    """The forward passes of a window. ``kinds`` has the calibration passes."""
    decoder, streams, text = model.decoder, config.recipe.target.streams, config.calibration
    sizes = text.window_length, text.fitted
    step = windows_of_step(decoder, text.fitted) * machine.mesh.shape[DATA]
    blocks = decoder.config.blocks
    shares = collections.Counter(map(decoder.config.kind_of, range(blocks)))
    last = {kind.block: kind.after.pruned for kind in kinds if kind.last}
    alike = [(count / blocks, model.at(block), last.get(block, ())) for block, count in shares.items()]

    def kept(kind: _Kind) -> float:
        width = decoder.at(kind.block).input_width
        return sum(map(width, itertools.chain(*kind.after[:streams]))) / (streams * decoder.config.d_model)

    def of_window(*calls: tuple[float, Call]) -> Work:
        return functools.reduce(Work.plus, (counted(call, machine).work.times(share / step) for share, call in calls), Work())

    whole = of_window(*((share, block_call(each.decoder, *sizes)) for share, each, _ in alike))
    pruned = [(share, block_call(each.decoder, *sizes, known)) for share, each, known in alike]
    return ForwardPasses(
        whole,
        of_window(*pruned) if any(known for *_, known in alike) else whole,
        of_window((1.0, head_call(decoder, *sizes))),
        sum(share * carried(call, call.arguments[2]) / step for share, call in pruned),
        max(map(kept, kinds), default=0.0),
    )


def walking(run: Planned, walk: BlockWalk, forward: ForwardPasses) -> Share:
    """The calibration and the pruning of all blocks."""
    machine, recipe, on_hosts = run.machine, run.config.recipe, not walk.states
    passes = [(kind, *_calibration(run, run.model.at(kind.block), kind, count)) for kind, count in walk.kinds.items()]
    programs = [program for _, program, _ in passes]
    if len(programs) == 1:  # otherwise a block is calibrated in several passes, each for some of its layers
        programs = [programs[0]._replace(name="calibration step")]
    programs += [_pruning(run, run.model.at(layers.block), shape, layers) for shape, layers in walk.layers.items()]
    own = (program._replace(memory=program.memory + walk.states) for program in programs)
    windows = run.blocks * run.calibrated / run.config.calibration.window_length
    moved, seconds = on_hosts * windows * forward.moved, windows * forward.pruned.seconds(machine)
    # A run that goes on makes these passes again, and those of the calibration for what they leave; see ``Journal.save``.
    again = seconds + machine.moving(moved)
    for kind, program, size in passes:
        moved += on_hosts * size
        if any(kind.kept) or kind.advances(recipe):
            again += program.seconds(machine) + machine.moving(on_hosts * size)
    saves = run.blocks - 1
    if run.config.recompute:
        saves = min(saves, int(again / (60 * run.config.recompute)))
    return Share(
        tuple(own),
        seconds={"pruned blocks forward": seconds},
        moved=moved,
        rewritten=lambda _: float(saves * run.stored.hidden),
        refused=walk.refused,
    )


def _calibration(run: Planned, model: DeclaredModel, kind: _Kind, blocks: int) -> tuple[Program, int]:
    """The program of a calibration pass, and the bytes that it moves."""
    config, machine, compile_call = run.config, run.machine, run.compile_call
    decoder, text, groups = model.decoder, config.calibration, kind.groups
    batch = windows_of_step(decoder, text.fitted)
    steps = sum(-(-count // (batch * machine.mesh.shape[DATA])) for count in (text.fitted, text.held_out))
    streams, target = config.recipe.target.streams, config.recipe.target
    capture = Capture(groups, target, advance=kind.advances(config.recipe), borrow=config.recipe.borrow)
    hessians = resident(decoder, groups, False, streams) - resident(decoder, (), False)
    # While the held-out windows pass through the block, the Hessians of the calibration windows are on the devices.
    beside = hessians if text.held_out else 0
    memory = beside + model.forward_bytes(groups, text.window_length, batch, streams) + 2 * hessians  # the sums, and a batch's
    calls = calibration_calls(decoder, capture, kind.known, kind.kept, text.window_length, text.fitted)
    where = f" (as in block {kind.block})" if len(decoder.config.kinds) > 1 else ""
    name, tokens = f"calibration of {_short(groups)}{where}", f"{batch} x {text.window_length} tokens a device"
    sums, compiled = compile_call(f"{name}, sums: {tokens}", calls.sums), None
    if sums:
        passes = [compile_call(f"{name}, pass: {tokens}", calls.passes[0])]
        if len(calls.distinct) > 1:
            passes.append(compile_call(f"{name}, pass of the dense stream: {tokens}", calls.passes[1]))
        compiled = joined(calls, [each for each in passes if each], sums)
    if compiled and compiled.memory:
        memory = beside + compiled.memory
    work, unknown = counted_all((*calls.passes, calls.sums), machine)
    moved = 0
    for call, names in zip(calls.passes, kind.kept):
        output, inputs = call.function.eval_shape(*call.arguments)
        moved += carried(call, output, [inputs[name] for name in names])
    program = Program(name, "calibration", blocks * steps, None, None, work, memory, compiled, unknown)
    return program, program.calls * moved


def _pruning(run: Planned, model: DeclaredModel, shape: _Shape, layers: _Layers) -> Program:
    recipe, held_out = run.config.recipe, run.config.calibration.held_out > 0
    decoder, layout, mesh = model.decoder, shape.layout, run.machine.mesh
    load, parts = group_load(decoder, layers.names, recipe), mesh.shape[MODEL] if layout.split else 1
    rows = -(-load.rows * parts // mesh.size)
    name = f"{_short((layers.names,))} [{load.rows:,}, {load.d_in:,}]"
    call = pruning_call(decoder, layers.names, shape.patterns, recipe, held_out, layout)
    work, unknown = counted(call, run.machine)
    memory = round(resident(decoder, layers.others, held_out, load.streams) + load.bytes(mesh, layout.split, layout.rows or rows))
    compiled = run.compile_call(f"solver for {name}: {plural(rows, 'row')} a device", call)
    if compiled and compiled.memory:
        memory = resident(decoder, (*layers.others, layers.names), held_out, load.streams) + compiled.memory - compiled.arguments
    return Program(name, "pruning", layers.calls, rows, layout, work, memory, compiled, unknown)


def _short(groups: Groups) -> str:
    """The layers of a group as "q, k, v"; of several, the first and "..."."""
    return ", ".join(name.rpartition(".")[2].removesuffix("_proj") for name in groups[0]) + ", ..." * (len(groups) > 1)
