"""The interface of decoder families."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from optima_tpu.models.cache import Cache
from optima_tpu.runtime.mesh import MODEL

Shape = tuple[int, ...]

LENGTHS = tuple(size for power in range(5, 31) for size in (2**power, 3 * 2 ** (power - 1)))
"""Lengths that texts are padded to: 32, 48, 64, 96, 128, ... Includes the powers of two: LongRoPE changes its factors at one."""


class Positions(NamedTuple):
    """The position data of a block's tokens.

    They are arrays, so that blocks with different values share one compilation.

    Attributes:
      cos, sin: rotary tables [length, rotated dimensions] float32, or None for a family without rotary embedding.
      window: how many tokens each position sees, itself included, [length] int32; None if all blocks of the model see
        everything.
      cache: the cache of the earlier tokens; None if there are none.
      arguments: what a model gives to a block of the general family besides.
    """

    cos: Array | np.ndarray | None = None
    sin: Array | np.ndarray | None = None
    window: Array | np.ndarray | None = None
    cache: Cache | None = None
    arguments: Any = ()

    @property
    def rotary(self) -> tuple[Array | np.ndarray, Array | np.ndarray]:
        """The tables (cos, sin) of a family with rotary embedding."""
        assert self.cos is not None and self.sin is not None, "only a block of a family with rotary embedding rotates"
        return self.cos, self.sin

    def at(self, start: Array, count: int) -> "Positions":
        """The position data of ``count`` tokens from position ``start`` on."""
        part: Positions = jax.tree.map(lambda table: jax.lax.dynamic_slice_in_dim(table, start, count), self)
        return part


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The part of a family's configuration that does not depend on the family.

    Attributes:
      d_model: width of the hidden states.
      d_embedding: width of the rows of embedding and head; ``d_model`` everywhere but in OPT-350m.
      blocks: number of blocks.
      vocab: rows of the embedding.
      tied: whether the head is the embedding.
      logit_cap: ``c`` where logits are ``c tanh(logits / c)``, or None.
      logit_scale: factor of the logits.
      head_bias: whether logits have a bias.
      generates: whether blocks keep what later tokens need, so that the model can write text.
      kind: the block that ``Family.block`` makes: the first one of those that are alike.
    """

    d_model: int
    d_embedding: int
    blocks: int
    vocab: int
    tied: bool
    logit_cap: float | None = None
    logit_scale: float = 1.0
    head_bias: bool = False
    generates: bool = True
    kind: int = 0

    @property
    def block_layers(self) -> Sequence[object]:
        """For every block, a value that tells its layers from other blocks'.

        Empty if all blocks have the same layers.
        """
        return ()

    def kind_of(self, index: int) -> int:
        """The first block with the layers of block ``index``."""
        layers = self.block_layers
        return layers.index(layers[index]) if layers else 0

    @property
    def kinds(self) -> tuple[int, ...]:
        """The first block of each kind, ascending."""
        return tuple(sorted({self.kind_of(index) for index in range(self.blocks)}))

    def positions(self, index: int, length: int) -> Positions:
        """The position data of block ``index`` for ``length`` tokens."""
        raise NotImplementedError

    def check(self, kind: int, length: int) -> None:
        """Raises UserError if blocks compute wrongly at this length."""

    def reach(self, name: str) -> float:
        """The mean share of tokens that a layer reads: 1, less for experts."""
        return 1.0


ReadTensor = Callable[[str], Array | np.ndarray]

FURTHER = "predicts tokens behind the next one, for decoding; it stays as it is, or leaves a model whose parts are cut"
"""Why :attr:`Family.ignored` has tensors of the same layers as a block's."""


class Residual(NamedTuple):
    """The residual stream around a layer that adds to it.

    The fields are names of ``nnx.Intermediate``, [batch, length, d_model].

    Attributes:
      before: the stream without the layer's output.
      after: the stream with the layer's output, which the next norm reads.
    """

    before: str
    after: str


class Stack(NamedTuple):
    """A tensor that is stored otherwise than the program computes with it.

    It holds parameters of all experts of a block, [experts, ...]. If no part has a number, it has no axis of experts.

    Attributes:
      parts: the parameters of one expert in it, one behind the other along the outputs, each by its name in the block with
        ``*`` for the number of the expert.
      turned: whether its matrices are [d_in, d_out].
    """

    parts: tuple[str, ...]
    turned: bool = True

    @property
    def axes(self) -> int:
        """How many axes count experts."""
        return int("*" in self.parts[0])

    def behind(self, prefix: str) -> "Stack":
        """The same with a prefix before each name."""
        return Stack(tuple(prefix + part for part in self.parts), self.turned)

    def of(self, expert: int) -> tuple[str, ...]:
        """The names of the parameters of an expert."""
        return tuple(part.replace("*", str(expert)) for part in self.parts)

    def joined(self, members: Any) -> Any:
        """Joins parameters [experts x parts, ...], in numpy or JAX."""
        tensor = members.reshape(len(members) // len(self.parts), -1, *members.shape[2:])
        tensor = tensor.swapaxes(1, -1) if self.turned else tensor
        return tensor if self.axes else tensor[0]

    def split(self, tensor: Any) -> Any:
        """The parameters that :meth:`joined` takes, of the tensor."""
        tensor = tensor if self.axes else tensor[None]
        tensor = tensor.swapaxes(1, -1) if self.turned else tensor
        return tensor.reshape(len(tensor) * len(self.parts), -1, *tensor.shape[2:])

    def turn(self, axes: tuple[Any, ...]) -> tuple[Any, ...]:
        """Orders axes of one expert as [d_out, d_in], or back as stored."""
        return axes[::-1] if self.turned else axes


class Cut(NamedTuple):
    """The parts of one kind that an export can delete: neurons or heads.

    All layers that read them have the same number of them.

    Attributes:
      called: what they are called, "key-value heads".
      total: how many a layer reads.
      width: how many inputs of the layers of ``read_by`` together are those of one part.
      read_by: the layers that read them, one part behind the other, named as in ``Family.linears``.
      made_by: the layers and other parameters that make them, by their names beside the layer that reads them -> the rows of a
        part in each of the matrices that are one behind the other in this one; rows behind these belong to no part. Empty where
        all rows are those of parts.
      settings: the numbers in a configuration of ``transformers`` that count them, as ``with_settings`` takes them -> how much
        a part adds.
      fixed: what the configuration must say too if some are cut.
    """

    called: str
    total: int
    width: int
    read_by: tuple[str, ...]
    made_by: Mapping[str, tuple[int, ...]]
    settings: Mapping[str, int]
    fixed: Mapping[str, int] = {}

    def config(self, kept: int) -> dict[str, int]:
        """The settings of a model that has so many."""
        return {**{name: each * kept for name, each in self.settings.items()}, **self.fixed}


class ExpertNames(NamedTuple):
    """The names of what the experts of a mixture have.

    Attributes:
      each: what the names of an expert's parameters begin with in a block, before its number: "mlp.experts.".
      router: the parameters of the router that have a row for each expert; a model has some of them.
      shares: the name under which the mixture sows the shares of a token's experts.
      down: the layer that ends an expert, "mlp.experts.*.down_proj".
    """

    each: str
    router: tuple[str, ...]
    shares: str
    down: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A decoder family: all that the rest of the program knows about it.

    A checkpoint's tensors are named by the attributes of the modules. All names except the head's begin with one of ``roots``,
    and names in block i continue with ``layers.format(i)``. So one declaration serves loading and export.

    Attributes:
      read_config: makes a :class:`DecoderConfig` from the ``transformers`` configuration. Raises a UserError that names a
        setting that is not supported.
      block: ``block(config)`` is an ``nnx.Module``: (x [batch, length, d_model], Positions) -> the same shape. The
        configuration's ``kind`` says which block.
      linears: the layers of it that are pruned, in the order of the forward pass, by their path in the block. ``*`` stands for
        every number: "mlp.experts.*.up_proj".
      narrow: those of them that read heads or neurons. The model axis splits their inputs, and the outputs of the others: one
        all-reduce for each sublayer.
      final: ``final(config)`` is an ``nnx.Module`` between the last block and the head, as a rule a norm.
      roots: possible prefixes of a checkpoint's tensor names; the first one under which the embedding exists is used.
      layers: the prefix of a block's names, after the root.
      embedding: the table of token embeddings, [vocab, d_embedding]; its name after the root.
      embedding_extras: shapes of the other tensors that the embedding needs, by name.
      embed: (config, read, tokens [windows, length], positions [length]) -> [windows, length, d_model]; None for the plain table.
        It computes with numpy arrays on the host, and with jax arrays in a traced program.
      head: full name of the output projection, [vocab, d_embedding]; not read if it is tied.
      head_bias: full name of its bias, [vocab]; read where ``DecoderConfig.head_bias`` says so.
      attended: the layers that read the output of attention; each block has one of them. Its input is kept while the block is
        pruned part by part, so that attention is computed once.
      residuals: layers whose outputs are added, as they are or times a factor, to the residual stream -> the names under which
        the block sows that stream, divided by the factor. Layers that are followed by a norm or by a router's share do not
        belong here.
      cuts: by the word of the pattern that cuts them: for each kind of parts what makes its :class:`Cut` from the
        configuration, or None where the model has no such parts; or why they cannot be cut, behind "whose ...s".
      experts: the names of the experts' parameters where experts can be removed; or says why they cannot be, behind the name of
        the model.
      shared: layers of experts that all read the input of the mixture, named as in ``linears``: an expert that few tokens reach
        may borrow from the others. Where a token's share multiplies its input (Llama 4), it lends what its first expert reads.
      stacks: the tensors that hold parameters of all experts, by their names in the block.
      exact: parameters of a block that ``--dtype`` leaves in the dtype in which they are stored, as ``transformers`` does.
      ignored: regular expression of a tensor's full name -> why a checkpoint may hold it although nothing reads it.
      note: what a run says about the family before it begins.
      needs_bos: whether every text must begin with the BOS token for the model to work.
      by_block: the settings of a ``transformers`` configuration that may differ from block to block (its ``per_layer_config``).
    """

    read_config: Callable[[Any], DecoderConfig]
    block: Callable[[Any], nnx.Module]
    linears: tuple[str, ...]
    narrow: tuple[str, ...]
    final: Callable[[Any], nnx.Module]
    roots: tuple[str, ...] = ("model.",)
    layers: str = "layers.{}."
    embedding: str = "embed_tokens.weight"
    embedding_extras: Callable[[Any], dict[str, Shape]] = lambda config: {}
    embed: Callable[[Any, ReadTensor, Array | np.ndarray, Array | np.ndarray], Array | np.ndarray] | None = None
    head: str = "lm_head.weight"
    head_bias: str = "lm_head.bias"
    attended: tuple[str, ...] = ("self_attn.o_proj",)
    residuals: Mapping[str, Residual] = dataclasses.field(default_factory=dict)
    cuts: Mapping[str, tuple[Callable[[Any], Cut | None], ...] | str] = dataclasses.field(default_factory=dict)
    experts: ExpertNames | str = "which has no experts"
    shared: tuple[str, ...] = ()
    stacks: Mapping[str, Stack] = dataclasses.field(default_factory=dict)
    exact: tuple[str, ...] = ()
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    note: str = ""
    needs_bos: bool = False
    by_block: frozenset[str] = frozenset()

    def root(self, names: Collection[str]) -> str:
        """The root of a checkpoint with these names of tensors."""
        return next((root for root in self.roots if root + self.embedding in names), self.roots[0])

    def sharding(self, name: str) -> P:
        """The spec of a block's parameter, with ``*`` for every number.

        Parameters that are no weight or bias of ``linears`` are replicated.
        """
        layer, _, part = name.rpartition(".")
        if layer not in self.linears or part not in ("weight", "bias"):
            return P()
        if layer in self.narrow:
            return P(None, MODEL) if part == "weight" else P()
        return P(MODEL, None) if part == "weight" else P(MODEL)


def text_half(text: Family, roots: tuple[str, ...], others: str, why: str = "the half for images", **declared: Any) -> Family:
    """The text half of a family whose checkpoints also read images or sound.

    What is not for text is exported unchanged.

    Args:
      text: the family of the text half by itself.
      others: regular expression of the names of the other tensors.
      why: what these are.
      declared: what the family declares otherwise than that of the text.
    """

    def read_config(config: Any) -> DecoderConfig:
        # transformers reads tie_word_embeddings beside the text's settings, not among them.
        return dataclasses.replace(text.read_config(config.get_text_config()), tied=config.tie_word_embeddings)

    ignored = {**text.ignored, others: f"{why}: text does not pass through it"}
    return dataclasses.replace(text, read_config=read_config, roots=roots, ignored=ignored, **declared)
