"""A pretrained decoder on a mesh, one block at a time.

Weights stay where the checkpoint has them until a block is asked for; hidden states stay on the host and visit the devices in
batches. So one block and one batch are resident on the devices, whatever the model's depth.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optima_tpu.errors import UserError
from optima_tpu.models import family_of
from optima_tpu.models.layers import RMSNorm, project
from optima_tpu.sharding import DATA, MODEL, divisible, place
from optima_tpu.weights.source import TensorSource


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model that is read block by block.

    Attributes:
      family: the module of its family; see ``optima_tpu.models``.
      config: the family's ``Config``.
      tensors: where its weights are read from, under their Hugging Face names.
      mesh: axes ("data", "model").
      batch: sequences that each step gives to one slice of the data axis.
    """

    family: ModuleType
    config: object
    tensors: TensorSource
    mesh: Mesh
    batch: int = 4

    @classmethod
    def open(cls, hf_config, tensors: TensorSource, mesh: Mesh, batch: int = 4) -> "Decoder":
        """Raises UserError when the architecture, or a setting of it, is not supported."""
        family = family_of(hf_config)
        return cls(family, family.Config.from_hf(hf_config), tensors, mesh, batch)

    @functools.cached_property
    def graph(self) -> nnx.GraphDef:
        """The static half of a block, the same for all."""
        return nnx.split(nnx.eval_shape(lambda: self.family.Block(self.config)))[0]

    @functools.cached_property
    def _abstract(self) -> nnx.State:
        return nnx.split(nnx.eval_shape(lambda: self.family.Block(self.config)))[1]

    @functools.cached_property
    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of a block, by its name inside the block ("self_attn.q_proj.weight")."""
        return {_name(path): leaf.shape for path, leaf in nnx.to_flat_state(self._abstract)}

    def prefix(self, index: int) -> str:
        """What stands before a block's parameter names in the checkpoint."""
        return self.family.PREFIX.format(index)

    def tensor_names(self) -> list[str]:
        """Every tensor that the model reads."""
        blocks = [self.prefix(i) + name for i in range(self.config.blocks) for name in self.block_shapes]
        ends = [self.family.EMBEDDING, self.family.FINAL_NORM] + ([] if self.config.tied else [self.family.HEAD])
        return ends + blocks

    def load_block(self, index: int) -> dict[str, Array]:
        """Block ``index``'s parameters on the mesh, in the checkpoint's dtypes. Each device reads its own slices.

        Raises:
          UserError: a tensor has another shape than the configuration says, or holds a NaN or an infinity.
        """
        return {name: self._load(self.prefix(index) + name, shape, self.family.SHARDING.get(name, P()))
                for name, shape in self.block_shapes.items()}

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """Hidden states before the first block, [samples, length, d_model] on the host, in the embedding's dtype."""
        table = self.tensors.read(self.family.EMBEDDING)
        _check(self.family.EMBEDDING, table)
        return table[tokens]

    def apply(self, parameters: Mapping[str, Array], hidden: np.ndarray) -> None:
        """Runs a block over ``hidden`` [samples, length, d_model] in place."""
        for batch in self.batches(hidden):
            output = run_block(self.graph, self.state(parameters), batch.hidden, *self.rope(hidden.shape[1]))
            hidden[batch.rows] = np.asarray(output)[: batch.count]

    def state(self, parameters: Mapping[str, Array]) -> nnx.State:
        """The parameters as the state that belongs to ``graph``."""
        return nnx.from_flat_state([(path, leaf.replace(parameters[_name(path)]))
                                    for path, leaf in nnx.to_flat_state(self._abstract)])

    def rope(self, length: int) -> tuple[Array, Array]:
        """The rotary tables (cos, sin) of the first ``length`` positions, on every device."""
        tables = self.config.rope.tables(length, self.config.head_dim)
        return jax.device_put(tables, NamedSharding(self.mesh, P()))

    def batches(self, hidden: np.ndarray) -> Iterator["Batch"]:
        """Cuts hidden states into batches of one shape, the last one filled up with zeros."""
        size = min(self.batch, -(-hidden.shape[0] // self.mesh.shape[DATA])) * self.mesh.shape[DATA]
        for first in range(0, hidden.shape[0], size):
            part = hidden[first:first + size]
            count = part.shape[0]
            if count < size:
                part = np.concatenate([part, np.zeros((size - count, *part.shape[1:]), part.dtype)])
            yield Batch(slice(first, first + count), count, place(self.mesh, part, P(DATA)),
                        place(self.mesh, np.arange(size) < count, P(DATA)))

    def head(self) -> "Head":
        """The final norm and the output projection on the mesh."""
        name = self.family.EMBEDDING if self.config.tied else self.family.HEAD
        return Head(self._load(self.family.FINAL_NORM, (self.config.d_model,), P()),
                    self._load(name, (self.config.vocab, self.config.d_model), P(MODEL, None)))

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [samples, length, vocab] float32 of a few sequences, on the host."""
        hidden = self.embed(tokens)
        for index in range(self.config.blocks):
            self.apply(self.load_block(index), hidden)
        head = self.head()
        return np.concatenate([np.asarray(run_head(head, batch.hidden, self.config.eps))[: batch.count]
                               for batch in self.batches(hidden)])

    def _load(self, name: str, shape: tuple[int, ...], spec: P) -> Array:
        found = tuple(self.tensors.shape(name))
        if found != shape:
            raise UserError(f"{name}: expected shape {shape} from the model's configuration, got {found}; "
                            "config.json and weights do not belong together")

        def read(index):
            part = self.tensors.read(name, index)
            _check(name, part)
            return part

        sharding = NamedSharding(self.mesh, divisible(self.mesh, shape, spec))
        return jax.make_array_from_callback(shape, sharding, read)


class Batch:
    """A few sequences on the mesh: ``hidden`` [size, length, d_model], of which the first ``count`` are ``rows`` of the host's."""

    def __init__(self, rows: slice, count: int, hidden: Array, valid: Array):
        self.rows, self.count, self.hidden, self.valid = rows, count, hidden, valid


@dataclasses.dataclass(frozen=True)
class Head:
    """Final norm [d_model] and output projection [vocab, d_model]."""

    norm: Array
    projection: Array


jax.tree_util.register_dataclass(Head, data_fields=["norm", "projection"], meta_fields=[])


@functools.partial(jax.jit, static_argnums=0)
def run_block(graph: nnx.GraphDef, state: nnx.State, hidden: Array, cos: Array, sin: Array) -> Array:
    """One block over a batch: [batch, length, d_model] to the same."""
    return forward(graph, state, hidden, cos, sin)[0]


def forward(graph: nnx.GraphDef, state: nnx.State, hidden: Array, cos: Array, sin: Array) -> tuple[Array, dict[str, Array]]:
    """The traceable part of :func:`run_block`, with what every linear layer read: {"self_attn.q_proj": [batch, length, d_in]}.

    Layers that share an input map to the same array.
    """
    # Float32 models keep float32 products on every platform; bfloat16 ones are not affected.
    with jax.default_matmul_precision("highest"):
        output, taps = nnx.capture(nnx.merge(graph, state), nnx.Intermediate)(hidden, cos, sin)
    return output, {_name(path[:-1]): value for path, (value,) in nnx.to_flat_state(taps)}


@functools.partial(jax.jit, static_argnums=2)
def run_head(head: Head, hidden: Array, eps: float) -> Array:
    """Logits [batch, length, vocab] in float32 of hidden states [batch, length, d_model]."""
    return head_logits(head, hidden, eps)


def head_logits(head: Head, hidden: Array, eps: float) -> Array:
    """The traceable part of :func:`run_head`."""
    norm = RMSNorm(hidden.shape[-1], eps=eps)
    norm.weight[...] = head.norm
    # Straight to float32: rounding logits to bfloat16 would cost perplexity its third digit.
    return project(norm(hidden), head.projection, jnp.float32)


def _name(path: tuple) -> str:
    return ".".join(map(str, path))


def _check(name: str, array: np.ndarray) -> None:
    if not np.isfinite(array).all():
        bad = int(np.size(array) - np.isfinite(array).sum())
        raise UserError(f"{name} holds {bad} values that are NaN or infinite: the checkpoint is damaged, get it again")
