"""The distance between a pruned and the dense model on a text."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optima_tpu.errors import UserError
from optima_tpu.evaluate.perplexity import check_finite, perplexity_of
from optima_tpu.evaluate.predictions import STRETCH, picked, stretch_of, sum_over_windows
from optima_tpu.method.distillation import log_divergence
from optima_tpu.models.activations import Activations
from optima_tpu.models.decoder import Decoder, Head, head_logits
from optima_tpu.report.evaluation import Distance
from optima_tpu.runtime.processes import everyones, fetch


class Comparison(NamedTuple):
    """Two models on the same windows.

    Attributes:
      dense, pruned: their perplexities, as :func:`optima_tpu.evaluate.perplexity.perplexity` computes them.
    """

    distance: Distance
    dense: float
    pruned: float


def distance(
    dense: Decoder,
    pruned: Decoder,
    tokens: np.ndarray,
    advance: Callable[[], None] = lambda: None,
    per_block: bool = False,
    left_out: int = 0,
) -> Comparison:
    """Measures the distance between two models, and their perplexities.

    One block of each model is on the devices at a time; both residual streams stay on the hosts.

    Args:
      dense: the reference.
      pruned: a model of the same shape on the same mesh; it need not be pruned.
      tokens: [windows, length] int32, from a text that was not used to calibrate the pruned model.
      advance: called after every block, and after every batch of the head.
      per_block: apply the head to the stream after every block, not only after the last one. This usually costs more time than
        the blocks themselves.
      left_out: how many blocks the pruned model is without. Then the streams are compared behind the last block alone.

    Raises:
      UserError: the models differ in depth, width or vocabulary; or the output of one is not finite. The message then names the
        first layer whose input is not finite.
    """
    check_same_shape(dense, pruned, left_out)
    if left_out and per_block:
        raise UserError(
            f"expected a model of all blocks where --per_block compares them, got one without {left_out}; leave it out"
        )
    models, count = (dense, pruned), pruned.config.blocks
    streams = [model.embed(tokens) for model in models]
    for index, parameters in zip(range(left_out), dense.blocks(range(left_out))):
        dense.apply(index, parameters, streams[0])
    squares = np.empty((count, len(streams[0].rows), 2))  # float64
    heads: tuple[Head, Head] | None = None
    scores = []
    for index, blocks in enumerate(zip(dense.blocks(range(left_out, dense.config.blocks)), pruned.blocks(range(count)))):
        for model, parameters, stream, block in zip(models, blocks, streams, (left_out + index, index)):
            model.apply(block, parameters, stream)
        squares[index] = _squares(*streams)
        advance()
        if per_block or index == count - 1:
            heads = heads or (dense.head(), pruned.head())
            scores.append(window_scores(heads, streams, tokens, dense.batch, advance))
    last = scores[-1]
    check_finite(dense, tokens, last.dense_nll, "dense model")
    check_finite(pruned, tokens, last.pruned_nll, "pruned model")
    errors = tuple(_ratios(streams[0].rows, squares, len(tokens))[-1 if left_out else 0 :])
    apart = _apart(scores, errors, tokens, per_block)
    return Comparison(apart, perplexity_of(last.dense_nll, tokens), perplexity_of(last.pruned_nll, tokens))


def _apart(scores: Sequence["DistanceSums"], hidden_errors: tuple[float, ...], tokens: np.ndarray, per_block: bool) -> Distance:
    """Averages sums over the predictions; ``per_block`` keeps every block."""
    last, predictions = scores[-1], tokens.shape[1] - 1
    kls, agreements = ([_mean(getattr(score, name) / predictions) for score in scores] for name in ("kl", "agreement"))
    (kl, kl_stderr), (agreement, agreement_stderr) = kls[-1], agreements[-1]
    return Distance(
        kl=kl,
        kl_stderr=kl_stderr,
        agreement=agreement,
        agreement_stderr=agreement_stderr,
        tokens=len(tokens) * predictions,
        hidden_errors=hidden_errors,
        kls=tuple(mean for mean, _ in kls) if per_block else None,
        agreements=tuple(mean for mean, _ in agreements) if per_block else None,
        log_ratio_stderr=_mean((last.pruned_nll - last.dense_nll) / predictions)[1],
    )


class DistanceSums(NamedTuple):
    """Sums over the predictions of each window, [windows] float32."""

    kl: np.ndarray | Array
    agreement: np.ndarray | Array
    dense_nll: np.ndarray | Array
    pruned_nll: np.ndarray | Array


def window_scores(
    heads: tuple[Head, Head],
    streams: Sequence[Activations],
    tokens: np.ndarray,
    size: int,
    advance: Callable[[], None] = lambda: None,
) -> DistanceSums:
    """Compares the predictions of two models from their residual streams.

    The dense model comes first in heads and streams.

    Args:
      tokens: [windows, length] int32. The streams may hold only some of these windows; the sums of the others are undefined.
      size: windows of a batch in each slice of the data axis.
    """
    sums = DistanceSums(*np.empty((len(DistanceSums._fields), len(tokens)), np.float32))
    stretch = stretch_of(size, len(heads[0].projection))
    for dense, pruned in zip(*(stream.batches(size) for stream in streams)):
        batch_sums = fetch(_batch_scores(heads, (dense.hidden, pruned.hidden), dense.place(tokens), stretch))
        for all_windows, part in zip(sums, batch_sums):
            all_windows[dense.rows[dense.filled]] = part[dense.filled]
        advance()
    return sums


@functools.partial(jax.jit, static_argnames="stretch")
def _batch_scores(heads: tuple[Head, Head], hidden: tuple[Array, Array], tokens: Array, stretch: int = STRETCH) -> DistanceSums:
    def score(targets, *states):
        logits = [head_logits(head, state) for head, state in zip(heads, states)]
        first = [values.argmax(axis=-1) for values in logits]
        p, q = (jax.nn.log_softmax(values, axis=-1) for values in logits)
        return DistanceSums(log_divergence(p, q), first[0] == first[1], -picked(p, targets), -picked(q, targets))

    return sum_over_windows(score, tokens, *hidden, stretch=stretch)


def divergences(head: Head, dense: Activations, others: Sequence[Activations], tokens: np.ndarray, size: int) -> np.ndarray:
    """``KL(dense || other)`` of several models' predictions with one head.

    Returns sums over each window, [others, windows] float32. The dense model's predictions are computed once for all of them.
    The devices hold a batch of the hidden states of every model, and the logits of two.

    Args:
      tokens, size: see :func:`window_scores`.
    """
    sums, stretch = np.empty((len(others), len(tokens)), np.float32), stretch_of(size, len(head.projection))
    for first, *rest in zip(*(stream.batches(size) for stream in (dense, *others))):
        states = tuple(each.hidden for each in rest)
        batch_sums = fetch(_batch_divergences(head, first.hidden, states, first.place(tokens), stretch))
        sums[:, first.rows[first.filled]] = np.stack(batch_sums)[:, first.filled]
    return sums


@functools.partial(jax.jit, static_argnames="stretch")
def _batch_divergences(head: Head, dense: Array, others: tuple[Array, ...], tokens: Array, stretch: int) -> tuple[Array, ...]:
    def score(targets, first, states):
        p = jax.nn.log_softmax(head_logits(head, first), axis=-1)

        def divergence(state):
            return log_divergence(p, jax.nn.log_softmax(head_logits(head, state), axis=-1))

        return tuple(jax.lax.map(divergence, jnp.moveaxis(states, 2, 0)))

    return sum_over_windows(score, tokens, dense, jnp.stack(others, axis=2), stretch=stretch)


def _mean(windows: np.ndarray) -> tuple[float, float | None]:
    """The mean of ``windows`` and its standard error, None for one window."""
    windows = windows.astype(np.float64)
    return float(windows.mean()), float(windows.std(ddof=1) / len(windows) ** 0.5) if len(windows) > 1 else None


def _squares(dense: Activations, pruned: Activations) -> np.ndarray:
    """Squared norms of difference and dense states, [held, 2] float64.

    There is one row for each window that this process holds.
    """
    norms = np.empty((len(dense.rows), 2))
    with np.errstate(over="ignore", invalid="ignore"):  # the check after the head reports a model that overflows
        for sums, reference, other in zip(norms, dense.values, pruned.values):
            reference = reference.astype(np.float32)
            sums[:] = [np.sum(np.square(part), dtype=np.float64) for part in (other.astype(np.float32) - reference, reference)]
    return norms


def _ratios(rows: np.ndarray, squares: np.ndarray, windows: int) -> list[float]:
    """Relative errors by block, from ``squares`` [blocks, held, 2]."""
    all_squares = np.empty((len(squares), windows, 2))
    for theirs, part in everyones((rows, squares)):  # processes may hold the same windows, with equal values
        all_squares[:, theirs] = part
    error, norm = all_squares.sum(axis=1).T
    with np.errstate(invalid="ignore", divide="ignore"):  # hidden states of 0: the error relative to them is not finite
        return (error / norm).tolist()


def check_same_shape(dense: Decoder, pruned: Decoder, left_out: int = 0) -> None:
    """Raises UserError if two models differ in depth, width or vocabulary."""
    for name, what in (("blocks", "blocks"), ("d_model", "features"), ("vocab", "tokens in the vocabulary")):
        expected, came = getattr(dense.config, name), getattr(pruned.config, name)
        expected -= left_out if name == "blocks" else 0
        if came != expected:
            raise UserError(
                f"expected a model of {expected} {what}, as in the dense model, got {came}: compare a pruned model with the "
                "dense model that it was made from"
            )
