"""The contract of every selector, and each against its formula in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optima_tpu.errors import UserError
from optima_tpu.method.patterns import NM, Heads, Pattern, Unstructured, WholeInputs
from optima_tpu.method.problem import LayerProblem
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.selectors import ADMM, Magnitude, Price, Selector, SparseGPT, Thanos, Wanda
from optima_tpu.runtime.mesh import ROWS
from tests.support.meshes import mesh
from tests.support.problems import ALIKE, PATTERNS, assert_obeys, groups, layer, select
from tests.support.pruning import prune_matrices

COUNT, SIZE = 8, 32
# Blocks of 12 leave a last one of 8, and divide no N:M group of 8.
SELECTORS = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "wanda shifted": Wanda(shift_zero=True),
    "sparsegpt": SparseGPT(block=12),
    "thanos": Thanos(block=12),
    "admm": ADMM(rho_first=0.3, levels=3),
    "price": Price(steps=2, exchanges=2),
}
# Those that rank the weights of dead inputs by size; the others prune them first.
BLIND = (Magnitude(), Wanda(shift_zero=True))
contract = pytest.mark.parametrize("selector", SELECTORS.values(), ids=SELECTORS)
# Sweeps choose a row part by part, and refuse to choose whole inputs.
SWEEPS = {"sparsegpt", "thanos"}
sweeps = pytest.mark.parametrize("name", sorted(SWEEPS))
LAYER, SHAPES = Unstructured(0.6, "layer"), ((1, 1), (4, 2), (2, 4))


def with_patterns(patterns, turns: bool = False):
    """Parametrizes over every selector with every pattern that it takes.

    With ``turns`` each selector has one pattern by turns, and its other patterns are slow.
    """
    pairs = {f"{pattern}-{name}": (selector, pattern) for pattern in patterns for name, selector in SELECTORS.items()}
    taken = {
        name: pair for name, pair in pairs.items() if not (isinstance(pair[1], WholeInputs) and name.rpartition("-")[2] in SWEEPS)
    }
    of_each = {name: 0 if name in SWEEPS else index % len(patterns) for index, name in enumerate(SELECTORS)}

    def slow(name: str, pattern: Pattern) -> bool:
        return pattern != patterns[of_each[name.rpartition("-")[2]]] if turns else pattern in ALIKE

    cases = [pytest.param(*pair, id=name, marks=[pytest.mark.slow] * slow(name, pair[1])) for name, pair in taken.items()]
    return pytest.mark.parametrize("selector, pattern", cases)


def problem_of(seed: int, weight: np.ndarray | None = None, hessian: np.ndarray | None = None) -> LayerProblem:
    random = layer(np.random.default_rng(seed), COUNT, SIZE)
    return LayerProblem(
        random.weight if weight is None else jnp.asarray(weight, jnp.float32),
        random.hessian if hessian is None else jnp.asarray(hessian, jnp.float32),
    )


def four_bits(seed: int) -> np.ndarray:
    """Weights of 15 levels with zeros of both signs; most tie in their row."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 8, (COUNT, SIZE)) * rng.choice([-0.25, 0.25], (COUNT, SIZE))


def assert_prunes_the_smallest(scores: np.ndarray, keep: np.ndarray, selector: Selector, pattern: Pattern, by_index: bool = True):
    """Checks that the smallest of the scores that compete are pruned.

    Of equal scores those with the lower index go, or any. An unstructured mask may be chosen block by block of inputs. Whole
    inputs compete by the sums of their scores, for which it takes scores with exact sums.
    """
    if isinstance(pattern, WholeInputs):
        scores, keep, pattern = scores.sum(axis=0, keepdims=True), keep[:1], Unstructured(group="row")
    starts = range(0, SIZE, SIZE if isinstance(pattern, NM) else getattr(selector, "block", SIZE))
    for start in starts:
        part = slice(start, None if isinstance(pattern, NM) else start + starts.step)
        for score, kept in zip(groups(scores[:, part], pattern), groups(keep[:, part], pattern)):
            ordered = kept[np.lexsort((np.arange(len(kept)) if by_index else kept, score))]
            assert (ordered[1:] >= ordered[:-1]).all()


@with_patterns(PATTERNS)
def test_every_group_loses_its_exact_share(selector, pattern):
    problem = problem_of(10)
    pruned = select(selector, problem, pattern)
    assert_obeys(pruned, pattern)
    assert (np.asarray(pruned.weight)[np.asarray(pruned.keep)] != 0).all()


@contract
def test_nothing_moves_where_nothing_goes(selector):
    problem = problem_of(11)
    pruned = select(selector, problem, Unstructured(0.0, selector.group))
    assert pruned.keep.all() and (pruned.weight == problem.weight).all()


@with_patterns(PATTERNS)
def test_the_scale_of_the_hessian_does_not_matter(selector, pattern):
    problem = problem_of(12)
    once = select(selector, problem, pattern)
    for scale in (1e-8, 1e6):
        again = select(selector, problem_of(12, hessian=np.asarray(problem.hessian) * scale), pattern)
        assert (again.keep == once.keep).all()
        assert np.abs(again.weight - once.weight).max() <= 1e-4 * np.abs(once.weight).max()


@with_patterns(PATTERNS)
def test_the_scale_of_a_row_does_not_matter(selector, pattern):
    """Of all rows together where they compete."""
    problem = problem_of(13)
    alone = isinstance(pattern, NM) or pattern.group == "row"
    scale = 2.0 ** (np.arange(COUNT)[:, None] * 3 - 10 if alone else 7)
    once = select(selector, problem, pattern)
    again = select(selector, problem_of(13, np.asarray(problem.weight) * scale), pattern)
    assert (again.keep == once.keep).all()
    assert np.abs(again.weight / scale - once.weight).max() <= 1e-5 * np.abs(once.weight).max()


@with_patterns(PATTERNS)
def test_dead_inputs_go_first_and_poison_nothing(selector, pattern):
    """One input is zero, one is noise; their weights then grow 1000-fold."""
    silent, noisy = dead = [3, 20]
    hessian = np.array(problem_of(14).hessian)
    for index, noise in ((silent, 0), (noisy, 1e-14)):
        hessian[index] = hessian[:, index] = noise
        hessian[index, index] = noise**2
    weight = np.array(problem_of(14).weight)
    once = select(selector, problem_of(14, weight, hessian), pattern)
    weight[:, dead] *= 1000
    again = select(selector, problem_of(14, weight, hessian), pattern)
    for pruned in (once, again):
        assert_obeys(pruned, pattern)
    if selector not in BLIND:
        assert not np.asarray(once.keep)[:, dead].any()
        assert (once.keep == again.keep).all() and (once.weight == again.weight).all()


@with_patterns(PATTERNS)
def test_a_layer_that_sees_nothing_loses_its_share_and_nothing_moves(selector, pattern):
    problem = problem_of(15, hessian=np.zeros((SIZE, SIZE)))
    pruned = select(selector, problem, pattern)
    assert_obeys(pruned, pattern)
    keep = np.asarray(pruned.keep)
    assert (np.asarray(pruned.weight)[keep] == np.asarray(problem.weight)[keep]).all()
    scores = np.abs(problem.weight) if selector in BLIND else np.zeros((COUNT, SIZE))
    assert_prunes_the_smallest(scores, keep, selector, pattern)


@with_patterns(PATTERNS)
def test_of_equal_weights_those_with_the_lower_index_go(selector, pattern):
    """Weights of few levels, as in a 4-bit checkpoint, behind equal inputs.

    ADMM's scores are not those weights: a pruned weight scores more than its equal that was kept. Prices of whole inputs are
    sums of squares, each as a share of its row's.
    """
    weight = four_bits(16)
    pruned = select(selector, problem_of(16, weight, np.eye(SIZE)), pattern)
    assert_obeys(pruned, pattern)
    shares = isinstance(selector, Price) and isinstance(pattern, WholeInputs)
    scores = weight**2 / np.sum(weight**2, axis=1, keepdims=True) if shares else np.abs(weight)
    assert_prunes_the_smallest(scores, np.asarray(pruned.keep), selector, pattern, not isinstance(selector, ADMM))
    assert_obeys(select(selector, problem_of(16, weight), pattern), pattern)


@contract
def test_groups_that_lie_apart_are_chosen_like_the_same_inputs_side_by_side(selector):
    """Also where weights tie: of those of one group the order is the same."""
    apart = NM(2, 4, stride=8)
    order = apart.order(SIZE)
    for problem in (problem_of(18), problem_of(18, four_bits(18))):
        actual, expected = select(selector, problem, apart), select(selector, problem.sorted(order), NM(2, 4))
        np.testing.assert_array_equal(actual.keep[:, order], expected.keep)
        np.testing.assert_allclose(actual.weight[:, order], expected.weight, atol=1e-4)


@with_patterns([LAYER, WholeInputs(0.3, multiple=8), Heads(0.4, total=4)], turns=True)
def test_the_mask_is_that_of_one_device_on_a_mesh(selector, pattern):
    """One row on each of eight devices; all rows compete, also with ties."""
    devices = mesh(4, 2)
    rows, everywhere = NamedSharding(devices, ROWS), NamedSharding(devices, P())
    for problem in (problem_of(17), problem_of(17, four_bits(17), np.eye(SIZE))):
        once = select(selector, problem, pattern)
        again = select(selector, jax.device_put(problem, LayerProblem(rows, everywhere)), pattern)
        np.testing.assert_array_equal(again.keep, once.keep)
        np.testing.assert_allclose(again.weight, once.weight, atol=1e-4)


@sweeps
@pytest.mark.parametrize("pattern, rows", [(LAYER, 16), (Unstructured(0.6, "row"), 13), (NM(2, 4), 13)], ids=str)
def test_a_sweep_over_rows_that_the_mesh_does_not_divide_is_that_of_one_device(name, pattern, rows):
    """Of Thanos all devices factorise at once, and none waits for ever."""
    problem, recipe = layer(np.random.default_rng(5), rows, SIZE), Recipe(pattern, SELECTORS[name], None)
    made = (prune_matrices((problem.weight,), problem.hessian, recipe, mesh(*shape)) for shape in SHAPES)
    (once, mask), *others = ((weight, keep) for (weight,), (keep,), _ in jax.device_get(list(made)))
    for weight, keep in others:
        np.testing.assert_array_equal(keep, mask)
        assert np.abs(weight - once).max() <= 1e-5 * np.abs(once).max()


@sweeps
def test_a_sweep_does_not_read_the_target(name):
    problem = layer(np.random.default_rng(4), COUNT, SIZE, target="other")
    pruned, own = (select(SELECTORS[name], each, NM(2, 4)) for each in (problem, dataclasses.replace(problem, pull=None)))
    assert (pruned.keep == own.keep).all() and (pruned.weight == own.weight).all()


@contract
def test_an_nm_group_that_does_not_divide_the_inputs_is_refused(selector):
    with pytest.raises(UserError, match="divisible by 8, got a layer with 12"):
        selector(layer(np.random.default_rng(7), 2, 12), NM(4, 8))


@sweeps
def test_sweeps_refuse_whole_inputs_and_name_another_selector(name):
    with pytest.raises(UserError, match=r"a part of a row loses, got 0.3 of the inputs .*; take --selector wanda$"):
        SELECTORS[name].check(WholeInputs(0.3))


def test_wanda_removes_the_inputs_with_the_lowest_sums_of_its_score():
    problem = problem_of(19)
    sums = np.sum(np.abs(problem.weight, dtype=np.float64) * np.sqrt(np.diag(problem.hessian)), axis=0)
    keep = np.asarray(select(Wanda(), problem, WholeInputs(0.5, multiple=8)).keep)
    assert keep[0].sum() == 16 and sums[keep[0]].min() > sums[~keep[0]].max()


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.6, "layer"), NM(2, 4)], ids=str)
def test_wanda_keeps_the_largest_products_of_weight_and_input_norm(pattern):
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((200, 16)) * np.exp(rng.standard_normal(16))
    weight = rng.standard_normal((8, 16))
    problem = LayerProblem(jnp.asarray(weight, jnp.float32), jnp.asarray(inputs.T @ inputs / 200, jnp.float32))
    pruned = select(Wanda(), problem, pattern)
    scores = np.abs(weight) * np.linalg.norm(inputs, axis=0)
    keep = np.asarray(pruned.keep)
    groups = {"row": scores.shape, "layer": (1, -1)}[pattern.group] if isinstance(pattern, Unstructured) else (-1, pattern.m)
    for group, kept in zip(scores.reshape(groups), keep.reshape(groups)):
        assert group[kept].min() > group[~kept].max()
    assert (np.asarray(pruned.weight) == np.where(keep, problem.weight, 0)).all()


def test_magnitude_looks_at_weights_alone():
    problem = layer(np.random.default_rng(1), 6, 16, spread=3.0)
    keep = np.asarray(select(Magnitude(), problem, Unstructured(0.5, "layer")).keep)
    size = np.abs(np.asarray(problem.weight))
    assert size[keep].min() > size[~keep].max() and keep.sum() == 48


def test_shift_zero_ranks_the_weights_of_dead_inputs_by_size():
    """Plain scores of a dead input tie at zero; shifted ones rank by size."""
    hessian = jnp.diag(jnp.array([0.0, 0.0, 1.0, 4.0]))
    problem = LayerProblem(jnp.array([[5.0, 1.0, 0.1, 0.1]]), hessian)
    # Scores: 0, 0, 0.1, 0.2 against 5, 1, 0.1 sqrt(2), 0.1 sqrt(5).
    assert select(Wanda(), problem, Unstructured(0.5)).keep.tolist() == [[False, False, True, True]]
    assert select(Wanda(shift_zero=True), problem, Unstructured(0.5)).keep.tolist() == [[True, True, False, False]]
    dead = dataclasses.replace(problem, hessian=jnp.zeros((4, 4)))
    assert select(Wanda(shift_zero=True), dead, Unstructured(0.5)).keep.tolist() == [[True, True, False, False]]


@contract
def test_matrices_of_one_input_are_chosen_as_if_each_were_alone(selector):
    """Patterns, rows and linear terms differ; only the Hessian is shared."""
    first = layer(np.random.default_rng(5), COUNT, SIZE, target="other")
    rows = jnp.asarray(np.random.default_rng(6).standard_normal((3, SIZE)), jnp.float32)
    problems = (first, LayerProblem(rows, first.hessian, damping=first.damping))
    both = (Unstructured(0.5, "row"), NM(2, 4))
    together = jax.jit(lambda problems: selector.choose(problems, both))(problems)
    for chosen, problem, pattern in zip(together, problems, both, strict=True):
        alone = select(selector, problem, pattern)
        np.testing.assert_array_equal(chosen.keep, alone.keep)
        np.testing.assert_allclose(chosen.weight, alone.weight, rtol=1e-5, atol=1e-6)
