"""Hessians of a block's linear layers from the activations that run through it."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from optima_tpu.activations import Activations
from optima_tpu.errors import UserError
from optima_tpu.models.decoder import Decoder, forward
from optima_tpu.processes import fetch
from optima_tpu.sharding import DATA, MODEL

Groups = tuple[tuple[str, ...], ...]
"""The linear layers of a block, those that read the same input together: (("self_attn.q_proj", ...), ...)."""


class Statistics(NamedTuple):
    """What is known of the inputs of a group of layers.

    Attributes:
      hessian: ``H = X'X / n_tokens`` [d_in, d_in] float32, columns over the model axis.
      tokens: how many inputs were not zero, int32: all tokens, or those that were routed to an expert.
    """

    hessian: Array
    tokens: Array


def linear_groups(decoder: Decoder) -> Groups:
    """The block's linear layers, grouped by the array that they read, in the order of the forward pass.

    Found by tracing: layers that share an input sow the same tracer.
    """
    found: list[Groups] = []  # the one trace leaves its groups here

    def trace(state, x, positions):
        inputs = forward(decoder.graph, state, x, positions)[1]
        groups: dict[int, list[str]] = {}
        for name in decoder.linears:
            groups.setdefault(id(inputs[name]), []).append(name)
        found.append(tuple(map(tuple, groups.values())))
        return x

    state = decoder.state({name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in decoder.block_shapes.items()})
    hidden = jax.ShapeDtypeStruct((1, 2, decoder.config.d_model), jnp.float32)
    jax.eval_shape(trace, state, hidden, decoder.config.positions(0, 2))
    return found[0]


def accumulate_hessians(decoder: Decoder, index: int, parameters: Mapping[str, Array], hidden: Activations,
                        groups: Groups) -> tuple[Statistics, ...]:
    """The :class:`Statistics` of each group's input.

    Products of activations in the model's dtype, accumulated in float32: on each device over its own tokens, then by one
    ``psum`` over the data axis.

    Args:
      index: the block's number, for messages.
      parameters: the block's parameters, by name.
      hidden: what enters the block.
      groups: from :func:`linear_groups`.

    Raises:
      UserError: an input holds a NaN or an infinity; names the layer.
    """
    state = decoder.state(parameters)
    length = hidden.values.shape[1]
    positions = decoder.positions(index, length)
    sizes = tuple(decoder.block_shapes[names[0] + ".weight"][1] for names in groups)
    everywhere = jax.NamedSharding(decoder.mesh, P())
    sums = tuple(Statistics(
        jnp.zeros((size, size), jnp.float32, device=jax.NamedSharding(decoder.mesh, _columns(decoder.mesh, size))),
        jnp.zeros((), jnp.int32, device=everywhere)) for size in sizes)
    for batch in hidden.batches(decoder.batch):
        sums = add_batch(decoder.graph, decoder.mesh, groups, sums, state, batch.hidden, batch.valid, positions)
    statistics = _divide(sums, np.float32(len(hidden) * length))
    for names, trace in zip(groups, fetch([jnp.trace(found.hessian) for found in statistics])):
        if not np.isfinite(trace):
            raise UserError(f"the input of {decoder.prefix(index)}{names[0]} holds NaN or infinite values: the model overflows "
                            "in its dtype or its weights are damaged; try --dtype float32")
    return statistics


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def add_batch(graph, mesh: Mesh, groups: Groups, sums, state, hidden, valid, positions):
    """One step of :func:`accumulate_hessians`: ``sums`` (donated) and what a ``Batch`` of hidden states adds to them."""
    inputs = forward(graph, state, hidden, positions)[1]
    kept = (inputs[names[0]] * valid[:, None, None].astype(hidden.dtype) for names in groups)
    return tuple(Statistics(total.hessian + _gram(x, mesh), total.tokens + jnp.sum(jnp.any(x != 0, axis=-1), dtype=jnp.int32))
                 for x, total in zip(kept, sums))


@functools.partial(jax.jit, donate_argnums=0)
def _divide(sums, tokens):
    return tuple(total._replace(hessian=total.hessian / tokens) for total in sums)


def _columns(mesh: Mesh, size: int) -> P:
    return P(None, MODEL) if size % mesh.shape[MODEL] == 0 else P()


def _gram(x: Array, mesh: Mesh) -> Array:
    """``X'X`` of x [batch, length, d] in float32. Each device of the model axis computes its own columns of the result.

    Where the axis does not divide d, every one of them computes all columns.
    """
    size = x.shape[-1]
    spec = _columns(mesh, size)
    width = size // mesh.shape[MODEL] if spec != P() else size

    def local(part: Array) -> Array:
        rows = part.reshape(-1, size)
        first = jax.lax.axis_index(MODEL) * width if width < size else 0
        mine = jax.lax.dynamic_slice_in_dim(rows, first, width, axis=1)
        # bfloat16 products are exact in float32; float32 ones need the precision.
        product = jax.lax.dot_general(rows, mine, (((0,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST,
                                      preferred_element_type=jnp.float32)
        return jax.lax.psum(product, DATA)

    return jax.shard_map(local, mesh=mesh, in_specs=P(DATA), out_specs=spec, check_vma=False)(x)
