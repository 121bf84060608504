"""Weights on the grid, zero where pruned, never worse than the nearest."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from optima_tpu.errors import UserError
from optima_tpu.method.patterns import Unstructured
from optima_tpu.method.problem import LayerProblem, Pruned
from optima_tpu.method.prune_group import prune_group
from optima_tpu.method.quantization import Int4, Int8, Quantized, Quantizer
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.selectors import Wanda
from optima_tpu.method.solvers import CG
from optima_tpu.models.checkpoints.compressed_tensors import integers, pack
from optima_tpu.pipeline.plan.counting import counted
from optima_tpu.pipeline.plan.topology import CHIPS, Machine
from optima_tpu.pipeline.programs import Call
from tests.support.meshes import mesh
from tests.support.problems import layer, oracle, row_objective
from tests.support.pruning import group_arguments

ROWS, SIZE, DAMPING = 12, 24, 0.01
QUANTIZERS = [Int4(group=8), Int4(group=None), Int8(), Int4(group=8, compensate=False), Int4(group=8, sweeps=0)]


@functools.partial(jax.jit, static_argnums=(0, 3))
def quantize(quantizer: Quantizer, problem: LayerProblem, pruned: Pruned, dtype=jnp.float32) -> Quantized:
    return quantizer(problem, pruned, jnp.dtype(dtype))


@functools.cache
def solved(target: str = "self") -> tuple[LayerProblem, Pruned]:
    """A layer, half of every row pruned, and its optimal weights."""
    problem = layer(np.random.default_rng(3), ROWS, SIZE, target=target)
    problem = LayerProblem(problem.weight, problem.hessian, problem.pull, DAMPING)
    keep = Unstructured(0.5).keep_mask(jnp.abs(problem.weight))
    exact = oracle(LayerProblem(*(problem.weight, problem.hessian, problem.pull)), Pruned(problem.weight, keep), DAMPING)
    return problem, Pruned(jnp.asarray(exact, jnp.float32), keep)


def levels(quantizer: Quantizer, quantized: Quantized) -> tuple[np.ndarray, np.ndarray]:
    """The integers and the scales of all weights."""
    scale = np.repeat(np.asarray(quantized.scale), SIZE // quantized.scale.shape[1], axis=1)
    return np.round(np.asarray(quantized.weight) / scale), scale


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_weights_are_integers_times_scales_and_pruned_ones_are_zero(quantizer, dtype):
    problem, pruned = solved()
    quantized = quantize(quantizer, problem, pruned, dtype)
    numbers, scale = levels(quantizer, quantized)
    half = 2 ** (quantizer.bits - 1)
    assert quantized.scale.shape == (ROWS, SIZE // (quantizer.group or SIZE)) and (scale > 0).all()
    assert numbers.min() >= -half and numbers.max() < half
    np.testing.assert_array_equal((numbers * scale).astype(dtype).astype(np.float32), quantized.weight)
    np.testing.assert_array_equal(quantized.scale.astype(dtype).astype(jnp.float32), quantized.scale)
    for weight in (quantized.weight, quantized.nearest):
        assert (
            not np.asarray(weight)[~np.asarray(pruned.keep)].any() and not np.signbit(np.asarray(weight) + 0.0)[weight == 0].any()
        )


@pytest.mark.parametrize("target", ["self", "other"])
def test_no_row_is_worse_than_its_nearest_integers_and_none_beats_its_optimum(target):
    problem, pruned = solved(target)
    undamped = LayerProblem(problem.weight, problem.hessian, problem.pull)
    best = row_objective(undamped, pruned.weight, DAMPING)
    values = []
    for sweeps in (0, 1, 2, 8):
        quantized = quantize(Int4(group=8, sweeps=sweeps), problem, pruned)
        values.append(row_objective(undamped, quantized.weight, DAMPING))
    nearest = row_objective(undamped, quantized.nearest, DAMPING)
    # Rounding of float32, whose objective is a difference of products of the size of the row's energy.
    noise = 1e-5 * np.abs(row_objective(undamped, np.zeros((ROWS, SIZE)), DAMPING))
    for value, before in zip(values, [nearest, *values]):
        assert (value <= before + noise).all()
    assert (best <= values[-1] + noise).all()
    cost = [(value - best).sum() for value in (nearest, *values)]
    assert cost[1] < cost[0] and cost[-1] < 0.8 * cost[0]


def test_where_the_descent_ends_no_integer_can_change_alone():
    problem, pruned = solved("other")
    quantized = quantize(Int4(group=8, sweeps=40), problem, pruned)
    undamped = LayerProblem(problem.weight, problem.hessian, problem.pull)
    numbers, scale = levels(Int4(), quantized)
    value = row_objective(undamped, quantized.weight, DAMPING)
    noise = 1e-5 * np.abs(row_objective(undamped, np.zeros((ROWS, SIZE)), DAMPING))
    for column in range(SIZE):
        for step in (-1, 1):
            moved = numbers.copy()
            moved[:, column] = np.clip(moved[:, column] + step, -8, 7)
            other = row_objective(undamped, moved * scale, DAMPING)
            assert (other >= value - noise)[np.asarray(pruned.keep)[:, column]].all()


def test_the_compensation_is_that_of_the_optimal_brain_surgeon():
    problem, pruned = solved()
    quantized = quantize(Int4(group=8, sweeps=0, clip=1), problem, pruned)
    matrix = np.asarray(problem.hessian, np.float64)
    matrix = matrix + DAMPING * np.diag(np.diag(matrix))
    matrix += 0.01 * np.mean(np.diag(matrix)) * np.eye(SIZE)
    keep, scale = np.asarray(pruned.keep), np.repeat(np.asarray(quantized.scale, np.float64), 8, axis=1)
    expected = np.asarray(pruned.weight, np.float64)
    for j in range(SIZE):
        inverse = np.linalg.inv(matrix[j:, j:])  # of the inputs that are not fixed yet
        fixed = np.where(keep[:, j], np.clip(np.round(expected[:, j] / scale[:, j]), -8, 7) * scale[:, j], 0)
        expected[:, j:] -= np.outer(expected[:, j] - fixed, inverse[0] / inverse[0, 0])
        expected[:, j] = fixed
    undamped = LayerProblem(problem.weight, problem.hessian, problem.pull)
    ours = row_objective(undamped, quantized.weight, DAMPING)
    start = np.where(
        (row_objective(undamped, expected, DAMPING) < row_objective(undamped, quantized.nearest, DAMPING))[:, None],
        expected,
        quantized.nearest,
    )
    np.testing.assert_allclose(quantized.weight, start, atol=1e-5)
    assert ours.sum() < row_objective(undamped, quantized.nearest, DAMPING).sum()


def test_rows_do_not_depend_on_each_other():
    problem, pruned = solved()
    whole, part = (
        quantize(
            Int4(group=8),
            LayerProblem(problem.weight[rows], problem.hessian, damping=DAMPING),
            Pruned(pruned.weight[rows], pruned.keep[rows]),
        )
        for rows in (slice(None), slice(3, 7))
    )
    np.testing.assert_allclose(whole.weight[3:7], part.weight, rtol=1e-5)


def test_a_row_without_weights_and_a_dead_input_stay_as_they_are():
    problem, pruned = solved()
    hessian = problem.hessian.at[2].set(0).at[:, 2].set(0)
    keep = pruned.keep.at[0].set(False).at[:, 2].set(True)
    pruned = Pruned(jnp.where(keep, pruned.weight, 0.0), keep)
    quantized = quantize(Int4(group=8), LayerProblem(problem.weight, hessian, damping=DAMPING), pruned)
    assert not quantized.weight[0].any() and np.isfinite(quantized.weight).all() and (quantized.scale > 0).all()


def test_the_mesh_does_not_change_the_integers():
    rng = np.random.default_rng(5)
    problem = layer(rng, 24, SIZE)
    recipe = Recipe(Unstructured(0.5), Wanda(), CG(tolerance=1e-6), quantize=Int4(group=8))
    (one,), (other,) = (
        jax.device_get(
            prune_group(*group_arguments((problem.weight,), problem.hessian, recipe, mesh(*shape), held_out=problem.hessian))
        )
        for shape in ((1, 1), (2, 4))
    )
    # A value near the middle of two integers may fall to either side by rounding. The rest of its row then takes another way, to
    # an error of about the same size.
    assert np.mean(np.all(np.abs(one.weight - other.weight) < 1e-3, axis=1)) > 0.85
    assert one.scale.shape == other.scale.shape == (24, 3)
    np.testing.assert_allclose(one.rows.quantized.sum(axis=1), other.rows.quantized.sum(axis=1), rtol=1e-2)
    after, (nearest, stored) = one.rows.after.sum(), one.rows.quantized.sum(axis=1)
    assert after < stored < nearest
    np.testing.assert_allclose(one.rows.quantized_held_out, one.rows.quantized, rtol=1e-5)  # the same tokens here


def test_a_plan_counts_its_products():
    rows, size, plain = 320, 192, Recipe(Unstructured(0.5), Wanda(), CG())
    machine = Machine("here", CHIPS["v5e"], mesh(1, 1), 1, 0.5, here=True)

    def work(recipe):
        weight, hessian = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, size), (size, size)))
        return counted(
            Call(prune_group, group_arguments((weight,), hessian, recipe, machine.mesh, held_out=hessian)), machine
        ).work

    before, after = (work(recipe) for recipe in (plain, replace(plain, quantize=Int4(sweeps=3))))
    # Six for the sweeps, three for the rounding, two to measure the result on each set of tokens, which know the energy; and in
    # every sweep the products of the integers and of their changes inside of a group.
    inside = 3 * 2 * 32 / size
    assert after.wide - before.wide == pytest.approx((13 + inside) * 2 * size * size * rows)
    assert after.rough == before.rough  # nothing reads R'R
    assert after.factor - before.factor == pytest.approx(4 / 3 * size**3) and after.traffic > before.traffic


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_come_back_exactly_from_weights_and_scales(dtype, bits):
    half = 2 ** (bits - 1)
    scale = np.exp(np.random.default_rng(0).uniform(-12, 2, (300, 2))).astype(dtype)  # subnormal ones in float16 too
    every = np.tile(np.arange(-half, half, dtype=np.int8), (300, 2))
    weight = (every.astype(np.float32) * np.repeat(scale.astype(np.float32), 2 * half, axis=1)).astype(dtype)
    np.testing.assert_array_equal(integers("w", weight, scale, bits), every)
    with pytest.raises(RuntimeError, match="not integers of"):
        integers("w", (weight.astype(np.float32) * 1.3).astype(dtype), scale, bits)


def test_packed_integers_lie_in_their_bits():
    values = np.array([[-8, 7, 0, 1, 2, 3, 4, 5, -1]], np.int8)
    assert pack(values, 4).view(np.uint32).tolist() == [[0xDCBA98F0, 0x00000007]]
    assert pack(values[:, :5], 8).view(np.uint32).tolist() == [[0x81808778, 0x00000082]]


def test_a_group_that_does_not_divide_the_inputs_is_refused_with_those_that_do():
    with pytest.raises(UserError, match="got 128 for a layer with 576; take 64 or 32 or 16 or null"):
        Int4(group=128).check(576)
