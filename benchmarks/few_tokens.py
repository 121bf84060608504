"""Experts that few tokens reach: the held-out error of their layers by how many tokens they borrow of the mean.

    python -m benchmarks.few_tokens --calibration.source file:c4.jsonl --evaluation.source pydoc

No small mixture with trained weights is at hand. So a block of a dense model stands in: its tokens are divided among experts as a
router would, by the nearest of some centres of the MLP's inputs, two for each token, and every expert has the weights of the MLP's
gate. For each number of calibration tokens, ``damping`` and ``borrow``, it prints the error on held-out tokens of the expert, averaged
over experts of different popularity: half of every row pruned by Wanda's rule, kept weights at the optimum, in float64.
"""

import argparse
from collections.abc import Sequence

import jax
import numpy as np

from optima_tpu.config.parse import parse
from optima_tpu.models.decoder import Decoder, forward
from optima_tpu.pipeline.sweep.runner import Shared

BORROWS = (0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1)
TEXT = ["--calibration.samples", "56", "--calibration.length", "512", "--calibration.held_out", "0"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.few_tokens",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Settings of a run may follow, as for optima_tpu.launch: model and text.",
    )
    parser.add_argument("--block", type=int, default=8, help="index of the block")
    parser.add_argument("--experts", type=int, default=32, help="number of experts; each token has two")
    parser.add_argument("--rows", type=int, default=32, help="rows of the layer")
    parser.add_argument("--tokens", default="1024,4096,16384", help="numbers of calibration tokens; the last third is held out")
    arguments, settings = parser.parse_known_args(argv)
    config, shared = parse([*TEXT, *settings]), Shared()
    decoder, ids = shared.model(config).decoder, shared.texts(config).calibration.ids
    inputs, weight = block_inputs(decoder, ids, arguments.block)
    weight, fitted = weight[: arguments.rows], len(inputs) * 2 // 3
    route = router(inputs[:fitted], arguments.experts)
    sent, held_out = route(inputs[:fitted]), route(inputs[fitted:])
    for count in map(int, arguments.tokens.split(",")):
        x = inputs[:count]
        popular = np.argsort(np.bincount(sent[:count].ravel(), minlength=arguments.experts))
        chosen = popular[np.linspace(arguments.experts // 10, arguments.experts - 3, 5).astype(int)]
        mine = [x[(sent[:count] == expert).any(axis=1)] for expert in chosen]
        unseen = [inputs[fitted:][(held_out == expert).any(axis=1)] for expert in chosen]
        print(f"\n{count} tokens, experts of {', '.join(str(len(own)) for own in mine)} of them\n")
        print(f"| damping | {' | '.join(f'borrow {borrow:.3g}' for borrow in BORROWS)} |\n|---|{'---|' * len(BORROWS)}")
        for damping in (0.01, 0.1, 0.3):
            errors = []
            for borrow in BORROWS:
                lent = borrow * x.shape[1] * (x.T @ x) / len(x)
                pruned = [solved(weight, own.T @ own + lent, damping) for own in mine]
                errors.append(np.mean([error(weight, other, rows) for other, rows in zip(pruned, unseen, strict=True)]))
            print(f"| {damping} | {' | '.join(f'{100 * each:.2f}%' for each in errors)} |")


def block_inputs(decoder: Decoder, ids: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The inputs of the MLP of a block [tokens, d_model] and the weights of its gate, float64."""
    hidden = decoder.embed(ids)
    for index in range(block):
        decoder.apply(index, decoder.load_block(index), hidden)
    parameters, positions = decoder.load_block(block), decoder.positions(block, ids.shape[1])

    @jax.jit
    def read(x):
        return forward(decoder.graph, decoder.state(parameters), x, positions)[1]["mlp.gate_proj"]

    found = np.concatenate([np.asarray(read(batch.hidden))[batch.there] for batch in hidden.batches(decoder.batch)])
    return found.reshape(-1, found.shape[-1]).astype(np.float64), np.asarray(parameters["mlp.gate_proj.weight"], np.float64)


def router(inputs: np.ndarray, experts: int):
    """Sends each token to two of the centres that k-means finds on the sphere, by their products."""
    rng, middle = np.random.default_rng(0), inputs.mean(axis=0)
    centred = inputs - middle
    centres = centred[rng.choice(len(centred), experts, replace=False)]
    for _ in range(12):
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
        nearest = np.argmax(centred @ centres.T, axis=1)
        centres = np.stack(
            [centred[nearest == each].mean(axis=0) if (nearest == each).any() else centres[each] for each in range(experts)]
        )
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    return lambda x: np.argsort(-(x - middle) @ centres.T, axis=1)[:, :2]


def solved(weight: np.ndarray, hessian: np.ndarray, damping: float) -> np.ndarray:
    """Half of every row by Wanda's rule, the others at the optimum of the damped objective."""
    diagonal, found = np.diagonal(hessian), np.zeros_like(weight)
    scores = np.abs(weight) * np.sqrt(diagonal)
    keep = scores >= np.sort(scores, axis=1)[:, scores.shape[1] // 2, None]
    matrix = hessian + np.diag(damping * diagonal + 1e-9 * diagonal.mean())
    for row, dense, kept in zip(found, weight, keep):
        row[kept] = dense[kept] + np.linalg.solve(matrix[np.ix_(kept, kept)], hessian[np.ix_(kept, ~kept)] @ dense[~kept])
    return found


def error(weight: np.ndarray, pruned: np.ndarray, rows: np.ndarray) -> float:
    """Squared change of the outputs for some inputs, as a share of their energy."""
    return float(np.sum((rows @ (weight - pruned).T) ** 2) / np.sum((rows @ weight.T) ** 2))


if __name__ == "__main__":
    main()
