"""The walk: calibrates, prunes and saves one block after the other."""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optima_tpu.method.acceptance import refuse_broken
from optima_tpu.method.linalg.scaling import live_diagonal
from optima_tpu.method.outcomes import PrunedMatrix
from optima_tpu.method.patterns import Pattern
from optima_tpu.method.problem import Given, ReadGiven
from optima_tpu.method.prune_group import prune_group
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.row_sharding import RowSharding
from optima_tpu.method.statistics import Groups, TokenSets, TokenStatistics
from optima_tpu.models.activations import HiddenStates
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline.ahead import Ahead, compiled_ahead
from optima_tpu.pipeline.calibrate import Stream, accumulate, repeat
from optima_tpu.pipeline.journal import DENSE, HIDDEN, Journal
from optima_tpu.pipeline.memory_plan import Pass, block_bytes, block_passes
from optima_tpu.pipeline.programs import Call, pruning_call
from optima_tpu.pipeline.sums import Capture
from optima_tpu.report.pace import Step
from optima_tpu.report.progress import Progress
from optima_tpu.report.records import BlockReport, LayerReport
from optima_tpu.report.rows import layer_report
from optima_tpu.runtime.host_memory import give_back_freed_memory
from optima_tpu.runtime.mesh import ROWS, place
from optima_tpu.runtime.processes import fetch


@dataclasses.dataclass(frozen=True)
class Walk:
    """The settings that all blocks of a run share.

    Attributes:
      decoder: the dense model, without the blocks that are left out.
      recipe: what is done to every layer.
      groups: for every block the layers that read the same input, from ``layer_groups.groups_of_blocks``.
      windows: the number of calibration windows; the windows after them are held out.
      budget: bytes that may be used of each device, beside hidden states that stay there.
      given: masks, and optionally weights, for a recipe without a selector.
      resident: whether the hidden states stay on the devices; otherwise they are on the hosts, and every pass moves them.
      tell: called with every layer's report as soon as the layer is done.
      begin: called before every part of a block with its kind and with words on it; see :func:`block_steps`.
      whole: the dense model with all blocks; None where the decoder has them.
      ahead: programs that are being compiled; see :func:`solver_calls`.
    """

    decoder: Decoder
    recipe: Recipe
    groups: tuple[Groups, ...]
    windows: int
    budget: float = math.inf
    given: ReadGiven | None = None
    resident: bool = False
    tell: Callable[[LayerReport], None] = lambda report: None
    begin: Callable[[str, str], None] = lambda kind, words: None
    whole: "WholeDense | None" = None
    ahead: Ahead = Ahead()

    @functools.cached_property
    def last(self) -> int:
        """The last block with a pruned layer; -1 if no layer is pruned.

        No block behind it reads the text.
        """
        blocks = reversed(range(self.decoder.config.blocks))
        return next((each for each in blocks if self.recipe.pruned_groups(self.groups[each], self.decoder.prefix(each))), -1)


class WholeDense(NamedTuple):
    """The dense model with all blocks, through which its stream passes.

    Attributes:
      decoder: of all blocks.
      kept: the indices, in it, of the blocks of the walk.
    """

    decoder: Decoder
    kept: tuple[int, ...]

    def before(self, index: int) -> range:
        """The left-out blocks just before the walk's block ``index``."""
        return range(self.kept[index - 1] + 1 if index else 0, self.kept[index])


class Streams(NamedTuple):
    """Hidden states of all windows.

    Attributes:
      pruned: after the pruned blocks.
      dense: after the dense blocks, if the target needs them.
    """

    pruned: HiddenStates
    dense: HiddenStates | None = None


class PrunedBlock(NamedTuple):
    """The result of pruning a block.

    Attributes:
      parameters: all parameters by their name inside the block, sharded as before.
      masks: by parameter name, [d_out, d_in] bool.
      layers: a report for every pruned layer.
      scales: by parameter name, [d_out, groups], of the weights that were quantised.
      seconds: of the passes that :func:`repeat_block` makes again, of all streams, at most: those of the calibration count with
        their sums.
    """

    parameters: dict[str, Array]
    masks: dict[str, Array]
    layers: tuple[LayerReport, ...]
    scales: dict[str, Array]
    seconds: float = 0.0


def prune_model(
    walk: Walk, tokens: np.ndarray, journal: Journal, progress: Progress, saved: Callable[[], None] = lambda: None
) -> None:
    """Prunes the blocks that the journal lacks and saves them in it.

    Args:
      tokens: [windows + held out, length] int32, the calibration set and the held-out windows after it.
      saved: called after every saved block.
    """
    for index, reason in journal.damaged.items():
        progress.note(f"block {index} was damaged since it was saved ({reason}): it is pruned again")
    missing = [index for index in range(walk.decoder.config.blocks) if index not in journal.finished]
    with compiled_ahead(solver_calls(walk, missing, len(tokens))) as ahead:
        _prune_blocks(dataclasses.replace(walk, ahead=ahead), missing, tokens, journal, progress, saved)
    journal.forget_states()


def _prune_blocks(
    walk: Walk, missing: Sequence[int], tokens: np.ndarray, journal: Journal, progress: Progress, saved: Callable[[], None]
) -> None:
    decoder, count = walk.decoder, walk.decoder.config.blocks
    streams, following = None, 0
    for index, parameters in zip(missing, decoder.blocks(missing)):
        started = time.monotonic()
        if index > walk.last:
            streams = None
        elif streams is None or following != index:
            walk.begin(ENTERING, f"getting the hidden states that enter block {index}")
            streams = _streams_before(walk, tokens, index, journal, progress)
        if streams:
            _pass_left_out(walk, index, streams.dense)
        journal.repeated += time.monotonic() - started
        progress.block(index, count)
        started = time.monotonic()
        pruned = prune_block(walk, index, parameters, streams) if streams else PrunedBlock(dict(parameters), {}, (), {})
        journal.repeated += pruned.seconds
        report, prefix = BlockReport(index, time.monotonic() - started, pruned.layers), decoder.prefix(index)
        weights, masks, scales = (
            {prefix + name: value for name, value in part.items()} for part in (pruned.parameters, pruned.masks, pruned.scales)
        )
        # Only a later block needs them.
        leaving = [states for states in streams if states] if streams and index < min(walk.last, missing[-1]) else []
        walk.begin(WRITING, "saving")
        journal.save(index, weights, masks, report, leaving, scales)
        saved()
        del parameters, pruned, weights, masks, scales  # frees their memory before the next block is placed
        give_back_freed_memory()
        following = index + 1
        progress.advance()


def solver_calls(walk: Walk, missing: Sequence[int], windows: int) -> dict[str, list[Call]]:
    """The programs that choose masks and solve, by the kind of their step.

    They prune the first missing block of each kind.

    Args:
      windows: the number of all windows.
    """
    calls: dict[str, list[Call]] = {}
    if walk.given is not None:  # masks from outside may come with weights, which is another program
        return calls
    for index in {walk.decoder.config.kind_of(index): index for index in reversed(missing)}.values():
        decoder, prefix = walk.decoder.at(index), walk.decoder.prefix(index)
        for part, _ in _passes(walk, index):
            for names, layout in zip(part.groups, part.layouts):
                calls.setdefault(_solving(names).kind, []).extend(
                    pruning_call(decoder, together, patterns, walk.recipe, walk.windows < windows, layout)
                    for together, patterns in _solved_together(walk.recipe, names, prefix)
                )
    return calls


def _solved_together(
    recipe: Recipe, names: tuple[str, ...], prefix: str
) -> list[tuple[tuple[str, ...], tuple[Pattern | None, ...]]]:
    """The layers of a group that one program prunes, and their patterns."""
    return [
        (together, tuple(recipe.pattern_of(prefix + name, name) for name in together))
        for together in recipe.solved_together(names, prefix)
    ]


def block_steps(walk: Walk, index: int) -> list[Step]:
    """The parts of a block's pruning that are measured one by one.

    A block that stays dense has only the last two. A block behind the last pruned one has only the last.
    """
    parts = [step for part, _ in _passes(walk, index) for step in (_calibrating(walk, index, part), *map(_solving, part.groups))]
    passing = [_passing(walk, index)] if index <= walk.last else []
    return [*parts, *passing, Step(WRITING, block_bytes(walk.decoder, index))]


WRITING = "writing files"
"""The kind of steps whose work is a number of bytes that are written."""
ENTERING = "hidden states before a block"
"""The kind of the step before the first block of a start, which embeds the text, or repeats the blocks before."""


def _calibrating(walk: Walk, index: int, part: Pass) -> Step:
    return Step(f"calibrating {walk.decoder.config.kind_of(index)} {part.groups}")


def _solving(names: tuple[str, ...]) -> Step:
    return Step(f"solving {names}")


def _passing(walk: Walk, index: int) -> Step:
    return Step(f"passing on {walk.decoder.config.kind_of(index)}")


def prune_block(walk: Walk, index: int, parameters: Mapping[str, Array], streams: Streams) -> PrunedBlock:
    """Calibrates and prunes a block, and passes the hidden states on.

    The Hessians come from the dense block, which reads the output of the pruned blocks before it, as in the paper. One pass
    accumulates them, or several passes if not all Hessians fit on the devices. With ``recapture`` each part of
    ``layer_groups.in_sequence`` has its own passes, through the block as pruned so far. A pass may keep inputs of layers, which
    no later layer changes: the passes behind it and the pruned block go on from there (``memory_plan.Kept``).

    Args:
      parameters: the dense block's parameters, by name inside the block, on the mesh.
      streams: the hidden states that enter the block; replaced by those that leave it.
    """
    if walk.recipe.target.dense_stream and streams.dense is None:
        raise ValueError("a dense target needs the hidden states of the dense model")
    block = PrunedBlock(dict(parameters), {}, (), {})
    passes, target, seconds = _passes(walk, index), walk.recipe.target, 0.0
    known: list[Mapping[str, HiddenStates]] = [{}] * target.streams
    for part, capture in passes:
        now = block.parameters if walk.recipe.recapture else parameters
        entering = tuple(
            _entering(walk, index, Stream(read, hidden, inputs), names)
            for read, hidden, inputs, names in zip((now, parameters), streams, known, part.kept)
            if hidden is not None
        )
        started = time.monotonic()
        walk.begin(_calibrating(walk, index, part).kind, "reading the calibration text")
        tokens = _calibrate(walk, index, capture, entering)
        if capture.advance or any(part.kept):  # a run that goes on makes the pass again for what it leaves
            seconds += time.monotonic() - started
        known = [stream.inputs for stream in entering]
        added = prune_groups(walk, index, block.parameters, part, tokens)
        block = PrunedBlock(added.parameters, block.masks | added.masks, block.layers + added.layers, block.scales | added.scales)
        del tokens, added  # frees their memory before the next statistics are made
    started = time.monotonic()
    walk.begin(_passing(walk, index).kind, "passing the text on through the pruned block")
    walk.decoder.apply(index, block.parameters, streams.pruned, known=known[0])
    if target.dense_stream and streams.dense is not None and not passes:
        walk.decoder.apply(index, parameters, streams.dense)
    return block._replace(seconds=seconds + time.monotonic() - started)


def _passes(walk: Walk, index: int) -> tuple[tuple[Pass, Capture], ...]:
    """The passes of :func:`prune_block`, and what each accumulates.

    The last pass also moves a dense stream through the block.
    """
    recipe, target = walk.recipe, walk.recipe.target
    parts = block_passes(walk.decoder, index, walk.groups[index], recipe, walk.budget)
    return tuple(
        (part, Capture(part.groups, target, advance=target.dense_stream and part is parts[-1], borrow=recipe.borrow))
        for part in parts
    )


def _entering(walk: Walk, index: int, stream: Stream, kept: Sequence[str]) -> Stream:
    """The stream with room for the inputs of layers that a pass keeps."""
    return stream._replace(kept={name: stream.hidden.room(walk.decoder.at(index).input_width(name)) for name in kept})


def repeat_block(walk: Walk, index: int, parameters: Mapping[str, Array], hidden: HiddenStates, dense: bool) -> None:
    """Passes one stream through a block as :func:`prune_block` did, in place.

    Runs the same programs over the same batches: on a mesh of several devices XLA may round another program differently.

    Args:
      parameters: of the pruned block or, for the dense stream, of the dense block.
    """
    known: Mapping[str, HiddenStates] = {}
    passes = _passes(walk, index)
    for part, capture in passes:
        stream = _entering(walk, index, Stream(parameters, hidden, known), part.kept[dense])
        for each, first, last in _sets(walk, capture, len(hidden)):
            repeat(walk.decoder, index, each, stream.part(first, last), dense)
        known = stream.inputs
    if not dense or not passes:
        walk.decoder.apply(index, parameters, hidden, known=known)


def prune_groups(
    walk: Walk, index: int, parameters: Mapping[str, Array], part: Pass, tokens: tuple[TokenSets[TokenStatistics], ...]
) -> PrunedBlock:
    """Prunes those linear layers of a block for which there are statistics.

    Args:
      parameters: the parameters of the block as pruned so far, by name inside the block, on the mesh.
      part: the groups of these layers.
      tokens: the statistics of each group.
    """
    parameters, masks, reports, scales, prefix = dict(parameters), {}, [], {}, walk.decoder.prefix(index)
    for names, layout, sets in zip(part.groups, part.layouts, tokens):
        walk.begin(_solving(names).kind, f"pruning {', '.join(names)}")
        walk.ahead.wait(_solving(names).kind)
        for together, patterns in _solved_together(walk.recipe, names, prefix):
            weights = tuple(parameters[name + ".weight"] for name in together)
            indices = [names.index(name) for name in together]
            matrices = prune_group(
                weights,
                TokenSets(*(each and each.of(indices) for each in _informative(sets))),
                _given(walk, prefix, together, weights),
                walk.recipe,
                patterns,
                RowSharding(walk.decoder.mesh, layout),
            )
            reports += _report(walk, index, together, matrices, sets.calibration)
            for name, old, matrix in zip(together, weights, matrices):
                # Gather to a replicated array first: XLA cannot reshard from rows over all devices to columns directly and warns.
                gathered = jax.device_put(matrix.weight, NamedSharding(walk.decoder.mesh, P()))
                parameters[name + ".weight"] = jax.device_put(gathered, old.sharding)
                masks[name + ".weight"] = matrix.keep
                if matrix.scale is not None:
                    scales[name + ".weight"] = matrix.scale
    return PrunedBlock(parameters, masks, tuple(reports), scales)


def _calibrate(walk: Walk, index: int, capture: Capture, streams: tuple[Stream, ...]) -> tuple[TokenSets[TokenStatistics], ...]:
    """The statistics of each group's input on both sets of tokens."""
    by_set = (
        accumulate(walk.decoder, index, each, [stream.part(first, last) for stream in streams])
        for each, first, last in _sets(walk, capture, len(streams[0].hidden))
    )
    return tuple(itertools.starmap(TokenSets, zip(*by_set)))


def _sets(walk: Walk, capture: Capture, total: int) -> Iterator[tuple[Capture, int, int]]:
    """Yields capture and range of the calibration and held-out windows."""
    yield capture, 0, walk.windows
    if walk.windows < total:
        yield dataclasses.replace(capture, energy=capture.target.dense_stream, borrow=0.0), walk.windows, total


def _informative(sets: TokenSets[TokenStatistics]) -> TokenSets[TokenStatistics]:
    """Replaces a zero Hessian by the identity, which prunes by magnitude."""
    hessian = sets.calibration.hessian
    if fetch(jnp.trace(hessian)) > 0:
        return sets
    identity = jnp.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.sharding)
    return sets._replace(calibration=sets.calibration._replace(hessian=identity))


def _given(walk: Walk, prefix: str, names: tuple[str, ...], weights: tuple[Array, ...]) -> tuple[Given[Array], ...] | None:
    """The imported masks of some layers; None if a selector makes them."""
    if walk.given is None:
        return None
    read = tuple(walk.given(prefix + name + ".weight", (len(weight), weight.shape[1])) for name, weight in zip(names, weights))
    return jax.tree.map(lambda array: place(walk.decoder.mesh, array, ROWS), read)


def _report(
    walk: Walk, index: int, names: tuple[str, ...], matrices: tuple[PrunedMatrix, ...], statistics: TokenStatistics
) -> list[LayerReport]:
    """The reports of some layers of one input. Calls ``walk.tell`` with each.

    Raises:
      UserError: a selector's weights are not finite.
    """
    kept = [jnp.sum(matrix.keep, dtype=jnp.int32) for matrix in matrices]
    diagonal, tokens, kept, rows = fetch(
        (jnp.diagonal(statistics.hessian), statistics.tokens, kept, [matrix.rows for matrix in matrices])
    )
    refuse_broken(walk.decoder.prefix(index), names, rows)
    corrected = walk.decoder.family.residuals if walk.recipe.target.gamma else ()
    reports = []
    for name, matrix, left, outcomes in zip(names, matrices, kept, rows, strict=True):
        (d_out, d_in), alive_inputs = matrix.keep.shape, int(live_diagonal(diagonal).sum())
        others = {"block": index, "name": name, "dead_inputs": d_in - alive_inputs, "tokens": int(tokens)}
        others["corrects_stream"] = name in corrected
        reports.append(layer_report(outcomes, (d_out, d_in), int(left), others))
        walk.tell(reports[-1])
    return reports


def _streams_before(walk: Walk, tokens: np.ndarray, index: int, journal: Journal, progress: Progress) -> Streams:
    """The hidden states that enter a block, loaded or computed again."""
    decoder = walk.decoder
    first, hidden = _saved_states(walk, tokens, index, journal, HIDDEN)
    if first < index:
        through = f"block {first}" if first == index - 1 else f"blocks {first} to {index - 1}"
        progress.note(
            f"the hidden states that enter block {index} are computed again, through {through} as pruned: a run saves them "
            f"only when this would take {journal.recompute} minutes (--recompute)"
        )
    finished = dataclasses.replace(decoder, tensors=journal.tensors())
    for block, parameters in zip(range(first, index), finished.blocks(range(first, index))):
        repeat_block(walk, block, parameters, hidden, dense=False)
    if not walk.recipe.target.dense_stream:
        return Streams(hidden)
    first, dense = _saved_states(walk, tokens, index, journal, DENSE)
    for block, parameters in zip(range(first, index), decoder.blocks(range(first, index))):
        _pass_left_out(walk, block, dense)
        repeat_block(walk, block, parameters, dense, dense=True)
    return Streams(hidden, dense)


def _pass_left_out(walk: Walk, index: int, dense: HiddenStates | None) -> None:
    """Passes the dense stream through the left-out blocks before ``index``."""
    if walk.whole is None or dense is None:
        return
    for block, parameters in zip(walk.whole.before(index), walk.whole.decoder.blocks(walk.whole.before(index))):
        walk.whole.decoder.apply(block, parameters, dense)


def _saved_states(walk: Walk, tokens: np.ndarray, index: int, journal: Journal, name: str) -> tuple[int, HiddenStates]:
    """The last block up to ``index`` with a saved input, and this input.

    Block 0 and the embeddings if none is saved.
    """
    decoder = walk.decoder
    block, hidden = journal.last_activations(decoder.mesh, index, len(tokens), name) or (-1, decoder.embed(tokens))
    return block + 1, hidden.on_devices(decoder.batch) if walk.resident else hidden
