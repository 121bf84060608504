"""Mixtures of experts: a router sends every token to a few of many MLPs.

These experts are small gated MLPs, which compute their own tokens alone. Beside them a shared expert, which is an ordinary
gated MLP, may compute every token.

Each slice of the data axis sorts its own tokens by expert: no token leaves its slice. Over the model axis every expert is split
as an MLP of its own width would be: gate and up by their outputs, down by its inputs, with one sum over the axis at the end.
Whole experts on different devices would need no such sum, but a device whose experts are popular would let the others wait.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from optima_tpu.errors import UserError
from optima_tpu.models import llama
from optima_tpu.models.family import Cut, ExpertNames, Family, Residual, Stack
from optima_tpu.models.grouped import Stretches, grouped_dot
from optima_tpu.models.layers import ACTIVATIONS, GatedMLP, Linear, project
from optima_tpu.models.routers import GroupRouter, Groups, Router, of_sum_one, same, softmax
from optima_tpu.runtime.mesh import DATA, MODEL, divisible


@dataclasses.dataclass(frozen=True)
class Gated:
    """An expert's neurons, ``activation(gate) * up``; see ``ACTIVATIONS``."""

    activation: str = "silu"

    def __call__(self, gate: Array, up: Array) -> Array:
        return ACTIVATIONS[self.activation](gate) * up


def usual_router(config: "MixtureConfig") -> nnx.Module:
    """Makes a mixture's router: by groups, or by the softmax of logits."""
    sizes = config.d_model, config.experts, config.experts_per_token
    if config.groups is not None:
        return GroupRouter(*sizes, config.normalise, config.groups)
    return Router(*sizes, scores=softmax, shares=of_sum_one if config.normalise else same)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureConfig(llama.LlamaConfig):
    """The numbers that shape a block; ``d_ff`` is the width of one expert.

    Attributes:
      experts: number of experts in every mixture.
      experts_per_token: number of experts that a token is sent to.
      normalise: whether the shares of these experts are scaled to sum to one.
      groups: how DeepSeek and GLM choose experts; None for the largest logits.
      router: makes the router of a mixture.
      shared_width: the width of the shared expert; 0 for none.
      mixed: for every block whether it has a mixture, or an MLP in its place; empty if all have one.
      mlp_width: the width of this MLP.
      share_first: whether the share of an expert multiplies its input, in the place of its output.
      neurons: makes the input of down from the outputs of gate and up, or of the layer that is both. Neuron j may read the
        outputs 2j and 2j + 1 of that layer alone, which the model axis splits.
    """

    experts: int
    experts_per_token: int
    normalise: bool
    groups: Groups | None = None
    router: Callable[["MixtureConfig"], nnx.Module] = usual_router
    shared_width: int = 0
    mixed: tuple[bool, ...] = ()
    mlp_width: int = 0
    share_first: bool = False
    neurons: Callable[..., Array] = Gated()

    def __post_init__(self) -> None:
        groups = self.groups or Groups()
        size, rest = divmod(self.experts, groups.total)
        if rest or groups.chosen > groups.total or (groups.chosen < groups.total and size < groups.best):
            raise UserError(
                f"expected equal groups of the {self.experts} experts, each of {groups.best} or more, and topk_group of at most "
                f"n_group, got topk_group {groups.chosen} and n_group {groups.total} in config.json: check the file"
            )
        if self.experts_per_token > (reachable := size * groups.chosen):
            raise UserError(
                "expected num_experts_per_tok, or top_k_experts, of at most the number of experts, got "
                f"{self.experts_per_token} and {reachable} in config.json: check the file"
            )

    @property
    def has_mixture(self) -> bool:
        """Whether the block of this configuration has a mixture."""
        return not self.mixed or self.mixed[self.kind]

    @property
    def block_layers(self) -> Sequence[object]:
        return self.mixed

    def reach(self, name: str) -> float:
        return 1.0 if expert_of(name) is None else self.experts_per_token / self.experts


@dataclasses.dataclass(frozen=True)
class MixtureNames:
    """How a family's checkpoint names the parts of a mixture.

    Attributes:
      mlp: the mixture's name in a block; empty if its parts stand in the block itself.
      router: the router's name in the mixture.
      rows: its parameters that have a row for each expert; a router has some of them.
      wide: the names of gate and up in an expert, or the name of the one layer that is both.
      narrow: the name of down.
      shared: the name of the shared expert in the mixture.
      shared_gate: the name of the layer that gives the share of the shared expert's output; empty where it is added as it is.
      bias: whether the layers of an expert have biases.
      width: the setting of ``transformers`` that is the width of an expert.
      shared_width: the setting that is the width of the shared expert; empty where it is a multiple of an expert's.
      mlp_width: the setting that is the width of an MLP in the place of a mixture.
    """

    mlp: str = "mlp"
    router: str = "gate"
    rows: tuple[str, ...] = ("weight", "bias", "e_score_correction_bias")
    wide: tuple[str, ...] = ("gate_proj", "up_proj")
    narrow: str = "down_proj"
    shared: str = "shared_experts"
    shared_gate: str = ""
    bias: bool = False
    width: str = "moe_intermediate_size"
    shared_width: str = ""
    mlp_width: str = "intermediate_size"

    def sizes(self, config: MixtureConfig) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of the layers of an expert."""
        both = 2 * config.d_ff // len(self.wide)
        return dict.fromkeys(self.wide, (config.d_model, both)) | {self.narrow: (config.d_ff, config.d_model)}

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers of all experts, by their path in the block."""
        return tuple(self.inside("experts.*", name) for name in (*self.wide, self.narrow))

    @property
    def experts(self) -> ExpertNames:
        """The names of what the experts have, by their path in the block."""
        router = (self.inside(self.router, name) for name in self.rows)
        return ExpertNames(self.inside("experts."), tuple(router), self.inside("shares"), self.layers[-1])

    def stacks(self, turned: bool) -> dict[str, Stack]:
        """``Family.stacks`` where tensors hold the layers of all experts.

        Gate and up are one tensor, down is another; ``turned`` as in :class:`Stack`.
        """
        *wide, narrow = self.layers
        kinds = {"": ".weight"} | ({"_bias": ".bias"} if self.bias else {})
        return {
            self.inside("experts", name + ending): Stack(tuple(layer + kind for layer in layers), turned)
            for name, layers in (("gate_up_proj", wide), ("down_proj", [narrow]))
            for ending, kind in kinds.items()
        }

    def inside(self, *names: str) -> str:
        """The path in the block of a part of the mixture."""
        return ".".join(filter(None, (self.mlp, *names)))

    @property
    def shared_layers(self) -> tuple[str, ...]:
        """The layers of the shared expert, by their path in the block."""
        return tuple(f"{self.mlp}.{self.shared}.{name}_proj" for name in ("gate", "up", "down"))


def expert_of(name: str) -> int | None:
    """The expert of a layer, 7 for "mlp.experts.7.up_proj"; None if none."""
    match = re.search(r"(?:^|\.)experts\.(\d+)\.", name)
    return int(match[1]) if match else None


class Route(NamedTuple):
    """The tokens of a slice, sorted by expert.

    A token has one row for each of its experts.

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
        """From the experts of each token, [tokens, experts_per_token]."""
        flat = chosen.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        row = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)), unique_indices=True)
        count = jnp.bincount(flat, length=experts)
        return cls(order // chosen.shape[1], flat[order], row.reshape(chosen.shape), Stretches(jnp.cumsum(count) - count, count))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows", "chosen"], meta_fields=["experts", "slices"])
@dataclasses.dataclass(frozen=True)
class Routed:
    """What a layer of all experts reads: the rows of their tokens.

    Each slice of the data axis sorts its own rows, expert after expert.

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


def check_given(config: Any, *names: str) -> None:
    """Raises UserError, by name, for null settings of a configuration."""
    if missing := [name for name in names if getattr(config, name) is None]:
        raise UserError(f"expected {', '.join(missing)} in config.json, got none: check the file")


class Expert(nnx.Module):
    """The parameters of one expert, under the names of the checkpoint."""

    def __init__(self, config: MixtureConfig, layout: MixtureNames):
        for name, sizes in layout.sizes(config).items():
            setattr(self, name, Linear(*sizes, bias=layout.bias))


class Experts(nnx.Module):
    """A router and its experts.

    Every layer of an expert sows the :class:`Routed` input that all experts read. The mixture sows the ``shares`` of each token's
    experts, which multiply their outputs: 1 where the shares multiply the inputs. If the rows that the narrow layers read are set
    as ``known`` of the first expert's narrow layer, nothing computes them.

    Attributes:
      mesh: the mesh that the block runs on; None for one device.
    """

    def __init__(self, config: MixtureConfig, layout: MixtureNames):
        self.layout, self.mesh, self.way = layout, None, Way(config.neurons, config.share_first)
        setattr(self, layout.router, config.router(config))
        self.experts = nnx.List([Expert(config, layout) for _ in range(config.experts)])

    def routed_output(self, x: Array, routed_by: Array | None = None) -> Array:
        """The outputs of each token's experts, weighted by their shares.

        The router reads ``routed_by``, or ``x`` if that is None.
        """
        layout = self.layout
        chosen, shares = getattr(self, layout.router)(x if routed_by is None else routed_by)
        self.sow(nnx.Intermediate, "shares", jnp.ones_like(shares) if self.way.share_first else shares)
        layers = [[getattr(expert, name) for expert in self.experts] for name in (*layout.wide, layout.narrow)]
        weights = [jnp.stack([layer.weight[...] for layer in every]) for every in layers]
        biases = [jnp.stack([layer.bias[...] for layer in every]) for every in layers if layout.bias]
        last = layers[-1][0]
        known = last.known[...] if hasattr(last, "known") else None
        output, wide, narrow = mixed(self.mesh, self.way, x, Sending(chosen, shares), weights, biases, known)
        for every, read in zip(layers, (*(wide for _ in layout.wide), narrow)):
            for layer in every:
                layer.sow(nnx.Intermediate, "x", read)
        return output


class Mixture(Experts):
    """Experts in the place of an MLP, with a shared expert if configured."""

    def __init__(self, config: MixtureConfig, layout: MixtureNames):
        super().__init__(config, layout)
        if config.shared_width:
            setattr(self, layout.shared, GatedMLP(config.d_model, config.shared_width, activation=config.activation))
        if layout.shared_gate:
            setattr(self, layout.shared_gate, Gate(config.d_model))

    def shared_output(self, x: Array) -> Array:
        """What the shared expert adds."""
        shared, gate = getattr(self, self.layout.shared), self.layout.shared_gate
        return getattr(self, gate)(x) * shared(x) if gate else shared(x)


class Gate(nnx.Module):
    """The shared expert's share of each token's output, [batch, length, 1]."""

    def __init__(self, d_model: int):
        self.weight = nnx.Param(jnp.zeros((1, d_model)))

    def __call__(self, x: Array) -> Array:
        return jax.nn.sigmoid(project(x, self.weight[...]))


class MixtureBlock(llama.DecoderBlock):
    """A block with a mixture.

    It also sows the residual stream without the shared expert's output, as "before_shared".
    """

    def behind_attention(self, x: Array) -> Array:
        mixture, normed = getattr(self, self.name), self._normed(self.norms.before_mlp, x)
        routed: Array = mixture.routed_output(normed)
        if not hasattr(mixture, mixture.layout.shared):
            return routed
        self.sow(nnx.Intermediate, "before_shared", x + routed)
        return routed + mixture.shared_output(normed)


class Sending(NamedTuple):
    """Each token's experts and shares, [batch, length, experts_per_token]."""

    chosen: Array
    shares: Array


@dataclasses.dataclass(frozen=True)
class Way:
    """How a mixture computes; equal ways share their compiled programs."""

    neurons: Callable[..., Array]
    share_first: bool = False


def mixed(
    mesh: Mesh | None, way: Way, x: Array, sent: Sending, weights: list[Array], biases: list[Array], known: Array | None = None
) -> tuple[Array, Routed, Routed]:
    """Computes the experts of a mixture for tokens x [batch, length, d_model].

    Args:
      mesh: the mesh that computes it; None for one device.
      weights, biases: of the layers of all experts, each [experts, ...]. The layer that ends an expert is the last one. The
        list of biases is empty if there are none.
      known: the rows that the last layer reads, from an earlier pass of the same tokens; None computes them.

    Returns:
      (output as ``x``, what the wide layers read, what the last one reads)
    """
    mix, slices = functools.partial(_mix, None, way), 1
    if mesh is not None and mesh.size > 1:
        data, model = divisible(mesh, (len(x), weights[-1].shape[2]), P(DATA, MODEL))
        slices = 1 if data is None else mesh.shape[data]
        tokens, wide, narrow, read = P(data), P(None, model), P(None, None, model), P(data, model)
        of_biases = [*(wide for _ in biases[1:]), P()][: len(biases)]
        # Every device has its part of the tokens and of the width.
        mix = jax.shard_map(
            functools.partial(_mix, model, way),
            mesh=mesh,
            in_specs=(tokens, tokens, [*(wide for _ in weights[1:]), narrow], of_biases, read),
            out_specs=(tokens, tokens, read),
            check_vma=False,
        )
    output, *inputs = mix(x, sent, weights, biases, known)
    wide_input, narrow_input = (Routed(rows, sent.chosen, len(weights[-1]), slices) for rows in inputs)
    return output, wide_input, narrow_input


def _mix(
    axis: str | None, way: Way, x: Array, sent: Sending, weights: list[Array], biases: list[Array], known: Array | None
) -> tuple[Array, Array, Array]:
    """The mixture of a slice's tokens, for a part of each expert's width.

    Args:
      axis: the mesh axis that has the other parts; None if this is all.
      x: [batch, length, d_model].
      weights: of the wide layers [experts, width, d_model], then of the narrow one [experts, d_model, width].
      biases: of the same layers, [experts, d_out]; empty for none.
      known: the input of the narrow one; None computes it.

    Returns:
      (output as ``x``, the input of the wide layers [rows, d_model], the input of the narrow one [rows, width])
    """
    (chosen, shares), (*wide, narrow) = (array.reshape(-1, array.shape[-1]) for array in sent), weights
    route, few = Route.of(chosen, len(narrow)), chosen.shape[-1]
    rows = x.reshape(-1, x.shape[-1])[route.token]
    if way.share_first:
        rows *= jnp.zeros_like(rows[:, 0]).at[route.row].set(shares, unique_indices=True)[:, None]
        shares = jnp.ones_like(shares)
    if known is None:
        outputs = [grouped_dot(rows, weight, route.stretches, x.dtype) for weight in wide]
        if biases:
            outputs = [output + bias[route.expert].astype(x.dtype) for output, bias in zip(outputs, biases)]
        hidden = way.neurons(*outputs)
    else:
        hidden = known
    # The sums over the model axis and over a token's experts are taken in float32 and rounded once.
    added, shares = grouped_dot(hidden, narrow, route.stretches, jnp.float32), shares.astype(jnp.float32)
    summed = functools.reduce(jnp.add, (added[route.row[:, one]] * shares[:, one, None] for one in range(few)))
    if axis is not None:
        summed = jax.lax.psum(summed, axis)
    if biases:  # once, not on every device of the axis
        summed += functools.reduce(
            jnp.add, (biases[-1][chosen[:, one]].astype(jnp.float32) * shares[:, one, None] for one in range(few))
        )
    return summed.reshape(x.shape).astype(x.dtype), rows, hidden


def expert_neurons(config: MixtureConfig, layout: MixtureNames) -> Cut | None:
    """The neurons of each expert.

    If the shared expert's width follows from an expert's, it loses as large a share of its neurons.
    """
    if not config.experts:
        return None
    shared = 0 if layout.shared_width else config.shared_width // config.d_ff
    read_by = (layout.layers[-1], *layout.shared_layers[-1:] * bool(shared))
    return Cut("neurons of each expert", config.d_ff, 1 + shared, read_by, dict.fromkeys(layout.wide, ()), {layout.width: 1})


def shared_neurons(config: MixtureConfig, layout: MixtureNames) -> Cut | None:
    """The neurons of a shared expert whose width is a setting of its own."""
    if not (config.shared_width and layout.shared_width):
        return None
    makers, settings = dict.fromkeys(("gate_proj", "up_proj"), ()), {layout.shared_width: 1}
    return Cut("neurons of the shared expert", config.shared_width, 1, layout.shared_layers[-1:], makers, settings)


def mlp_neurons(config: MixtureConfig, layout: MixtureNames) -> Cut | None:
    """The neurons of the MLPs that are in the place of mixtures."""
    if not config.mixed or all(config.mixed):
        return None
    makers = dict.fromkeys(("gate_proj", "up_proj"), ())
    return Cut("neurons", config.mlp_width, 1, (f"{layout.mlp}.down_proj",), makers, {layout.mlp_width: 1})


def family(
    settings: Callable[[Any], llama.Settings],
    layout: MixtureNames = MixtureNames(),
    *,
    made: Callable[..., MixtureConfig] = MixtureConfig,
    attention: Callable[[Any], nnx.Module] = llama.RotaryAttention,
    **row: Any,
) -> Family:
    """A family of Llama's blocks, all or some with mixtures in place of MLPs.

    Args:
      settings, made, row: see :func:`optima_tpu.models.llama.relative`.
      attention: makes the attention of a block.
    """

    def block(config: MixtureConfig) -> llama.DecoderBlock:
        if config.has_mixture:
            return MixtureBlock(config, attention(config), Mixture(config, layout), layout.mlp)
        mlp = GatedMLP(config.d_model, config.mlp_width, activation=config.activation)
        return llama.DecoderBlock(config, attention(config), mlp, layout.mlp)

    def named(name: str) -> str:
        return name.replace("mlp.", layout.mlp + ".", 1) if name.startswith("mlp.") else name

    *wide, narrow = layout.layers
    *_, down = layout.shared_layers
    declared: dict[str, Any] = dict(
        block=block,
        linears=(*map(named, llama.LINEARS), *layout.shared_layers, *layout.layers),
        narrow=(*map(named, llama.FAMILY.narrow), down, narrow),
        # A shared expert that has a gate adds its share only.
        residuals={named(name): around for name, around in llama.FAMILY.residuals.items()}
        | ({} if layout.shared_gate else {down: Residual("before_shared", "after_mlp")}),
        cuts={
            **llama.FAMILY.cuts,
            "neuron": tuple(functools.partial(each, layout=layout) for each in (expert_neurons, shared_neurons, mlp_neurons)),
        },
        experts=layout.experts,
        shared=tuple(wide),
    )
    return llama.relative(settings, made=made, **{**declared, **row})
