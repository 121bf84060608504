"""Groups a block's linear layers by their input, in calibration order."""

from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp

from optima_tpu.method.layer_rules import kind_name
from optima_tpu.method.statistics import Groups
from optima_tpu.models.decoder import Decoder, forward
from optima_tpu.models.experts import expert_of


def groups_of_blocks(decoder: Decoder) -> tuple[Groups, ...]:
    """For every block of the model its :func:`linear_groups`."""
    by_kind = {kind: linear_groups(decoder.at(kind)) for kind in decoder.config.kinds}
    return tuple(by_kind[decoder.config.kind_of(index)] for index in range(decoder.config.blocks))


def linear_groups(decoder: Decoder) -> Groups:
    """The block's linear layers, grouped by the array that they read.

    The groups have the order of the forward pass. Tracing finds them: layers that share an input sow the same tracer. Each
    expert reads its own part of the input of all experts.
    """
    traced: list[Groups] = []  # the single trace below appends its groups

    def trace(state, x, positions):
        inputs = forward(decoder.graph, state, x, positions)[1]
        groups: dict[tuple[int, int | None], list[str]] = {}
        for name in decoder.linears:
            groups.setdefault((id(jax.tree.leaves(inputs[name])[0]), expert_of(name)), []).append(name)
        traced.append(tuple(map(tuple, groups.values())))
        return x

    state = decoder.state({name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in decoder.block_shapes.items()})
    hidden = jax.ShapeDtypeStruct((1, 2, decoder.config.d_model), jnp.float32)
    jax.eval_shape(trace, state, hidden, decoder.config.positions(decoder.config.kind, 2))
    return traced[0]


def in_sequence(groups: Groups) -> tuple[Groups, ...]:
    """Splits groups by the kind of layer, in the order of the forward pass."""
    return _by(groups, lambda names: kind_name(names[0]))


def alike(groups: Groups) -> tuple[Groups, ...]:
    """Puts groups of experts with the same layers together, in order."""
    return _by(groups, lambda names: tuple(map(kind_name, names)))


def _by(groups: Groups, key: Callable[[tuple[str, ...]], Hashable]) -> tuple[Groups, ...]:
    parts: dict[Hashable, list[tuple[str, ...]]] = {}
    for names in groups:
        parts.setdefault(key(names), []).append(names)
    return tuple(map(tuple, parts.values()))
