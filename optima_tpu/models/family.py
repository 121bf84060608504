"""What a decoder family is to the rest of the program."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from optima_tpu.models.cache import KeyValueCache

Shape = tuple[int, ...]


class Positions(NamedTuple):
    """What a block knows of the places of its tokens. Arrays, so that blocks that differ here share one compilation.

    Attributes:
      cos, sin: rotary tables [length, rotated dimensions] float32, or None for a family without rotary embedding.
      window: how many tokens a position sees, itself included, int32 scalar; None if all blocks of the model see everything.
      cache: of the tokens before these ones; None where these are the first.
    """

    cos: Array | np.ndarray | None = None
    sin: Array | np.ndarray | None = None
    window: Array | np.ndarray | None = None
    cache: KeyValueCache | None = None

    @property
    def rotary(self) -> tuple[Array | np.ndarray, Array | np.ndarray]:
        """The tables (cos, sin) of a family with rotary embedding."""
        assert self.cos is not None and self.sin is not None, "only a block of a family with rotary embedding rotates"
        return self.cos, self.sin

    def at(self, place: Array) -> "Positions":
        """Of the single token at ``place``, int32 scalar."""
        cos, sin = jax.tree.map(lambda table: jax.lax.dynamic_slice_in_dim(table, place, 1), (self.cos, self.sin))
        return self._replace(cos=cos, sin=sin)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The part of a family's configuration that does not depend on the family.

    Attributes:
      d_model: width of the hidden states.
      d_embedding: width of the rows of embedding and head; ``d_model`` everywhere but in OPT-350m.
      blocks: how many.
      vocab: rows of the embedding.
      tied: whether the head is the embedding.
      logit_cap: ``c`` where logits are ``c tanh(logits / c)``, or None.
    """

    d_model: int
    d_embedding: int
    blocks: int
    vocab: int
    tied: bool
    logit_cap: float | None = None

    def positions(self, index: int, length: int) -> Positions:
        """What block ``index`` knows of the first ``length`` places."""
        raise NotImplementedError


ReadTensor = Callable[[str], Array | np.ndarray]


class Residual(NamedTuple):
    """The residual stream [batch, length, d_model] around a layer that adds to it, as names of ``nnx.Intermediate``.

    Attributes:
      before: without the layer's output.
      after: with it, what the next norm reads.
    """

    before: str
    after: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One decoder family. What is declared here is all that the rest of the program knows of it.

    A checkpoint's tensors are named by the attributes of the modules. All but the head stand behind one of ``roots``, and block
    i's parameters behind that and ``layers.format(i)``; so one declaration serves loading and export.

    Attributes:
      read_config: from the ``transformers`` configuration. Raises UserError, by name, for a setting that is not supported.
      block: ``block(config)`` is an ``nnx.Module``: (x [batch, length, d_model], Positions) -> the same shape.
      linears: the layers of it that are pruned, in the order of the forward pass, by their path in the block. ``*`` stands for
        every number: "mlp.experts.*.up_proj".
      sharding: specs of their parameters, named in the same way; what is not named is replicated.
      final: ``final(config)`` is an ``nnx.Module`` between the last block and the head, as a rule a norm.
      roots: where the model begins in the names of a checkpoint; the first one that holds the embedding is meant.
      layers: where a block begins behind the root.
      embedding: the table of token embeddings, [vocab, d_embedding]; its name, as the others, behind the root.
      embedding_extras: shapes of what else is read to embed, by name.
      embed: (config, read, tokens [samples, length], places [length]) -> [samples, length, d_model]; None for the plain table.
        It computes where its arrays are: those of numpy on the host, those of jax in a traced program.
      head: whole name of the output projection, [vocab, d_embedding]; not read where it is tied.
      residuals: layers whose outputs are added, as they are, to the residual stream -> the names under which the block sows
        that stream. Not those that a norm or a router's share comes after.
      ignored: regular expression of a tensor's whole name -> why a checkpoint may hold it though nothing reads it.
      needs_bos: whether every text must begin with the BOS token for the model to work.
    """

    read_config: Callable[[Any], DecoderConfig]
    block: Callable[[Any], nnx.Module]
    linears: tuple[str, ...]
    sharding: Mapping[str, P]
    final: Callable[[Any], nnx.Module]
    roots: tuple[str, ...] = ("model.",)
    layers: str = "layers.{}."
    embedding: str = "embed_tokens.weight"
    embedding_extras: Callable[[Any], dict[str, Shape]] = lambda config: {}
    embed: Callable[[Any, ReadTensor, Array | np.ndarray, Array | np.ndarray], Array | np.ndarray] | None = None
    head: str = "lm_head.weight"
    residuals: Mapping[str, Residual] = dataclasses.field(default_factory=dict)
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    needs_bos: bool = False
