"""Removes experts of mixtures before the walk: statistics of their outputs, the choice of those that stay."""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from optima_tpu.method.experts import ExpertStatistics
from optima_tpu.models.activations import HiddenStates
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.family import ExpertNames
from optima_tpu.pipeline.calibrate import PassProgram, pass_batch
from optima_tpu.pipeline.grams import add_outputs


def expert_statistics(
    decoder: Decoder, index: int, names: ExpertNames, parameters: Mapping[str, Array], hidden: HiddenStates
) -> ExpertStatistics:
    """Sums over the outputs of the experts of block ``index``.

    Args:
      names: of the family.
      parameters: the block's, by name inside the block, on the mesh.
      hidden: the hidden states that enter the block.
    """
    decoder = decoder.at(index)
    first, state, positions = names.down.replace("*", "0"), decoder.state(parameters), decoder.positions(index, hidden.length)
    program = PassProgram(decoder.graph, decoder.mesh, (first, names.shares))
    down, bias = (_stacked(parameters, f"{names.down}.{ending}") for ending in ("weight", "bias"))
    assert down is not None, "the block has a mixture"
    zeros = jnp.zeros(len(down))
    sums = ExpertStatistics(zeros.astype(jnp.int32), zeros, zeros, zeros)
    for batch in hidden.batches(decoder.batch):
        found = pass_batch(program, state, batch.hidden, positions, {})[1]
        sums = _added(decoder.mesh, sums, found[first], found[names.shares], batch.valid, down, bias)
    return sums


@functools.partial(jax.jit, static_argnums=0)
def _added(mesh: Mesh, sums: ExpertStatistics, *batch: Any) -> ExpertStatistics:
    return add_outputs(mesh, sums, *batch)


def _stacked(parameters: Mapping[str, Array], name: str) -> Array | None:
    """A parameter of all experts, [experts, ...], by its name with ``*`` for the number of the expert; None if they have none."""
    numbers = itertools.takewhile(lambda number: name.replace("*", str(number)) in parameters, itertools.count())
    found = [parameters[name.replace("*", str(number))] for number in numbers]
    return jnp.stack(found) if found else None
