"""Mixtures of experts: a router sends every token to a few of many small gated MLPs, and these compute their own tokens alone.

Each slice of the data axis sorts its own tokens by expert: no token leaves its slice. Over the model axis every expert is split as
an MLP of its own width would be: gate and up by their outputs, down by its inputs, with one sum over the axis at the end. Whole
experts on different devices would need no such sum, but a device whose experts are popular would let the others wait.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from optima_tpu.errors import UserError
from optima_tpu.models import llama
from optima_tpu.models.family import Family
from optima_tpu.models.grouped import Stretches, grouped_dot
from optima_tpu.models.layers import Linear, project
from optima_tpu.runtime.mesh import DATA, MODEL, divisible


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """The numbers that shape a block; ``d_ff`` is the width of one expert.

    Attributes:
      experts: number of experts in every block.
      experts_per_token: number of experts that a token is sent to.
      normalise: whether the shares of these experts are scaled to sum to one.
    """

    experts: int
    experts_per_token: int
    normalise: bool

    def __post_init__(self) -> None:
        if self.experts_per_token > self.experts:
            raise UserError(
                f"expected num_experts_per_tok of at most the number of experts, got {self.experts_per_token} and {self.experts} in "
                "config.json: check the file"
            )

    def reach(self, name: str) -> float:
        return 1.0 if expert_of(name) is None else self.experts_per_token / self.experts


def expert_of(name: str) -> int | None:
    """The number of the expert that a layer belongs to, 7 for "mlp.experts.7.up_proj"; None for another layer."""
    found = re.search(r"\.experts\.(\d+)\.", name)
    return int(found[1]) if found else None


class Route(NamedTuple):
    """The tokens of a slice, sorted by expert; a token is there once for each of its experts.

    Attributes:
      token: [rows] int32, the token of each row.
      expert: [rows] int32, ascending.
      row: [tokens, experts_per_token] int32, the row of each token at each of its experts.
      stretches: the rows of each expert.
    """

    token: Array
    expert: Array
    row: Array
    stretches: Stretches

    @classmethod
    def of(cls, chosen: Array, experts: int) -> "Route":
        """From the experts of each token, [tokens, experts_per_token] int32."""
        flat = chosen.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        row = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)), unique_indices=True)
        count = jnp.bincount(flat, length=experts)
        return cls(order // chosen.shape[1], flat[order], row.reshape(chosen.shape), Stretches(jnp.cumsum(count) - count, count))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows", "chosen"], meta_fields=["experts", "slices"])
@dataclasses.dataclass(frozen=True)
class Routed:
    """What a layer of all experts reads: the rows of their tokens, expert after expert, in each slice of the data axis by itself.

    Attributes:
      rows: [slices * rows, d_in] in the model's dtype, sorted as :class:`Route` says.
      chosen: [batch, length, experts_per_token] int32.
      experts: number of experts.
      slices: number of slices of the data axis that have tokens of their own.
    """

    rows: Array
    chosen: Array
    experts: int
    slices: int

    def read_by(self, expert: int) -> Array:
        """What one expert reads, [batch, length, d_in], with zeros for tokens that are sent elsewhere."""

        def of_slice(rows: Array, chosen: Array) -> Array:
            mine = chosen == expert
            row = jnp.take_along_axis(Route.of(chosen, self.experts).row, jnp.argmax(mine, axis=1)[:, None], axis=1)[:, 0]
            return jnp.where(jnp.any(mine, axis=1)[:, None], rows[row], 0)

        rows = self.rows.reshape(self.slices, -1, self.rows.shape[1])
        found = jax.vmap(of_slice)(rows, self.chosen.reshape(self.slices, -1, self.chosen.shape[-1]))
        return found.reshape(*self.chosen.shape[:2], -1)


def input_of(inputs: Mapping[str, Any], name: str) -> Array:
    """The input [batch, length, d_in] of a layer, from the inputs of :func:`~optima_tpu.models.decoder.forward`.

    For the layer of an expert a copy is made, with zeros for the tokens of other experts.
    """
    expert = expert_of(name)
    return inputs[name] if expert is None else inputs[name].read_by(expert)


class Router(nnx.Module):
    """The experts that each token is sent to [batch, length, experts_per_token] int32, and their shares of the same shape."""

    def __init__(self, config: Config):
        self.weight = nnx.Param(jnp.zeros((config.experts, config.d_model)))
        self.few, self.normalise = config.experts_per_token, config.normalise

    def __call__(self, x: Array) -> tuple[Array, Array]:
        # Logits in x's dtype and softmax in float32, as the reference: another rounding would route some tokens to other experts.
        shares = jax.nn.softmax(project(x, self.weight[...]).astype(jnp.float32), axis=-1)
        values, chosen = jax.lax.top_k(shares, self.few)
        if self.normalise:
            values = values / jnp.sum(values, axis=-1, keepdims=True)
        return chosen, values.astype(x.dtype)


class Expert(nnx.Module):
    """The parameters of one expert: gate, up and down, under the names of the checkpoint."""

    def __init__(self, config: Config, names: tuple[str, str, str]):
        for name, shape in zip(names, [(config.d_model, config.d_ff)] * 2 + [(config.d_ff, config.d_model)]):
            setattr(self, name, Linear(*shape))


class Mixture(nnx.Module):
    """The sum of the outputs of each token's experts, weighted by their shares.

    Every layer of an expert sows the :class:`Routed` input that all experts read.

    Attributes:
      mesh: the mesh that the block runs on; None for one device.
    """

    def __init__(self, config: Config, names: tuple[str, str, str]):
        self.gate, self.names, self.mesh = Router(config), names, None
        self.experts = nnx.List([Expert(config, names) for _ in range(config.experts)])

    def __call__(self, x: Array) -> Array:
        chosen, shares = self.gate(x)
        layers = [[getattr(expert, name) for expert in self.experts] for name in self.names]
        gate, up, down = (jnp.stack([layer.weight[...] for layer in every]) for every in layers)
        spread = _Spread.of(self.mesh, len(x), gate.shape[1])
        output, rows, hidden = spread.run(_mix, x, chosen, shares, gate, up, down)
        for every, read in zip(layers, (rows, rows, hidden)):
            routed = Routed(read, chosen, len(self.experts), spread.slices)
            for layer in every:
                layer.sow(nnx.Intermediate, "x", routed)
        return output


class _Spread(NamedTuple):
    """How a mixture is spread over a mesh.

    Attributes:
      mesh: None for one device.
      data: the axis that splits the batch; None if none does.
      model: the axis that splits the width of the experts; None if none does.
    """

    mesh: Mesh | None
    data: str | None
    model: str | None

    @classmethod
    def of(cls, mesh: Mesh | None, batch: int, width: int) -> "_Spread":
        if mesh is None or mesh.size == 1:
            return cls(None, None, None)
        return cls(mesh, *divisible(mesh, (batch, width), P(DATA, MODEL)))

    @property
    def slices(self) -> int:
        return 1 if self.mesh is None or self.data is None else self.mesh.shape[self.data]

    def run(self, mix: Any, *arrays: Array) -> tuple[Array, Array, Array]:
        """Calls :func:`_mix` on every device, with its part of the tokens and of the width."""
        if self.mesh is None:
            return mix(None, *arrays)
        tokens, wide, narrow = P(self.data), P(None, self.model), P(None, None, self.model)
        return jax.shard_map(
            functools.partial(mix, self.model),
            mesh=self.mesh,
            in_specs=(tokens, tokens, tokens, wide, wide, narrow),
            out_specs=(tokens, tokens, P(self.data, self.model)),
            check_vma=False,
        )(*arrays)


def _mix(
    axis: str | None, x: Array, chosen: Array, shares: Array, gate: Array, up: Array, down: Array
) -> tuple[Array, Array, Array]:
    """The mixture of the tokens of one slice, with a part of every expert's width.

    Args:
      axis: the mesh axis that has the other parts; None if this is all.
      x: [batch, length, d_model].
      chosen, shares: [batch, length, experts_per_token].
      gate, up: [experts, width, d_model].
      down: [experts, d_model, width].

    Returns:
      (output as ``x``, the input of gate and up [rows, d_model], the input of down [rows, width])
    """
    tokens, few = x.reshape(-1, x.shape[-1]), chosen.shape[-1]
    route = Route.of(chosen.reshape(-1, few), len(gate))
    rows = tokens[route.token]
    hidden = jax.nn.silu(grouped_dot(rows, gate, route.stretches, x.dtype)) * grouped_dot(rows, up, route.stretches, x.dtype)
    # The sums over the model axis and over a token's experts are taken in float32 and rounded once.
    outputs, shares = grouped_dot(hidden, down, route.stretches, jnp.float32), shares.reshape(-1, few).astype(jnp.float32)
    summed = functools.reduce(jnp.add, (outputs[route.row[:, one]] * shares[:, one, None] for one in range(few)))
    if axis is not None:
        summed = jax.lax.psum(summed, axis)
    return summed.reshape(x.shape).astype(x.dtype), rows, hidden


def family(
    read_config: Callable[[Any], Config],
    mlp: str = "mlp",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    attention: Callable[[Config], nnx.Module] = llama.rotary_attention,
) -> Family:
    """A family with Llama's blocks that has a mixture in the place of the MLP.

    Args:
      mlp: the mixture's name in a block of the checkpoint.
      names: of gate, up and down in an expert of the checkpoint.
      attention: makes the attention of a block.
    """

    def block(config: Config) -> llama.PreNormBlock:
        return llama.PreNormBlock(config, attention(config), Mixture(config, names), mlp)

    gate, up, down = (f"{mlp}.experts.*.{name}" for name in names)
    return dataclasses.replace(
        llama.FAMILY,
        read_config=read_config,
        block=block,
        linears=(*llama.LINEARS[:4], gate, up, down),
        shared=(gate, up),
        sharding=llama.SHARDING
        | {gate + ".weight": P(MODEL, None), up + ".weight": P(MODEL, None), down + ".weight": P(None, MODEL)},
    )
