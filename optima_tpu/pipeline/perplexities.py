"""Measures a run's models on the evaluation text and keeps the results.

RUN/dense.json          the dense model's perplexity, and the digests of the text and of the losses that belong to it
RUN/dense_losses.npy    the loss of each token of the first windows
RUN/pruned.json, RUN/pruned_losses.npy    the same of the pruned model
"""

import hashlib
import io
from pathlib import Path

import numpy as np

from optima_tpu.data import token_digest
from optima_tpu.evaluate.perplexity import perplexity_of, text_steps, token_losses
from optima_tpu.evaluate.token_changes import token_changes
from optima_tpu.models.checkpoints import load_tokenizer
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline.keeping import StageWork
from optima_tpu.pipeline.opened import Opened, TextPerplexity
from optima_tpu.report.contents import TokenChanges
from optima_tpu.report.pace import Step
from optima_tpu.runtime.checksums import keep
from optima_tpu.runtime.kept import KeptRecord
from optima_tpu.runtime.processes import first_only, from_first
from optima_tpu.runtime.records import Positive, Record

_SINGLE = 1 << 20
"""The number of evaluation tokens whose single losses are kept: they take 4 MB."""


class KeptPerplexity(Record, frozen=True):
    """The contents of dense.json and pruned.json.

    Attributes:
      tokens: digest of the text.
      losses: SHA-256 of the file of losses that belongs to it; None without one.
    """

    tokens: str
    perplexity: Positive
    losses: str | None


def perplexity_steps(opened: Opened, decoder: Decoder) -> list[Step]:
    """The steps of :func:`measured`, equal for all models of this shape."""
    return text_steps(decoder, opened.texts.evaluation.ids, both=False)


def measured(work: StageWork, decoder: Decoder) -> TextPerplexity:
    """Measures a model on a run's evaluation text. Every process calls it."""
    ids = work.opened.texts.evaluation.ids
    losses = token_losses(decoder, ids, work.progress.advance, work.progress.advance)
    first = losses[: max(1, _SINGLE // ids.shape[1])].copy()  # a view would keep all of them
    return TextPerplexity(perplexity_of(losses.sum(axis=1, dtype=np.float64), ids), first)


def perplexity_files(model: str) -> tuple[str, str]:
    """The two files of the "dense" or "pruned" model's perplexity in a run."""
    return f"{model}.json", f"{model}_losses.npy"


def read_perplexity(directory: Path, ids: np.ndarray, model: str) -> TextPerplexity | None:
    """The perplexity that an earlier start kept for the text ``ids``.

    None if nothing was kept. Every process calls it.
    """
    record = _kept(model).read(directory)
    if record is None or record.tokens != token_digest(ids):
        return None
    path, digest = directory / perplexity_files(model)[1], record.losses
    return TextPerplexity(record.perplexity, from_first(lambda: _losses(path, digest)))


def keep_perplexity(opened: Opened, model: str, measured: TextPerplexity) -> None:
    """Saves a measured perplexity if it is new. Every process calls it.

    Raises:
      UserError: the disk is full or not writable.
    """
    ids = opened.texts.evaluation.ids
    kept = read_perplexity(opened.directory, ids, model)
    if kept and kept.perplexity == measured.perplexity and (kept.losses is not None or measured.losses is None):
        return
    name, losses = perplexity_files(model)[1], None
    if measured.losses is not None:
        file = io.BytesIO()
        np.save(file, measured.losses)
        data = file.getvalue()
        losses = hashlib.sha256(data).hexdigest()
        first_only(lambda: keep(opened.directory, {name: data}))  # the losses come first: the record holds their digest
    _kept(model).write(opened.directory, KeptPerplexity(token_digest(ids), measured.perplexity, losses))


def changes(opened: Opened, dense: TextPerplexity, pruned: TextPerplexity) -> TokenChanges | None:
    """The evaluation tokens that got worse; None without saved losses."""
    if dense.losses is None or pruned.losses is None or dense.losses.shape != pruned.losses.shape:
        return None
    tokenizer, ids = load_tokenizer(opened.model.pretrained), opened.texts.evaluation.ids
    return token_changes(
        dense.losses, pruned.losses, ids, lambda few: str(tokenizer.decode(few, clean_up_tokenization_spaces=False))
    )


def _kept(model: str) -> KeptRecord[KeptPerplexity]:
    return KeptRecord(perplexity_files(model)[0], KeptPerplexity)


def _losses(path: Path, digest: str | None) -> np.ndarray | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return np.load(io.BytesIO(data), allow_pickle=False) if hashlib.sha256(data).hexdigest() == digest else None
