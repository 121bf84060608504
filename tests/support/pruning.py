"""Prunes matrices and blocks in one call; fills in what a test leaves out."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from optima_tpu.method.acceptance import accept_rows, row_errors
from optima_tpu.method.outcomes import RowOutcomes
from optima_tpu.method.patterns import Pattern
from optima_tpu.method.problem import Given, LayerProblem, Pruned, ReadGiven
from optima_tpu.method.prune_group import prune_group
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.row_sharding import ON_EVERY_DEVICE, RowLayout, RowSharding
from optima_tpu.method.statistics import Drift, Groups, TokenSets, TokenStatistics
from optima_tpu.models.activations import Activations
from optima_tpu.models.decoder import Decoder, forward
from optima_tpu.pipeline.memory_plan import Pass
from optima_tpu.pipeline.walk import Streams, Walk, prune_block, prune_groups
from optima_tpu.report.records import LayerReport

compiled_forward = jax.jit(forward, static_argnums=0)
"""``forward`` in one program. Outside of jit each of its operations would be compiled alone, which takes longer."""


def measure(hessian: Array, dense: Array, old: Array, new: Array):
    """The errors of rows on one device, as ``accept_rows`` asks for them."""
    return row_errors(hessian)(dense, old, new)


@functools.partial(jax.jit, static_argnums=(1, 2))
def prune_layer(problem: LayerProblem, recipe: Recipe, dtype=jnp.float32) -> tuple[Pruned, RowOutcomes]:
    """Prunes one matrix on one device: selector, solver, cast, acceptance.

    ``prune_group`` does the same on a mesh.
    """
    problem = dataclasses.replace(problem, damping=recipe.damping)
    pruned = recipe.selector(problem, recipe.pattern)
    solution = recipe.update(recipe.pattern)(problem, pruned)
    return accept_rows(TokenSets(problem), pruned, solution, recipe.accept if recipe.solver else None, jnp.dtype(dtype), measure)


def group_arguments(
    weights,
    hessian,
    recipe: Recipe,
    mesh: Mesh,
    patterns: tuple[Pattern, ...] | None = None,
    given: tuple[Given, ...] | None = None,
    held_out: Array | None = None,
    layout: RowLayout = ON_EVERY_DEVICE,
    drift: Drift | None = None,
    held_out_drift: Drift | None = None,
) -> tuple:
    """The arguments of ``prune_group``, of arrays or of their shapes."""
    tokens = jax.ShapeDtypeStruct((), jnp.int32) if isinstance(hessian, jax.ShapeDtypeStruct) else jnp.int32(1)
    sets = TokenSets(
        TokenStatistics(hessian, tokens, drift), None if held_out is None else TokenStatistics(held_out, tokens, held_out_drift)
    )
    return weights, sets, given, recipe, patterns or (recipe.pattern,) * len(weights), RowSharding(mesh, layout)


def prune_matrices(weights, hessian, recipe: Recipe, mesh: Mesh, **options):
    """Prunes matrices of one input. Returns weights, masks, row outcomes."""
    return tuple(zip(*(outcome[:3] for outcome in prune_group(*group_arguments(weights, hessian, recipe, mesh, **options)))))


def prune_calibrated(
    decoder: Decoder, index: int, parameters: Mapping[str, Array], groups: Groups, statistics, recipe: Recipe, **options
) -> tuple[dict[str, Array], dict[str, Array], tuple[LayerReport, ...]]:
    """Prunes layers whose statistics are given, by ``prune_groups``.

    ``statistics`` are :class:`TokenSets`, or statistics of calibration tokens alone.
    """
    sets = tuple(each if isinstance(each, TokenSets) else TokenSets(each) for each in statistics)
    walk = Walk(decoder, recipe, (groups,) * (index + 1), windows=0, **options)
    return prune_groups(walk, index, parameters, Pass(groups, (ON_EVERY_DEVICE,) * len(groups)), sets)[:3]


def walk_block(
    decoder: Decoder,
    index: int,
    hidden: Activations,
    groups: Groups,
    recipe: Recipe,
    tell: Callable[[LayerReport], None] = lambda report: None,
    *,
    windows: int | None = None,
    given: ReadGiven | None = None,
    parameters: Mapping[str, Array] | None = None,
    budget: float = math.inf,
    dense: Activations | None = None,
) -> tuple[dict[str, Array], dict[str, Array], tuple[LayerReport, ...]]:
    """Takes one step of the walk. Returns (parameters, masks, reports).

    By default the block is read from the decoder and calibrated on all windows.
    """
    walk = Walk(decoder, recipe, (groups,) * (index + 1), len(hidden) if windows is None else windows, budget, given, tell)
    parameters = next(decoder.blocks([index])) if parameters is None else parameters
    return prune_block(walk, index, parameters, Streams(hidden, dense))[:3]
