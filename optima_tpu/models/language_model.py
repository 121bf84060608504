"""A whole decoder as one Flax NNX module, for those who go on in plain JAX."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from optima_tpu.models.decoder import Decoder, Head, forward, head_logits
from optima_tpu.runtime.mesh import MODEL


class LanguageModel(nnx.Module):
    """Tokens [batch, length] int32 -> logits [batch, length, vocab] float32.

    It is causal and has no cache.

    All parameters are in memory, each an ``nnx.Param`` in Hugging Face's shape ([d_out, d_in]) and in the checkpoint's dtype:
    ``model.blocks[3].self_attn.q_proj.weight``. They are on the decoder's mesh, split as its family says. It works under
    ``nnx.jit`` and ``nnx.grad``. Blocks are not stacked, and every block is a part of the compiled program.

    Args:
      decoder: an opened model; its weights are read.
    """

    def __init__(self, decoder: Decoder):
        family, root = decoder.family, decoder.root
        head = decoder.head()
        self.blocks = nnx.List(
            nnx.merge(decoder.graph, decoder.state(read)) for read in decoder.blocks(range(decoder.config.blocks))
        )
        self.final = nnx.merge(head.graph, head.state)
        names = {family.embedding: P(MODEL, None), **dict.fromkeys(family.embedding_extras(decoder.config), P())}
        placed = decoder.place_ends({root + name: spec for name, spec in names.items()})
        self.embedding = nnx.Dict({name.removeprefix(root): nnx.Param(array) for name, array in placed.items()})
        self.head = None if decoder.config.tied else nnx.Param(head.projection)
        self.head_bias = None if head.bias is None else nnx.Param(head.bias)
        self._fixed = _Fixed(decoder)

    def __call__(self, tokens: Array) -> Array:
        decoder, length = self._fixed.decoder, tokens.shape[1]
        hidden = jnp.asarray(decoder.embedded(lambda name: self.embedding[name][...], tokens, jnp.arange(length)))
        for index, block in enumerate(self.blocks):
            # Not block(...): what its layers sow would stay in the module.
            hidden, _ = forward(*nnx.split(block), hidden, decoder.config.positions(index, length))
        graph, state = nnx.split(self.final)
        projection = self.embedding[decoder.family.embedding] if self.head is None else self.head
        bias = None if self.head_bias is None else self.head_bias[...]
        config = decoder.config
        return head_logits(Head(state, projection[...], bias, graph, config.logit_cap, config.logit_scale), hidden)

    def tensors(self) -> dict[str, Array]:
        """Parameters by checkpoint name for ``safetensors.flax.save_file``."""
        decoder = self._fixed.decoder
        parts = {decoder.prefix(index): block for index, block in enumerate(self.blocks)}
        parts |= {decoder.root: self.final}
        parameters = {
            prefix + ".".join(map(str, path)): value[...]
            for prefix, part in parts.items()
            for path, value in nnx.to_flat_state(nnx.state(part, nnx.Param))
        }
        parameters |= {decoder.root + name: value[...] for name, value in self.embedding.items()}
        ends = (decoder.family.head, self.head), (decoder.family.head_bias, self.head_bias)
        return parameters | {name: value[...] for name, value in ends if value is not None}


class _Fixed:
    """Wraps the decoder, so that NNX compares and hashes it by identity."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
