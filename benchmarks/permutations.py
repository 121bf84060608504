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
from optima_tpu.evaluate.perplexity import perplexity_of, token_nll
from optima_tpu.method.patterns import NM
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.llama import LINEARS
from optima_tpu.pipeline.calibrate import Capture, Stream, accumulate, groups_of_blocks
from optima_tpu.pipeline.inputs import open_model_on_mesh, read_texts
from optima_tpu.pipeline.walk import Streams, Walk, prune_block

_V, _O, _WIDE, _DOWN = "self_attn.v_proj", "self_attn.o_proj", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"


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
    decoder, windows, pattern = model.decoder, config.calibration.fitted, config.recipe.pattern
    if not isinstance(pattern, NM) or pattern.stride > 1 or decoder.linears != LINEARS or not config.calibration.held_out:
        raise UserError(f"expected a pattern N:M, the layers of Llama and held-out windows, got {pattern}, {decoder.linears}")
    calibration, evaluation, *_ = read_texts(config, model)
    walk, capture = Walk(decoder, config.recipe, groups_of_blocks(decoder), windows), Capture(((_O,), (_DOWN,)))
    for better in (False, True):
        pruned, other = decoder.embed(calibration.ids), decoder.embed(evaluation.ids)
        dense, layers = pruned.copy(), []
        for index in range(blocks):
            whole = next(decoder.blocks([index]))
            if better:
                inputs = accumulate(decoder, index, capture, [Stream(whole, pruned.part(0, windows))])
                whole = reordered(decoder, whole, [np.diag(each.hessian) for each in inputs], pattern)
            found = prune_block(walk, index, whole, Streams(pruned, dense.copy() if config.recipe.target.dense_stream else None))
            decoder.apply(index, whole, dense)
            decoder.apply(index, found.parameters, other)
            layers += found.layers
        errors = {name: [r.dense_after or r.held_out_after for r in layers if r.name == name] for name in LINEARS}
        drift = mean_error(pruned.part(windows, len(pruned)), dense.part(windows, len(dense)))
        print("in a better order" if better else "as they are", f"hidden states {drift:.3%}", sep="  ", end="  ")
        print(*(f"{name} {statistics.geometric_mean(each):.3%}" for name, each in errors.items()), sep="  ", flush=True)
        if blocks == decoder.config.blocks:
            value = perplexity_of(token_nll(decoder, other, evaluation.ids).sum(axis=1, dtype=np.float64), evaluation.ids)
            print(f"perplexity {value:.3f}, on {evaluation.how}", flush=True)


def reordered(decoder: Decoder, whole: dict[str, Array], energies: Sequence[np.ndarray], pattern: NM) -> dict[str, Array]:
    """The block's parameters in an order that keeps more of ``w_ij^2 H_jj``; its function stays the same up to rounding.

    Args:
      energies: ``H_jj`` of the inputs of o_proj and down_proj.
    """
    heads, size, several = decoder.config.kv_heads, decoder.config.head_dim, decoder.config.heads // decoder.config.kv_heads
    values, neurons = (
        np.square(np.asarray(whole[f"{name}.weight"], np.float32)) * each for name, each in zip((_O, _DOWN), energies)
    )
    # Heads that read one key-value head have one order, so the columns of all of them count as rows of it.
    shared = values.reshape(-1, heads, several, size).swapaxes(0, 1).reshape(heads, -1, size)
    each, order = np.stack([search(scores, pattern) for scores in shared]), search(neurons, pattern)
    rows = (size * np.arange(heads)[:, None] + each).ravel()
    columns = (size * np.arange(heads * several)[:, None] + np.repeat(each, several, axis=0)).ravel()
    moved = {f"{_O}.weight": whole[f"{_O}.weight"][:, columns], f"{_DOWN}.weight": whole[f"{_DOWN}.weight"][:, order]}
    places = {_V: rows, **dict.fromkeys(_WIDE, order)}
    outputs = ((f"{name}.{part}", place) for name, place in places.items() for part in ("weight", "bias"))
    return whole | moved | {key: whole[key][place] for key, place in outputs if key in whole}


def search(scores: np.ndarray, pattern: NM, rounds: int = 20) -> np.ndarray:
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
