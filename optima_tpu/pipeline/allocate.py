"""Measures blocks to choose their sparsities; see ``method.allocation``."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optima_tpu.errors import UserError
from optima_tpu.evaluate.distance import divergences
from optima_tpu.method.allocation import OWL, Allocation, SparsitySteps, allocate, steps_of
from optima_tpu.method.layer_rules import LayerRule
from optima_tpu.method.patterns import Pattern
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.selectors import Wanda
from optima_tpu.method.solvers import CG
from optima_tpu.method.statistics import TokenSets, TokenStatistics
from optima_tpu.models.activations import Activations
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline.calibrate import Stream, accumulate
from optima_tpu.pipeline.cutting import pruned_model, smaller_walk
from optima_tpu.pipeline.journal import Journal
from optima_tpu.pipeline.keeping import KeptResult, Stage, StageWork
from optima_tpu.pipeline.memory_plan import Pass, block_bytes, block_passes
from optima_tpu.pipeline.opened import Opened
from optima_tpu.pipeline.sums import Capture
from optima_tpu.pipeline.walk import Walk, prune_groups
from optima_tpu.report.contents import Allocated
from optima_tpu.report.pace import Step
from optima_tpu.runtime.kept import KeptRecord
from optima_tpu.runtime.processes import fetch, from_first
from optima_tpu.runtime.records import read_record

ALLOCATION = "allocation.json"
KEPT = KeptRecord(ALLOCATION, Allocated)


def allocated(walk: Walk, tokens: np.ndarray, allocation: Allocation, advance: Callable[[], None] = lambda: None) -> Allocated:
    """Measures the dense blocks and distributes the pattern's sparsity.

    Args:
      walk: the run's. Of its recipe, the pattern and the layer rules are used.
      tokens: [windows + held out, length] int32.
      advance: called after every block.

    Raises:
      UserError: as :func:`allocation_steps`; or an activation is not finite.
    """
    decoder, recipe = walk.decoder, walk.recipe
    steps, sparsity = allocation_steps(decoder, recipe, allocation), recipe.pattern.sparsity
    free = [_free(decoder, index, recipe) for index in range(decoder.config.blocks)]
    if isinstance(allocation, OWL):
        scores = _outliers(walk, tokens[: walk.windows], allocation.outlier, free, advance)
    else:
        far = steps.most * steps.size
        trials = tuple(recipe.pattern.at(trial) for trial in (sparsity - far, sparsity + far))
        scores = _losses(walk, tokens, trials, free, advance)
    weights = [
        sum(math.prod(decoder.at(index).block_shapes[name + ".weight"]) for name in names) for index, names in enumerate(free)
    ]
    shifts = allocate(allocation, scores, weights, steps)
    return Allocated(
        tuple(sparsity + int(count) * steps.size if names else None for count, names in zip(shifts, free)),
        tuple(tuple(row.tolist()) if names else None for row, names in zip(scores, free)),
    )


def read_allocation(directory: Path) -> Allocated | None:
    """The allocation of an earlier start, on all processes; None for none.

    Raises:
      UserError: the file has another shape. Finished blocks may have its sparsities, so it is not measured again.
    """
    path = directory / ALLOCATION
    saved: Allocated | None = from_first(lambda: read_record(path, Allocated) if path.exists() else None)
    return saved


def allocation_steps(decoder: Decoder, recipe: Recipe, allocation: Allocation) -> SparsitySteps:
    """The sparsities that blocks may have.

    Raises:
      UserError: as ``allocation.steps_of``, or rules name every layer.
    """
    inputs = {
        decoder.at(index).block_shapes[name + ".weight"][1]
        for index in range(decoder.config.blocks)
        for name in _free(decoder, index, recipe)
    }
    if not inputs:
        raise UserError(
            "expected layers that --layers does not name, whose sparsity --allocation can set, got none: use --allocation uniform"
        )
    return steps_of(allocation, recipe.pattern.sparsity, inputs)


def _free(decoder: Decoder, index: int, recipe: Recipe) -> tuple[str, ...]:
    """The layers of a block that no rule names."""
    prefix = decoder.prefix(index)
    return tuple(
        name for name in decoder.at(index).linears if not any(rule.matches(prefix + name, name) for rule in recipe.layers)
    )


def _outliers(
    walk: Walk, tokens: np.ndarray, outlier: float, free: list[tuple[str, ...]], advance: Callable[[], None]
) -> np.ndarray:
    """Outlier shares of free layers, [blocks, 1]; 0 for blocks without any."""
    decoder = walk.decoder
    hidden, shares = decoder.embed(tokens), np.zeros((decoder.config.blocks, 1))
    for index, parameters in enumerate(decoder.blocks(range(decoder.config.blocks))):
        norms = {
            name: jnp.sqrt(jnp.diagonal(statistics.hessian))
            for part, every in _calibrated(walk, index, Stream(parameters, hidden))
            for names, statistics in zip(part.groups, every)
            for name in names
            if name in free[index]
        }
        if norms:
            weights = tuple(parameters[name + ".weight"] for name in norms)
            shares[index] = fetch(_outlier_share(weights, tuple(norms.values()), outlier))
        decoder.apply(index, parameters, hidden)
        advance()
    return shares


def _losses(
    walk: Walk, tokens: np.ndarray, trials: tuple[Pattern, ...], free: list[tuple[str, ...]], advance: Callable[[], None]
) -> np.ndarray:
    """``KL(dense || pruned)`` for each block if this block alone is pruned.

    The result is [blocks, trials] float64, per prediction on the held-out windows. All these models pass through the blocks
    together, so every block is read once.
    """
    decoder, windows = walk.decoder, walk.windows
    walks = [
        dataclasses.replace(walk, recipe=Recipe(pattern, Wanda(), CG(), layers=walk.recipe.layers), given=None)
        for pattern in trials
    ]
    hidden = decoder.embed(tokens)
    streams: dict[int, list[Activations]] = {}
    for index, parameters in enumerate(decoder.blocks(range(decoder.config.blocks))):
        for stream in itertools.chain(*streams.values()):
            decoder.apply(index, parameters, stream)
        if free[index]:
            pruned = [parameters] * len(trials)
            # A pass has room for one pruned block; the blocks of the other trials need more.
            calibrating = dataclasses.replace(walks[0], budget=walk.budget - (len(trials) - 1) * block_bytes(decoder, index))
            for part, statistics in _calibrated(calibrating, index, Stream(parameters, hidden.part(0, windows))):
                sets = tuple(map(TokenSets, statistics))
                pruned = [prune_groups(trial, index, changed, part, sets).parameters for trial, changed in zip(walks, pruned)]
            streams[index] = [hidden.part(windows, len(tokens)).copy() for _ in trials]
            for changed, stream in zip(pruned, streams[index]):
                decoder.apply(index, changed, stream)
        decoder.apply(index, parameters, hidden)
        advance()
    head, losses = decoder.head(), np.zeros((decoder.config.blocks, len(trials)))
    dense = hidden.part(windows, len(tokens))
    for index, every in streams.items():
        sums = divergences(head, dense, every, tokens, decoder.batch)[:, windows:]
        losses[index] = sums.mean(axis=1, dtype=np.float64) / (tokens.shape[1] - 1)
    return losses


def _calibrated(walk: Walk, index: int, stream: Stream) -> Iterator[tuple[Pass, tuple[TokenStatistics, ...]]]:
    """The passes over a block's groups, with the dense inputs' statistics."""
    recipe = dataclasses.replace(walk.recipe, recapture=False)
    for part in block_passes(walk.decoder, index, walk.groups[index], recipe, walk.budget):
        yield part, accumulate(walk.decoder, index, Capture(part.groups), (stream,))


@functools.partial(jax.jit, static_argnames="outlier")
def _outlier_share(weights: tuple[Array, ...], norms: tuple[Array, ...], outlier: float) -> Array:
    """The share of outliers among the weights, float32.

    An outlier's ``|w_ij| ||x_j||`` is more than ``outlier`` times the mean over all weights.
    """
    scores = [jnp.abs(weight.astype(jnp.float32)) * norm for weight, norm in zip(weights, norms)]
    count = sum(score.size for score in scores)
    mean = sum(jnp.sum(score) for score in scores) / count
    # Counted matrix by matrix: a block of a large model has more weights than an int32 can count.
    share = sum(jnp.sum(score > outlier * mean, dtype=jnp.int32).astype(jnp.float32) for score in scores) / count
    return cast(Array, share)  # the sum of no matrices would be an int


def allocation_rules(allocation: Allocated, decoder: Decoder, pattern: Pattern) -> tuple[LayerRule, ...]:
    """Layer rules with these sparsities, to go before the recipe's own."""
    return tuple(
        LayerRule(decoder.prefix(index) + "*", pattern.at(sparsity))
        for index, sparsity in enumerate(allocation.sparsity)
        if sparsity is not None
    )


def with_sparsities(walk: Walk, allocation: Allocated | None) -> Walk:
    """The walk with the sparsities that were allocated."""
    if allocation is None:
        return walk
    layers = allocation_rules(allocation, walk.decoder, walk.recipe.pattern) + walk.recipe.layers
    return dataclasses.replace(walk, recipe=dataclasses.replace(walk.recipe, layers=layers))


def allocating(walk: Walk) -> Stage[[Journal], Allocated]:
    """The stage that chooses the sparsities of a walk's blocks."""

    def make(work: StageWork, journal: Journal) -> Allocated:
        opened = work.opened
        blocks = smaller_walk(opened, walk)
        return allocated(blocks, opened.texts.calibration.ids, opened.config.allocation, work.progress.advance)

    def steps(opened: Opened) -> list[Step]:
        config = pruned_model(opened).decoder.config
        return [Step(f"allocating {config.kind_of(index)}") for index in range(config.blocks)]

    kept = KeptResult(
        lambda opened: read_allocation(opened.directory), lambda opened, allocation: KEPT.write(opened.directory, allocation)
    )
    return Stage("allocating", make, kept, steps)
