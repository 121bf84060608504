"""What N:M patterns gain from another order of the neurons, which changes no output of the dense block.

    python -m benchmarks.permutations 8 --preset fast --pattern 2:4

Takes the settings of ``optima_tpu.launch`` after the number of blocks, for a model with the layers of Llama. The mask of ``down_proj``
depends on which M neurons stand together, that of ``o_proj`` on which M dimensions of a head do, and both may stand in any order: rows of
``gate_proj`` and ``up_proj`` as columns of ``down_proj``, rows of ``v_proj`` as columns of ``o_proj`` in all heads that read them. Prunes
the blocks as they are and in the order of :func:`search`. Prints each layer's error on held-out windows (against the dense model for a
dense target), the error of ``stream_error`` behind the last block, and for all blocks the perplexity on ``--evaluation.source``.

Channel permutations for N:M: Pool and Yu, 2021. Moves by assignment: RIA, Zhang et al., 2024.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.optimize import linear_sum_assignment

from benchmarks.stream_error import check_walk, mean_error
from optima_tpu.config.parse import parse
from optima_tpu.errors import UserError
from optima_tpu.evaluate.perplexity import perplexity_of, window_nll
from optima_tpu.method.patterns import NM
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.llama import LINEARS
from optima_tpu.pipeline.calibrate import Capture, Stream, accumulate, groups_of_blocks
from optima_tpu.pipeline.inputs import open_model_on_mesh, read_texts
from optima_tpu.pipeline.walk import Streams, Walk, prune_block

_ATTENTION, _MLP = ("self_attn.v_proj", "self_attn.o_proj"), ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_ROUNDS = 20


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.permutations", allow_abbrev=False)
    parser.add_argument("blocks", type=int, help="number of blocks to prune, from the first")
    arguments, settings = parser.parse_known_args(argv)
    try:
        compare(arguments.blocks, settings)
    except UserError as error:
        sys.exit(f"error: {error}")


def compare(blocks: int, settings: Sequence[str]) -> None:
    """Prints the comparison described above.

    Raises:
      UserError: a setting is wrong or not supported by this comparison.
    """
    config = parse(list(settings))
    model = open_model_on_mesh(config)
    check_walk(config, model, blocks)
    decoder, samples, pattern = model.decoder, config.calibration.samples, config.pattern
    if not isinstance(pattern, NM) or pattern.stride > 1 or decoder.linears != LINEARS or not config.calibration.held_out:
        raise UserError(f"expected a pattern N:M, the layers of Llama and held-out windows, got {pattern}, {decoder.linears}")
    calibration, evaluation, _ = read_texts(config, model)
    walk, errors = Walk(decoder, config.recipe, groups_of_blocks(decoder), samples), {}
    for name in ("as they are", "in a better order"):
        pruned, other = decoder.embed(calibration.ids), decoder.embed(evaluation.ids)
        dense, layers = pruned.copy(), []
        for index in range(blocks):
            whole = decoder.load_block(index)
            if name != "as they are":
                inputs = accumulate(
                    decoder, index, Capture(((_ATTENTION[-1],), (_MLP[-1],))), [Stream(whole, pruned.part(0, samples))]
                )
                whole = reordered(decoder, whole, [np.diag(each.hessian) for each in inputs], pattern)
            states = dense.copy() if config.recipe.target.dense_stream else None
            found = prune_block(walk, index, whole, Streams(pruned, states))
            decoder.apply(index, whole, dense)
            decoder.apply(index, found.parameters, other)
            layers += found.layers
        errors[name] = {
            layer: statistics.geometric_mean(r.dense_after or r.held_out_after for r in layers if r.name == layer)
            for layer in LINEARS
        }
        drift = mean_error(pruned.part(samples, len(pruned)), dense.part(samples, len(dense)))
        print(f"{name}: hidden states {drift:.3%}", *(f"{key} {value:.3%}" for key, value in errors[name].items()), sep="  ")
        if blocks == decoder.config.blocks:
            value = perplexity_of(window_nll(decoder, other, evaluation.ids), evaluation.ids)
            print(f"perplexity {value:.3f}, on {evaluation.how}", flush=True)


def reordered(decoder: Decoder, whole: dict[str, Array], energies: Sequence[np.ndarray], pattern: NM) -> dict[str, Array]:
    """The block's parameters in an order that keeps more of ``w_ij^2 H_jj``; its function stays the same up to rounding.

    Args:
      energies: ``H_jj`` of the inputs of o_proj and down_proj.
    """
    heads, size = decoder.config.kv_heads, decoder.config.head_dim
    (v, o), (*wide, down) = _ATTENTION, _MLP
    of_values, of_neurons = (
        np.square(np.asarray(whole[name + ".weight"], np.float32)) * energy for name, energy in zip((o, down), energies)
    )
    # [d_out, kv heads, heads of one, size]: the heads that read one key-value head share its order, so their columns are rows here.
    shared = of_values.reshape(len(of_values), heads, -1, size).transpose(1, 0, 2, 3).reshape(heads, -1, size)
    each = np.stack([search(scores, pattern) for scores in shared])
    rows = (size * np.arange(heads)[:, None] + each).ravel()
    several = decoder.config.heads // heads
    columns = (size * np.arange(heads * several)[:, None] + np.repeat(each, several, axis=0)).ravel()
    neurons, found = search(of_neurons, pattern), dict(whole)
    for name, order, axis in [(v, rows, 0), (o, columns, 1), *((name, neurons, 0) for name in wide), (down, neurons, 1)]:
        for key in (name + ".weight", name + ".bias")[: 1 + (axis == 0 and name + ".bias" in whole)]:
            found[key] = jnp.take(whole[key], order, axis=axis)
    return found


def search(scores: np.ndarray, pattern: NM, rounds: int = _ROUNDS) -> np.ndarray:
    """An order of the columns [d_in] whose consecutive groups keep more of the scores [rows, d_in] under N:M.

    Columns are dealt out to the groups by their sums. Then each round takes one column out of every group and assigns these columns to the
    groups anew, at the best total. In a row, a group whose N-th best other score is ``t`` keeps ``max(t, s)`` of a column's ``s`` beside
    what it keeps anyway, so the total never falls.
    """
    rng = np.random.default_rng(0)
    ranked = np.argsort(-scores.sum(axis=0), kind="stable").reshape(pattern.m, -1)
    ranked[1::2] = ranked[1::2, ::-1]
    order = ranked.T.copy()
    groups = np.arange(len(order))
    for _ in range(rounds):
        place = rng.integers(pattern.m, size=len(order))
        taken, others = order[groups, place], order[np.arange(pattern.m) != place[:, None]].reshape(len(order), -1)
        least = np.sort(scores[:, others], axis=-1)[..., -pattern.n]
        order[groups, place] = taken[linear_sum_assignment(_gains(least, scores[:, taken]), maximize=True)[1]]
    return order.ravel()


@jax.jit
def _gains(least: Array, taken: Array) -> Array:
    """[groups, columns]: the sums over rows of the larger of a group's and a column's score, each [rows, groups] float32."""
    return jax.lax.map(lambda one: jnp.sum(jnp.maximum(taken, one[:, None]), axis=0), least.T)


if __name__ == "__main__":
    main()
