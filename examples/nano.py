"""Prunes a Llama-like model: the whole method in one file, for reading.

    python examples/nano.py MODEL_FOLDER CALIBRATION.txt OUT_FOLDER

MODEL_FOLDER is a dense model in the format of Hugging Face; of one that is pruned already every objective is 0.

Half of the weights of every linear layer go. Which half, Wanda's score says (Sun et al., 2023). Then the weights that stay move,
so that the layer's output on the calibration text changes least: one small quadratic program for each output row (OPTIMA, 2025,
arXiv:2512.13886), solved until a bound proves that the objective is within 0.1% of its minimum. The masks are those of
``optima prune MODEL --preset fast``, and the weights agree to rounding (tests/test_nano.py).

What the package has and this file lacks: other families, meshes, resuming, models larger than memory, other masks and targets,
float32 errors inside the bound, and a report.
"""

import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors.flax import load_file, save_file
from tokenizers import Tokenizer

SPARSITY = 0.5
DAMPING = 0.01  # without a pull toward the dense weights, a nearly singular layer fits the calibration text with huge weights
GAP = 1e-3  # the certified distance from the minimum, as a share of it
STEPS, CYCLES = 4, 24  # conjugate-gradient steps between two certificates, and how often these are made at most
WINDOWS, LENGTH, BATCH = 32, 512, 4  # calibration windows, tokens in each, windows at once

# The inputs of a block's linear layers. Layers that read the same input share its Hessian.
GROUPS = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "heads": ("self_attn.o_proj",),
    "mlp": ("mlp.gate_proj", "mlp.up_proj"),
    "neurons": ("mlp.down_proj",),
}

# A TPU or GPU would round the factors of a product to 16 or 19 bits by default, which ruins Hessians and solves.
jax.config.update("jax_default_matmul_precision", "highest")


# The model: a Llama block, [batch, length, d_model] to the same.


class Shape(NamedTuple):
    """The numbers of ``config.json`` that a forward pass needs."""

    blocks: int
    heads: int
    kv_heads: int
    eps: float
    theta: float

    @classmethod
    def read(cls, folder: Path) -> "Shape":
        """Reads ``config.json``. Exits if this file cannot run the model."""
        config = json.loads((folder / "config.json").read_text())
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind, rotation = config["architectures"][0], rope.get("rope_type", "default")
        if kind != "LlamaForCausalLM" or rotation != "default" or config.get("attention_bias") or config.get("mlp_bias"):
            sys.exit(f"expected a Llama with plain rotary embedding and no biases, got {kind}, {rotation}: use `optima prune`")
        heads = config["num_attention_heads"]
        theta = rope.get("rope_theta") or config.get("rope_theta", 10_000.0)
        return cls(config["num_hidden_layers"], heads, config.get("num_key_value_heads", heads), config["rms_norm_eps"], theta)


def normalised(x: Array, scale: Array, eps: float) -> Array:
    """RMSNorm."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rotated(x: Array, theta: float) -> Array:
    """Rotary position embedding of [batch, length, heads, head_dim]."""
    length, size = x.shape[1], x.shape[3]
    frequency = theta ** (-np.arange(0, size, 2) / size)
    angle = jnp.asarray(np.outer(np.arange(length), frequency), jnp.float32)[:, None]
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def block(weights: Mapping[str, Array], x: Array, shape: Shape) -> tuple[Array, dict[str, Array]]:
    """Returns a decoder layer's output and the input of each layer group."""

    def linear(name: str, x: Array) -> Array:
        return x @ weights[name + ".weight"].T

    def heads(name: str) -> Array:
        made = linear(name, inputs["attention"])
        return made.reshape(*x.shape[:2], -1, x.shape[-1] // shape.heads)

    inputs = {"attention": normalised(x, weights["input_layernorm.weight"], shape.eps)}
    q, k, v = (heads(f"self_attn.{name}_proj") for name in "qkv")
    mixed = jax.nn.dot_product_attention(rotated(q, shape.theta), rotated(k, shape.theta), v, is_causal=True)
    inputs["heads"] = mixed.reshape(x.shape)
    x = x + linear("self_attn.o_proj", inputs["heads"])
    inputs["mlp"] = normalised(x, weights["post_attention_layernorm.weight"], shape.eps)
    inputs["neurons"] = jax.nn.silu(linear("mlp.gate_proj", inputs["mlp"])) * linear("mlp.up_proj", inputs["mlp"])
    return x + linear("mlp.down_proj", inputs["neurons"]), inputs


run_block = jax.jit(block, static_argnames="shape")


@jax.jit
def head_loss(norm: Array, head: Array, hidden: Array, tokens: Array, eps: float) -> Array:
    """Sums each window's negative log-likelihood, first token left out."""
    scores = jax.nn.log_softmax(normalised(hidden[:, :-1], norm, eps) @ head.T)
    return -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=2)[..., 0].sum(axis=1)


def block_weights(weights: Mapping[str, Array], index: int) -> dict[str, Array]:
    """A block's weights in float32, by their name inside the block."""
    prefix = f"model.layers.{index}."
    return {name.removeprefix(prefix): array.astype(jnp.float32) for name, array in weights.items() if name.startswith(prefix)}


def embedded(weights: Mapping[str, Array], tokens: np.ndarray) -> list[Array]:
    """The hidden states that enter block 0, in batches."""
    table = weights["model.embed_tokens.weight"].astype(jnp.float32)
    return [table[tokens[first : first + BATCH]] for first in range(0, len(tokens), BATCH)]


def perplexity(weights: Mapping[str, Array], shape: Shape, tokens: np.ndarray) -> float:
    """Returns the model's perplexity on token windows [windows, length]."""
    hidden = embedded(weights, tokens)
    for index in range(shape.blocks):
        own = block_weights(weights, index)
        hidden = [run_block(own, x, shape)[0] for x in hidden]
    norm = weights["model.norm.weight"].astype(jnp.float32)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).astype(jnp.float32)
    targets = (tokens[first : first + BATCH] for first in range(0, len(tokens), BATCH))
    losses = [float(head_loss(norm, head, x, part, shape.eps).sum()) for x, part in zip(hidden, targets)]
    return math.exp(sum(losses) / (tokens.shape[0] * (tokens.shape[1] - 1)))


# The method: a layer y = x W', with W [d_out, d_in] and the Hessian H = X'X / n_tokens [d_in, d_in] of its inputs.


@jax.jit
def wanda_mask(weight: Array, hessian: Array) -> Array:
    """Keeps each row's largest ``|w| sqrt(H_jj)``; of equal ones the later."""
    score = jnp.abs(weight) * jnp.sqrt(jnp.diagonal(hessian))
    rank = jnp.argsort(jnp.argsort(score, axis=1, stable=True), axis=1)
    return rank >= math.floor(round(score.shape[1] * SPARSITY, 6))


class Descent(NamedTuple):
    """Conjugate gradients of all rows: each array [d_out, d_in] or [d_out]."""

    change: Array  # D = (v - w) sqrt(H_jj)
    residual: Array  # -D A
    direction: Array
    image: Array  # direction A
    curvature: Array  # direction A direction'
    gap: Array  # certified


@jax.jit
def solve(weight: Array, hessian: Array, keep: Array) -> tuple[Array, Array]:
    """Solves all rows. Returns (weights [d_out, d_in], gaps [d_out]).

    In variables that give the Hessian a unit diagonal, ``D = (v - w) sqrt(H_jj)``, with ``A`` the scaled Hessian plus the
    damping, every row minimises ``f(D) = D A D'`` over its kept coordinates; pruned ones are fixed at ``D_j = -w_j sqrt(H_jj)``.

    The inverse ``P`` of the whole ``A`` preconditions every row, whatever its mask. It also bounds what is left to gain: with
    ``r`` the residual on kept coordinates, ``f - f* = r A_KK^-1 r' <= r P r'``, since a principal block of an inverse dominates
    the inverse of the block. The gap is this bound as a share of the least that ``f*`` can be.
    """
    diagonal = jnp.diagonal(hessian)
    live = diagonal > 1e-12 * jnp.max(diagonal)  # an input that is always 0 says nothing about its weights
    scale = jnp.where(live, jnp.sqrt(jnp.where(live, diagonal, 1.0)), 1.0)
    matrix = jnp.where(live[:, None] & live, hessian / scale / scale[:, None], 0.0)
    matrix = jnp.fill_diagonal(matrix, 1.0, inplace=False) + DAMPING * jnp.eye(len(scale))
    root = jnp.linalg.inv(jnp.linalg.cholesky(matrix))
    inverse = root.T @ root
    free = keep & live

    def measured(path: Descent) -> Descent:
        """Computes residual and certificate anew, to end rounding drift."""
        residual = -path.change @ matrix
        value = -jnp.sum(path.change * residual, axis=1)
        bound = jnp.sum((jnp.where(free, residual, 0.0) @ root.T) ** 2, axis=1)
        # Float32 leaves this much of a row that loses nothing, whose f* is 0.
        floor = 1e-8 * jnp.sum((weight * scale) ** 2, axis=1) + 1e-30
        return path._replace(residual=residual, gap=bound / jnp.maximum(value - bound, floor))

    def step(_: int, path: Descent) -> Descent:
        preconditioned = jnp.where(free, jnp.where(free, path.residual, 0.0) @ inverse, 0.0)
        overlap = jnp.sum(preconditioned * path.image, axis=1)
        momentum = -overlap / jnp.where(path.curvature > 0, path.curvature, jnp.inf)
        direction = preconditioned + momentum[:, None] * path.direction
        image = direction @ matrix
        curvature = jnp.sum(direction * image, axis=1)
        moves = (path.gap > GAP) & (curvature > 0)
        stride = jnp.where(moves, jnp.sum(path.residual * direction, axis=1) / jnp.where(moves, curvature, 1.0), 0.0)[:, None]
        change, residual = path.change + stride * direction, path.residual - stride * image
        return Descent(change, residual, direction, image, jnp.where(moves, curvature, 0.0), path.gap)

    def cycle(state: tuple[int, Descent]) -> tuple[int, Descent]:
        return state[0] + 1, measured(jax.lax.fori_loop(0, STEPS, step, state[1]))

    start = jnp.where(keep | ~live, 0.0, -weight * scale)
    zero, rows = jnp.zeros_like(start), jnp.zeros(len(start))
    path = Descent(start, -start @ matrix, zero, zero, rows, rows + jnp.inf)
    _, path = jax.lax.while_loop(lambda state: (state[0] < CYCLES) & jnp.any(state[1].gap > GAP), cycle, (0, path))
    return jnp.where(keep, weight + jnp.where(free, path.change / scale, 0.0), 0.0), path.gap


def objective(weight: Array, hessian: Array, dense: Array) -> Array:
    """``(v - w) (H + d diag H) (v - w)'`` of every row, [d_out]."""
    change = weight - dense
    return jnp.sum(change * (change @ hessian + DAMPING * jnp.diagonal(hessian) * change), axis=1)


@jax.jit
def pruned_layer(stored: Array, hessian: Array) -> tuple[Array, Array, Array]:
    """Returns (weights, objective before the solve [d_out], and after)."""
    dense = stored.astype(jnp.float32)
    keep = wanda_mask(dense, hessian)
    masked = jnp.where(keep, dense, 0.0)
    solved = solve(dense, hessian, keep)[0].astype(stored.dtype).astype(jnp.float32)
    before, after = objective(masked, hessian, dense), objective(solved, hessian, dense)
    # No row gets worse: checked with the weights as they are stored.
    final = jnp.where((after <= before)[:, None], solved, masked)
    return final.astype(stored.dtype), before, jnp.minimum(before, after)


def pruned(weights: Mapping[str, Array], shape: Shape, tokens: np.ndarray) -> Iterator[tuple[str, Array, float, float]]:
    """Prunes block by block, and yields each linear layer.

    Yields (name, weights, objective before the solve, objective after). A block's Hessians are those of the dense block, on
    what the pruned blocks before it give.
    """
    hidden = embedded(weights, tokens)
    for index in range(shape.blocks):
        own = block_weights(weights, index)
        hessians: dict[str, Array] = dict.fromkeys(GROUPS, jnp.float32(0))
        for x in hidden:
            for group, rows in run_block(own, x, shape)[1].items():
                rows = rows.reshape(-1, rows.shape[-1])
                hessians[group] += rows.T @ rows / tokens.size
        for group, names in GROUPS.items():
            for name in names:
                full = f"model.layers.{index}.{name}.weight"
                matrix, before, after = pruned_layer(weights[full], hessians[group])
                own[name + ".weight"] = matrix.astype(jnp.float32)
                yield full, matrix, float(before.sum()), float(after.sum())
        hidden = [run_block(own, x, shape)[0] for x in hidden]


# The command.


def windows(folder: Path, text: str) -> np.ndarray:
    """Returns the complete windows of a text, token ids [windows, LENGTH]."""
    ids = np.array(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids, np.int32)
    return ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)


def load(folder: Path) -> dict[str, Array]:
    """Every tensor of a folder in the format of Hugging Face."""
    return {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in load_file(file).items()}


def save(weights: Mapping[str, Array], source: Path, out: Path) -> None:
    """Writes weights, configuration and tokenizer for ``transformers``."""
    out.mkdir(parents=True)
    for file in source.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copy(file, out)
    save_file(dict(weights), out / "model.safetensors", metadata={"format": "pt"})


def main(source: Path, text: Path, out: Path) -> None:
    shape, weights = Shape.read(source), load(source)
    tokens = windows(source, text.read_text())
    if len(tokens) < WINDOWS + 4:
        sys.exit(f"expected a text of {WINDOWS + 4} windows of {LENGTH} tokens, got {len(tokens)} in {text}: give a longer one")
    calibration, held_out = tokens[:WINDOWS], tokens[WINDOWS : 2 * WINDOWS]
    print(f"measuring the dense model on {len(held_out)} windows that are not pruned with", flush=True)
    dense = perplexity(weights, shape, held_out)
    for name, matrix, before, after in pruned(weights, shape, calibration):
        weights[name] = matrix
        print(f"{name}: objective {before:.4g} -> {after:.4g}", flush=True)
    save(weights, source, out)
    print(f"perplexity on {len(held_out)} windows that were not read: {dense:.2f} -> {perplexity(weights, shape, held_out):.2f}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python examples/nano.py MODEL_FOLDER CALIBRATION.txt OUT_FOLDER")
    main(*map(Path, sys.argv[1:]))
