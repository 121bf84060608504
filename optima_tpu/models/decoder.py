"""A pretrained decoder on a mesh, one block at a time.

Weights stay in the checkpoint until a block is requested. Hidden states stay on the hosts and go to the devices in batches,
unless a walk keeps them there. So the devices hold one block and two batches, and the hosts hold one more block, for a model of
any depth.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from transformers import PretrainedConfig

from optima_tpu.errors import UserError, plural
from optima_tpu.method.layer_rules import kind_name
from optima_tpu.models import family_of
from optima_tpu.models.activations import Activations, HiddenStates, held_rows
from optima_tpu.models.checkpoints.source import TensorSource
from optima_tpu.models.family import DecoderConfig, Family, Positions, ReadTensor
from optima_tpu.models.layers import Known, project
from optima_tpu.runtime.mesh import MODEL, divisible, place, spread, struct_on
from optima_tpu.runtime.processes import together


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model that is read block by block.

    Blocks may differ in their layers: ``graph``, ``state``, ``block_shapes``, ``linears`` and ``sharding`` are those of the
    blocks like block ``config.kind``, and :meth:`at` gives the decoder of another block.

    Attributes:
      family: see ``optima_tpu.models``.
      root: the prefix of tensor names in this checkpoint, one of the family's roots.
      config: what the family read from the model's configuration.
      tensors: the source of its weights, under their Hugging Face names.
      mesh: axes ("data", "model").
      batch: sequences that each step gives to one slice of the data axis.
    """

    family: Family
    root: str
    config: DecoderConfig
    tensors: TensorSource
    mesh: Mesh
    batch: int = 4

    @classmethod
    def open(
        cls, hf_config: PretrainedConfig, tensors: TensorSource, mesh: Mesh, batch: int = 4, general: bool = False
    ) -> "Decoder":
        """Opens a model.

        Args:
          general: whether the model is run by its code in torch though it has a family.

        Raises:
          UserError: the architecture, or a setting of it, is not supported.
        """
        family = family_of(hf_config, general)
        return cls(family, family.root(tensors.names()), family.read_config(hf_config), tensors, mesh, batch)

    def at(self, index: int) -> "Decoder":
        """The same decoder, of the blocks like block ``index``."""
        kind = self.config.kind_of(index)
        if kind != self.config.kind and kind not in self._others:
            self._others[kind] = dataclasses.replace(self, config=dataclasses.replace(self.config, kind=kind))
        return self if kind == self.config.kind else self._others[kind]

    @functools.cached_property
    def _others(self) -> dict[int, "Decoder"]:
        return {}

    @property
    def idle_weights(self) -> int:
        """How many weights of experts a token does not pass through."""
        return round(
            sum(
                len(indices) * (1 - alike.config.reach(name)) * math.prod(shape)
                for alike, indices in self.stretches
                for name, shape in alike.block_shapes.items()
            )
        )

    @functools.cached_property
    def stretches(self) -> tuple[tuple["Decoder", range], ...]:
        """Runs of consecutive blocks that are alike: (decoder, indices)."""
        alike = itertools.groupby(range(self.config.blocks), self.config.kind_of)
        runs = [list(indices) for _, indices in alike]
        return tuple((self.at(indices[0]), range(indices[0], indices[-1] + 1)) for indices in runs)

    @property
    def sizes(self) -> tuple[Family, list[tuple[Sequence[int], Mapping[str, tuple[int, ...]]]]]:
        """The family, and the shapes of each stretch of blocks.

        Decoders with equal sizes have equal programs.
        """
        return self.family, [(indices, alike.block_shapes) for alike, indices in self.stretches]

    @functools.cached_property
    def graph(self) -> nnx.GraphDef:
        """The static half of a block."""
        return self._block[0]

    @functools.cached_property
    def _block(self) -> tuple[nnx.GraphDef, nnx.State]:
        def block(config: DecoderConfig) -> nnx.Module:
            built = self.family.block(config)
            # Mixtures of experts keep the tokens of a device on it, and TPUs have a kernel for attention: they need the mesh.
            built.set_attributes(mesh=self.mesh, raise_if_not_found=False)
            return built

        return _abstract(block, self.config)

    @functools.cached_property
    def _final(self) -> tuple[nnx.GraphDef, nnx.State]:
        return _abstract(self.family.final, self.config)

    @functools.cached_property
    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter of a block, "self_attn.q_proj.weight"."""
        return _shapes(self._block[1])

    def input_width(self, name: str) -> int:
        """Width of the input of a linear layer of a block."""
        return self.block_shapes[name + ".weight"][1]

    @functools.cached_property
    def linears(self) -> tuple[str, ...]:
        """The layers of a block that are pruned, by their path in it."""
        kinds = {kind: position for position, kind in enumerate(self.family.linears)}
        names = [name.removesuffix(".weight") for name in self.block_shapes if name.endswith(".weight")]
        linears = [name for name in names if kind_name(name) in kinds]
        return tuple(sorted(linears, key=lambda name: (list(map(int, re.findall(r"\d+", name))), kinds[kind_name(name)])))

    @functools.cached_property
    def attended(self) -> str:
        """The layer of a block that reads the output of attention."""
        return next(name for name in self.family.attended if name in self.linears)

    def sharding(self, name: str) -> P:
        """The wanted sharding of a block's parameter.

        Dimensions that the mesh does not divide are replicated.
        """
        return self.family.sharding(kind_name(name))

    def prefix(self, index: int) -> str:
        """The prefix of a block's parameter names in the checkpoint."""
        return self.root + self.family.layers.format(index)

    def tensor_names(self) -> list[str]:
        """Every tensor that the model reads."""
        blocks = [self.prefix(i) + name for i in range(self.config.blocks) for name in self.at(i).block_shapes]
        return [*self.end_shapes, *blocks]

    @functools.cached_property
    def end_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor outside the blocks, by its checkpoint name."""
        family, config = self.family, self.config
        table = (config.vocab, config.d_embedding)
        inner = {family.embedding: table} | family.embedding_extras(config) | _shapes(self._final[1])
        head = ({} if config.tied else {family.head: table}) | ({family.head_bias: table[:1]} if config.head_bias else {})
        return {self.root + name: shape for name, shape in inner.items()} | head

    def blocks(self, indices: Sequence[int]) -> Iterator[dict[str, Array]]:
        """Yields the parameters of several blocks, block by block.

        The next block is read while the caller works on one. If a tensor's sizes allow, every device reads its own share, so
        that no byte is read twice on any host. Then the devices exchange the parts that the forward pass needs on several
        devices.

        Raises:
          UserError: a tensor has another shape than the configuration says, or holds a NaN or an infinity.
        """
        with concurrent.futures.ThreadPoolExecutor(1) as reader:
            waiting = collections.deque(reader.submit(self.at(index)._read_block, index) for index in indices[:1])
            for index, following in itertools.pairwise(indices):
                waiting.append(reader.submit(self.at(following)._read_block, following))
                yield self.at(index)._place_block(together(waiting.popleft().result))
            if waiting:
                yield self.at(indices[-1])._place_block(together(waiting.popleft().result))

    @property
    def overflowed(self) -> str:
        """Says why activations are not finite, and what to do."""
        dtype = self.tensors.dtype(self.root + self.family.embedding)
        if dtype == np.float32:
            return "the model overflows even in float32, so its weights are damaged or were never finite: get the model again"
        return f"the model overflows in {dtype}, or its weights are damaged; try --dtype float32"

    def embed(self, tokens: np.ndarray) -> Activations:
        """Hidden states of tokens [windows, length] before the first block."""
        own_tokens, positions = tokens[held_rows(self.mesh, 0, len(tokens))], np.arange(tokens.shape[1])
        # Writable: the output of a block overwrites its input.
        hidden = together(lambda: np.require(self.embedded(self._read, own_tokens, positions), requirements="W"))
        return Activations(self.mesh, 0, len(tokens), hidden)

    def embedded(self, read: ReadTensor, tokens: Array | np.ndarray, positions: Array | np.ndarray) -> Array | np.ndarray:
        """Embeddings of tokens [windows, length]; see ``Family.embed``."""
        if self.family.embed is None:
            return read(self.family.embedding)[tokens]
        return self.family.embed(self.config, read, tokens, positions)

    def apply(
        self,
        index: int,
        parameters: Mapping[str, Array],
        hidden: HiddenStates,
        batch: int | None = None,
        known: Mapping[str, HiddenStates] | None = None,
    ) -> None:
        """Runs block ``index`` over the hidden states, in place.

        Args:
          batch: stands in for the decoder's.
          known: inputs of layers for the same windows, by the layer's name; what they depend on is not computed.
        """
        positions, alike, batch = self.positions(index, hidden.length), self.at(index), batch or self.batch
        state = alike.state(parameters)
        with hidden.put_behind() as put:
            for part, inputs in zip(hidden.batches(batch), self.known(known or {}, batch)):
                put(part.rows, run_block(alike.graph, state, part.hidden, positions, inputs))

    def known(self, inputs: Mapping[str, HiddenStates], batch: int) -> Iterator[dict[str, Array]]:
        """The known inputs of each batch for :func:`forward`."""
        if not inputs:
            return itertools.repeat({})
        parts = zip(*(every.batches(batch) for every in inputs.values()))
        return ({name: part.hidden for name, part in zip(inputs, each)} for each in parts)

    def state(self, parameters: Mapping[str, Array | jax.ShapeDtypeStruct]) -> nnx.State:
        """The parameters as the state that belongs to ``graph``."""
        return _filled(self._block[1], parameters)

    def positions(self, index: int, length: int) -> Positions:
        """The position data of block ``index``, on every device.

        Raises:
          UserError: see :meth:`DecoderConfig.check`.
        """
        together(lambda: self.config.check(self.config.kind_of(index), length))
        return jax.tree.map(lambda array: place(self.mesh, array, P()), self.config.positions(index, length))

    def head(self) -> "Head":
        """The head on the mesh: makes logits of the last block's output."""
        return self._head(self.place_ends)

    def head_struct(self) -> "Head":
        """Shapes, dtypes and shardings of :meth:`head`; no weight is read."""
        return self._head(
            lambda specs: {
                name: struct_on(self.mesh, self.end_shapes[name], self.tensors.dtype(name), spec) for name, spec in specs.items()
            }
        )

    def _head(self, placing: Callable[[Mapping[str, P]], dict[str, Array]]) -> "Head":
        graph, abstract = self._final
        name = self.root + self.family.embedding if self.config.tied else self.family.head
        biases = {self.family.head_bias: P(MODEL)} if self.config.head_bias else {}
        placed = placing({self.root + inner: P() for inner in _shapes(abstract)} | {name: P(MODEL, None)} | biases)
        projection, bias = placed.pop(name), placed.pop(self.family.head_bias, None)
        parameters = {name.removeprefix(self.root): array for name, array in placed.items()}
        return Head(_filled(abstract, parameters), projection, bias, graph, self.config.logit_cap, self.config.logit_scale)

    def _read(self, name: str) -> np.ndarray:
        """Reads a tensor outside the blocks, named without the root."""
        name = self.root + name
        self._check_shape(name, self.end_shapes[name])
        array = self.tensors.read(name)
        _check(name, array)
        if name == self.root + self.family.embedding and not array.any():
            raise UserError(f"{name} holds only zeros: the checkpoint is damaged or was never filled; get the model again")
        return array

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        stored = tuple(self.tensors.shape(name))
        if stored != shape:
            raise UserError(
                f"{name}: expected shape {shape} from the model's configuration, got {stored}; "
                "config.json and weights do not belong together"
            )

    def _read_block(self, index: int) -> dict[str, "Parts"]:
        read = {
            name: self._read_parts(self.prefix(index) + name, shape, self.sharding(name))
            for name, shape in self.block_shapes.items()
        }
        # One matrix of zeros may be meant: blocks are added to a model with an output of zero.
        if not any(part.any() for name, parts in read.items() if len(self.block_shapes[name]) > 1 for part in parts.values()):
            raise UserError(
                f"all matrices of {self.prefix(index)[:-1]} hold only zeros: the checkpoint is damaged or was never filled; get "
                "the model again"
            )
        return read

    def _place_block(self, read: Mapping[str, "Parts"]) -> dict[str, Array]:
        return {name: self._place(read[name], shape, self.sharding(name)) for name, shape in self.block_shapes.items()}

    def _read_parts(self, name: str, shape: tuple[int, ...], spec: P) -> "Parts":
        """Reads the slices of this process's devices under :func:`spread`."""
        self._check_shape(name, shape)
        parts: Parts = {}
        read = NamedSharding(self.mesh, spread(self.mesh, shape, spec))
        for index in read.addressable_devices_indices_map(shape).values():
            assert index is not None, "the devices of a mesh hold a part of every array on it"
            if str(index) not in parts:
                parts[str(index)] = self.tensors.read(name, index)
                _check(name, parts[str(index)])
        return parts

    def place_ends(self, specs: Mapping[str, P]) -> dict[str, Array]:
        """Reads tensors outside the blocks to the mesh, by their names."""
        wanted = {name: (self.end_shapes[name], spec) for name, spec in specs.items()}
        read = together(lambda: {name: self._read_parts(name, *how) for name, how in wanted.items()})
        return {name: self._place(read[name], *how) for name, how in wanted.items()}

    def _place(self, parts: "Parts", shape: tuple[int, ...], spec: P) -> Array:
        """A tensor on the mesh, split as far as the mesh divides it."""
        read = NamedSharding(self.mesh, spread(self.mesh, shape, spec))
        array = jax.make_array_from_callback(shape, read, lambda index: parts[str(index)])
        wanted = NamedSharding(self.mesh, divisible(self.mesh, shape, spec))
        return array if read.is_equivalent_to(wanted, len(shape)) else jax.device_put(array, wanted)


Parts = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Head:
    """The family's ``final`` module, and what makes logits of its output.

    The projection is [vocab, d_embedding] and the bias [vocab] or None; ``cap`` and ``scale`` are those of the logits.
    """

    state: nnx.State
    projection: Array
    bias: Array | None
    graph: nnx.GraphDef
    cap: float | None
    scale: float = 1.0


jax.tree_util.register_dataclass(Head, data_fields=["state", "projection", "bias"], meta_fields=["graph", "cap", "scale"])


@functools.partial(jax.jit, static_argnums=0)
def run_block(
    graph: nnx.GraphDef, state: nnx.State, hidden: Array, positions: Positions, known: Mapping[str, Array] | None = None
) -> Array:
    """Runs one block over [batch, length, d_model]; see :func:`forward`."""
    return forward(graph, state, hidden, positions, known)[0]


def forward(
    graph: nnx.GraphDef, state: nnx.State, hidden: Array, positions: Positions, known: Mapping[str, Array] | None = None
) -> tuple[Array, dict[str, Any]]:
    """Runs one block; also returns the input of every linear layer.

    Traceable. The inputs are {"self_attn.q_proj": [batch, length, d_in], ...}.

    Layers that share an input map to the same array, and the layers of all experts to one ``experts.Routed``. The residual
    stream [batch, length, d_model] is in the same dictionary, under the names of ``Family.residuals``.

    Args:
      known: the inputs of some layers, by the layer's name, from an earlier pass of the same tokens. The compiler drops what
        would have computed them.
    """
    block = nnx.merge(graph, state)
    for name, value in (known or {}).items():
        layer_of(block, name).known = Known(value)
    # Float32 models keep float32 products on every platform; bfloat16 ones are not affected.
    with jax.default_matmul_precision("highest"):
        output, taps = nnx.capture(block, nnx.Intermediate)(hidden, positions)
    # A layer sows its input as "x"; what the block itself sows has its own name.
    return output, {_name(path[:-1] if path[-1] == "x" else path): value for path, (value,) in nnx.to_flat_state(taps)}


def head_logits(head: Head, hidden: Array) -> Array:
    """Logits [batch, length, vocab] float32 of hidden states. Traceable."""
    states = nnx.merge(head.graph, head.state)(hidden)
    # Straight to float32: rounding logits to bfloat16 would cost perplexity its third digit.
    logits = project(states, head.projection, jnp.float32)
    logits = _bfloat16_gradient(logits) if states.dtype == jnp.bfloat16 else logits
    logits = logits if head.bias is None else logits + head.bias.astype(jnp.float32)
    logits = logits if head.scale == 1 else head.scale * logits
    return head.cap * jnp.tanh(logits / head.cap) if head.cap else logits


@jax.custom_vjp
def _bfloat16_gradient(logits: Array) -> Array:
    """The logits, whose gradient is rounded before the product with the head.

    With a float32 gradient that product, the largest of a training step, takes six passes of a TPU's matrix unit instead of
    one. The product's result is rounded to bfloat16 anyway.
    """
    return logits


_bfloat16_gradient.defvjp(lambda logits: (logits, None), lambda _, gradient: (gradient.astype(jnp.bfloat16).astype(jnp.float32),))


def _abstract(module: Callable[[Any], nnx.Module], config: DecoderConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: module(config)))


def _shapes(state: nnx.State) -> dict[str, tuple[int, ...]]:
    return {_name(path): leaf.shape for path, leaf in nnx.to_flat_state(state)}


def _filled(state: nnx.State, parameters: Mapping[str, Array | jax.ShapeDtypeStruct]) -> nnx.State:
    return nnx.from_flat_state([(path, leaf.replace(parameters[_name(path)])) for path, leaf in nnx.to_flat_state(state)])


def layer_of(block: nnx.Module, name: str) -> Any:
    """A layer of a block by its name, "self_attn.o_proj"."""
    return functools.reduce(getattr, name.split("."), block)


def _name(path: tuple) -> str:
    return ".".join(map(str, path))


def _check(name: str, array: np.ndarray) -> None:
    if not np.isfinite(array).all():
        raise UserError(
            f"{name} holds {plural(int(np.sum(~np.isfinite(array))), 'value')} of NaN or infinity in {array.dtype}: "
            "the checkpoint is damaged, or does not fit --dtype"
        )
