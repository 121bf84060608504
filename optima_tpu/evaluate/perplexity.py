"""Perplexity as SparseGPT, Wanda and OPTIMA report it."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from optima_tpu.errors import UserError
from optima_tpu.evaluate.predictions import per_token, picked
from optima_tpu.models.activations import Activations
from optima_tpu.models.decoder import Decoder, Head, forward, head_logits
from optima_tpu.models.family import Positions
from optima_tpu.runtime.processes import fetch


def perplexity(decoder: Decoder, tokens: np.ndarray, advance: Callable[[], None] = lambda: None) -> float:
    """``exp`` of the mean negative log-likelihood of every token but the first of each window.

    The windows do not overlap and see nothing before them, so the mean over windows of window means is the mean over tokens.
    One block is on the devices at a time; all windows pass through it before the next.

    Args:
      tokens: [windows, length] int32.
      advance: called after every block and once after the head.

    Raises:
      UserError: the model's output is not finite; names the first layer with such an input.
    """
    return perplexity_of(token_losses(decoder, tokens, advance).sum(axis=1, dtype=np.float64), tokens)


def token_losses(decoder: Decoder, tokens: np.ndarray, advance: Callable[[], None] = lambda: None) -> np.ndarray:
    """The negative log-likelihood of every token but the first of each window, [windows, length - 1] float32, in every process.

    Args and errors: as :func:`perplexity`.
    """
    hidden = decoder.embed(tokens)
    for index, parameters in enumerate(decoder.blocks(range(decoder.config.blocks))):
        decoder.apply(index, parameters, hidden)
        advance()
    losses = _token_nll(decoder, hidden, tokens)
    advance()
    check_finite(decoder, tokens, losses.sum(axis=1, dtype=np.float64))
    return losses


def window_nll(decoder: Decoder, hidden: Activations, tokens: np.ndarray) -> np.ndarray:
    """Summed negative log-likelihood of tokens 1.. of every window, [windows] float64.

    Args:
      hidden: what leaves the last block.
      tokens: [windows, length] int32.
    """
    return _token_nll(decoder, hidden, tokens).sum(axis=1, dtype=np.float64)


def _token_nll(decoder: Decoder, hidden: Activations, tokens: np.ndarray) -> np.ndarray:
    """As :func:`token_losses`, of what leaves the last block."""
    head, losses = decoder.head(), np.empty((len(tokens), tokens.shape[1] - 1), np.float32)
    for batch in hidden.batches(decoder.batch):
        found = fetch(_batch_nll(head, batch.hidden, batch.place(tokens)))
        losses[batch.rows[batch.there]] = found[batch.there]
    return losses


def perplexity_of(windows: np.ndarray | Array, tokens: np.ndarray) -> float:
    """The perplexity by the summed negative log-likelihoods [windows] of token windows [windows, length].

    Their total is taken in float64, in which a perplexity ends at ``e^709``: what is beyond is that.
    """
    return math.exp(min(np.mean(windows, dtype=np.float64) / (tokens.shape[1] - 1), 709.0))


def check_finite(decoder: Decoder, tokens: np.ndarray, windows: np.ndarray | Array, which: str = "model") -> None:
    """Raises UserError where a window's sum [windows] is not finite; names the first layer with such an input."""
    if not np.isfinite(windows).all():
        raise overflow(decoder, tokens[~np.isfinite(windows)][:1], which)


def overflow(decoder: Decoder, tokens: np.ndarray, which: str = "model") -> UserError:
    """What to raise where the output for a text [1, length] is not finite; names the first layer with such an input."""
    return UserError(
        f"{_first_broken(decoder, tokens)} holds NaN or infinite values: the {which} overflows in its dtype or its "
        "weights are damaged; try --dtype float32"
    )


def _first_broken(decoder: Decoder, tokens: np.ndarray) -> str:
    """Where the values of a window [1, length] stop being finite: "the input of model.layers.1.mlp.down_proj"."""
    hidden = decoder.embed(tokens)
    for index, parameters in enumerate(decoder.blocks(range(decoder.config.blocks))):
        positions = decoder.positions(index, tokens.shape[1])
        for batch in hidden.batches(decoder.batch):
            finite = fetch(_finite_inputs(decoder.graph, decoder.state(parameters), batch.hidden, positions))
            for name in decoder.linears:
                if not finite[name]:
                    return f"the input of {decoder.prefix(index)}{name}"
        decoder.apply(index, parameters, hidden)
    return "the output of the last block or of the head"


@functools.partial(jax.jit, static_argnums=0)
def _finite_inputs(graph: nnx.GraphDef, state: nnx.State, hidden: Array, positions: Positions) -> dict[str, Array]:
    inputs = forward(graph, state, hidden, positions)[1]
    return {name: jnp.isfinite(value).all() for name, value in inputs.items()}


@jax.jit
def _batch_nll(head: Head, hidden: Array, tokens: Array) -> Array:
    """As :func:`_token_nll`, of the windows that are on the devices."""

    def score(targets, states):
        logits = head_logits(head, states)
        return jax.nn.logsumexp(logits, axis=-1) - picked(logits, targets)

    return per_token(score, tokens, hidden)
