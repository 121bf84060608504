"""The walk: calibrate a block, prune it, send the activations through what is left of it, go on."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optima_tpu.accept import Acceptance, PerRow
from optima_tpu.activations import Activations
from optima_tpu.calibrate import Groups, Statistics, accumulate_hessians
from optima_tpu.features import Features
from optima_tpu.layer_rules import LayerRule, pattern_of
from optima_tpu.memory import Pass, block_bytes, passes
from optima_tpu.models.decoder import Decoder
from optima_tpu.patterns import Pattern
from optima_tpu.problem import LayerProblem, Pruned, Solution, objective, output_energy, self_target
from optima_tpu.processes import fetch
from optima_tpu.report.records import LayerReport
from optima_tpu.selectors import MaskSelector
from optima_tpu.sharding import ON_EVERY_DEVICE, ROWS, Layout, divisible, map_rows, over_rows, place
from optima_tpu.solvers import Solver
from optima_tpu.solvers.scaling import live_features


ReadMask = Callable[[str, tuple[int, int]], np.ndarray]
"""Name of a weight ("model.layers.0.mlp.up_proj.weight") and its shape -> mask [d_out, d_in] bool, True where it stays."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is done to every linear layer.

    Attributes:
      pattern: how many weights go, and inside which groups.
      selector: which ones stay; None where masks from elsewhere say so.
      solver: where those that stay go; None keeps the selector's own weights, the baseline of the paper's tables.
      accept: when the solver's weights replace the selector's.
      layers: layers with another pattern, or none.
    """

    pattern: Pattern
    selector: MaskSelector | None
    solver: Solver | None
    accept: Acceptance = PerRow()
    layers: tuple[LayerRule, ...] = ()


class RowReport(NamedTuple):
    """What happened to each row of a layer; every array is [d_out]."""

    energy: Array  # float32, mean square of the dense output
    before: Array  # float32, objective of the selector's weights
    after: Array  # float32, objective of the final weights
    gap: Array  # float32, the solver's
    steps: Array  # int32
    converged: Array  # bool
    refused: Array  # bool, the solver's weights were not accepted
    held_out: Array | None = None  # [3, d_out] float32: energy, before and after on held-out tokens


def prune_layer(problem: LayerProblem, recipe: Recipe, dtype=jnp.float32) -> tuple[Pruned, RowReport]:
    """Prunes one matrix on one device: selector, solver, cast, acceptance.

    Args:
      problem: the rows of one matrix.
      dtype: what the weights will be stored in; they are judged after the cast.

    Returns:
      The pruned weights ([d_out, d_in] float32 holding values of ``dtype``) and what happened to every row.
    """
    pruned = _select(problem, recipe.pattern, recipe.selector, None)
    solution = recipe.solver(problem, pruned) if recipe.solver else _unsolved(pruned)
    return _judge(pruned, solution, recipe, dtype, lambda hessian, old, new: (
        output_energy(problem), objective(problem, old), objective(problem, new)), problem.hessian)


@functools.partial(jax.jit, static_argnames=("recipe", "mesh", "patterns", "layout"))
def prune_group(weights: tuple[Array, ...], hessian: Array, recipe: Recipe, mesh: Mesh,
                patterns: tuple[Pattern, ...] | None = None, masks: tuple[Array, ...] | None = None,
                held_out: Array | None = None, layout: Layout = ON_EVERY_DEVICE
                ) -> tuple[tuple[Array, ...], tuple[Array, ...], tuple[RowReport, ...]]:
    """Prunes the matrices that read one input, on the mesh.

    Masks are chosen matrix by matrix; the solver gets the rows of all of them at once, split over every device.

    Args:
      weights: each [d_out, d_in], dense, in the checkpoint's dtype.
      hessian: [d_in, d_in] float32.
      patterns: of each matrix; None stands for the recipe's.
      masks: each [d_out, d_in] bool, for a recipe without a selector.
      held_out: [d_in, d_in] float32, the Hessian of tokens that only the report is to know.
      layout: where both Hessians lie, and how many rows a device takes at once; see ``memory.layout``.

    Returns:
      For every matrix: weights in its dtype, mask [d_out, d_in] bool, and the report on its rows.
    """
    on_mesh = NamedSharding(mesh, layout.hessian)
    hessian = jax.lax.with_sharding_constraint(hessian, on_mesh)
    if held_out is not None:
        held_out = jax.lax.with_sharding_constraint(held_out, on_mesh)
    spread = [NamedSharding(mesh, divisible(mesh, weight.shape, ROWS)) for weight in weights]
    wide = [jax.lax.with_sharding_constraint(weight.astype(jnp.float32), rows) for weight, rows in zip(weights, spread)]
    stack = _stack(wide)
    linear = map_rows(lambda hessian, features: lambda rows: features.product(rows, hessian), mesh, layout, layout.matrix)
    stacked = LayerProblem(stack, hessian, linear(hessian, stack))
    slices = list(itertools.starmap(slice, itertools.pairwise(itertools.accumulate(map(len, weights), initial=0))))
    choices = [_select(LayerProblem(weight, hessian, stacked.linear[rows]), patterns[index] if patterns else recipe.pattern,
                       recipe.selector, masks and jax.lax.with_sharding_constraint(masks[index], spread[index]))
               for index, (weight, rows) in enumerate(zip(wide, slices))]
    # Said again: a sort between two layouts would be done on every device for all rows.
    choices = [Pruned(*(jax.lax.with_sharding_constraint(array, rows) for array in choice))
               for choice, rows in zip(choices, spread)]
    pruned = Pruned(_stack([c.weight for c in choices]), _stack([c.keep for c in choices]))
    solution = over_rows(recipe.solver, mesh, layout)(stacked, pruned) if recipe.solver else _unsolved(pruned)

    measure = map_rows(_measure, mesh, layout, (layout.vector,) * 3)
    new, masks, reports = [], [], []
    for weight, dense, choice, rows in zip(weights, wide, choices, slices):
        final, report = _judge(choice, Solution(*(array[rows] for array in solution)), recipe, weight.dtype,
                               lambda hessian, *ends: measure(hessian, dense, *ends), hessian, held_out)
        new.append(final.weight.astype(weight.dtype))
        masks.append(final.keep)
        reports.append(report)
    return tuple(new), tuple(masks), tuple(reports)


def walk_block(decoder: Decoder, index: int, hidden: Activations, groups: Groups, recipe: Recipe,
               tell: Callable[[LayerReport], None] = lambda report: None, *, samples: int | None = None,
               masks: ReadMask | None = None, parameters: Mapping[str, Array] | None = None, budget: float = math.inf
               ) -> tuple[dict[str, Array], dict[str, Array], tuple[LayerReport, ...]]:
    """One step of the walk: calibrates a block, prunes it, and sends the hidden states through what is left of it.

    The Hessians come from the block as it was, behind the pruned blocks before it, as in the paper: from one pass through it, or
    from several where they do not all fit on the devices.

    Args:
      hidden: what enters the block; afterwards what leaves it pruned.
      groups: from ``calibrate.linear_groups``.
      samples: the first so many samples calibrate, the others are held out; None stands for all of them.
      masks: for a recipe without a selector.
      parameters: the block's, on the mesh, where they were read before.
      budget: bytes that may be used of each device; see ``memory.passes``.

    Returns:
      As :func:`prune_block`.
    """
    dense = parameters = decoder.load_block(index) if parameters is None else parameters
    samples = len(hidden) if samples is None else samples
    prefix, keeps, layers = decoder.prefix(index), {}, ()
    for part, layouts in block_passes(decoder, index, groups, recipe, budget):
        statistics = accumulate_hessians(decoder, index, dense, hidden.part(0, samples), part)
        held_out = None
        if samples < len(hidden):
            unseen = hidden.part(samples, len(hidden))
            held_out = tuple(found.hessian for found in accumulate_hessians(decoder, index, dense, unseen, part))
        parameters, kept, reports = prune_block(index, prefix, parameters, part, statistics, recipe, decoder.mesh, tell,
                                                held_out=held_out, masks=masks, layouts=layouts)
        keeps, layers = keeps | kept, layers + reports
        del statistics, held_out  # not to be held while the next ones are made
    decoder.apply(index, parameters, hidden)
    return dict(parameters), keeps, layers


def block_passes(decoder: Decoder, index: int, groups: Groups, recipe: Recipe, budget: float) -> tuple[Pass, ...]:
    """The layers of a block that are pruned, in passes with a layout each; see ``memory.passes``.

    Raises:
      UserError: a layer does not fit the budget.
    """
    prefix = decoder.prefix(index)
    return passes(prefix, decoder.block_shapes, pruned_groups(groups, recipe, prefix), block_bytes(decoder, index), budget,
                  decoder.mesh, recipe.solver, recipe.selector)


def pruned_groups(groups: Groups, recipe: Recipe, prefix: str) -> Groups:
    """The groups without the layers that stay dense, and without those groups of which nothing is left."""
    left = (tuple(name for name in names if pattern_of(recipe.layers, recipe.pattern, prefix + name, name)) for names in groups)
    return tuple(filter(None, left))


def prune_block(index: int, prefix: str, parameters: Mapping[str, Array], groups: Groups,
                statistics: tuple[Statistics, ...], recipe: Recipe, mesh: Mesh,
                tell: Callable[[LayerReport], None] = lambda report: None, *,
                held_out: tuple[Array, ...] | None = None, masks: ReadMask | None = None,
                layouts: tuple[Layout, ...] | None = None
                ) -> tuple[dict[str, Array], dict[str, Array], tuple[LayerReport, ...]]:
    """Prunes the linear layers of a block.

    Args:
      index: the block's number, for the reports.
      prefix: of the block's parameters, "model.layers.3.".
      parameters: by name inside the block, on the mesh.
      groups: layers that are pruned and read one input together, with one of ``statistics`` each; see :func:`pruned_groups`.
      tell: called with every layer's report as soon as the layer is done.
      held_out: Hessians of the held-out tokens.
      masks: for a recipe without a selector.
      layouts: one for each group; None stands for the ordinary one.

    Returns:
      All parameters of the block with the pruned ones replaced (laid out as before), the masks by parameter name, and a
      report for every layer.
    """
    parameters, keep_by_name, reports = dict(parameters), {}, []
    for group, (names, (hessian, tokens)) in enumerate(zip(groups, statistics)):
        keys = [name + ".weight" for name in names]
        weights = tuple(parameters[key] for key in keys)
        patterns = tuple(pattern_of(recipe.layers, recipe.pattern, prefix + name, name) for name in names)
        given = masks and tuple(place(mesh, masks(prefix + key, weight.shape), ROWS) for key, weight in zip(keys, weights))
        new, keeps, rows = prune_group(weights, _informative(hessian), recipe, mesh, patterns, given,
                                       held_out and held_out[group], layouts[group] if layouts else ON_EVERY_DEVICE)
        alive, read, kept, rows = fetch((jnp.sum(live_features(hessian)), tokens,
                                         [jnp.sum(keep, dtype=jnp.int32) for keep in keeps], rows))
        for name, key, old, weight, keep, left, report in zip(names, keys, weights, new, keeps, kept, rows):
            # By way of whole copies: XLA finds no other from rows over all devices to columns, and complains of it.
            parameters[key] = jax.device_put(jax.device_put(weight, NamedSharding(mesh, P())), old.sharding)
            keep_by_name[key] = keep
            reports.append(_summary(index, name, keep.shape, int(left), report, hessian.shape[0] - int(alive), int(read)))
            tell(reports[-1])
    return parameters, keep_by_name, tuple(reports)


def _informative(hessian: Array) -> Array:
    """The Hessian, or the identity where it is zero: an expert to which no token was routed is pruned by magnitude alone."""
    return hessian if fetch(jnp.trace(hessian)) > 0 else jnp.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.sharding)


def _select(problem: LayerProblem, pattern: Pattern, selector: MaskSelector | None, keep: Array | None) -> Pruned:
    return selector(problem, pattern) if selector else Pruned(jnp.where(keep, problem.weight, 0.0), keep)


def _measure(hessian: Array, features: Features) -> Callable[..., tuple[Array, Array, Array]]:
    """Of each row: the mean square of its dense output, and the objectives of two others, [rows] each."""
    def measure(dense: Array, old: Array, new: Array) -> tuple[Array, Array, Array]:
        problem = self_target(dense, hessian, features)
        return output_energy(problem, features), objective(problem, old, features), objective(problem, new, features)

    return measure


def _judge(pruned: Pruned, solution: Solution, recipe: Recipe, dtype, measure: Callable[..., tuple[Array, Array, Array]],
           hessian: Array, held_out: Array | None = None) -> tuple[Pruned, RowReport]:
    """Takes the solver's weights where they are accepted; ``measure(hessian, old, new)`` is :func:`_measure` of the layer."""
    def stored(weight):
        # The mask again after the cast, and + 0.0 so that no -0.0 is left: zeros are exact in the file.
        return jnp.where(pruned.keep, weight, 0.0).astype(dtype).astype(jnp.float32) + 0.0

    old, new = stored(pruned.weight), stored(solution.weight)
    energy, before, after = measure(hessian, old, new)
    accepted = recipe.accept(before, after, solution.converged) if recipe.solver else jnp.ones(before.shape, bool)
    final = jnp.where(accepted[:, None], new, old)
    unseen = None if held_out is None else jnp.stack(measure(held_out, old, final))
    report = RowReport(energy, before, jnp.where(accepted, after, before), solution.gap, solution.steps, solution.converged,
                       ~accepted, unseen)
    return Pruned(final, pruned.keep), report


def _unsolved(pruned: Pruned) -> Solution:
    rows = pruned.weight.shape[0]
    return Solution(pruned.weight, jnp.zeros(rows), jnp.zeros(rows, jnp.int32), jnp.ones(rows, bool))


def _stack(arrays: list[Array]) -> Array:
    return jnp.concatenate(arrays) if len(arrays) > 1 else arrays[0]


def _summary(index: int, name: str, shape: tuple[int, int], kept: int, rows: RowReport, dead: int, tokens: int) -> LayerReport:
    size = shape[0] * shape[1]

    def share(values: np.ndarray, energies: np.ndarray = rows.energy) -> float:
        energy = float(np.sum(energies, dtype=np.float64))
        return float(np.sum(values, dtype=np.float64)) / energy if energy > 0 else 0.0

    unseen = (None, None) if rows.held_out is None else (share(rows.held_out[1], rows.held_out[0]),
                                                         share(rows.held_out[2], rows.held_out[0]))
    return LayerReport(
        block=index, name=name, shape=shape, pruned=size - kept, sparsity=(size - kept) / size,
        error_before=share(rows.before), error_after=share(rows.after),
        gap_median=float(np.median(rows.gap)), gap_max=float(np.max(rows.gap)),
        steps_median=int(np.median(rows.steps)), steps_max=int(np.max(rows.steps)), rows=len(rows.gap),
        rows_converged=int(np.sum(rows.converged)), rows_refused=int(np.sum(rows.refused)), dead_inputs=dead, tokens=tokens,
        held_out_before=unseen[0], held_out_after=unseen[1])
