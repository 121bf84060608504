"""Optimizers keep pruned weights at zero and move the rest as if alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optima_tpu
from optima_tpu import broken_zeros, keep_zeros, masks_of
from optima_tpu.errors import UserError
from optima_tpu.runtime.mesh import make_mesh


@pytest.fixture(autouse=True)
def promotion():
    """For optax without :func:`keep_zeros`, and what it adds to parameters."""
    with jax.numpy_dtype_promotion("standard"):
        yield


OPTIMIZERS = {
    "sgd with momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "lion": optax.lion(1e-2, weight_decay=0.1),
    "adafactor": optax.adafactor(1e-2),
    "muon": optax.contrib.muon(1e-2),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "noisy": optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)),
    "in steps of two": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
}


def pruned(rng: np.random.Generator, *shape: int) -> jax.Array:
    weight = rng.standard_normal(shape)
    return jnp.asarray(np.where(rng.random(shape) < 0.5, weight, 0), jnp.float32)


def model(seed: int = 0) -> dict:
    """A stacked matrix, a norm, a matrix, a dense embedding with one zero."""
    rng = np.random.default_rng(seed)
    embedding = jnp.asarray(rng.standard_normal((12, 8)), jnp.float32).at[3, 4].set(0)
    return {"layers": {"kernel": pruned(rng, 3, 8, 6), "scale": jnp.zeros((3,))}, "out": pruned(rng, 6, 4), "table": embedding}


def trained(optimizer: optax.GradientTransformation, parameters: dict, steps: int = 5) -> dict:
    state, update = optimizer.init(parameters), jax.jit(optimizer.update)
    for step in range(steps):
        draw = np.random.default_rng(step).standard_normal
        gradient = jax.tree.map(lambda array, draw=draw: jnp.asarray(draw(array.shape), array.dtype), parameters)
        updates, state = update(gradient, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
    return parameters


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_pruned_weights_stay_zero_and_the_others_move(optimizer):
    """In bfloat16, where optax also promotes; tests below use float32."""
    parameters = jax.tree.map(lambda array: array.astype(jnp.bfloat16), model())
    masks = masks_of(parameters)
    after = trained(keep_zeros(optimizer, masks), parameters)
    assert broken_zeros(after, masks) == []
    # Not all of them: a small step may be lost in the rounding of a large weight.
    moved = jax.tree.map(lambda now, before, keep: np.mean((now != before)[keep]) > 0.5, after, parameters, masks)
    assert all(jax.tree.leaves(moved))
    assert broken_zeros(trained(optimizer, parameters), masks) == ["layers.kernel", "out"]


@pytest.mark.parametrize("name", ["adamw", "muon", "clipped"])
def test_masks_read_at_every_update_are_those_given_beforehand(name):
    parameters = model()
    given = trained(keep_zeros(OPTIMIZERS[name], masks_of(parameters)), parameters)
    jax.tree.map(np.testing.assert_array_equal, trained(keep_zeros(OPTIMIZERS[name]), parameters), given)


def test_masks_are_read_from_parameters_that_come_after_the_optimizer():
    optimizer, before = keep_zeros(optax.adamw(1e-2)), jax.tree.map(jnp.ones_like, model())
    state = optimizer.init(before)  # as a trainer that fills its model later
    parameters = model()
    updates, _ = optimizer.update(before, state, parameters)
    assert broken_zeros(optax.apply_updates(parameters, updates), masks_of(parameters)) == []
    assert np.all(np.asarray(updates["layers"]["scale"]) != 0)  # a vector of zeros is no pruned matrix
    with pytest.raises(ValueError, match="got no parameters"):
        optimizer.update(before, state)


@pytest.mark.parametrize("name", ["sgd with momentum", "adamw", "lion"])
def test_kept_weights_move_as_in_a_model_without_the_pruned_ones(name):
    """The oracle of an elementwise optimizer is the vector of kept weights."""
    weight = model()["out"]
    masks = masks_of({"out": weight})
    after = trained(keep_zeros(OPTIMIZERS[name], masks), {"out": weight})["out"]

    kept, state = weight[masks["out"]], OPTIMIZERS[name].init(weight[masks["out"]])
    for step in range(5):
        gradient = jnp.asarray(np.random.default_rng(step).standard_normal(weight.shape), jnp.float32)
        updates, state = OPTIMIZERS[name].update(gradient[masks["out"]], state, kept)
        kept = optax.apply_updates(kept, updates)
    np.testing.assert_allclose(after[masks["out"]], kept, rtol=1e-6)


def test_a_norm_that_clips_counts_kept_weights_alone():
    masks = {"w": jnp.array([[True, False]])}
    optimizer = keep_zeros(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), masks)
    parameters = {"w": jnp.array([[1.0, 0.0]])}
    updates, _ = optimizer.update({"w": jnp.array([[0.5, 100.0]])}, optimizer.init(parameters), parameters)
    np.testing.assert_array_equal(updates["w"], [[-0.5, 0.0]])


def test_an_nnx_optimizer_takes_it():
    layer = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    layer.kernel[...] = pruned(np.random.default_rng(0), 8, 6)
    masks = masks_of(nnx.state(layer, nnx.Param))
    optimizer = nnx.Optimizer(layer, keep_zeros(optax.adamw(1e-2), masks), wrt=nnx.Param)
    before = layer.kernel[...]
    for step in range(3):
        x = jax.random.normal(jax.random.key(step), (4, 8))
        optimizer.update(layer, nnx.grad(lambda layer, x=x: jnp.sum(jnp.square(layer(x) - 1)))(layer))
    assert broken_zeros(nnx.state(layer, nnx.Param), masks) == [] and np.any(layer.kernel[...] != before)


def test_masks_are_split_as_their_weights_are():
    split = NamedSharding(make_mesh("4x2"), P(None, "model"))
    parameters = {"w": jax.device_put(pruned(np.random.default_rng(0), 8, 6), split)}
    masks = masks_of(parameters)
    assert masks["w"].sharding.is_equivalent_to(split, 2)
    after = trained(keep_zeros(optax.adam(1e-2), masks), parameters)
    assert broken_zeros(after, masks) == [] and after["w"].sharding.is_equivalent_to(split, 2)


def test_parameters_without_zeros_are_refused():
    with pytest.raises(UserError, match="expected parameters of a pruned model, got none with a share of zeros of at least 0.1"):
        optima_tpu.masks_of({"w": jnp.ones((4, 4)), "bias": jnp.zeros(4)})
