"""Problems, oracles and tiny models that the tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from optima_tpu.problem import LayerProblem, Pruned, Solution, drift, self_target


def mesh(data: int, model: int) -> Mesh:
    """A mesh of the first ``data * model`` simulated devices."""
    devices = np.array(jax.devices()[: data * model]).reshape(data, model)
    return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def correlated_hessian(rng: np.random.Generator, size: int, tokens: int | None = None, spread: float = 1.0) -> np.ndarray:
    """``X'X / n`` [size, size] float32 of correlated inputs whose scales spread over ``exp(+-spread)``."""
    tokens = tokens or 8 * size
    mixing = np.eye(size) + 0.3 * rng.standard_normal((size, size)) / np.sqrt(size) * 3
    x = rng.standard_normal((tokens, size)) @ mixing * np.exp(spread * rng.standard_normal(size))
    return (x.T @ x / tokens).astype(np.float32)


def layer(rng: np.random.Generator, rows: int, size: int, *, target: str = "self", **hessian) -> LayerProblem:
    """A random layer; ``target="other"`` asks for something else than its own outputs."""
    problem = self_target(jnp.asarray(rng.standard_normal((rows, size)), jnp.float32),
                          jnp.asarray(correlated_hessian(rng, size, **hessian)))
    if target == "other":
        shift = jnp.asarray(0.1 * rng.standard_normal((rows, size)), jnp.float32)
        problem = problem._replace(linear=problem.linear + shift @ problem.hessian)
    return problem


@functools.partial(jax.jit, static_argnums=0)
def solve(solver, problem: LayerProblem, pruned: Pruned) -> Solution:
    """Runs a solver, compiled once for each choice and shape."""
    return solver(problem, pruned)


def wide(problem: LayerProblem, damping: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(weight, damped Hessian, e) in float64, with ``e = g - W H`` as float32 holds it."""
    hessian = np.asarray(problem.hessian, np.float64)
    return (np.asarray(problem.weight, np.float64), hessian + damping * np.diag(np.diag(hessian)),
            np.asarray(drift(problem), np.float64))


def oracle(problem: LayerProblem, pruned: Pruned, damping: float = 0.0) -> np.ndarray:
    """The optimal weights of every row, float64, by a linear solve on the kept inputs (numpy, no code of ours)."""
    weight, hessian, pull = wide(problem, damping)
    keep, target = np.asarray(pruned.keep), weight @ hessian + pull
    solved = np.zeros_like(weight)
    for row, kept in enumerate(keep):
        if kept.any():
            solved[row, kept] = np.linalg.solve(hessian[np.ix_(kept, kept)], target[row, kept])
    return solved


def row_objective(problem: LayerProblem, weight: np.ndarray, damping: float = 0.0) -> np.ndarray:
    """``(v - w) H (v - w)' - 2 e (v - w)'`` of every row in float64, damped if asked."""
    dense, hessian, pull = wide(problem, damping)
    change = np.asarray(weight, np.float64) - dense
    return np.sum(change * (change @ hessian - 2 * pull), axis=1)


class MemoryTensors:
    """A TensorSource over a dictionary of numpy arrays."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays

    def names(self):
        return tuple(self.arrays)

    def shape(self, name):
        return self.arrays[name].shape

    def dtype(self, name):
        return self.arrays[name].dtype

    def read(self, name, index=(...,)):
        return self.arrays[name][index]


def tiny_llama(seed: int = 0, **settings):
    """(configuration of transformers, MemoryTensors) of a random Llama whose sizes divide no mesh; no torch needed."""
    from transformers import LlamaConfig

    from optima_tpu.models.decoder import Decoder

    config = LlamaConfig(**(dict(vocab_size=64, hidden_size=36, intermediate_size=60, num_hidden_layers=3, num_attention_heads=9,
                                 num_key_value_heads=3, max_position_embeddings=128, tie_word_embeddings=True) | settings))
    config.architectures = ["LlamaForCausalLM"]
    rng = np.random.default_rng(seed)
    shapes = Decoder.open(config, MemoryTensors({}), mesh(1, 1))
    arrays = {}
    for name in shapes.tensor_names():
        inner = name.split(".", 3)[3] if name.startswith("model.layers.") else None
        shape = shapes.block_shapes[inner] if inner else {
            "model.norm.weight": (config.hidden_size,)}.get(name, (config.vocab_size, config.hidden_size))
        noise = rng.standard_normal(shape).astype(np.float32)
        arrays[name] = 1 + 0.1 * noise if "norm" in name else noise / np.sqrt(shape[-1])
    return config, MemoryTensors(arrays)
