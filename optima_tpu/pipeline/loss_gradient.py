"""The gradient of the dense model's loss at the outputs of its layers, by which a target may weigh the tokens.

One pass of the calibration text through all blocks and back. Blocks are read one after the other, as in the walk, so the devices hold
one block at a time; what enters each block waits on the hosts, for as many windows as :data:`ROOM` holds. Then the pass begins
again with the next windows, and the run keeps what it has:

    RUN/loss_gradient/0000-0063.npz     the mean squares of windows 0 to 63, removed when all blocks are pruned
"""

import dataclasses
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from optima_tpu.errors import UserError
from optima_tpu.method.distillation import cross_entropy
from optima_tpu.method.statistics import Groups
from optima_tpu.models.activations import HiddenStates
from optima_tpu.models.decoder import Decoder, forward, layer_of
from optima_tpu.models.experts import expert_of
from optima_tpu.models.family import Positions
from optima_tpu.pipeline.distill.blocks import head_gradient
from optima_tpu.report.pace import Step
from optima_tpu.runtime.checksums import forget, intact, keep, known
from optima_tpu.runtime.files import remove
from optima_tpu.runtime.mesh import DATA
from optima_tpu.runtime.processes import fetch, first_only, from_first, together

GRADIENT = "gradient of the loss"
"""The stage of a run that measures it."""
FOLDER = "loss_gradient"
ROOM = 4 << 30
"""Bytes of what enters the blocks that wait on the hosts, all of them together, but at least those of a batch."""

Squares = list[dict[str, np.ndarray]]
"""For every block, by the first layer of each group, the mean of ``(dL / dz)^2`` over the outputs ``z`` of the group's layers:
[windows, length] float32."""


class Text(NamedTuple):
    """What passes through the dense model.

    Attributes:
      decoder: the dense model.
      groups: for every block, the layers that read the same input and are pruned.
      tokens: [windows, length] int32.
      seed: of the labels. The label of a position depends on the seed, the window and the position alone.
    """

    decoder: Decoder
    groups: Sequence[Groups]
    tokens: np.ndarray
    seed: int

    @property
    def parts(self) -> list[range]:
        """The windows that pass together."""
        return parts_of(self.decoder, *self.tokens.shape)

    def steps(self, windows: range) -> list[Step]:
        """What :func:`mean_squares` does before each call of ``advance``."""
        batches = -(-len(windows) // (self.decoder.batch * self.decoder.mesh.shape[DATA]))
        kinds = [self.decoder.config.kind_of(index) for index in range(self.decoder.config.blocks)]
        forward, back = ([Step(f"gradient {way} {kind}", len(windows)) for kind in kinds] for way in ("forward", "back"))
        return [*forward, *[Step("gradient of the head")] * batches, *reversed(back)]

    def weighed(self, index: int) -> Groups:
        """The groups of a block whose tokens are weighed."""
        return unrouted(self.groups[index])


def unrouted(groups: Groups) -> Groups:
    """The groups without those of experts, which get only the tokens that are sent to them."""
    return tuple(names for names in groups if expert_of(names[0]) is None)


def parts_of(decoder: Decoder, windows: int, length: int) -> list[range]:
    """The windows that pass together: whole batches, so that a window has the same neighbours however many these are."""
    batch, dtype = decoder.batch * decoder.mesh.shape[DATA], decoder.tensors.dtype(decoder.root + decoder.family.embedding)
    window = length * decoder.config.d_model * dtype.itemsize * decoder.config.blocks
    size = batch * max(1, ROOM // (batch * window))
    return [range(first, min(first + size, windows)) for first in range(0, windows, size)]


def mean_squares(text: Text, windows: range, advance: Callable[[], None] = lambda: None) -> Squares:
    """The mean squares of the loss's gradient at the outputs of all layers, for some of the windows.

        L = sum_t -log q_t(label_t),    label_t ~ q_t

    with the dense model's distribution ``q_t`` of the token behind position ``t``: labels that the model draws make the mean square a
    sample of the Fisher information's diagonal. A window's last position has no label.

    Args:
      advance: called after the pass through every block, after every batch of the head, and after the pass back through every block.

    Raises:
      UserError: a gradient is not finite.
    """
    decoder, span = text.decoder, range(text.decoder.config.blocks)
    hidden, entering = decoder.embed(text.tokens[windows.start : windows.stop]), []
    for index, parameters in zip(span, decoder.blocks(span)):
        entering.append(hidden.copy())
        decoder.apply(index, parameters, hidden)
        advance()
    head, places = decoder.head(), _places(windows, hidden.length)
    with hidden.put_behind() as put:
        for batch in hidden.batches(decoder.batch):
            read = batch.hidden, batch.hidden, batch.place(places), batch.valid  # the loss needs no second model
            put(batch.rows, head_gradient(DrawnLabels(text.seed), head, *read)[1])
            advance()
    found: Squares = []
    for index, parameters in zip(reversed(span), decoder.blocks(span[::-1])):
        found.insert(0, _back_through(text, index, parameters, entering.pop(), hidden))
        advance()
    return found


def _back_through(
    text: Text, index: int, parameters: Mapping[str, Array], entering: HiddenStates, cotangent: HiddenStates
) -> dict[str, np.ndarray]:
    """The mean squares of one block.

    Args:
      entering: the hidden states that enter it.
      cotangent: of those that leave it; replaced by that of those that enter it.
    """
    decoder, block, groups = text.decoder, text.decoder.at(index), text.weighed(index)
    state, positions = block.state(parameters), decoder.positions(index, entering.length)
    found = {names[0]: np.zeros((len(entering), entering.length), np.float32) for names in groups}
    with cotangent.put_behind() as put:
        for batch, behind in zip(entering.batches(decoder.batch), cotangent.batches(decoder.batch)):
            squares, before = backward(block.graph, groups, state, batch.hidden, positions, behind.hidden)
            put(batch.rows, before)
            for name, each in fetch(squares).items():
                found[name][batch.rows[batch.there]] = each[batch.there]
    if not all(np.isfinite(each).all() for each in found.values()):
        raise UserError(
            f"the gradient of the loss at the outputs of {decoder.prefix(index)[:-1]} is NaN or infinite: {decoder.overflowed}"
        )
    return found


def _places(windows: range, length: int) -> np.ndarray:
    """A number of its own for every position of every window, [windows, length] int32."""
    return (np.arange(windows.start, windows.stop)[:, None] * length + np.arange(length)).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class DrawnLabels:
    """A loss for ``distill.blocks.head_gradient``: the cross-entropy of labels that the model draws itself."""

    seed: int

    def __call__(self, dense: Array, logits: Array, places: Array) -> Array:
        """The loss of every position, [windows, chunk] float32.

        Args:
          logits: [windows, chunk, vocab] float32.
          places: [windows, chunk] int32, the number of the position that each label stands at.
        """
        key = jax.random.key(self.seed)
        draw = jax.vmap(jax.vmap(lambda place, row: jax.random.categorical(jax.random.fold_in(key, place), row)))
        return cross_entropy(logits, draw(places, jax.lax.stop_gradient(logits)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def backward(
    graph: Any, groups: Groups, state: Any, hidden: Array, positions: Positions, cotangent: Array
) -> tuple[dict[str, Array], Array]:
    """The mean squares of a block's groups, [batch, length] float32 by their first layers, and the cotangent of what enters it.

    Args:
      hidden: [batch, length, d_model], what enters the block.
      cotangent: of what leaves it.
    """

    def run(shifts: dict[str, Array], hidden: Array) -> Array:
        block = nnx.merge(graph, state)
        for name, shift in shifts.items():  # a bias of its own for every token has the gradient of the layer's output
            inner = layer_of(block, name)
            inner.bias = nnx.Param(inner.bias[...] + shift if hasattr(inner, "bias") else shift)
        return forward(*nnx.split(block), hidden, positions)[0]

    rows = {name: len(layer_of(nnx.merge(graph, state), name).weight[...]) for names in groups for name in names}
    shifts = {name: jnp.zeros((*hidden.shape[:2], size), hidden.dtype) for name, size in rows.items()}
    gradients, before = jax.vjp(run, shifts, hidden)[1](cotangent)

    def mean(names: tuple[str, ...]) -> Array:
        sums = [jnp.sum(jnp.square(gradients[name].astype(jnp.float32)), axis=-1) for name in names]
        return functools.reduce(jnp.add, sums) / sum(rows[name] for name in names)

    return {names[0]: mean(names) for names in groups}, before


def missing(text: Text, directory: Path) -> list[range]:
    """The parts whose mean squares a run still has to measure. Every process calls it."""
    return from_first(lambda: [windows for windows in text.parts if not intact(directory, _name(windows))])


def measure(text: Text, directory: Path, advance: Callable[[], None]) -> None:
    """Measures the parts that are missing, and keeps each in the directory of the run. Every process calls it.

    Args:
      advance: as for :func:`mean_squares`, for every missing part.

    Raises:
      UserError: as :func:`mean_squares`, or the disk is full.
    """
    for windows in missing(text, directory):
        file = io.BytesIO()
        squares = mean_squares(text, windows, advance)
        arrays: dict[str, Any] = {_key(index, name): each for index, block in enumerate(squares) for name, each in block.items()}
        np.savez(file, **arrays)
        first_only(functools.partial(keep, directory, {_name(windows): file.getvalue()}))


def read(text: Text, directory: Path) -> Squares:
    """The mean squares of all windows, when no part is missing. Every process calls it."""

    def parts() -> list[Mapping[str, np.ndarray]]:
        files = (io.BytesIO((directory / _name(windows)).read_bytes()) for windows in text.parts)
        return [dict(np.load(file, allow_pickle=False)) for file in files]

    found = together(parts)
    return [
        {names[0]: np.concatenate([part[_key(index, names[0])] for part in found]) for names in text.weighed(index)}
        for index in range(text.decoder.config.blocks)
    ]


def forget_all(directory: Path) -> None:
    """Removes what was kept: when all blocks are finished, none is needed. Every process calls it."""

    def clear() -> None:
        forget(directory, [name for name in known(directory) if name.startswith(f"{FOLDER}/")])
        remove(directory / FOLDER)

    first_only(clear)


def _name(windows: range) -> str:
    return f"{FOLDER}/{windows.start:04d}-{windows.stop - 1:04d}.npz"


def _key(index: int, name: str) -> str:
    return f"{index}/{name}"
