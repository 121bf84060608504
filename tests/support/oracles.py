"""What a model computes, in short and slow forms, to compare with."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optima_tpu.models.decoder import Decoder, head_logits
from optima_tpu.models.experts import Route, Routed, expert_of

run_head = jax.jit(head_logits)


def logits_of(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    """Returns logits [samples, length, vocab] float32 on the host."""
    hidden = decoder.embed(tokens)
    for index, parameters in enumerate(decoder.blocks(range(decoder.config.blocks))):
        decoder.apply(index, parameters, hidden)
    head, logits = decoder.head(), np.empty((*tokens.shape, decoder.config.vocab), np.float32)
    for batch in hidden.batches(decoder.batch):
        logits[batch.rows[batch.filled]] = np.asarray(run_head(head, batch.hidden))[batch.filled]
    return logits


def input_of(inputs: Mapping[str, Any], name: str) -> Array:
    """Picks a layer's input [batch, length, d_in] from those of ``forward``.

    For the layer of an expert it is a copy, with zeros for the tokens of other experts.
    """
    expert = expert_of(name)
    return inputs[name] if expert is None else _read_by(inputs[name], expert)


def _read_by(routed: Routed, expert: int) -> Array:
    def of_slice(rows: Array, chosen: Array) -> Array:
        own = chosen == expert
        row = jnp.take_along_axis(Route.of(chosen, routed.experts).row, jnp.argmax(own, axis=1)[:, None], axis=1)[:, 0]
        return jnp.where(jnp.any(own, axis=1)[:, None], rows[row], 0)

    rows = routed.rows.reshape(routed.slices, -1, routed.rows.shape[1])
    read = jax.vmap(of_slice)(rows, routed.chosen.reshape(routed.slices, -1, routed.chosen.shape[-1]))
    return read.reshape(*routed.chosen.shape[:2], -1)
