"""Problems, oracles and tiny models that the tests share."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from optima_tpu.method.patterns import NM, Unstructured
from optima_tpu.method.problem import LayerProblem, Pruned, Solution, pull_of, self_target
from optima_tpu.pipeline.plan.hlo import COLLECTIVE, text_inside_loops  # noqa: F401

PATTERNS = [
    *(Unstructured(sparsity, group) for group in ("row", "layer") for sparsity in (0.5, 0.6, 0.7)),
    NM(2, 4),
    NM(4, 8),
    NM(6, 8),
]
"""What contracts of selectors and solvers hold for: the patterns of the paper's tables, both comparison groups, and 6:8."""


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
    problem = self_target(
        jnp.asarray(rng.standard_normal((rows, size)), jnp.float32), jnp.asarray(correlated_hessian(rng, size, **hessian))
    )
    if target == "other":
        shift = jnp.asarray(0.1 * rng.standard_normal((rows, size)), jnp.float32)
        problem = problem._replace(linear=problem.linear + shift @ problem.hessian)
    return problem


@functools.partial(jax.jit, static_argnums=0)
def solve(solver, problem: LayerProblem, pruned: Pruned) -> Solution:
    """Runs a solver, compiled once for each choice and shape."""
    return solver(problem, pruned)


@functools.partial(jax.jit, static_argnums=(0, 2))
def select(selector, problem: LayerProblem, pattern) -> Pruned:
    """Runs a selector, compiled once for each choice, pattern and shape."""
    return selector(problem, pattern)


def wide(problem: LayerProblem, damping: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(weight, damped Hessian, e) in float64, with ``e = g - W H`` as float32 holds it."""
    hessian = np.asarray(problem.hessian, np.float64)
    return (
        np.asarray(problem.weight, np.float64),
        hessian + damping * np.diag(np.diag(hessian)),
        np.asarray(pull_of(problem), np.float64),
    )


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

    config = LlamaConfig(
        **(
            dict(
                vocab_size=64,
                hidden_size=36,
                intermediate_size=60,
                num_hidden_layers=3,
                num_attention_heads=9,
                num_key_value_heads=3,
                max_position_embeddings=128,
                tie_word_embeddings=True,
            )
            | settings
        )
    )
    config.architectures = ["LlamaForCausalLM"]
    rng = np.random.default_rng(seed)
    shapes = Decoder.open(config, MemoryTensors({}), mesh(1, 1))
    arrays = {}
    for name in shapes.tensor_names():
        inner = name.split(".", 3)[3] if name.startswith("model.layers.") else None
        shape = (
            shapes.block_shapes[inner]
            if inner
            else {"model.norm.weight": (config.hidden_size,)}.get(name, (config.vocab_size, config.hidden_size))
        )
        noise = rng.standard_normal(shape).astype(np.float32)
        arrays[name] = (1 + 0.1 * noise if "norm" in name else noise / np.sqrt(shape[-1])).astype(np.float32)
    return config, MemoryTensors(arrays)


SMALL = [
    "--calibration.source",
    "random",
    "--calibration.samples",
    "8",
    "--calibration.length",
    "32",
    "--evaluation.source",
    "random",
    "--evaluation.windows",
    "4",
]
"""The settings of a run over a :func:`tiny_folder` that takes a second or two."""


def byte_tokenizer():
    """A tokenizer of one token a byte, and ``<s>`` (256, BOS) and ``</s>`` (257, EOS)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def tiny_folder(
    path: Path, *, dtype: str = "float32", change: Callable[[dict[str, np.ndarray]], None] = lambda arrays: None, **settings
) -> Path:
    """Writes a :func:`tiny_llama` as a Hugging Face folder: two shards, and a tokenizer of one token a byte; no torch needed.

    Args:
      change: edits the tensors, by name, before they are written.
    """
    import safetensors.numpy

    from optima_tpu.models.checkpoints.source import DTYPES

    # o_proj and down_proj of one shape: the solver is compiled once less.
    config, source = tiny_llama(**(dict(vocab_size=258, intermediate_size=36) | settings))
    arrays = {name: array.astype(DTYPES[dtype]) for name, array in sorted(source.arrays.items())}
    change(arrays)
    path.mkdir(parents=True)
    names, files = list(arrays), [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    weight_map = dict.fromkeys(names[::2], files[0]) | dict.fromkeys(names[1::2], files[1])
    for file in files:
        safetensors.numpy.save_file({name: arrays[name] for name in names if weight_map[name] == file}, path / file)
    size = sum(array.nbytes for array in arrays.values())
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(config.to_diff_dict() | {"dtype": dtype}, indent=1))
    byte_tokenizer().save_pretrained(path)
    return path


def with_bos(folder: Path) -> Path:
    """Makes the tokenizer of a :func:`tiny_folder` put a BOS before every text, as those of Llama and Gemma do."""
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.save_pretrained(folder)
    return folder


def folder_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor in the safetensors files of a folder."""
    import safetensors.numpy

    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(path)
    return tensors


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of everything in a directory, and of itself; empty where there is none."""
    paths = [directory, *directory.rglob("*")] if directory.exists() else []
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}
