"""Work per device: products and factorisations exact, bytes by one rule."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from optima_tpu.config.choices import CHOICES
from optima_tpu.method.linalg.features import matmul, rough_matmul
from optima_tpu.method.linalg.inverses import inverse, inverse_and_root
from optima_tpu.method.patterns import NM, Unstructured
from optima_tpu.method.problem import LayerProblem
from optima_tpu.method.prune_group import prune_group
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.selectors import ADMM, Imported, SparseGPT, Wanda
from optima_tpu.method.solvers import CG
from optima_tpu.method.solvers.cg import usual_steps
from optima_tpu.method.statistics import TokenStatistics
from optima_tpu.models import splash
from optima_tpu.models.experts import Routed
from optima_tpu.pipeline.grams import add_routed
from optima_tpu.pipeline.plan.counting import Work, counted
from optima_tpu.pipeline.plan.topology import CHIPS, Machine
from optima_tpu.pipeline.programs import Call
from optima_tpu.runtime.loops import usual_turns
from optima_tpu.runtime.mesh import ROWS, struct_on
from tests.support.pruning import group_arguments

ROW, SIZE = 64, 32  # of the arrays here: their traffic is in float32 arrays [ROW, SIZE]
ARRAY, PRODUCT = 4 * ROW * SIZE, 2 * ROW * SIZE * SIZE


def machine(data=1, model=1, here=False) -> Machine:
    return Machine("there", CHIPS["v5e"], AbstractMesh((data, model), ("data", "model")), 1, 0.5, here=here)


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


X, Y, W = struct(ROW, SIZE), struct(ROW, SIZE), struct(SIZE, SIZE)
MATRIX = 4 * SIZE * SIZE


def work(function, *arguments, on: Machine | None = None) -> Work:
    counts = counted(Call(jax.jit(function), arguments), on or machine())
    assert not counts.unknown
    return counts.work


def test_products_count_by_dtype_and_precision_and_factorisations_by_themselves():
    narrow = struct(ROW, SIZE, dtype=jnp.bfloat16), struct(SIZE, SIZE, dtype=jnp.bfloat16)
    assert work(jnp.matmul, *narrow) == Work(narrow=PRODUCT, traffic=(2 * ARRAY + MATRIX) / 2)
    assert work(matmul, X, W) == Work(wide=PRODUCT, traffic=2 * ARRAY + MATRIX)
    assert work(rough_matmul, X, W) == Work(rough=PRODUCT, traffic=2 * ARRAY + MATRIX)
    batched = work(lambda a, b: jnp.einsum("brs,bst->brt", a, b), struct(5, ROW, SIZE), struct(5, SIZE, SIZE))
    assert batched.flops == 5 * PRODUCT
    assert work(lambda a: lax.linalg.cholesky(a, symmetrize_input=False), W) == Work(
        factor=SIZE**3 / 3,
        traffic=4 * MATRIX,  # and another pass for the zeros above the diagonal
    )
    assert work(lambda a, b: lax.linalg.triangular_solve(a, b), W, X).factor == ROW * SIZE**2


def test_what_is_computed_element_by_element_is_one_pass():
    assert work(lambda x, y: jnp.exp(x) * y + x, X, Y).traffic == 3 * ARRAY
    # A row's sum is needed before its share: the array is read twice, and once written.
    assert work(lambda x: x / jnp.sum(x, axis=1, keepdims=True), X).traffic == 3 * ARRAY
    # The factor of a product is written for it; its result is added to where it is computed.
    assert work(lambda x, y, w: matmul(x * 2, w) + y, X, Y, W).traffic == (1 + 2 + 1 + 1) * ARRAY + MATRIX
    assert work(lambda x, y: x, X, Y).traffic == 0  # nothing is done


def test_a_part_of_an_array_counts_as_large_as_it_is():
    part = ARRAY // 8
    assert work(lambda x: lax.dynamic_slice_in_dim(x, 3, ROW // 8) * 2, X).traffic == 2 * part
    written = work(lambda x, y: lax.dynamic_update_slice_in_dim(x, 2 * y[: ROW // 8], 3, 0), X, Y)
    assert written.traffic == 2 * part


def test_equal_things_are_computed_once_and_what_nothing_needs_never():
    assert work(lambda x, w: (matmul(x, w) + 1, matmul(x, w) + 2), X, W).wide == PRODUCT
    assert work(lambda x, w: (matmul(x, w), x)[1] + 1, X, W).wide == 0


@pytest.mark.parametrize("loop", ["scan", "fori", "while"])
def test_a_loop_counts_as_often_as_it_runs(loop):
    def program(x, w):
        if loop == "scan":
            return lax.scan(lambda x, _: (matmul(x, w), None), x, None, length=5)[0]
        if loop == "fori":
            return lax.fori_loop(0, 5, lambda _, x: matmul(x, w), x)
        with usual_turns(5):
            return lax.while_loop(lambda x: jnp.any(x < 1), lambda x: matmul(x, w), x)

    total = work(program, X, W)
    assert total.wide == 5 * PRODUCT
    assert total.traffic == pytest.approx(5 * (2 * ARRAY + MATRIX + (loop == "while") * ARRAY), rel=1e-2)


def test_a_loop_that_says_nothing_counts_once_and_is_named():
    def program(x, w):
        return lax.while_loop(lambda x: jnp.any(x < 1), lambda x: matmul(x, w), x)

    counts = counted(Call(jax.jit(program), (X, W)), machine())
    (where,) = counts.unknown
    assert counts.work.wide == PRODUCT and "test_counting.py" in where

    # ``usual_turns`` holds inside of calls and of branches, and not inside of the loop itself.
    def branched(x, w):
        with usual_turns(3):
            return lax.cond(jnp.any(x > 0), jax.jit(program), lambda x, w: x, x, w)

    assert work(branched, X, W).wide == 3 * PRODUCT

    def nested(x, w):
        with usual_turns(3):
            return lax.while_loop(lambda x: jnp.any(x < 1), lambda x: program(x, w), x)

    counts = counted(Call(jax.jit(nested), (X, W)), machine())
    assert counts.work.wide == 3 * PRODUCT and counts.unknown == {where}


def test_of_branches_the_largest_counts_and_of_platforms_the_machines_own():
    def branches(x, w):
        return lax.cond(jnp.any(x > 0), lambda x: matmul(matmul(x, w), w), lambda x: matmul(x, w), x)

    def platforms(x, w):
        return lax.platform_dependent(x, tpu=lambda x: matmul(x, w), default=lambda x: x)

    assert work(branches, X, W).wide == 2 * PRODUCT
    assert work(platforms, X, W).wide == PRODUCT and work(platforms, X, W, on=machine(here=True)).wide == 0


def test_the_work_of_a_device_is_its_share():
    on = machine(4, 2)
    x, whole = struct_on(on.mesh, X.shape, X.dtype, ROWS), struct_on(on.mesh, W.shape, W.dtype, P())

    def outside(x, w):
        return matmul(x, matmul(w, w)) + 1

    total = work(outside, x, whole, on=on)
    assert total.wide == PRODUCT / 8 + 2 * SIZE**3  # what no device shares is computed by each
    assert total.traffic == 2 * ARRAY / 8 + 4 * MATRIX

    def inside(x, w):
        return jax.shard_map(matmul, mesh=on.mesh, in_specs=(ROWS, P()), out_specs=ROWS, check_vma=False)(x, w)

    assert work(inside, x, whole, on=on) == Work(wide=PRODUCT / 8, traffic=2 * ARRAY / 8 + MATRIX)

    def constrained(x, w):
        return matmul(lax.with_sharding_constraint(x, jax.NamedSharding(on.mesh, P("data"))), w)

    assert work(constrained, struct(ROW, SIZE), whole, on=on).wide == PRODUCT / 4


def test_a_product_whose_factors_are_split_over_an_axis_is_summed_over_it():
    on = machine(4, 2)
    x, w = (
        struct_on(on.mesh, each.shape, each.dtype, P("data" if each is X else "model", axis))
        for each, axis in ((X, "model"), (W, None))
    )
    summed, out = work(matmul, x, w, on=on), ARRAY / 4
    assert summed == Work(wide=PRODUCT / 8, traffic=ARRAY / 8 + MATRIX / 2 + 3 * out)
    # What follows is done by every device of the axis, and an axis of one device splits nothing.
    assert work(lambda x, w: matmul(x, w) * 2, x, w, on=on).traffic == summed.traffic + 2 * out
    alone = struct_on(machine().mesh, X.shape, X.dtype, P("data", "model"))
    assert work(matmul, alone, W).traffic == 2 * ARRAY + MATRIX


def test_what_was_narrow_before_it_was_converted_counts_so():
    def widened(x, w):
        return matmul(x.astype(jnp.float32), w.astype(jnp.float32))

    narrow = struct(ROW, SIZE, dtype=jnp.bfloat16)
    assert work(widened, narrow, struct(SIZE, SIZE, dtype=jnp.bfloat16)).narrow == PRODUCT
    assert work(widened, narrow, W).wide == PRODUCT
    assert work(lambda x, y: x.astype(jnp.float32) * y, narrow, Y).traffic == 2.5 * ARRAY


def test_a_kernel_counts_the_steps_that_do_something_and_holds_the_rest_on_the_chip():
    """Causal attention on 4 blocks of queries and keys does 10 of 16 steps."""
    heads, length, size = 4, 2048, 128
    arrays = [struct(2, length, count, size, dtype=jnp.bfloat16) for count in (heads, heads, heads)]
    on = machine()

    def attend(q, k, v):
        return splash.attention(on.mesh, q, k, v, None)

    total = work(attend, *arrays, on=on)
    assert total.flops == total.narrow == 10 / 16 * 2 * (2 * heads * 2 * length**2 * size)
    assert total.traffic < 4 * 2 * heads * length**2 / 2  # half of the scores in float32


@pytest.mark.parametrize("chosen", [range(8), range(3)], ids=["all", "some"])
def test_experts_count_the_rows_that_are_sent_to_them(chosen):
    rows, experts, few = 512, 8, 2
    on = machine()

    def sums(before, routed, valid):
        return add_routed(on.mesh, tuple(chosen), before, [routed], valid, ())

    routed = Routed(struct(few * rows, SIZE), struct(4, rows // 4, few, dtype=jnp.int32), experts, 1)
    before = TokenStatistics(struct(len(chosen), SIZE, SIZE), struct(len(chosen), dtype=jnp.int32))
    total = work(sums, before, routed, struct(4, dtype=jnp.bool_), on=on)
    assert total.flops == pytest.approx(2 * few * rows * len(chosen) / experts * SIZE**2)


def test_bytes_are_fewer_than_those_of_the_cpus_compiler_and_flops_are_the_same():
    """The CPU's compiler fuses less than the rule assumes."""

    def elements(x, y, w):
        return jax.nn.softmax(jnp.where(x > 0, x, 0) * y, axis=1), jnp.tanh(matmul(x * y, w)) * x

    problem = LayerProblem(struct(512, 256), struct(256, 256))
    for call, arguments in (
        (elements, (struct(512, 256), struct(512, 256), struct(256, 256))),
        (lambda problem, weight: problem.errors(weight), (problem, struct(512, 256))),
    ):
        total, compiled = work(call, *arguments, on=machine(here=True)), jax.jit(call).lower(*arguments).compile().cost_analysis()
        assert 0.97 < total.flops / compiled["flops"] <= 1
        assert 0.5 < total.traffic / compiled["bytes accessed"] <= 1


def pruning(recipe: Recipe, rows: int, size: int, on: Machine, **options):
    arrays = (
        (struct_on(on.mesh, (rows, size), jnp.dtype(jnp.float32), ROWS),),
        struct_on(on.mesh, (size, size), jnp.dtype(jnp.float32), P()),
    )
    return counted(Call(prune_group, group_arguments(*arrays, recipe, on.mesh, **options)), on)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_every_loop_of_every_method_says_how_often_it_runs(pattern):
    for setting in ("solver", "selector"):
        for cls in CHOICES[setting].values():
            if cls not in (None, Imported):
                methods = (cls(), CG()) if setting == "selector" else (Wanda(), cls())
                counts = pruning(Recipe(pattern, *methods), 32, 16, machine())
                assert not counts.unknown and counts.work.flops > 0, cls


def test_a_solve_counts_its_usual_steps_on_every_device():
    """Counts the products of the default solver's steps, checks and result.

    Each step takes two products, the check after every fourth step two more, and the start one. Measuring the solver's result
    takes others.
    """
    rows, size = 4096, 256
    steps = usual_steps(size, CG().damping)
    for on, devices in ((machine(), 1), (machine(4, 2), 8)):
        product = 2 * rows * size**2 / devices
        one, solved = (pruning(Recipe(Unstructured(0.5), Wanda(), solver), rows, size, on).work for solver in (None, CG()))
        assert solved.rough - one.rough == pytest.approx(steps * product + 2 * size**3)  # and R'R, on each device
        # Without a solver the weights before and after it are one.
        assert solved.wide - one.wide == pytest.approx((steps + steps / 2 + 1 + 1) * product)
        assert solved.factor == pytest.approx(4 / 3 * size**3)


def test_a_wider_layer_takes_more_usual_steps_and_never_more_than_the_solver_may_take():
    size = 1024
    few, more = (pruning(Recipe(Unstructured(0.5), Wanda(), CG(max_steps=most)), size, size, machine()).work for most in (8, 96))
    assert usual_steps(4 * size, 0.01) > usual_steps(size, 0.01) > 8
    assert usual_steps(4 * size, 0.01) > usual_steps(4 * size, 0.3)
    assert few.rough < more.rough


def test_inverses_are_shared_by_the_tpus_that_make_them():
    """By panels of 128 columns; see ``linalg.blocked_cholesky``."""
    size, panel = 2048, 128
    for call, kinds in ((lambda matrix: inverse(matrix, 1.0), {"rough"}), (inverse_and_root, {"wide", "rough"})):
        for devices in (1, 8):
            on = machine(devices, 1)

            def program(matrix, call=call, on=on):
                with jax.sharding.use_abstract_mesh(on.mesh):
                    return call(matrix)

            total = work(program, struct_on(on.mesh, (size, size), jnp.dtype(jnp.float32), P()), on=on)
            products = (6 * size**3 + 2 * size**2 * panel) / devices + 2 * size**2 * panel  # each device has the whole panel
            assert {name for name in ("narrow", "wide", "rough") if getattr(total, name)} == kinds
            assert total.flops - total.factor == pytest.approx(products)
    halves = work(lambda matrix: inverse(matrix, 1.0), struct(size, size), on=machine(here=True))
    assert halves.flops == pytest.approx(2 * size**3, rel=0.05)


def test_a_selector_makes_its_inverses_once_for_an_input():
    rows, size, on = 64, 512, machine()

    def rough(selector):
        return pruning(Recipe(Unstructured(0.5), selector, None), rows, size, on).work.rough

    product, one = 2 * rows * size**2, rough(ADMM(levels=6, inverses=1, iterations=1))
    assert rough(ADMM(levels=6, inverses=1, iterations=3)) - one == pytest.approx(12 * product)
    made = 6 * size**3 + 4 * size**2 * 128
    assert one - made == pytest.approx(6 * product) and rough(ADMM(levels=6, inverses=3, iterations=1)) - one == pytest.approx(
        2 * made
    )
    assert rough(SparseGPT()) == rough(Wanda()) == 0  # nothing reads SparseGPT's R'R
