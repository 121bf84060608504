"""The walk: calibrate a block, prune it, send the activations through what is left of it, go on."""

import functools
import itertools
import math
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optima_tpu.method.judge import Aim, RowErrors, judge_rows, measure_rows, refuse_broken, row_errors
from optima_tpu.method.layer_rules import pattern_of
from optima_tpu.method.linalg.features import WHOLE
from optima_tpu.method.linalg.scaling import live_features
from optima_tpu.method.mask_swaps import Refined, Refining, refining_over_rows
from optima_tpu.method.patterns import Pattern
from optima_tpu.method.problem import Given, LayerProblem, Pruned, ReadGiven, Solution, self_target
from optima_tpu.method.recipe import Recipe, pruned_groups, solved_together
from optima_tpu.method.row_report import RowReport
from optima_tpu.method.row_sharding import ON_EVERY_DEVICE, Layout, map_rows, over_rows, prepared
from optima_tpu.method.selectors import MaskSelector
from optima_tpu.method.solvers import damping_of
from optima_tpu.method.statistics import Drift, Groups, Statistics
from optima_tpu.method.targets import DenseTarget, LinearTerm
from optima_tpu.method.tuning import Grid, damping_with, ridged, tuned
from optima_tpu.models.activations import Activations
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline.calibrate import accumulate_drift, accumulate_hessians, stages
from optima_tpu.pipeline.memory_plan import Pass, block_bytes, passes
from optima_tpu.report.records import LayerReport
from optima_tpu.report.rows import layer_report
from optima_tpu.runtime.mesh import ROWS, divisible, place
from optima_tpu.runtime.processes import fetch


def prune_layer(problem: LayerProblem, recipe: Recipe, dtype=jnp.float32) -> tuple[Pruned, RowReport]:
    """Prunes one matrix on one device: selector, solver, cast, acceptance. What :func:`prune_group` does on a mesh is the same.

    Args:
      problem: the rows of one matrix.
      dtype: what the weights will be stored in; they are judged after the cast.

    Returns:
      The pruned weights ([d_out, d_in] float32 holding values of ``dtype``) and what happened to every row.
    """
    pruned = _select(problem, recipe.pattern, recipe.selector, None)
    update = recipe.update(recipe.pattern)
    found = prepared(update, problem.hessian, WHOLE)(problem, pruned) if update else _unsolved(pruned)
    return judge_rows(
        pruned,
        found,
        recipe.solver and recipe.accept,
        dtype,
        lambda hessian, old, new: row_errors(problem, old, new),
        problem.hessian,
        damping=damping_of(recipe.solver),
    )


@functools.partial(jax.jit, static_argnames=("recipe", "mesh", "patterns", "layout"))
def prune_group(
    weights: tuple[Array, ...],
    hessian: Array,
    recipe: Recipe,
    mesh: Mesh,
    patterns: tuple[Pattern, ...] | None = None,
    given: tuple[Given, ...] | None = None,
    held_out: Array | None = None,
    layout: Layout = ON_EVERY_DEVICE,
    drift: Drift | None = None,
    held_out_drift: Drift | None = None,
) -> tuple[tuple[Array, ...], tuple[Array, ...], tuple[RowReport, ...]]:
    """Prunes the matrices that read one input, on the mesh.

    Masks are chosen matrix by matrix; the solver gets the rows of all of them at once, split over every device. Where the recipe
    tunes, there is one matrix, which is solved once for every candidate.

    Args:
      weights: each [d_out, d_in], dense, in the checkpoint's dtype; one where the recipe tunes.
      hessian: [d_in, d_in] float32.
      patterns: of each matrix; None stands for the recipe's. All the same where the recipe refines masks.
      given: of each matrix, for a recipe without a selector.
      held_out: [d_in, d_in] float32, the Hessian of tokens that no weight is fitted to.
      layout: where all matrices [d_in, d_in] lie, and how many rows a device takes at once; see ``memory.layout``.
      drift: of the calibration tokens, for a dense target.
      held_out_drift: of the held-out tokens, with energies, for a dense target.

    Returns:
      For every matrix: weights in its dtype, mask [d_out, d_in] bool, and the report on its rows.
    """

    def on_mesh(matrix: Array | None) -> Array | None:
        return None if matrix is None else jax.lax.with_sharding_constraint(matrix, NamedSharding(mesh, layout.hessian))

    hessian, held_out = map(on_mesh, (hessian, held_out))
    spread = [NamedSharding(mesh, divisible(mesh, weight.shape, ROWS)) for weight in weights]
    wide = [jax.lax.with_sharding_constraint(weight.astype(jnp.float32), rows) for weight, rows in zip(weights, spread)]
    stack = _stack(wide)
    product = map_rows(lambda matrix, features: lambda rows: features.product(rows, matrix), mesh, layout, layout.matrix)

    def linear_term(drift: Drift | None) -> LinearTerm | None:
        """Of all rows, for one set of tokens."""
        if drift is None:
            return None
        stream = None
        if any(found is not None for found in drift.residual):
            stream = recipe.target.gamma * _stack(
                [
                    jnp.zeros_like(weight) if found is None else jax.lax.with_sharding_constraint(found, rows)
                    for weight, found, rows in zip(wide, drift.residual, spread)
                ]
            )
        return LinearTerm(product(on_mesh(drift.cross), stack), stream)

    term, unseen = linear_term(drift), linear_term(held_out_drift)

    def problem(hessian: Array, alpha: Array | float) -> LayerProblem:
        linear = product(hessian, stack)
        return LayerProblem(stack, hessian, linear if term is None else linear + term.at(alpha))

    alpha = 0.0 if term is None else recipe.target.alpha
    stacked = problem(hessian, alpha)
    slices = list(itertools.starmap(slice, itertools.pairwise(itertools.accumulate(map(len, weights), initial=0))))
    patterns = patterns or (recipe.pattern,) * len(weights)
    # Without a term from the product that selectors take again: another one, of the rows on each device, would leave rounding.
    singles = [
        self_target(weight, hessian) if term is None else LayerProblem(weight, hessian, stacked.linear[rows])
        for weight, rows in zip(wide, slices)
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for inverses, see solvers/inverse.py
        choices = [
            _select(
                single, patterns[index], recipe.selector, given and jax.lax.with_sharding_constraint(given[index], spread[index])
            )
            for index, single in enumerate(singles)
        ]
    # Said again: masks chosen between two layouts would be chosen on every device for all rows.
    choices = [
        Pruned(*(jax.lax.with_sharding_constraint(array, rows) for array in choice)) for choice, rows in zip(choices, spread)
    ]
    pruned = Pruned(_stack([c.weight for c in choices]), _stack([c.keep for c in choices]))
    update = recipe.update(patterns[0])
    if isinstance(update, Refining):
        if len(set(patterns)) > 1:
            raise ValueError("masks are refined for one pattern at a time")
        solve = refining_over_rows(update, mesh, layout)
    else:
        solve = over_rows(update, mesh, layout) if update else lambda problem, pruned: _unsolved(pruned)
    measure = map_rows(measure_rows, mesh, layout, RowErrors(*[layout.vector] * len(RowErrors._fields)))

    def judge(index: int, found: Solution | Refined, alpha: Array | float, damping: Array | float) -> tuple[Pruned, RowReport]:
        dense, rows = wide[index], slices[index]
        aim = term and Aim(dense, term.at(alpha)[rows], unseen and unseen.of(rows), unseen and held_out_drift.energy[index])
        return judge_rows(
            choices[index],
            jax.tree.map(lambda array: array[rows], found),
            recipe.solver and recipe.accept,
            weights[index].dtype,
            lambda hessian, *ends: measure(hessian, dense, *ends),
            hessian,
            held_out,
            aim,
            damping,
        )

    if isinstance(recipe.tuning, Grid):
        if held_out is None or len(weights) > 1:
            raise ValueError("tuning needs held-out tokens, and one matrix at a time")

        def attempt(amount: Array, alpha: Array) -> tuple[Pruned, RowReport]:
            found = solve(problem(ridged(hessian, amount), alpha), pruned)
            final, report = judge(0, found, alpha, damping_with(amount, recipe.solver))
            return Pruned(*(jax.lax.with_sharding_constraint(array, spread[0]) for array in final)), report

        judged = [tuned(recipe.tuning, recipe.solver, recipe.target, attempt)]
    else:
        found = solve(stacked, pruned)
        judged = [judge(index, found, alpha, damping_of(recipe.solver)) for index in range(len(weights))]
    return (
        tuple(final.weight.astype(weight.dtype) for (final, _), weight in zip(judged, weights)),
        tuple(final.keep for final, _ in judged),
        tuple(report for _, report in judged),
    )


def walk_block(
    decoder: Decoder,
    index: int,
    hidden: Activations,
    groups: Groups,
    recipe: Recipe,
    tell: Callable[[LayerReport], None] = lambda report: None,
    *,
    samples: int | None = None,
    given: ReadGiven | None = None,
    parameters: Mapping[str, Array] | None = None,
    budget: float = math.inf,
    dense: Activations | None = None,
) -> tuple[dict[str, Array], dict[str, Array], tuple[LayerReport, ...]]:
    """One step of the walk: calibrates a block, prunes it, and sends the hidden states through what is left of it.

    The Hessians come from the block as it was, behind the pruned blocks before it, as in the paper: from one pass through it, or
    from several where they do not all fit on the devices. Where the recipe recaptures, there is a pass for every distinct input,
    through the block as pruned so far.

    Args:
      hidden: what enters the block; afterwards what leaves it pruned.
      groups: from ``calibrate.linear_groups``.
      samples: the first so many samples calibrate, the others are held out; None stands for all of them.
      given: masks, and weights, for a recipe without a selector.
      parameters: the block's, on the mesh, where they were read before.
      budget: bytes that may be used of each device; see ``memory.passes``.
      dense: for a dense target what enters the block in the dense model; afterwards what leaves it there.

    Returns:
      As :func:`prune_block`.
    """
    whole = parameters = decoder.load_block(index) if parameters is None else parameters
    samples = len(hidden) if samples is None else samples
    drifts = isinstance(recipe.target, DenseTarget)
    if drifts and dense is None:
        raise ValueError("a dense target needs the hidden states of the dense model")
    prefix, keeps, layers = decoder.prefix(index), {}, ()
    visits = block_passes(decoder, index, groups, recipe, budget)
    for number, (part, layouts) in enumerate(visits, 1):
        captured = parameters if recipe.recapture else whole

        def capture(first: int, last: int, energy: bool) -> tuple[tuple[Statistics, ...], tuple[Drift, ...] | None]:
            seen = hidden.part(first, last)
            if not drifts:
                return accumulate_hessians(decoder, index, captured, seen, part), None
            # The last pass computes nearly all of the dense block anyway, so it takes the dense stream out of it, too.
            return accumulate_drift(
                decoder,
                index,
                captured,
                seen,
                whole,
                dense.part(first, last),
                part,
                recipe.target,
                energy,
                advance=number == len(visits),
            )

        statistics, drift = capture(0, samples, energy=False)
        unseen = unseen_drift = None
        if samples < len(hidden):
            unseen, unseen_drift = capture(samples, len(hidden), energy=True)
            unseen = tuple(found.hessian for found in unseen)
        parameters, kept, reports = prune_block(
            index,
            prefix,
            parameters,
            part,
            statistics,
            recipe,
            decoder.mesh,
            tell,
            held_out=unseen,
            given=given,
            layouts=layouts,
            drift=drift,
            held_out_drift=unseen_drift,
        )
        keeps, layers = keeps | kept, layers + reports
        del statistics, drift, unseen, unseen_drift  # not to be held while the next ones are made
    decoder.apply(index, parameters, hidden)
    if drifts and not visits:
        decoder.apply(index, whole, dense)
    return dict(parameters), keeps, layers


def block_passes(decoder: Decoder, index: int, groups: Groups, recipe: Recipe, budget: float) -> tuple[Pass, ...]:
    """The layers of a block that are pruned, in passes with a layout each; see ``memory.passes``.

    Raises:
      UserError: a layer does not fit the budget.
    """
    prefix, weights = decoder.prefix(index), block_bytes(decoder, index)
    parts = (pruned_groups(part, recipe, prefix) for part in (stages(groups) if recipe.recapture else (groups,)))
    return tuple(
        itertools.chain.from_iterable(
            passes(
                prefix,
                decoder.block_shapes,
                part,
                weights,
                budget,
                decoder.mesh,
                recipe.update(recipe.pattern),
                recipe.selector,
                recipe.target.matrices,
                aimed_residuals(decoder, recipe),
            )
            for part in parts
            if part
        )
    )


def aimed_residuals(decoder: Decoder, recipe: Recipe) -> Collection[str]:
    """The layers whose target holds the drift of the residual stream."""
    return decoder.family.residuals if isinstance(recipe.target, DenseTarget) and recipe.target.gamma else ()


def prune_block(
    index: int,
    prefix: str,
    parameters: Mapping[str, Array],
    groups: Groups,
    statistics: tuple[Statistics, ...],
    recipe: Recipe,
    mesh: Mesh,
    tell: Callable[[LayerReport], None] = lambda report: None,
    *,
    held_out: tuple[Array, ...] | None = None,
    given: ReadGiven | None = None,
    layouts: tuple[Layout, ...] | None = None,
    drift: tuple[Drift, ...] | None = None,
    held_out_drift: tuple[Drift, ...] | None = None,
) -> tuple[dict[str, Array], dict[str, Array], tuple[LayerReport, ...]]:
    """Prunes the linear layers of a block.

    Args:
      index: the block's number, for the reports.
      prefix: of the block's parameters, "model.layers.3.".
      parameters: by name inside the block, on the mesh.
      groups: layers that are pruned and read one input together, with one of ``statistics`` each; see :func:`pruned_groups`.
      tell: called with every layer's report as soon as the layer is done.
      held_out: Hessians of the held-out tokens.
      given: masks, and weights, for a recipe without a selector.
      layouts: one for each group; None stands for the ordinary one.
      drift, held_out_drift: of both sets of tokens, for a dense target; that of the held-out tokens with energies.

    Returns:
      All parameters of the block with the pruned ones replaced (laid out as before), the masks by parameter name, and a
      report for every layer.
    """
    parameters, keep_by_name, reports = dict(parameters), {}, []
    for group, (names, (hessian, tokens)) in enumerate(zip(groups, statistics)):
        for together in solved_together(names, recipe, prefix):
            keys = [name + ".weight" for name in together]
            weights = tuple(parameters[key] for key in keys)
            patterns = tuple(pattern_of(recipe.layers, recipe.pattern, prefix + name, name) for name in together)
            choices = given and jax.tree.map(
                lambda array: place(mesh, array, ROWS),
                tuple(given(prefix + key, weight.shape) for key, weight in zip(keys, weights)),
            )
            places = [names.index(name) for name in together]
            drifts = (found and found[group].of(places) for found in (drift, held_out_drift))
            new, keeps, rows = prune_group(
                weights,
                _informative(hessian),
                recipe,
                mesh,
                patterns,
                choices,
                held_out and held_out[group],
                layouts[group] if layouts else ON_EVERY_DEVICE,
                *drifts,
            )
            alive, read, kept, rows = fetch(
                (jnp.sum(live_features(hessian)), tokens, [jnp.sum(keep, dtype=jnp.int32) for keep in keeps], rows)
            )
            refuse_broken(prefix, together, rows)
            for name, key, old, weight, keep, left, report in zip(together, keys, weights, new, keeps, kept, rows):
                chosen = report.chosen is not None and recipe.tuning.chosen(report.chosen, recipe.solver, recipe.target)
                # By way of whole copies: XLA finds no other from rows over all devices to columns, and complains of it.
                parameters[key] = jax.device_put(jax.device_put(weight, NamedSharding(mesh, P())), old.sharding)
                keep_by_name[key] = keep
                reports.append(
                    layer_report(
                        index,
                        name,
                        keep.shape,
                        int(left),
                        report,
                        hessian.shape[0] - int(alive),
                        int(read),
                        chosen or (None, None),
                    )
                )
                tell(reports[-1])
    return parameters, keep_by_name, tuple(reports)


def _informative(hessian: Array) -> Array:
    """The Hessian, or the identity where it is zero: an expert to which no token was routed is pruned by magnitude alone."""
    return hessian if fetch(jnp.trace(hessian)) > 0 else jnp.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.sharding)


def _select(problem: LayerProblem, pattern: Pattern, selector: MaskSelector | None, given: Given | None) -> Pruned:
    if selector:
        return selector(problem, pattern)
    weight = problem.weight if given.weight is None else given.weight.astype(jnp.float32)
    return Pruned(jnp.where(given.keep, weight, 0.0), given.keep)


def _unsolved(pruned: Pruned) -> Solution:
    rows = pruned.weight.shape[0]
    return Solution(pruned.weight, jnp.zeros(rows), jnp.zeros(rows, jnp.int32), jnp.ones(rows, bool))


def _stack(arrays: list[Array]) -> Array:
    return jnp.concatenate(arrays) if len(arrays) > 1 else arrays[0]
