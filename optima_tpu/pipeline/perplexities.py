"""The perplexities of a run's models on the evaluation text, with the loss of every token, and how the run directory keeps them.

RUN/dense.json          the dense model's perplexity, and the digests of the text and of the losses that belong to it
RUN/dense_losses.npy    the loss of each token of the first windows
RUN/pruned.json, RUN/pruned_losses.npy    the same of the pruned model
"""

import hashlib
import io
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np

from optima_tpu.data import token_digest
from optima_tpu.evaluate.perplexity import perplexity_of, text_steps, token_losses
from optima_tpu.evaluate.token_changes import token_changes
from optima_tpu.models.checkpoints import load_tokenizer
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline.keeping import StageWork
from optima_tpu.pipeline.opened import Opened
from optima_tpu.pipeline.repair import perplexity_files
from optima_tpu.report.pace import Step
from optima_tpu.runtime.checksums import keep
from optima_tpu.runtime.kept import KeptRecord
from optima_tpu.runtime.processes import first_only, from_first
from optima_tpu.runtime.records import Positive

_KEPT = 1 << 20
"""The number of evaluation tokens whose single losses are kept: they take 4 MB."""


class _Record(TypedDict):
    """The digest of the text, the perplexity on it, and the SHA-256 of the losses that belong to it."""

    tokens: str
    perplexity: Positive
    losses: NotRequired[str]


class TextPerplexity(NamedTuple):
    """What a model makes of the evaluation text.

    Attributes:
      perplexity: of the model.
      losses: [windows, length - 1] float32, of the tokens of the first windows; None where only the perplexity is known.
    """

    perplexity: float
    losses: np.ndarray | None = None


def perplexity_steps(opened: Opened) -> list[Step]:
    """The steps of :func:`measured`, the same for every model of this shape."""
    return text_steps(opened.model.decoder, opened.texts.evaluation.ids, both=False)


def measured(work: StageWork, decoder: Decoder) -> TextPerplexity:
    """Measures a model on the evaluation text of a run. Every process calls it."""
    ids = work.opened.texts.evaluation.ids
    losses = token_losses(decoder, ids, work.progress.advance, work.progress.advance)
    first = losses[: max(1, _KEPT // ids.shape[1])].copy()  # a view would keep all of them
    return TextPerplexity(perplexity_of(losses.sum(axis=1, dtype=np.float64), ids), first)


def read_perplexity(opened: Opened, model: str) -> TextPerplexity | None:
    """What an earlier start of the run measured on this text; None if nothing was kept. Every process calls it."""
    directory, digest = opened.directory, token_digest(opened.texts.evaluation.ids)
    record = _record(model).read(directory)
    if record is None or record["tokens"] != digest:
        return None
    return TextPerplexity(
        record["perplexity"], from_first(lambda: _losses(directory / perplexity_files(model)[1], record.get("losses")))
    )


def keep_perplexity(opened: Opened, model: str, measured: TextPerplexity) -> None:
    """Writes what was measured into the run directory, unless it has it. Every process calls it.

    Raises:
      UserError: the disk is full or not writable.
    """
    kept = read_perplexity(opened, model)
    if kept and kept.perplexity == measured.perplexity and (kept.losses is not None or measured.losses is None):
        return
    name = perplexity_files(model)[1]
    record: _Record = {"tokens": token_digest(opened.texts.evaluation.ids), "perplexity": measured.perplexity}
    if measured.losses is not None:
        file = io.BytesIO()
        np.save(file, measured.losses)
        data = file.getvalue()
        record["losses"] = hashlib.sha256(data).hexdigest()
        first_only(lambda: keep(opened.directory, {name: data}))  # the losses come first: the record holds their digest
    _record(model).write(opened.directory, record)


def changes(opened: Opened, dense: TextPerplexity, pruned: TextPerplexity) -> dict[str, Any] | None:
    """The tokens of the evaluation text that got worse; None if a model's losses were not saved."""
    if dense.losses is None or pruned.losses is None or dense.losses.shape != pruned.losses.shape:
        return None
    tokenizer, ids = load_tokenizer(opened.model.pretrained), opened.texts.evaluation.ids
    return token_changes(
        dense.losses, pruned.losses, ids, lambda few: str(tokenizer.decode(few, clean_up_tokenization_spaces=False))
    )


def _record(model: str) -> KeptRecord[_Record]:
    return KeptRecord(perplexity_files(model)[0], _Record)


def _losses(path: Path, digest: str | None) -> np.ndarray | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return np.load(io.BytesIO(data), allow_pickle=False) if hashlib.sha256(data).hexdigest() == digest else None
