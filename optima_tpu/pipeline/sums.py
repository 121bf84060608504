"""The sums of a calibration pass, and the program that adds a batch."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from optima_tpu.method.layer_rules import kind_name
from optima_tpu.method.statistics import Drift, Groups, TokenStatistics
from optima_tpu.method.targets import SelfTarget, Target
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.experts import expert_of
from optima_tpu.models.layers import project
from optima_tpu.pipeline.grams import add_gram, add_routed, gram, gram_of_tokens
from optima_tpu.pipeline.layer_groups import alike
from optima_tpu.runtime.mesh import MODEL, struct_on


@dataclasses.dataclass(frozen=True)
class Capture:
    """What a pass of tokens through a block accumulates.

    Attributes:
      groups: all groups of :func:`linear_groups`, or some of them.
      target: decides whether the drift from the dense model is accumulated, whether the drift of the residual stream is too, and
        whether tokens are weighted. Tokens are weighted in a group whose layers all add to one residual stream, by one over the
        mean square of the dense model's stream after these layers.
      energy: whether the mean squares of the outputs' drift are accumulated too.
      advance: whether this pass also moves the dense stream through the block, which saves a :meth:`Decoder.apply`.
      borrow: how many tokens of the mean over all tokens count beside an expert's own, for each input of the layer; see
        :func:`accumulate`.
    """

    groups: Groups
    target: Target = SelfTarget()
    energy: bool = False
    advance: bool = False
    borrow: float = 0.0


class ResidualNames(NamedTuple):
    """The sown names of the residual stream around a group of layers.

    Attributes:
      before: for every layer of the group, the stream that its output is added to, or None; empty if the drift of the residual
        stream is not accumulated.
      after: the stream after all layers of the group if the tokens are weighted by it, else None.
    """

    before: tuple[str | None, ...]
    after: str | None


def residual_names(decoder: Decoder, groups: Groups, target: Target) -> tuple[ResidualNames | None, ...]:
    """The names of each group's residual stream; None without a drift."""
    if not target.dense_stream:
        return (None,) * len(groups)
    sown = []
    for names in groups:
        around = [decoder.family.residuals.get(name) for name in names]
        before = tuple(None if each is None else each.before for each in around) if target.gamma else ()
        shared = around[0] if target.weigh_tokens and len(set(around)) == 1 else None
        sown.append(ResidualNames(before, None if shared is None else shared.after))
    return tuple(sown)


@dataclasses.dataclass(frozen=True)
class SumsProgram:
    """The static part of :func:`add_batch`: the program that adds a batch.

    Attributes:
      groups: the groups whose inputs are accumulated, those that are :func:`alike` together.
      residuals: from :func:`residual_names`, for each of these.
      borrows: for each of these, whether the products of all tokens are accumulated too.
    """

    mesh: Mesh
    groups: tuple[Groups, ...]
    residuals: tuple[ResidualNames | None, ...]
    borrows: tuple[bool, ...]

    @classmethod
    def of(cls, decoder: Decoder, capture: Capture) -> "SumsProgram":
        groups = alike(capture.groups)
        residuals = residual_names(decoder, tuple(names for names, *_ in groups), capture.target)
        borrows = tuple(capture.borrow > 0 and kind_name(names[0]) in decoder.family.shared for names, *_ in groups)
        return cls(decoder.mesh, groups, residuals, borrows)

    def multiplied(self, decoder: Decoder, energy: bool) -> tuple[str, ...]:
        """The layers whose dense weights :func:`add_batch` multiplies."""
        drifting = [groups for groups, places in zip(self.groups, self.residuals) if places is not None]
        return tuple(name for groups in drifting for names in groups if energy or few_outputs(decoder, names) for name in names)


class Sums(NamedTuple):
    """The accumulated sums, for each entry of ``SumsProgram.groups``.

    Attributes:
      statistics: not yet divided by the number of tokens. The arrays of experts have one more axis, the first, for the experts.
      weights: the sum of the tokens' weights, float32; None if tokens have no weights.
      means: the products of all tokens, [d_in, d_in] float32; None if nothing is borrowed.
    """

    statistics: tuple[TokenStatistics, ...]
    weights: tuple[Array | None, ...]
    means: tuple[Array | None, ...]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def add_batch(
    program: SumsProgram, sums: Sums, inputs: Sequence[Mapping[str, Any]], weights: Mapping[str, Array], valid: Array
) -> Sums:
    """The new sums of :func:`accumulate`, with the tokens of one batch.

    Args:
      sums: donated.
      inputs: of each stream, from :func:`pass_batch`.
      weights: by name, the dense weights of the layers ``program.multiplied``.
      valid: [batch] bool, the windows that count (``Batch.valid``).
    """
    statistics, totals, means = [], [], []
    for groups, places, before, total, mean in zip(program.groups, program.residuals, *sums):
        names = groups[0]
        experts = tuple(number for name, *_ in groups if (number := expert_of(name)) is not None)
        if experts:
            read = [stream[names[0]] for stream in inputs[: 1 if places is None else 2]]
            matrices = tuple(jnp.stack([weights[name] for name in layers]) for layers in zip(*groups) if weights)
            statistics.append(add_routed(program.mesh, experts, before, read, valid, matrices))
            totals.append(total)
            means.append(None if mean is None else mean + gram_of_tokens(program.mesh, read[0], valid))
            continue
        means.append(None)
        seen = _seen(names[0], places, inputs, _scale(places, inputs, valid), valid)
        totals.append(total if total is None or seen.scale is None else total + jnp.sum(jnp.square(seen.scale)))
        hessian = add_gram(before.hessian, seen.x, program.mesh)
        count = before.tokens + jnp.sum(seen.routed, dtype=jnp.int32)
        drift = None if before.drift is None else _add_drift(program.mesh, before.drift, names, seen, weights)
        statistics.append(TokenStatistics(hessian, count, drift))
    return Sums(tuple(statistics), tuple(totals), tuple(means))


class _Seen(NamedTuple):
    """The inputs of a group in one batch, 0 for tokens without an input.

    With a second stream also the difference.

    Attributes:
      x: [batch, length, d_in] in the model's dtype.
      routed: [batch, length] bool, tokens whose input is not zero.
      difference: as ``x``, ``X_d - X``.
      lost: for each layer of the group, the drift of the residual stream that its output is added to, or None.
      scale: [batch, length] float32, the factor of each token's input.
    """

    x: Array
    routed: Array
    difference: Array | None = None
    lost: tuple[Array | None, ...] = ()
    scale: Array | None = None


def _seen(
    name: str, places: ResidualNames | None, inputs: Sequence[Mapping[str, Array]], scale: Array | None, valid: Array
) -> _Seen:
    mask = valid[:, None, None].astype(inputs[0][name].dtype)

    def weighed(array: Array) -> Array:
        # Rounded to the model's dtype, as the activations themselves are. Both factors of H have the same rounding.
        return array if scale is None else (array.astype(scale.dtype) * scale[..., None]).astype(mask.dtype)

    if places is None:
        x = inputs[0][name] * mask
        return _Seen(weighed(x), jnp.any(x != 0, axis=-1), scale=scale)
    pruned, dense = inputs
    x, other = (stream[name] * mask for stream in inputs)
    routed, dense_routed = (jnp.any(array != 0, axis=-1) for array in (x, other))
    both = (routed & dense_routed)[..., None]
    lost = [None if before is None else jnp.where(both, dense[before] - pruned[before], 0) for before in places.before]
    difference = jnp.where(both, other - x, 0)
    return _Seen(
        weighed(x), routed, weighed(difference), tuple(None if array is None else weighed(array) for array in lost), scale
    )


def _scale(places: ResidualNames | None, inputs: Sequence[Mapping[str, Array]], valid: Array) -> Array | None:
    """The root of each token's weight, float32; None if all weigh alike."""
    if places is None or places.after is None:
        return None
    return jnp.where(valid[:, None], inverse_norm(inputs[-1][places.after]), 0)


def _add_drift(mesh: Mesh, drift: Drift, names: tuple[str, ...], seen: _Seen, weights: Mapping[str, Array]) -> Drift:
    difference = seen.difference
    assert difference is not None, "where there is a drift there are two streams"
    outputs = [project(difference, weights[name], jnp.float32) for name in names] if drift.energy or drift.outputs else []
    energy = (before + jnp.sum(jnp.square(moved), axis=(0, 1)) for moved, before in zip(outputs, drift.energy))
    residual = (
        None if lost is None or before is None else before + gram(seen.x, mesh, lost)
        for lost, before in zip(seen.lost, drift.residual, strict=True)
    )
    return Drift(
        None if drift.cross is None else drift.cross + gram(seen.x, mesh, difference),
        tuple(jax.lax.with_sharding_constraint(rows, jax.NamedSharding(mesh, P())) for rows in energy),
        tuple(residual),
        # Rounded to the model's dtype, as the drift of the residual stream is.
        tuple(before + gram(seen.x, mesh, moved.astype(seen.x.dtype)) for moved, before in zip(outputs, drift.outputs)),
    )


def inverse_norm(stream: Array) -> Array:
    """``1 / rms`` of every token, [batch, length] float32; 0 if rms is 0."""
    square = jnp.mean(jnp.square(stream.astype(jnp.float32)), axis=-1)
    return jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


def sums_of(decoder: Decoder, program: SumsProgram, energy: bool = False) -> Sums:
    """The structs of :class:`Sums`, from :func:`struct_on`."""

    def of(groups: Groups, places: ResidualNames | None) -> TokenStatistics:
        one = statistics_of(decoder, groups[0], places, energy)
        if expert_of(groups[0][0]) is None:
            return one
        return jax.tree.map(
            lambda struct: struct_on(program.mesh, (len(groups), *struct.shape), struct.dtype, P(None, *struct.sharding.spec)),
            one,
        )

    statistics = tuple(map(of, program.groups, program.residuals))
    weight = struct_on(program.mesh, (), jnp.float32, P())
    weights = tuple(weight if places and places.after else None for places in program.residuals)
    squares = (statistics_of(decoder, groups[0], None).hessian for groups in program.groups)
    return Sums(statistics, weights, tuple(square if borrows else None for square, borrows in zip(squares, program.borrows)))


def statistics_of(
    decoder: Decoder, names: tuple[str, ...], places: ResidualNames | None, energy: bool = False
) -> TokenStatistics:
    """The structs of a group's statistics, from :func:`struct_on`.

    Args:
      names: the group's layers.
      places: from :func:`residual_names`; None without a drift.
      energy: whether the drift includes the mean squares of the outputs.
    """
    outputs, inputs = zip(*(decoder.block_shapes[name + ".weight"] for name in names))

    def columns(rows: int) -> Array:
        return struct_on(decoder.mesh, (rows, inputs[0]), jnp.float32, P(None, MODEL))

    drift = None
    if places is not None:
        few = few_outputs(decoder, names)
        drift = Drift(
            None if few else columns(inputs[0]),
            tuple(struct_on(decoder.mesh, (rows,), jnp.float32, P()) for rows in outputs if energy),
            tuple(None if before is None else columns(rows) for rows, before in zip(outputs, places.before)),
            tuple(map(columns, outputs)) if few else (),
        )
    return TokenStatistics(columns(inputs[0]), struct_on(decoder.mesh, (), jnp.int32, P()), drift)


def few_outputs(decoder: Decoder, names: tuple[str, ...]) -> bool:
    """Whether the drift costs less over a group's outputs than its inputs.

    Two products with as many rows as outputs then take fewer operations than one with as many rows as inputs. This saves time
    on an accelerator, where a layer has thousands of outputs. Where devices share the inputs of the layer, the first product is
    summed over the model axis, as in the layer's own forward pass.
    """
    shapes = [decoder.block_shapes[name + ".weight"] for name in names]
    return expert_of(names[0]) is None and 2 * sum(rows for rows, _ in shapes) < shapes[0][1]
