"""Prunes with tokens that are weighed by the gradient of the dense model's loss, and measures what that earns.

    python -m benchmarks.loss_weights --power 0.5 --text npy:held-out.npy -- --preset fast --pattern 2:4

The layers that read one input have the Hessian ``H = sum_t w_t x_t x_t' / sum_t w_t`` over tokens ``t``, with

    w_t = (mean over outputs i of (dL / dz_ti)^2) ^ power

where ``z`` are the dense outputs of these layers and ``L`` is the cross-entropy with labels drawn from the dense model: the squares are
a sample of the Fisher information's diagonal. GuidedQuant (arXiv:2505.07004) quantises with such weights, of the text's own labels.
Power 0 weighs all tokens alike. The program has no such weights; docs/results/smollm2.md says why.
"""

import argparse
import functools
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from benchmarks.stream_error import check_walk
from optima_tpu.config.parse import parse
from optima_tpu.errors import UserError
from optima_tpu.evaluate.distance import Sums, window_scores
from optima_tpu.method.statistics import TokenSets, TokenStatistics
from optima_tpu.models.decoder import Decoder, Head, forward, head_logits, run_block
from optima_tpu.models.experts import expert_of
from optima_tpu.models.family import Positions
from optima_tpu.pipeline.calibrate import groups_of_blocks
from optima_tpu.pipeline.grams import gram
from optima_tpu.pipeline.memory_plan import block_passes
from optima_tpu.pipeline.sweep.runner import Shared
from optima_tpu.pipeline.walk import Walk, prune_groups


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss_weights", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--power", type=float, default=1.0, help="of the mean squares")
    parser.add_argument("--text", action="append", required=True, help="what is measured on, as evaluation.source; repeatable")
    parser.add_argument("settings", nargs="*", help="settings of optima_tpu.launch, after --")
    chosen, shared = parser.parse_args(argv), Shared()
    try:
        configs = [parse([*chosen.settings, "--evaluation.source", text]) for text in chosen.text]
        config, decoder = configs[0], shared.model(configs[0]).decoder
        check_walk(config, shared.model(config), 1)
        if config.target.dense_stream or config.recapture or any(expert_of(name) is not None for name in decoder.linears):
            raise UserError("expected --target self, --recapture false and a model without experts, got other settings")
        tokens, texts = shared.texts(config).calibration.ids, [shared.texts(each).evaluation.ids for each in configs]
    except UserError as error:
        sys.exit(f"error: {error}")
    walk = Walk(decoder, config.recipe, groups_of_blocks(decoder), config.calibration.fitted)
    for text, ids, sums in zip(chosen.text, texts, compare(walk, tokens[: walk.samples], texts, chosen.power)):
        kl, dense, pruned = (np.mean(each) / (ids.shape[1] - 1) for each in (sums.kl, sums.dense_nll, sums.pruned_nll))
        print(f"{text}: divergence {kl:.4f} nats, perplexity {np.exp(dense):.2f} dense, {np.exp(pruned):.2f} pruned", flush=True)


def compare(walk: Walk, tokens: np.ndarray, texts: Sequence[np.ndarray], power: float) -> list[Sums]:
    """Prunes the blocks in order, calibrated on ``tokens`` [samples, length], and compares both models on every text."""
    decoder, span, squares = walk.decoder, range(walk.decoder.config.blocks), mean_squares(walk.decoder, tokens)
    hidden, dense, pruned = (list(map(decoder.embed, each)) for each in ([tokens], texts, texts))
    for index, parameters in zip(span, decoder.blocks(span)):
        found, at, positions = dict(parameters), decoder.at(index), decoder.positions(index, tokens.shape[1])
        for part in block_passes(decoder, index, walk.groups[index], walk.recipe, walk.budget):
            rows = {names: [at.block_shapes[name + ".weight"][0] for name in names] for names in part.groups}
            means = [np.average([squares[index][name] for name in names], 0, rows[names]) ** power for names in part.groups]
            weights = {names[0]: mean / mean.mean() for names, mean in zip(part.groups, means)}
            totals: dict[str, Array] = defaultdict(lambda: jnp.zeros(()))
            for batch in hidden[0].batches(decoder.batch):
                roots = {name: batch.place(np.sqrt(weight)) for name, weight in weights.items()}  # 0 for padding
                products = _products(at.graph, decoder.mesh, at.state(parameters), batch.hidden, positions, roots)
                totals |= {name: totals[name] + product for name, product in products.items()}
            statistics = [TokenStatistics(totals[name] / tokens.size, jnp.int32(tokens.size)) for name in weights]
            found = prune_groups(walk, index, found, part, tuple(map(TokenSets, statistics))).parameters
        for states, block in [(each, found) for each in hidden + pruned] + [(each, parameters) for each in dense]:
            decoder.apply(index, block, states)
    head = decoder.head()
    return [window_scores((head, head), pair, text, decoder.batch) for text, *pair in zip(texts, dense, pruned)]


def mean_squares(decoder: Decoder, tokens: np.ndarray, seed: int = 7) -> list[dict[str, np.ndarray]]:
    """``mean_i (dL / dz_ti)^2`` of every block by the name of a layer, [samples, length] float32. Holds the whole model."""
    blocks = [decoder.at(index) for index in range(decoder.config.blocks)]
    states = [block.state(parameters) for block, parameters in zip(blocks, decoder.blocks(range(len(blocks))))]
    places = [decoder.positions(index, tokens.shape[1]) for index in range(len(blocks))]
    key, found = jax.random.key(seed), [defaultdict[str, list[np.ndarray]](list) for _ in blocks]
    for batch in decoder.embed(tokens).batches(decoder.batch):
        inputs = [batch.hidden]
        for block, state, positions in zip(blocks, states, places):
            inputs.append(run_block(block.graph, state, inputs[-1], positions))
        key, drawing = jax.random.split(key)
        cotangent = head_gradient(decoder.head(), inputs.pop(), drawing)
        for block, state, positions, into in reversed(list(zip(blocks, states, places, found))):
            squares, cotangent = backward(block.graph, block.linears, state, inputs.pop(), positions, cotangent)
            for name, each in squares.items():
                into[name].append(np.asarray(each)[batch.there])
    return [{name: np.concatenate(parts) for name, parts in block.items()} for block in found]


@jax.jit
def head_gradient(head: Head, hidden: Array, key: Array) -> Array:
    """The gradient of ``L`` with respect to what enters the head; the labels are drawn window by window."""

    def of_window(window: tuple[Array, Array]) -> Array:
        logits, pull = jax.vjp(lambda hidden: head_logits(head, hidden[None])[0], window[0])
        labels = jax.random.categorical(window[1], logits)
        return pull(jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[-1]))[0]

    return jax.lax.map(of_window, (hidden, jax.random.split(key, len(hidden))))


@functools.partial(jax.jit, static_argnums=(0, 1))
def backward(
    graph: Any, names: tuple[str, ...], state: Any, hidden: Array, positions: Positions, cotangent: Array
) -> tuple[dict[str, Array], Array]:
    """The mean squares of a block's layers, [batch, length] by their names, and the cotangent of what enters the block."""

    def run(shifts: dict[str, Array], hidden: Array) -> Array:
        block = nnx.merge(graph, state)
        for name, shift in shifts.items():  # a bias of its own for every token has the gradient of the output
            layer = functools.reduce(getattr, name.split("."), block)
            layer.bias = nnx.Param(layer.bias[...] + shift if hasattr(layer, "bias") else shift)
        return forward(*nnx.split(block), hidden, positions)[0]

    inner = {name: functools.reduce(getattr, name.split("."), nnx.merge(graph, state)) for name in names}
    shifts = {name: jnp.zeros((*hidden.shape[:2], len(layer.weight[...])), hidden.dtype) for name, layer in inner.items()}
    gradients, before = jax.vjp(run, shifts, hidden)[1](cotangent)
    return {name: jnp.mean(jnp.square(each.astype(jnp.float32)), axis=-1) for name, each in gradients.items()}, before


@functools.partial(jax.jit, static_argnums=(0, 1))
def _products(
    graph: Any, mesh: Any, state: Any, hidden: Array, positions: Positions, roots: Mapping[str, Array]
) -> dict[str, Array]:
    inputs = forward(graph, state, hidden, positions)[1]
    return {name: gram(inputs[name] * root[..., None].astype(hidden.dtype), mesh) for name, root in roots.items()}


if __name__ == "__main__":
    main()
