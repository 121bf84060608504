"""Prunes matrices of one input on a mesh: masks, weights, acceptance."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32

from optima_tpu.errors import UserError
from optima_tpu.method.acceptance import Measure, RowErrors, accept_rows, row_errors
from optima_tpu.method.outcomes import PrunedMatrix
from optima_tpu.method.patterns import Pattern
from optima_tpu.method.problem import Errors, Given, LayerProblem, Pruned, Solution
from optima_tpu.method.quantization import Quantized
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.row_sharding import RowSharding
from optima_tpu.method.selectors import Selector
from optima_tpu.method.statistics import TokenSets, TokenStatistics
from optima_tpu.method.targets import LinearTerm, Target

Tree = TypeVar("Tree")


@functools.partial(jax.jit, static_argnames=("recipe", "patterns", "sharding"))
def prune_group(
    weights: tuple[Float[Array, "_ d_in"], ...],
    tokens: TokenSets[TokenStatistics],
    given: tuple[Given[Array], ...] | None,
    recipe: Recipe,
    patterns: tuple[Pattern, ...],
    sharding: RowSharding,
) -> tuple[PrunedMatrix, ...]:
    """Prunes the matrices that read one input, and may quantise them.

    Masks are chosen matrix by matrix; the solver gets the rows of all of them at once, sharded over every device, and so does the
    quantizer. A matrix that loses no weight begins with its dense weights: there is no mask to choose or to exchange.

    Args:
      weights: each [d_out, d_in], dense, in the checkpoint's dtype.
      tokens: the statistics of both sets of tokens. With a dense-model target they include the drift, for the held-out tokens
        with energies.
      given: the imported mask of each matrix, and maybe its weights, instead of the selector's.
      patterns: the pattern of each matrix; all equal if the recipe refines masks.
      sharding: the sharding of all matrices [d_in, d_in], and how many rows a device solves at once.
    """
    group = _Group.of(weights, tokens, recipe.target, sharding)
    if not any(group.losing(patterns)):
        recipe = dataclasses.replace(recipe, refine=None)
    if recipe.refine and len(set(patterns)) > 1:
        raise ValueError("masks are exchanged for one pattern at a time")
    pruned = group.choose(recipe, patterns, given)
    solve = sharding.solve(recipe.update(patterns[0]))  # the pattern matters to exchanges alone
    errors = Errors._make([sharding.layout.vector] * 2)
    measure = sharding.map(row_errors, RowErrors._make([sharding.layout.vector, errors, errors]))

    problem = group.problem(recipe)
    solved = solve(problem, _stacked(pruned))
    accept = recipe.accept if recipe.solver else None
    matrices, objectives = [], [group.objective(index, problem) for index in range(len(weights))]
    for index, (own, rows) in enumerate(zip(pruned, group.slices)):
        own_rows = jax.tree.map(lambda array, rows=rows: array[rows], solved)
        final, outcomes = accept_rows(objectives[index], own, own_rows, accept, weights[index].dtype, measure)
        matrices.append(PrunedMatrix(*group.spread(index, final), outcomes))
    if recipe.quantize:
        integers = sharding.on_rows(
            functools.partial(recipe.quantize.prepare, dtype=_one_dtype(weights)), Quantized._make([sharding.layout.matrix] * 3)
        )(problem, _stacked(tuple(Pruned(*matrix[:2]) for matrix in matrices)))
        for index, (matrix, rows) in enumerate(zip(matrices, group.slices)):
            own_integers = group.spread(index, jax.tree.map(lambda array, rows=rows: array[rows], integers))
            matrices[index] = _quantized(matrix, own_integers, objectives[index], weights[index].dtype, measure)
    return tuple(
        matrix._replace(
            weight=matrix.weight.astype(dense.dtype), scale=None if matrix.scale is None else matrix.scale.astype(dense.dtype)
        )
        for matrix, dense in zip(matrices, weights)
    )


def _one_dtype(weights: tuple[Array, ...]) -> np.dtype:
    dtypes = {weight.dtype for weight in weights}
    if len(dtypes) > 1:
        raise UserError(
            "expected layers with one input to have one dtype where weights are quantised, got "
            f"{' and '.join(sorted(map(str, dtypes)))}; choose one by --dtype"
        )
    return dtypes.pop()


def _quantized(
    matrix: PrunedMatrix, integers: Quantized, problems: TokenSets[LayerProblem], dtype: np.dtype, measure: Measure
) -> PrunedMatrix:
    """The quantised matrix, with its own and the nearest integers' errors."""
    outcomes, nearest = matrix.rows, Pruned(integers.nearest, matrix.keep)
    final = Solution(integers.weight, outcomes.gap, outcomes.steps, outcomes.converged)
    rounded, errors = accept_rows(problems, nearest, final, None, dtype, measure)
    rows = outcomes._replace(
        quantized=jnp.stack((errors.before, errors.after)),
        quantized_held_out=None if errors.held_out is None else errors.held_out[1:],
        quantized_dense=None if errors.dense is None else errors.dense[1:3],
    )
    return PrunedMatrix(*rounded, rows, integers.scale)


class _Group(NamedTuple):
    """The matrices of one input on the mesh, in float32.

    Attributes:
      matrices: each [d_out, d_in], dense, rows sharded over all devices.
      stack: [rows, d_in], the rows of all matrices.
      tokens: the Hessians of both sets of tokens, and what a dense-model target adds for all rows; None without one.
      drifts: for each matrix the mean of ``(D w')^2`` of its rows on the held-out tokens; empty without a dense-model target.
      sharding: the sharding of the rows.
    """

    matrices: tuple[Float32[Array, "_ d_in"], ...]
    stack: Float32[Array, "rows d_in"]
    tokens: TokenSets[tuple[Float32[Array, "d_in d_in"], LinearTerm | None]]
    drifts: tuple[Float32[Array, " _"], ...]
    sharding: RowSharding

    @classmethod
    def of(
        cls, weights: tuple[Array, ...], tokens: TokenSets[TokenStatistics], target: Target, sharding: RowSharding
    ) -> "_Group":
        matrices = tuple(
            jax.lax.with_sharding_constraint(weight.astype(jnp.float32), sharding.rows(weight)) for weight in weights
        )
        stack = _stack(matrices)

        def terms(statistics: TokenStatistics) -> tuple[Array, LinearTerm | None]:
            hessian, drift = sharding.place(statistics.hessian), statistics.drift
            if drift is None:
                return hessian, None

            def stacked(each: tuple[Array | None, ...]) -> Array:
                return _stack(
                    tuple(
                        jnp.zeros_like(matrix) if rows is None else jax.lax.with_sharding_constraint(rows, sharding.rows(matrix))
                        for matrix, rows in zip(matrices, each)
                    )
                )

            stream = target.gamma * stacked(drift.residual) if any(lost is not None for lost in drift.residual) else None
            if drift.cross is None:
                return hessian, LinearTerm(stacked(drift.outputs), stream)
            return hessian, LinearTerm(sharding.product(sharding.place(drift.cross), stack), stream)

        drift = tokens.held_out.drift if tokens.held_out else None
        both = TokenSets(terms(tokens.calibration), None if tokens.held_out is None else terms(tokens.held_out))
        return cls(matrices, stack, both, drift.energy if drift else (), sharding)

    @property
    def slices(self) -> list[slice]:
        """The rows of each matrix in the stack."""
        ends = itertools.accumulate(map(len, self.matrices), initial=0)
        return list(itertools.starmap(slice, itertools.pairwise(ends)))

    def problem(self, recipe: Recipe) -> LayerProblem:
        """The problem of all rows, on the calibration tokens."""
        hessian, term = self.tokens.calibration
        pull = None if term is None else recipe.target.pull(term, recipe.target.alpha)
        return LayerProblem(self.stack, hessian, pull, recipe.damping)

    def choose(self, recipe: Recipe, patterns: tuple[Pattern, ...], given: tuple[Given[Array], ...] | None) -> tuple[Pruned, ...]:
        """The masks of all matrices, with the weights the selector leaves."""
        all_rows = self.problem(recipe)
        problems = [self.own(index, all_rows) for index in range(len(self.matrices))]
        with jax.sharding.use_abstract_mesh(self.sharding.mesh.abstract_mesh):  # for inverses, see linalg/inverses.py
            if given is not None:
                spread = (self.spread(index, each) for index, each in enumerate(given))
                choices = tuple(_taken(each, problem.weight) for each, problem in zip(spread, problems))
            else:
                choices = _chosen(recipe.selector, problems, patterns, self.losing(patterns))
        # Constrain the sharding again: otherwise every device would choose the masks of all rows.
        return tuple(self.spread(index, choice) for index, choice in enumerate(choices))

    def losing(self, patterns: tuple[Pattern, ...]) -> list[bool]:
        """Whether each matrix loses a weight."""
        return [pattern.prunes(matrix.shape) for pattern, matrix in zip(patterns, self.matrices)]

    def own(self, index: int, problem: LayerProblem) -> LayerProblem:
        """The rows of one matrix, out of the problem of all rows."""
        pull = None if problem.pull is None else problem.pull[self.slices[index]]
        return dataclasses.replace(problem, weight=self.matrices[index], pull=pull)

    def objective(self, index: int, problem: LayerProblem) -> TokenSets[LayerProblem]:
        """The objective of the rows of one matrix on both sets of tokens."""
        own = self.own(index, problem)
        if self.tokens.held_out is None:
            return TokenSets(own)
        hessian, term = self.tokens.held_out
        if term is None:
            return TokenSets(own, LayerProblem(own.weight, hessian))
        return TokenSets(own, LayerProblem(own.weight, hessian, term.outputs[self.slices[index]], offset=self.drifts[index]))

    def spread(self, index: int, arrays: Tree) -> Tree:
        """Shards arrays of one matrix by rows over all devices."""
        sharding = self.sharding.rows(self.matrices[index])
        return jax.tree.map(lambda array: jax.lax.with_sharding_constraint(array, sharding), arrays)


def _chosen(
    selector: Selector, problems: Sequence[LayerProblem], patterns: Sequence[Pattern], losing: Sequence[bool]
) -> tuple[Pruned, ...]:
    """The selector's choices; dense weights where a matrix loses none."""
    arguments = tuple(itertools.compress(problems, losing)), tuple(itertools.compress(patterns, losing))
    chosen = iter(selector.choose(*arguments) if any(losing) else ())
    dense = (Pruned(problem.weight, jnp.ones_like(problem.weight, bool)) for problem in problems)
    return tuple(next(chosen) if loses else unpruned for loses, unpruned in zip(losing, dense))


def _taken(given: Given[Array], dense: Array) -> Pruned:
    """An imported mask, with its own weights or with the dense ones."""
    weight = dense if given.weight is None else given.weight.astype(jnp.float32)
    return Pruned(jnp.where(given.keep, weight, 0.0), given.keep)


def _stacked(choices: tuple[Pruned, ...]) -> Pruned:
    return Pruned(_stack(tuple(choice.weight for choice in choices)), _stack(tuple(choice.keep for choice in choices)))


def _stack(arrays: tuple[Array, ...]) -> Array:
    return jnp.concatenate(arrays) if len(arrays) > 1 else arrays[0]
