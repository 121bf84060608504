"""Calibration on text that the dense model writes itself, and how that text is kept for the whole of a run."""

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from optima_tpu.config.run_config import RunConfig
from optima_tpu.data import SelfGenerated, Tokens, parse_source, token_digest
from optima_tpu.data.sampling import held_out_text
from optima_tpu.errors import UserError
from optima_tpu.models.checkpoints import Pretrained, load_tokenizer
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.generate import generate
from optima_tpu.report.progress import Progress
from optima_tpu.report.run_record import RUN, read_run, refuse_another
from optima_tpu.runtime.device_memory import device_budget
from optima_tpu.runtime.files import write_bytes, writing
from optima_tpu.runtime.processes import from_first, is_first, together

CALIBRATION = "calibration.npy"


def self_calibration(config: RunConfig, pretrained: Pretrained, decoder: Decoder, console: Console | None = None) -> Tokens:
    """The windows of a run that the dense model writes, or those that the run has kept of them. Every process calls it.

    A window begins with the tokenizer's BOS, or with its EOS where it has none: what stands before a document in packed text.
    Where the model draws an EOS, the next document begins in the same window: with a BOS if the tokenizer puts one before every
    text, with what the model draws otherwise. No window ends early.

    Args:
      console: where the progress is told.

    Raises:
      UserError: the tokenizer has neither token; or see :func:`optima_tpu.models.generate.generate`.
    """
    source, text = parse_source(config.calibration.source), config.calibration
    assert isinstance(source, SelfGenerated), "asked of a run whose model writes its calibration text"
    tokenizer = together(lambda: load_tokenizer(pretrained))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = eos if bos is None else bos
    if start is None:
        raise UserError(
            "expected a tokenizer with a BOS or an EOS token, with which text that the model writes begins; its "
            "tokenizer_config.json names none: add one, or choose another --calibration.source"
        )
    count = text.samples + text.held_out
    ids = from_first(lambda: _kept(config.run_directory, generated_by(config)))
    if ids is None:
        before_each = list(tokenizer("")["input_ids"][:1]) == [start]
        with Progress(console or Console(quiet=not is_first())) as progress:
            ids = generate(
                decoder,
                samples=count,
                length=text.length,
                start=start,
                seed=text.seed,
                vocabulary=len(tokenizer),
                temperature=source.temperature,
                restart=eos if before_each and eos != start else None,
                budget=device_budget(config.device_memory),
                progress=progress,
            )
    how = (
        f"{count} windows of {text.length} tokens that the model wrote itself, from {tokenizer.decode([start])} at "
        f"temperature {source.temperature:g}{held_out_text(text.held_out)}"
    )
    return Tokens(ids, how, ids.size)


def keep_calibration(directory: Path, manifest: Mapping[str, Any], calibration: Tokens) -> None:
    """Keeps what the model wrote in the directory of its run: another mesh might write other windows, by rounding."""
    if "generated" in manifest and _kept(directory, manifest) is None:
        file = io.BytesIO()
        np.save(file, calibration.ids)
        with writing(directory / CALIBRATION, "make room and repeat the command"):
            write_bytes(directory / CALIBRATION, file.getvalue())


def generated_by(config: RunConfig) -> Mapping[str, Any]:
    """What a manifest says of windows that the model wrote, beside their digests; nothing for other sources."""
    text = config.calibration
    return {"generated": dataclasses.asdict(text)} if isinstance(parse_source(text.source), SelfGenerated) else {}


def _kept(directory: Path, wanted: Mapping[str, Any]) -> np.ndarray | None:
    """The windows that a run has kept; None where there is no run, or where they are not those that it began with.

    Raises:
      UserError: the run's windows come from elsewhere, or were made in another way than ``wanted["generated"]`` says.
    """
    if not (directory / RUN).exists():
        return None
    manifest = read_run(directory)["manifest"]
    refuse_another(directory, manifest | {"generated": wanted["generated"]})
    samples = wanted["generated"]["samples"]
    try:
        ids = np.load(io.BytesIO((directory / CALIBRATION).read_bytes()), allow_pickle=False)
    except (OSError, ValueError, EOFError):  # written again, and refused by the digests if that comes out otherwise
        return None
    whole = [token_digest(ids[:samples]), token_digest(ids[samples:])] == [manifest["calibration"], manifest["held_out"]]
    return ids if whole else None
