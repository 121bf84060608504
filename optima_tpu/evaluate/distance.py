"""How far a pruned model is from the dense one on a text, and after which block."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optima_tpu.errors import UserError
from optima_tpu.evaluate.perplexity import check_finite, perplexity_of
from optima_tpu.evaluate.predictions import picked, sum_over_windows
from optima_tpu.models.activations import Activations
from optima_tpu.models.decoder import Decoder, Head, head_logits
from optima_tpu.runtime.processes import everyones, fetch


class Distance(NamedTuple):
    """Two models on the same windows, ``p`` the dense model's distribution of the next token and ``q`` the pruned one's.

    Means are over the predictions that perplexity scores: those at every position of a window but the last. Standard errors
    are those of a mean of window means, which is right although the positions of one window depend on each other; None where
    there is only one window.

    Attributes:
      kl: mean of ``KL(p || q) = sum_v p(v) log(p(v) / q(v))`` in nats. Computed in float32: of identical models it is 0, and
        below about 1e-6 it is rounding.
      kl_stderr: its standard error.
      agreement: share of positions at which both models hold the same token for the most probable one.
      agreement_stderr: its standard error.
      tokens: how many predictions that is.
      hidden_errors: for every block ``||H_pruned - H_dense||_F^2 / ||H_dense||_F^2``, ``H`` the residual stream after it over
        all positions of all windows. It contains what earlier blocks did. In many models a few tokens have a norm far above
        the others', and then it tells mostly about these.
      kls: ``kl`` for every block, where ``p`` and ``q`` are what the model's final norm and head would read from the stream
        after that block (the logit lens, nostalgebraist 2020); None if not asked for. Only the last one is a distance of
        predictions. The head was trained on the last stream alone: it reads early ones badly, and does not see changes that
        only later blocks make use of.
      agreements: ``agreement`` for every block in the same way; None if not asked for.
      dense_perplexity, pruned_perplexity: of both models, as :func:`optima_tpu.evaluate.perplexity.perplexity` gives them.
    """

    kl: float
    kl_stderr: float | None
    agreement: float
    agreement_stderr: float | None
    tokens: int
    hidden_errors: list[float]
    kls: list[float] | None
    agreements: list[float] | None
    dense_perplexity: float
    pruned_perplexity: float


def distance(
    dense: Decoder, pruned: Decoder, tokens: np.ndarray, advance: Callable[[], None] = lambda: None, per_block: bool = False
) -> Distance:
    """Walks both models side by side: one block of each is on the devices at a time, both streams stay on the hosts.

    Args:
      dense: the reference.
      pruned: a model of the same shape on the same mesh; it need not be pruned.
      tokens: [windows, length] int32, text that neither calibrated the pruned model.
      advance: called after every block; the last call comes after the head.
      per_block: score the stream after every block by the head, not only after the last one. As a rule that costs more than
        the blocks themselves.

    Raises:
      UserError: the models differ in depth, width or vocabulary; or an output of one is not finite, names the first layer
        with such an input.
    """
    check_same_shape(dense, pruned)
    models, count = (dense, pruned), dense.config.blocks
    streams = [model.embed(tokens) for model in models]
    squares = np.empty((count, len(streams[0].rows), 2))  # float64
    heads: tuple[Head, Head] | None = None
    scores = []
    for index, blocks in enumerate(zip(*(model.blocks(range(count)) for model in models))):
        for model, parameters, stream in zip(models, blocks, streams):
            model.apply(index, parameters, stream)
        squares[index] = _squares(*streams)
        if per_block or index == count - 1:
            heads = heads or (dense.head(), pruned.head())
            scores.append(window_scores(heads, streams, tokens, dense.batch))
        advance()
    last = scores[-1]
    check_finite(dense, tokens, last.dense_nll, "dense model")
    check_finite(pruned, tokens, last.pruned_nll, "pruned model")
    predictions = tokens.shape[1] - 1
    kls, agreements = ([_mean(getattr(score, name) / predictions) for score in scores] for name in ("kl", "agreement"))
    (kl, kl_stderr), (agreement, agreement_stderr) = kls[-1], agreements[-1]
    return Distance(
        kl=kl,
        kl_stderr=kl_stderr,
        agreement=agreement,
        agreement_stderr=agreement_stderr,
        tokens=len(tokens) * predictions,
        hidden_errors=_ratios(streams[0].rows, squares, len(tokens)),
        kls=[mean for mean, _ in kls] if per_block else None,
        agreements=[mean for mean, _ in agreements] if per_block else None,
        dense_perplexity=perplexity_of(last.dense_nll, tokens),
        pruned_perplexity=perplexity_of(last.pruned_nll, tokens),
    )


class Sums(NamedTuple):
    """Sums over the predictions of every window, [windows] float32."""

    kl: np.ndarray | Array
    agreement: np.ndarray | Array
    dense_nll: np.ndarray | Array
    pruned_nll: np.ndarray | Array


def window_scores(heads: tuple[Head, Head], streams: Sequence[Activations], tokens: np.ndarray, size: int) -> Sums:
    """What the heads make of two streams, the dense one first.

    Args:
      tokens: [windows, length] int32, of which the streams may be a stretch: the sums of the others mean nothing.
      size: windows that a batch gives to one slice of the data axis.
    """
    sums = Sums(*np.empty((len(Sums._fields), len(tokens)), np.float32))
    for dense, pruned in zip(*(stream.batches(size) for stream in streams)):
        found = fetch(_batch_scores(heads, (dense.hidden, pruned.hidden), dense.place(tokens)))
        for whole, part in zip(sums, found):
            whole[dense.rows[dense.there]] = part[dense.there]
    return sums


@jax.jit
def _batch_scores(heads: tuple[Head, Head], hidden: tuple[Array, Array], tokens: Array) -> Sums:
    def score(targets, *states):
        logits = [head_logits(head, state) for head, state in zip(heads, states)]
        first = [values.argmax(axis=-1) for values in logits]
        p, q = (jax.nn.log_softmax(values, axis=-1) for values in logits)
        return Sums(jnp.sum(jnp.exp(p) * (p - q), axis=-1), first[0] == first[1], -picked(p, targets), -picked(q, targets))

    return sum_over_windows(score, tokens, *hidden)


def _mean(windows: np.ndarray) -> tuple[float, float | None]:
    """The mean of window means and its standard error."""
    windows = windows.astype(np.float64)
    return float(windows.mean()), float(windows.std(ddof=1) / len(windows) ** 0.5) if len(windows) > 1 else None


def _squares(dense: Activations, pruned: Activations) -> np.ndarray:
    """Squared norms of difference and dense states of every window that this process holds, [held, 2] float64."""
    found = np.empty((len(dense.rows), 2))
    with np.errstate(over="ignore", invalid="ignore"):  # a model that overflows is refused after the head
        for sums, reference, other in zip(found, dense.values, pruned.values):
            reference = reference.astype(np.float32)
            sums[:] = [np.sum(np.square(part), dtype=np.float64) for part in (other.astype(np.float32) - reference, reference)]
    return found


def _ratios(rows: np.ndarray, squares: np.ndarray, windows: int) -> list[float]:
    """Relative errors by block from ``squares`` [blocks, held, 2] of the windows ``rows`` that each process holds."""
    whole = np.empty((len(squares), windows, 2))
    for theirs, part in everyones((rows, squares)):  # some hold the same windows, with the same values
        whole[:, theirs] = part
    error, norm = whole.sum(axis=1).T
    return (error / norm).tolist()


def check_same_shape(dense: Decoder, pruned: Decoder) -> None:
    """Raises UserError where the models differ in depth, width or vocabulary."""
    for name, what in (("blocks", "blocks"), ("d_model", "features"), ("vocab", "tokens in the vocabulary")):
        expected, came = getattr(dense.config, name), getattr(pruned.config, name)
        if came != expected:
            raise UserError(
                f"expected a model of {expected} {what} as the dense one has, got {came}: compare a pruned model "
                "with the one that it was made from"
            )
