"""Turns text into token windows for calibration and evaluation.

There is one module for each source.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeGuard

import numpy as np

from optima_tpu.data import sampling
from optima_tpu.data.c4 import C4
from optima_tpu.data.file import File
from optima_tpu.data.hub import Hub
from optima_tpu.data.mix import Mix
from optima_tpu.data.npy import Npy
from optima_tpu.data.pydoc import PyDoc
from optima_tpu.data.random import Random
from optima_tpu.data.sampling import Draw
from optima_tpu.data.self_generated import SelfGenerated
from optima_tpu.data.source import (
    Part,
    Source,
    Split,
    TextSource,
    Tokens,
    TokenSource,
    common_part,
    token_digest,
    unigram_perplexity,
)
from optima_tpu.data.tfds import TFDS
from optima_tpu.data.wikitext2 import WikiText2
from optima_tpu.errors import UserError, did_you_mean, panics_refused
from optima_tpu.runtime.bounds import MOST, Bound

if TYPE_CHECKING:  # importing it takes seconds and warns that torch is missing, also in programs that tokenise nothing
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "C4",
    "TFDS",
    "Draw",
    "File",
    "Hub",
    "Mix",
    "Npy",
    "PyDoc",
    "Random",
    "SelfGenerated",
    "Source",
    "Split",
    "TextSource",
    "TokenSource",
    "Tokens",
    "WikiText2",
    "calibration_tokens",
    "check_files",
    "evaluation_tokens",
    "parse_source",
    "read_by_all",
    "refuse_overlap",
    "shared",
    "stream_tokens",
    "token_digest",
    "tokenizing",
    "unigram_perplexity",
]

_FILE_OF, _INSTEAD = "the tokenizer.json of", "download it again, or take that of the base model"

NAMED: dict[str, Source] = {str(source): source for source in (PyDoc(), C4(), WikiText2(), Random())}
WITH_PATH: dict[str, Callable[[str], Source]] = {"file": File.parse, "npy": Npy.parse, "tfds": TFDS.parse, "hub": Hub.parse}


_FORMS = {
    "file": "file:PATH, such as file:texts/a.txt",
    "npy": "npy:PATH, such as npy:tokens.npy",
    "tfds": "tfds:NAME@DIR",
    "hub": "hub:ORG/NAME@SPLIT",
}


def parse_source(text: str) -> Source:
    """Reads the name of a source or of a mix, such as "c4" or "file:PATH".

    Raises:
      UserError: the text is none of these. Whether a file exists is checked when the file is read.
    """
    kind, colon, path = text.partition(":")
    if mix := Mix.parse(text, parse_source):
        return mix
    if "," in text and all(part.strip().partition(":")[0] in (*NAMED, *WITH_PATH) for part in text.split(",")):
        raise UserError(f"expected a share behind each text of a mix, such as c4:0.5,pydoc:0.5, got {text!r}")
    if text in NAMED:
        return NAMED[text]
    if text.partition("?")[0] == "self":
        return SelfGenerated.parse(text)
    if colon and path and kind in WITH_PATH:
        return WITH_PATH[kind](path)
    if colon and kind in WITH_PATH:
        raise UserError(f"expected {_FORMS[kind]}, got {text!r}")
    raise UserError(
        f"expected a text source ({', '.join(NAMED)}, self, file:PATH, file:PATH?field=NAME, npy:PATH, "
        f"tfds:NAME@DIR, hub:ORG/NAME@SPLIT, or several with their shares, such as c4:0.5,pydoc:0.5), got {text!r}"
        + (did_you_mean(text, [*NAMED, "self"]) or "; for a text of your own write file: before its path")
    )


def read_by_all(source: Source) -> TypeGuard[TFDS]:
    """Whether every process can read any document of a source by itself."""
    return isinstance(source, TFDS)


def calibration_tokens(source: Source, tokenizer: "PreTrainedTokenizerBase", draw: Draw, over: sampling.Over = map) -> Tokens:
    """Draws the calibration windows of a model, then the held-out windows.

    The same arguments give the same tokens. Windows of a text are drawn by
    :func:`optima_tpu.data.sampling.calibration_windows`. Every document is tokenised with the tokenizer's own special tokens,
    so the tokenizer decides whether a BOS begins a document. The text is held in memory while windows are drawn (a shard of C4:
    about 1 GB), except for sources whose documents can be read by index.

    Args:
      over: how documents are read and tokenised, see :func:`optima_tpu.data.sampling.calibration_windows`.

    Returns:
      ids [windows + held_out, length] int32, the held-out ones last.

    Raises:
      UserError: the source can't be read or holds too few tokens, or its ids do not fit the tokenizer.
    """
    if isinstance(source, Mix):
        return source.windows(draw, "calibration windows", lambda text, own: calibration_tokens(text, tokenizer, own, over))
    if isinstance(source, TokenSource):
        tokens = _token_windows(source, tokenizer, draw)
        return _replacing(tokens._replace(how=tokens.how + sampling.held_out_text(draw.windows, draw.held_out)), draw.bos)
    documents = source.documents("calibration")
    return _preceded(
        sampling.calibration_windows(
            documents if isinstance(documents, Sequence) else list(documents),
            _encoder(tokenizer, draw.bos),
            _of_text(draw),
            separator=tokenizer.eos_token_id,
            origin=str(source),
            over=over,
        ),
        draw.bos,
    )


def stream_tokens(source: Source, tokenizer: "PreTrainedTokenizerBase", draw: Draw) -> Tokens:
    """Returns at most ``windows`` disjoint windows to train a pruned model on.

    See :func:`optima_tpu.data.sampling.stream_windows`. A :class:`TokenSource` gives as many as are asked for.

    Returns:
      ids [windows, length] int32.

    Raises:
      UserError: the source can't be read or holds less than one window, or its ids do not fit the tokenizer.
    """
    if isinstance(source, Mix):
        return source.windows(draw, "windows", lambda text, own: stream_tokens(text, tokenizer, own))
    if isinstance(source, TokenSource):
        return _replacing(_token_windows(source, tokenizer, draw), draw.bos)
    return _preceded(
        sampling.stream_windows(
            source.documents("calibration"),
            _encoder(tokenizer, draw.bos),
            _of_text(draw),
            separator=tokenizer.eos_token_id,
            origin=str(source),
        ),
        draw.bos,
    )


def evaluation_tokens(
    source: Source, tokenizer: "PreTrainedTokenizerBase", *, length: int, windows: int | None, bos: int | None = None
) -> Tokens:
    """The windows for perplexity: a text cut into consecutive windows.

    The last partial window is left out. The documents are joined by a blank line and tokenised as one text with the tokenizer's
    own special tokens, as SparseGPT (arXiv:2301.00774) and Wanda (arXiv:2306.11695) do with WikiText-2.

    Args:
      windows: takes at most so many windows, the first ones; None takes all.
      bos: see :class:`Draw`.

    Returns:
      ids [windows, length] int32.

    Raises:
      UserError: the source can't be read or holds less than one window, or its ids do not fit the tokenizer.
    """
    Bound(1).refuse("windows", 1 if windows is None else windows)
    Bound(1).refuse("length", length)
    if isinstance(source, TokenSource):
        return _replacing(source.tokens("evaluation", vocabulary=len(tokenizer), windows=windows, length=length, seed=0), bos)
    return _preceded(
        sampling.evaluation_windows(
            source.documents("evaluation"),
            _encoder(tokenizer, bos),
            length=_text_length(length, bos),
            windows=windows,
            origin=str(source),
        ),
        bos,
    )


def refuse_overlap(
    calibration: Source,
    evaluation: Source,
    named: bool = True,
    both: str = "calibration and evaluation",
    option: str = "--evaluation.source",
) -> None:
    """Raises UserError if both sources would read the same documents.

    No model is scored on text that it was calibrated on. See :func:`shared`. Sources that name no parts have splits without
    common documents.

    Args:
      named: whether the person named the second.
      both: what the command calls the two.
      option: its option that names another text for the second.
    """
    if part := shared(calibration, evaluation):
        calibration.check()  # a missing file is the more useful message
        raise UserError(
            f"{'' if named else f'without {option} '}{both} would both read {part.text}: expected two different texts; give "
            f"{option} another one, such as wikitext2, pydoc or file:PATH"
        )


def shared(calibration: Source, evaluation: Source) -> Part | None:
    """Returns a part of a text that both sources would read, or None.

    Two sources share a file, a split of a data set (also if different kinds of sources read it), or overlapping parts of a split.

    Raises:
      UserError: a source can't say what it reads, because its data set does not exist here.
    """
    return common_part(calibration.parts("calibration"), evaluation.parts("evaluation"))


def _text_length(length: int, bos: int | None) -> int:
    """The number of text tokens in a window."""
    if bos is None:
        return length
    Bound(2, hint="the model needs a BOS token in each window").refuse("length", length)
    return length - 1


def _of_text(draw: Draw) -> Draw:
    """The draw of the text in the windows, after their BOS."""
    return dataclasses.replace(draw, length=_text_length(draw.length, draw.bos), bos=None)


def _token_windows(source: TokenSource, tokenizer: "PreTrainedTokenizerBase", draw: Draw) -> Tokens:
    return source.tokens("calibration", vocabulary=len(tokenizer), windows=draw.count, length=draw.length, seed=draw.seed)


def check_sources(*sources: str | None) -> None:
    """Raises UserError for a text that names no source. None is skipped."""
    for source in sources:
        if source is not None:
            parse_source(source)


def check_files(*sources: str | None) -> None:
    """Raises UserError for a source's missing file. None is skipped."""
    for source in filter(None, sources):
        for text in parse_source(source).each_text():
            text.check()


def _preceded(tokens: Tokens, bos: int | None) -> Tokens:
    if bos is None:
        return tokens
    ids = np.pad(tokens.ids, ((0, 0), (1, 0)), constant_values=bos)
    return tokens._replace(ids=ids, how=f"{tokens.how}, a BOS token before each: {ids.shape[1]} in all")


def _replacing(tokens: Tokens, bos: int | None) -> Tokens:
    if bos is None or (tokens.ids[:, 0] == bos).all():
        return tokens
    ids = tokens.ids.copy()
    ids[:, 0] = bos
    return tokens._replace(ids=ids, how=tokens.how + ", the first token of each replaced by a BOS token")


def tokenizing(tokenizer: "PreTrainedTokenizerBase") -> contextlib.AbstractContextManager[None]:
    """Turns a panic of the tokenizers library into a UserError."""
    return panics_refused(f"{_FILE_OF} {tokenizer.name_or_path} has a rule that fails on some text: {_INSTEAD}")


def _encoder(tokenizer: "PreTrainedTokenizerBase", bos: int | None) -> sampling.Encode:
    def encode(text: str) -> np.ndarray:
        # Not verbose: transformers would warn that a document is longer than the model's context, which is allowed here.
        with tokenizing(tokenizer):
            encoded = tokenizer(text, add_special_tokens=bos is None, return_attention_mask=False, verbose=False)
        ids = np.asarray(encoded["input_ids"], np.int64)
        if ids.size and ids.max() > MOST:
            raise UserError(f"{_FILE_OF} {tokenizer.name_or_path} has a token with the number {ids.max()}: {_INSTEAD}")
        return ids.astype(np.int32)

    return encode
