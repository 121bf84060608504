"""Removes experts of mixtures before the walk: statistics of their outputs, the choice of those that stay."""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from optima_tpu.method.experts import ExpertScore, ExpertStatistics, kept_experts
from optima_tpu.models.activations import HiddenStates
from optima_tpu.models.checkpoints.fewer_experts import ExpertCut
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.family import ExpertNames
from optima_tpu.models.model import Model, without_experts
from optima_tpu.pipeline.calibrate import PassProgram, pass_batch
from optima_tpu.pipeline.grams import add_outputs
from optima_tpu.runtime.processes import fetch


def choose_experts(
    model: Model, cut: ExpertCut, score: ExpertScore, tokens: np.ndarray, before: Sequence[tuple[int, ...]] = ()
) -> Iterator[tuple[int, ...]]:
    """The experts that stay in each block, ascending; empty for a block without a mixture.

    A block is scored by what it computes behind the blocks before it, which have lost their experts.

    Args:
      tokens: [windows, length] int32, the calibration text.
      before: the choices for the first blocks, where they are known.
    """
    decoder, names = model.decoder, cut.names
    mixed = [_part(names.down, 0) + ".weight" in decoder.at(index).block_shapes for index in range(decoder.config.blocks)]
    fewer = without_experts(model, cut, [range(cut.kept) if each else () for each in mixed]).decoder
    hidden = decoder.embed(tokens)
    for index, parameters in enumerate(decoder.blocks(range(decoder.config.blocks))):
        if not mixed[index]:
            stay: tuple[int, ...] = ()
        elif index < len(before):
            stay = before[index]
        else:
            scores = fetch(score(expert_statistics(decoder, index, names, parameters, hidden)))
            stay = tuple(kept_experts(scores, cut.kept, cut.groups).tolist())
        if index >= len(before):
            yield stay
        fewer.apply(index, _with_only(parameters, names, stay) if stay else parameters, hidden)


def _with_only(parameters: Mapping[str, Array], names: ExpertNames, stay: Sequence[int]) -> dict[str, Array]:
    """The parameters of a block without the other experts."""
    rows = {name: parameters[name][jnp.array(stay)] for name in names.router if name in parameters}
    others = {name: array for name, array in parameters.items() if not name.startswith(names.each)} | rows
    numbered = [(name, *name.removeprefix(names.each).split(".", 1)) for name in parameters.keys() - others.keys()]
    new = {old: number for number, old in enumerate(stay)}
    return others | {f"{names.each}{new[int(old)]}.{rest}": parameters[name] for name, old, rest in numbered if int(old) in new}


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
    first, state, positions = _part(names.down, 0), decoder.state(parameters), decoder.positions(index, hidden.length)
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
    numbers = itertools.takewhile(lambda number: _part(name, number) in parameters, itertools.count())
    found = [parameters[_part(name, number)] for number in numbers]
    return jnp.stack(found) if found else None


def _part(name: str, number: int) -> str:
    """The name of a layer or parameter of one expert."""
    return name.replace("*", str(number))
