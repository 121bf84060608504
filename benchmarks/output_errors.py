"""Compares finished runs by each layer output's distance from the dense one.

    python -m benchmarks.output_errors runs/paper runs/best

For each layer, the relative error is ``||X_d W' - X V'||^2 / ||X_d W'||^2``, with pruned weights ``V``, dense weights ``W``, and
the layer's inputs ``X`` in the pruned and ``X_d`` in the dense model. It includes the errors of all layers before.

The errors are sums over the tokens of the first run's held-out windows: once with equal weights, and once weighed by the inverse
mean square of the dense model's residual stream after the layer's attention or MLP. ``--target.weigh_tokens`` uses these weights
in the layers that add to the stream. Prints the means over layers, and the layers in which a later run has a larger error than
the first run.
"""

import argparse
import functools
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optima_tpu.config.parse import recorded_run
from optima_tpu.errors import UserError
from optima_tpu.evaluate.distance import check_same_shape
from optima_tpu.evaluate.model import open_evaluated
from optima_tpu.models.decoder import Decoder, forward
from optima_tpu.models.layers import project
from optima_tpu.pipeline.inputs import open_model_on_mesh, read_texts
from optima_tpu.pipeline.layer_groups import linear_groups
from optima_tpu.pipeline.sums import inverse_norm
from optima_tpu.report.runs import read_report
from tests.support.oracles import input_of

Errors = dict[str, np.ndarray]
"""Layer -> [runs, 2] float64: for each run the relative error over tokens with equal weights, and over weighed tokens."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.output_errors", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", help="run directories of one model; the text is that of the first run")
    names = parser.parse_args(argv).runs
    try:
        config = recorded_run(read_report(names[0]).configuration)
        if not config.calibration.held_out:
            raise UserError(f"expected a run with held-out windows, got {names[0]} without any: give another run first")
        model = open_model_on_mesh(config)
        runs = [open_evaluated(name, model.decoder.mesh, config.dtype, config.batch).model.decoder for name in names]
        for run in runs:
            check_same_shape(model.decoder, run)
        tokens = read_texts(config, model).calibration.ids[config.calibration.fitted :]
        errors = output_errors(model.decoder, runs, tokens)
    except UserError as error:
        sys.exit(f"error: {error}")
    means = np.mean(list(errors.values()), axis=0)
    for index, name in enumerate(names):
        print(f"{name}: {means[index][0]:.2%}, tokens weighed {means[index][1]:.2%}, means over {len(errors)} layers")
        for kind, what in enumerate(("", ", tokens weighed") if index else ()):
            worse = {layer: by_run[[0, index], kind] for layer, by_run in errors.items() if by_run[index, kind] > by_run[0, kind]}
            print(
                f"  larger than in {names[0]}{what}: {len(worse)} layers",
                *(f"{layer} {later:.4f} for {first:.4f}" for layer, (first, later) in worse.items()),
                sep="  ",
            )


def output_errors(dense: Decoder, runs: Sequence[Decoder], tokens: np.ndarray) -> Errors:
    """Returns the errors described above by layer. Works in one process.

    Args:
      tokens: [windows, length] int32.
    """
    models, errors = (dense, *runs), {}
    streams, linears = [model.embed(tokens) for model in models], sum(linear_groups(dense), ())
    count, behind = dense.config.blocks, _streams_behind(dense, linears)
    for index, blocks in enumerate(zip(*(model.blocks(range(count)) for model in models))):
        sums, positions = np.zeros((len(linears), len(models), 2)), dense.positions(index, tokens.shape[1])
        states = tuple(model.state(parameters) for model, parameters in zip(models, blocks))
        weights = tuple({name: parameters[name + ".weight"] for name in linears} for parameters in blocks)
        for batch in zip(*(stream.batches(dense.batch) for stream in streams)):
            hidden, valid = tuple(part.hidden for part in batch), batch[0].valid
            sums += np.asarray(_sums(dense.graph, linears, behind, states, weights, hidden, valid, positions), np.float64)
        for name, (reference, *lost) in zip(linears, sums):
            errors[dense.prefix(index) + name] = np.stack(lost) / reference
        for model, parameters, stream in zip(models, blocks, streams):
            model.apply(index, parameters, stream)
    return errors


def _streams_behind(decoder: Decoder, linears: Sequence[str]) -> tuple[str | None, ...]:
    """Names the residual stream behind each layer's attention or MLP.

    None if there is no such stream.
    """
    behind = {name.split(".")[0]: residual.after for name, residual in decoder.family.residuals.items()}
    return tuple(behind.get(name.split(".")[0]) for name in linears)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sums(graph, linears, behind, states, weights, hidden, valid, positions) -> Array:
    """Sums squares over a batch: of dense outputs, of each run's differences.

    Args:
      linears: names of layers.
      behind: for each layer the residual stream that weighs its tokens; with None the weights are equal.
      states, weights, hidden: one entry for the dense model and for each run.

    Returns:
      [layers, models, 2] float32; the last axis is (equal weights, weighed).
    """
    inputs = [forward(graph, state, x, positions)[1] for state, x in zip(states, hidden)]

    def of_layer(name: str, stream: str | None) -> Array:
        dense, *others = (project(input_of(read, name), weight[name], jnp.float32) for read, weight in zip(inputs, weights))
        scale = jnp.broadcast_to(valid[:, None], dense.shape[:2]).astype(jnp.float32)
        weighed = scale if stream is None else scale * jnp.square(inverse_norm(inputs[0][stream]))
        squares = [jnp.sum(jnp.square(output), axis=-1) for output in (dense, *(other - dense for other in others))]
        return jnp.stack([jnp.stack([jnp.sum(square * scale), jnp.sum(square * weighed)]) for square in squares])

    return jnp.stack([of_layer(*layer) for layer in zip(linears, behind)])


if __name__ == "__main__":
    main()
