"""Split Hessians and batches of rows: the same solution in less memory."""

import contextlib
import dataclasses
import functools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optima_tpu.errors import UserError
from optima_tpu.launch import main
from optima_tpu.method.linalg import blocked_cholesky
from optima_tpu.method.linalg import inverses as shared
from optima_tpu.method.linalg.blocked_cholesky import inverse_by_panels
from optima_tpu.method.linalg.features import WHOLE, Features, matmul
from optima_tpu.method.linalg.inverses import ROUGH_RIDGE, inverse, inverse_cholesky, together
from optima_tpu.method.mask_swaps import Swaps
from optima_tpu.method.patterns import Unstructured
from optima_tpu.method.prune_group import prune_group
from optima_tpu.method.quantization import Int4
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.row_sharding import RowLayout, RowSharding
from optima_tpu.method.selectors import ADMM, Imported, SparseGPT, Thanos, Wanda
from optima_tpu.method.solvers import CG, MPAX, Adam, Exact
from optima_tpu.method.statistics import Drift
from optima_tpu.method.targets import DenseTarget
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline import memory_plan
from optima_tpu.pipeline.layer_groups import groups_of_blocks
from optima_tpu.pipeline.memory_plan import GroupLoad, block_passes, described
from optima_tpu.pipeline.plan.hlo import COLLECTIVE
from optima_tpu.runtime.device_memory import GIB, device_budget, host_memory
from optima_tpu.runtime.mesh import MODEL
from tests.support.memory import block_of
from tests.support.meshes import mesh
from tests.support.problems import correlated_hessian, layer, oracle, row_objective, select, wide
from tests.support.pruning import group_arguments, prune_matrices, walk_block
from tests.support.runs import SMALL
from tests.support.tiny_models import tiny_folder, tiny_llama

SPLIT = RowLayout(split=True)
RECIPE = Recipe(Unstructured(0.5), Wanda(), CG(tolerance=1e-6))


@pytest.mark.parametrize("devices, size, panel", [(4, 36, 4), (2, 26, 128)])
def test_the_inverse_of_a_matrix_in_columns(devices, size, panel):
    """Nine columns a device, in three panels of three, and thirteen in one."""
    matrix = correlated_hessian(np.random.default_rng(0), size) + 0.01 * np.eye(size, dtype=np.float32)
    inverse, root = jax.jit(
        jax.shard_map(
            lambda columns: inverse_by_panels(columns, Features(MODEL), panel),
            mesh=mesh(1, devices),
            in_specs=P(None, MODEL),
            out_specs=P(None, MODEL),
            check_vma=False,
        )
    )(matrix)
    exact = np.linalg.inv(matrix.astype(np.float64))
    for computed in (inverse, np.asarray(root, np.float64).T @ root):
        assert np.abs(computed - exact).max() < 2e-6 * np.abs(exact).max()
    assert (np.triu(root, 1) == 0).all()


@pytest.mark.parametrize("size, panel", [(26, 8), (36, 128), (600, 128)])
def test_halves_and_panels_of_a_whole_matrix_give_the_same_inverse(size, panel):
    """CPUs and GPUs run the halves, TPUs the panels.

    The halves pad 26 to 32, and 600 is more than two leaves.
    """
    matrix = correlated_hessian(np.random.default_rng(0), size) + 0.01 * np.eye(size, dtype=np.float32)
    exact = np.linalg.inv(np.linalg.cholesky(matrix.astype(np.float64)))
    whole, by_panels = jax.jit(lambda matrix: inverse_by_panels(matrix, WHOLE, panel))(matrix)
    for root in (by_panels, inverse_cholesky(jnp.asarray(matrix))):
        assert np.abs(root - exact).max() < 1e-5 * np.abs(exact).max() and (np.triu(root, 1) == 0).all()
    for computed in (whole, inverse(jnp.asarray(matrix), 0.01)):
        assert np.abs(computed - exact.T @ exact).max() < 1e-5 * np.abs(exact.T @ exact).max()
    assert np.isnan(inverse_by_panels(-jnp.asarray(matrix), WHOLE, panel)[1]).any()


@pytest.mark.parametrize("make", [functools.partial(inverse, ridge=0.01), inverse_cholesky])
def test_a_tpu_gets_the_small_program(make):
    """A TPU's program is a loop; a GPU's program grows with the matrix."""

    def lowered(platform: str, size: int) -> str:
        matrix = jax.ShapeDtypeStruct((size, size), jnp.float32)
        return jax.jit(make).trace(matrix).lower(lowering_platforms=(platform,)).as_text()

    assert lowered("tpu", 2048).count("\n") < 1.1 * lowered("tpu", 512).count("\n")
    assert lowered("cuda", 2048).count("\n") > 2 * lowered("cuda", 512).count("\n")


@pytest.mark.parametrize("devices", [1, 8])
def test_an_inverse_that_chooses_takes_three_passes_on_a_tpu_where_the_ridge_allows_it(devices):
    """HIGH takes three passes of a TPU's matrix unit, HIGHEST takes six.

    The product R'R is always rough.
    """

    def precisions(ridge: float, platform: str) -> set[str]:
        with jax.sharding.use_abstract_mesh(mesh(devices, 1).abstract_mesh):
            traced = jax.jit(functools.partial(inverse, ridge=ridge)).trace(jax.ShapeDtypeStruct((2048, 2048), jnp.float32))
            text = traced.lower(lowering_platforms=(platform,)).as_text()
        return set(re.findall(r"dot_general.*precision = \[(\w+)", text))

    assert precisions(ROUGH_RIDGE, "tpu") == {"HIGH"}
    assert precisions(ROUGH_RIDGE / 2, "tpu") == precisions(ROUGH_RIDGE, "cuda") == {"HIGH", "HIGHEST"}


def test_the_smallest_ridge_of_a_rough_inverse_is_far_above_its_rounding(monkeypatch):
    """Rounds factors to 16 bits, as a product in three passes does.

    The Hessian has 512 inputs, of 64 tokens.
    """
    hessian = correlated_hessian(np.random.default_rng(0), 512, tokens=64, spread=2.0)
    scale = np.sqrt(np.diagonal(hessian))
    matrix = hessian / scale / scale[:, None] + ROUGH_RIDGE * np.eye(512, dtype=np.float32)
    exact = np.linalg.inv(matrix.astype(np.float64))

    def rounded(a, b):
        return matmul(*(jax.lax.reduce_precision(array, 8, 15) for array in (a, b)))

    monkeypatch.setattr(blocked_cholesky, "rough_matmul", rounded)
    computed, _ = jax.jit(lambda matrix: inverse_by_panels(matrix, WHOLE, product=rounded))(matrix)
    assert np.abs(np.diagonal(computed) / np.diagonal(exact) - 1).max() < 0.01
    assert np.linalg.norm(computed - exact) < 0.01 * np.linalg.norm(exact)


@pytest.mark.parametrize("inside", [False, True])
def test_all_devices_make_an_inverse_together(inside):
    """Inside ``shard_map``, as solvers call it, and outside, as selectors do.

    Each device has five columns.
    """
    grid, matrix = mesh(4, 2), correlated_hessian(np.random.default_rng(0), 40) + 0.01 * np.eye(40, dtype=np.float32)
    by_hand = jax.shard_map(together, mesh=grid, in_specs=P(), out_specs=P(), check_vma=False)
    with contextlib.nullcontext() if inside else jax.sharding.use_abstract_mesh(grid.abstract_mesh):
        inverse, root = jax.jit(by_hand if inside else together)(jax.device_put(matrix, NamedSharding(grid, P())))
    exact = np.linalg.inv(matrix.astype(np.float64))
    for computed in (inverse, np.asarray(root, np.float64).T @ root):
        assert np.abs(computed - exact).max() < 2e-6 * np.abs(exact).max()
    assert (np.triu(root, 1) == 0).all()


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(Unstructured(0.5), ADMM(), None),
        Recipe(Unstructured(0.5), SparseGPT(), None),
        pytest.param(Recipe(Unstructured(0.5), Wanda(), CG()), marks=pytest.mark.slow),  # is in the next one
        Recipe(Unstructured(0.5), Wanda(), CG(), refine=Swaps()),
    ],
)
def test_tpus_share_every_inverse_of_a_layer(recipe):
    """Other platforms and TPUs with narrow panels make their own inverses."""

    def reductions(platform: str, size: int) -> int:
        arrays = (jax.ShapeDtypeStruct((64, size), jnp.float32),), jax.ShapeDtypeStruct((size, size), jnp.float32)
        traced = prune_group.trace(*group_arguments(*arrays, recipe, mesh(4, 2)))
        return traced.lower(lowering_platforms=(platform,)).as_text().count("all_reduce")

    assert reductions("tpu", 1024) > 0
    assert reductions("tpu", 1000) == reductions("tpu", 512) == reductions("cuda", 1024) == reductions("cpu", 1024) == 0


def test_shared_inverses_give_the_weights_of_those_that_every_device_makes(monkeypatch):
    """Simulated devices share in the mask, exchanges and solve of a layer."""
    problem = layer(np.random.default_rng(5), 24, 64, spread=0.5)
    recipe = Recipe(Unstructured(0.5, "row"), ADMM(), CG(tolerance=1e-5), refine=Swaps())

    def pruned(grid):
        hessian = jax.device_put(problem.hessian, NamedSharding(grid, P()))
        return jax.device_get(prune_matrices((problem.weight,), hessian, recipe, grid))

    (alone,), (kept,), _ = pruned(mesh(1, 1))
    monkeypatch.setattr("optima_tpu.method.linalg.features._FEWEST_COLUMNS", 8)
    monkeypatch.setattr(shared, "_made", lambda matrix, each, by_all: by_all(matrix))
    (shared_weight,), (keep,), _ = pruned(mesh(4, 2))
    np.testing.assert_array_equal(keep, kept)
    # Near an optimum an objective that is right to 1e-7, as in float32, leaves the weights free by the root of it.
    np.testing.assert_allclose(shared_weight, alone, atol=1e-3)
    values = (row_objective(problem, weight, recipe.damping) for weight in (shared_weight, alone))
    np.testing.assert_allclose(*values, rtol=1e-5)


def test_panels_that_do_not_divide_the_columns():
    """Two identity columns pad each device's ten to three panels of four."""
    test_the_inverse_of_a_matrix_in_columns(2, 20, 4)


@functools.lru_cache
def problem_and_mask():
    """Thirteen rows, which no mesh divides."""
    problem = dataclasses.replace(layer(np.random.default_rng(3), 13, 36, target="other", spread=0.5), damping=1e-2)
    return problem, select(Wanda(), problem, Unstructured(0.5))


@functools.lru_cache
def solved(shape, where):
    """Solution of CG with four steps, and its certificate.

    After more steps little is left to gain, and the certificate would count rounding.
    """
    solver = CG(tolerance=1e-9, max_steps=4)
    return jax.device_get(jax.jit(RowSharding(mesh(*shape), where).solve(solver))(*problem_and_mask()))


@pytest.mark.parametrize("shape, where", [((1, 4), SPLIT), ((4, 2), RowLayout(True, 2))])
def test_the_layout_does_not_change_the_solution(shape, where):
    problem, pruned = problem_and_mask()
    laid_out, whole = solved(shape, where), solved((1, 1), RowLayout())
    np.testing.assert_allclose(laid_out.weight, whole.weight, atol=1e-5)
    np.testing.assert_allclose(laid_out.gap, whole.gap, rtol=1e-4)
    assert (laid_out.weight[~np.asarray(pruned.keep)] == 0).all()
    _, hessian, pull = wide(problem, 1e-2)
    best = row_objective(problem, oracle(problem, pruned, 1e-2), 1e-2)
    gain = row_objective(problem, pruned.weight, 1e-2) - best
    optimum = best + np.sum(pull * np.linalg.solve(hessian, pull.T).T, axis=1)  # counted from the unconstrained one
    for solution in (laid_out, whole):
        excess = row_objective(problem, solution.weight, 1e-2) - best
        assert (excess < 0.05 * gain).all() and (excess <= solution.gap * optimum * (1 + 1e-3)).all()


ROWS, SIZE = 320, 192


@functools.lru_cache
def compiled(where, shape):
    """Compiles ``prune_group`` with Hessians as calibration leaves them.

    The memory model was fitted to other sizes.
    """
    grid = mesh(*shape)
    columns = NamedSharding(grid, P(None, MODEL))
    hessian = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32, sharding=columns)
    weight = jax.ShapeDtypeStruct((ROWS, SIZE), jnp.bfloat16, sharding=columns)
    arguments = group_arguments((weight,), hessian, RECIPE, grid, held_out=hessian, layout=where)
    return prune_group.lower(*arguments).compile()


def test_collectives_of_a_split_solve_are_as_designed_and_no_device_sees_the_hessian():
    """Counts the collectives in the body of each loop.

    An iteration has two all-gathers and two all-reduces, and so has the check after a cycle. A panel of the inverse has one
    all-reduce.
    """
    text = compiled(SPLIT, (2, 4)).as_text()
    assert "f32[192,48]" in text and not re.search(r"\[(1,)?192,192\]", text)
    assert "[320,192]" not in text, "all rows on one device"
    bodies = {
        match[1]: match[0] for match in re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n.*?^\}", text, re.MULTILINE | re.DOTALL)
    }
    loops = [Counter(COLLECTIVE.findall(bodies[name])) for name in re.findall(r"body=%?([\w.\-]+)", text)]
    step, check, panel = ({"all-gather(": 2, "all-reduce(": 2}, {"all-gather(": 2, "all-reduce(": 2}, {"all-reduce(": 1})
    assert sorted(map(sorted, map(Counter.elements, filter(None, loops)))) == sorted(
        sorted(Counter(each).elements()) for each in (step, check, panel, panel)
    )


@pytest.mark.parametrize("where, shape", [(RowLayout(False, 32), (1, 1)), (SPLIT, (2, 4))])
def test_the_memory_model_bounds_what_xla_reports(where, shape):
    analysis = compiled(where, shape).memory_analysis()
    total = analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes
    bound = GroupLoad(SIZE, ROWS, RECIPE.footprint()).bytes(mesh(*shape), where.split, where.rows or ROWS // shape[0])
    assert total < bound < 1.6 * total


DENSE_TARGETS = DenseTarget(0.5), DenseTarget(0.5, 0.5)


@pytest.mark.parametrize("change", [dict(refine=Swaps()), dict(quantize=Int4()), *(dict(target=each) for each in DENSE_TARGETS)])
def test_the_memory_model_bounds_what_xla_reports_with_held_out_tokens(change):
    rows, size = 320, 192
    recipe = dataclasses.replace(Recipe(Unstructured(0.5), Wanda(), CG()), **change)
    weight, hessian = jax.ShapeDtypeStruct((rows, size), jnp.bfloat16), jax.ShapeDtypeStruct((size, size), jnp.float32)
    dense, drifts = recipe.target.dense_stream, recipe.target in DENSE_TARGETS[1:]
    residual = dict(residual=(jax.ShapeDtypeStruct((rows, size), jnp.float32),)) if drifts else {}
    both = Drift(hessian, (jax.ShapeDtypeStruct((rows,), jnp.float32),), **residual)
    drift = dict.fromkeys(("drift", "held_out_drift"), both) if dense else {}
    lowered = prune_group.lower(*group_arguments((weight,), hessian, recipe, mesh(1, 1), held_out=hessian, **drift))
    analysis = lowered.compile().memory_analysis()
    total = analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes
    bound = GroupLoad(size, rows, recipe.footprint(), streams=1 + dense, residual=drifts).bytes(mesh(1, 1), False, rows)
    assert total < bound < 1.6 * total
    # Exchanges compare all inputs of a row, and integers are rounded one input after the other.
    assert recipe.footprint().split == (recipe.refine is None and recipe.quantize is None)


def test_the_layout_follows_from_the_budget():
    grid, cg = mesh(2, 4), Recipe(Unstructured(0.5), Wanda(), CG())

    def choose(budget, recipe=cg):
        return GroupLoad(28672, 8192, recipe.footprint()).layout(grid, budget)

    assert choose(math.inf) == choose(60 * GIB) == RowLayout()
    batches = choose(22.5 * GIB)
    assert not batches.split and 64 <= batches.rows <= 512
    assert choose(15 * GIB) == SPLIT
    assert choose(8 * GIB).split and choose(8 * GIB).rows < 4096
    for budget in (8, 15, 22.5):  # what was chosen fits
        chosen = choose(budget * GIB)
        each = 4096 if chosen.split else 1024
        assert GroupLoad(28672, 8192, cg.footprint()).bytes(grid, chosen.split, chosen.rows or each) <= budget * GIB
    assert choose(15 * GIB, dataclasses.replace(cg, solver=None)).split is False
    block = block_of({"mlp.down_proj": (8192, 28672)}, grid)
    weights = 2.5 * 4 * 8192 * 28672  # of the block, which no axis splits here
    hessians = 2 * 4 * 28672**2 / 4  # in columns
    for solver, selector in (
        (MPAX(), Wanda()),
        (Exact(), Imported()),
        (Adam(), Imported()),
        (CG(damping=0.0), Wanda()),
        (CG(), Thanos()),
        (CG(), SparseGPT()),
    ):
        recipe = Recipe(Unstructured(0.5), selector, solver)
        assert choose(8 * GIB, recipe) is None
        with pytest.raises(UserError, match=r"mlp.down_proj has 28672 inputs.*GiB.*--selector wanda.*--device_memory"):
            block_passes(block, 0, (("mlp.down_proj",),), recipe, 8 * GIB + weights + hessians)
    with pytest.raises(UserError, match="divides 28673"):  # by an axis that does not divide the inputs nothing is split
        block_passes(block_of({"a": (8192, 28673)}, grid), 0, (("a",),), cg, 8 * GIB)


def test_undamped_cg_refuses_a_split_hessian():
    problem, pruned = problem_and_mask()
    with pytest.raises(UserError, match="raise --solver.damping"):
        jax.eval_shape(RowSharding(mesh(1, 4), SPLIT).solve(CG()), dataclasses.replace(problem, damping=0.0), pruned)


def test_the_budget_is_what_the_user_says_or_a_share_of_the_machine():
    assert device_budget(2.5) == 2.5 * GIB
    assert 0 < device_budget(None) * jax.device_count() < 2**50
    assert device_budget(None) == 0.5 * host_memory() / jax.device_count()


@pytest.mark.parametrize("text, limited", [("1048576\n", True), ("max\n", False), (None, False)], ids=str)
def test_a_container_has_no_more_memory_than_its_limit(tmp_path, text, limited):
    path = tmp_path / "memory.max"
    if text:
        path.write_text(text)
    assert (host_memory([str(path)]) == 2**20) == limited and (limited or host_memory([str(path)]) == host_memory([]))


def test_processes_on_one_machine_share_its_memory(monkeypatch):
    alone = device_budget(None)
    monkeypatch.setattr("optima_tpu.runtime.device_memory.everyones", lambda value: [value, value])
    assert device_budget(None) == alone / 2


def test_the_hessians_of_a_pass_fit_a_share_of_the_budget():
    block, recipe = (
        block_of({"a": (8, 64), "b": (8, 64), "c": (64, 256)}, mesh(1, 1)),
        Recipe(Unstructured(0.5), Imported(), None),
    )
    cut = functools.partial(block_passes, block, 0, (("a",), ("b",), ("c",)), recipe)
    assert [each.groups for each in cut(math.inf)] == [(("a",), ("b",), ("c",))]
    assert described(cut(math.inf)) == ""
    passes = cut(4 * 2 * 4 * 256 * 256)  # a quarter is what the last one takes
    assert [each.groups for each in passes] == [(("a",), ("b",)), (("c",),)]
    assert "in 2 passes" in described(passes) and described(passes, 2) == ""


@pytest.mark.parametrize("shape, times", [((8, 1), 1), ((4, 2), 1.5), ((1, 1), 2)])
def test_a_layers_own_hessians_are_counted_once_where_they_are_used_as_they_come(shape, times):
    """Hessians in columns are gathered first, which takes another copy.

    On one device, a TPU's panels take as much memory again.
    """
    size, rows = 2048, 64
    recipe = Recipe(Unstructured(0.5, "row"), ADMM(), CG(), refine=Swaps())
    take = GroupLoad(size, rows, recipe.footprint()).bytes(mesh(*shape), False, -(-rows // math.prod(shape)))
    take += 2.5 * 4 * rows * size  # the block's own weights
    cut = functools.partial(block_passes, block_of({"a": (rows, size)}, mesh(*shape)), 0, (("a",),), recipe)
    least = take + (times - 1) * 2 * 4 * size**2  # the calibration's and that of the held-out tokens
    assert cut(least * 1.001)[0].layouts == (RowLayout(),)
    with contextlib.suppress(UserError):
        assert cut(least * 0.98)[0].layouts != (RowLayout(),)


def test_a_block_pruned_in_a_small_budget_is_the_same_block(monkeypatch):
    """One group goes in batches and another is split, in several passes.

    All passes start from the parameters that the block had.
    """
    decoder = Decoder.open(*tiny_llama(), mesh(2, 4), batch=2)
    tokens = np.random.default_rng(1).integers(0, 64, (8, 24)).astype(np.int32)
    groups = (("mlp.gate_proj",), ("mlp.down_proj",))
    whole, small = decoder.embed(tokens), decoder.embed(tokens)
    monkeypatch.setattr("optima_tpu.pipeline.memory_plan._FEW_ROWS", 4)
    monkeypatch.setattr("optima_tpu.pipeline.memory_plan._HESSIANS_SHARE", 0.05)
    planned = []
    monkeypatch.setattr("optima_tpu.pipeline.walk.block_passes", lambda *a: planned.append(block_passes(*a)) or planned[-1])
    weights, masks, reports = walk_block(decoder, 0, whole, groups, RECIPE, windows=4)
    same, other_masks, others = walk_block(decoder, 0, small, groups, RECIPE, windows=4, budget=86_000)
    assert described(planned[0]) == "" and len(planned[1]) > 1
    assert {where.split for part in planned[1] for where in part.layouts} == {False, True}, planned[1]
    assert any(where.rows for part in planned[1] for where in part.layouts), planned[1]
    assert list(masks) == list(other_masks)
    for name, weight in weights.items():
        assert np.abs(weight - same[name]).max() < 1e-3 * np.abs(weight).max()
        assert same[name].sharding == weight.sharding
    for name, mask in masks.items():
        assert (mask == other_masks[name]).all()
    for report, other in zip(reports, others, strict=True):
        assert report.name == other.name
        for error in ("error_before", "error_after", "held_out_before", "held_out_after"):
            assert getattr(other, error) == pytest.approx(getattr(report, error), rel=1e-3)
    assert np.abs(whole.values - small.values).max() < 1e-3 * np.abs(whole.values).max()


def test_blocks_are_laid_out_once_beside_the_hidden_states_that_stay_on_accelerators(monkeypatch):
    """Blocks are laid out again if the layers fit only without the states."""
    decoder, laid_out = Decoder.open(*tiny_llama(), mesh(2, 2), batch=2), []
    monkeypatch.setattr(memory_plan, "block_passes", lambda *a: laid_out.append(a[1]) or block_passes(*a))
    monkeypatch.setattr(memory_plan, "_STATES_SHARE", 1)

    def fit(budget, devices=decoder.mesh.abstract_mesh):
        laid_out.clear()
        plan = memory_plan.fitted(dataclasses.replace(decoder, mesh=devices), groups_of_blocks(decoder), RECIPE, (4, 24), budget)
        return plan.states, laid_out.count(0)

    assert fit(GIB, decoder.mesh) == (0, 1)  # these are CPU devices
    states, times = fit(GIB)
    assert states > 0 and times == 1
    least = 1.0
    while True:
        with contextlib.suppress(UserError):
            assert fit(least) == (0, 2)
            break
        least += states / 2
    assert fit(least + states) == (states, 1)


def test_a_layer_that_does_not_fit_is_named_before_anything_is_done(tmp_path, capsys):
    arguments = ["--model", str(tiny_folder(tmp_path / "model")), "--mesh", "2x4", "--output", str(tmp_path / "run"), *SMALL]
    assert main([*arguments, "--device_memory", "0.00001"]) == 2
    error = capsys.readouterr().err
    assert "model.layers.0.self_attn.q_proj has 36 inputs" in error and "GiB" in error and "--device_memory" in error
    assert not (tmp_path / "run" / "journal").exists()
