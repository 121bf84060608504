"""Perplexity, measured as in SparseGPT, Wanda and OPTIMA."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from optima_tpu.errors import UserError
from optima_tpu.evaluate.predictions import STRETCH, per_token, picked, stretch_of
from optima_tpu.models.activations import Activations, count_batches
from optima_tpu.models.decoder import Decoder, Head, forward, head_logits
from optima_tpu.models.family import Positions
from optima_tpu.report.pace import Step
from optima_tpu.runtime.processes import fetch


def _nothing() -> None:
    pass


def perplexity(
    decoder: Decoder, tokens: np.ndarray, advance: Callable[[], None] = _nothing, between: Callable[[], None] = _nothing
) -> float:
    """Returns ``exp`` of the mean negative log-likelihood of a text's tokens.

    The mean is over all tokens except the first of each window. Windows do not overlap, have one length, and share no context; so
    the mean of window means is the mean over tokens. One block is on the devices at a time; all windows pass through it before
    the next block.

    Args:
      tokens: [windows, length] int32.
      advance: called after every block and once after the head.
      between: called between two batches of the head, which takes as long as several blocks where the vocabulary is large.

    Raises:
      UserError: the model's output is not finite. The message names the first layer whose input is not finite.
    """
    return perplexity_of(token_losses(decoder, tokens, advance, between).sum(axis=1, dtype=np.float64), tokens)


def token_losses(
    decoder: Decoder, tokens: np.ndarray, advance: Callable[[], None] = _nothing, between: Callable[[], None] = _nothing
) -> np.ndarray:
    """Negative log-likelihoods of all tokens but each window's first.

    They are [windows, length - 1] float32, and every process gets all of them. Arguments and errors are the same as in
    :func:`perplexity`.
    """
    hidden = decoder.embed(tokens)
    for index, parameters in enumerate(decoder.blocks(range(decoder.config.blocks))):
        decoder.apply(index, parameters, hidden)
        advance()
    losses = token_nll(decoder, hidden, tokens, between)
    advance()
    check_finite(decoder, tokens, losses.sum(axis=1, dtype=np.float64))
    return losses


def token_nll(decoder: Decoder, hidden: Activations, tokens: np.ndarray, between: Callable[[], None] = _nothing) -> np.ndarray:
    """As :func:`token_losses`, from the output of the last block."""
    head, losses = decoder.head(), np.empty((len(tokens), tokens.shape[1] - 1), np.float32)
    stretch = stretch_of(decoder.batch, decoder.config.vocab)
    for number, batch in enumerate(hidden.batches(decoder.batch)):
        if number:
            between()
        nll = fetch(_batch_nll(head, batch.hidden, batch.place(tokens), stretch))
        losses[batch.rows[batch.filled]] = nll[batch.filled]
    return losses


def perplexity_of(windows: np.ndarray | Array, tokens: np.ndarray) -> float:
    """Perplexity from the windows' summed negative log-likelihoods [windows].

    ``tokens`` is [windows, length]. Computed in float64, whose largest number is about ``e^709``: a larger perplexity is
    returned as ``e^709``.
    """
    return math.exp(min(np.mean(windows, dtype=np.float64) / (tokens.shape[1] - 1), 709.0))


def check_finite(decoder: Decoder, tokens: np.ndarray, windows: np.ndarray | Array, which: str = "model") -> None:
    """Raises UserError if a window's sum [windows] is not finite."""
    if not np.isfinite(windows).all():
        raise overflow(decoder, tokens[~np.isfinite(windows)][:1], which)


def overflow(decoder: Decoder, tokens: np.ndarray, which: str = "model") -> UserError:
    """The error for a text [1, length] whose output is not finite."""
    return UserError(
        f"{_first_broken(decoder, tokens)} holds NaN or infinite values: "
        f"{decoder.overflowed.replace('the model', f'the {which}', 1)}"
    )


def _first_broken(decoder: Decoder, tokens: np.ndarray) -> str:
    """The first layer whose input is not finite, for a window [1, length]."""
    hidden = decoder.embed(tokens)
    for index, parameters in enumerate(decoder.blocks(range(decoder.config.blocks))):
        positions, alike = decoder.positions(index, tokens.shape[1]), decoder.at(index)
        for batch in hidden.batches(decoder.batch):
            finite = fetch(_finite_inputs(alike.graph, alike.state(parameters), batch.hidden, positions))
            for name in alike.linears:
                if not finite[name]:
                    return f"the input of {decoder.prefix(index)}{name}"
        decoder.apply(index, parameters, hidden)
    return "the output of the last block or of the head"


@functools.partial(jax.jit, static_argnums=0)
def _finite_inputs(graph: nnx.GraphDef, state: nnx.State, hidden: Array, positions: Positions) -> dict[str, Array]:
    inputs = forward(graph, state, hidden, positions)[1]
    # The experts of a block read parts of one array, which comes with the numbers of each token's experts.
    return {name: jnp.isfinite(jax.tree.leaves(value)[0]).all() for name, value in inputs.items()}


@functools.partial(jax.jit, static_argnames="stretch")
def _batch_nll(head: Head, hidden: Array, tokens: Array, stretch: int = STRETCH) -> Array:
    """Same as :func:`token_nll`, for a batch of windows on the devices."""

    def score(targets, states):
        logits = head_logits(head, states)
        return jax.nn.logsumexp(logits, axis=-1) - picked(logits, targets)

    return per_token(score, tokens, hidden, stretch=stretch)


def text_steps(decoder: Decoder, tokens: np.ndarray, both: bool, per_block: bool = False) -> list[Step]:
    """The steps that a text takes, for one model or for two.

    Texts of one length of window run the same programs.

    Args:
      tokens: [windows, length] int32.
      per_block: the head reads the hidden states of every block, as in :func:`distance`.
    """
    windows, length = tokens.shape
    which = f"{'both models' if both else 'the model'} on windows of {length}"
    batches = count_batches(decoder.mesh, windows, decoder.batch)
    # The work is counted in weights that windows are multiplied by: the head takes as long as several blocks, and comes last.
    head, steps = windows / batches * decoder.config.vocab * decoder.config.d_model, list[Step]()
    for index in range(decoder.config.blocks):
        kind, weights = f"{which}, {decoder.config.kind_of(index)}", sum(map(math.prod, decoder.at(index).block_shapes.values()))
        steps.append(Step(kind, float(windows * weights)))
        if per_block or index == decoder.config.blocks - 1:
            steps += [Step(f"{which}, head", head, like=kind)] * batches
    return steps
