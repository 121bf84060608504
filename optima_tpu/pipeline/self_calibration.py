"""Lets the dense model write text for a run, and saves the text."""

import dataclasses
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from optima_tpu.config.run_config import RunConfig, to_dict
from optima_tpu.data import SelfGenerated, Tokens, parse_source
from optima_tpu.data.sampling import held_out_text
from optima_tpu.errors import UserError, plural
from optima_tpu.models.checkpoints import Pretrained, load_tokenizer
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.generate import Prompt, Sampling, generate, plan_generation
from optima_tpu.report.progress import Progress, Terminal
from optima_tpu.report.run_record import RUN, read_run, refuse_another
from optima_tpu.runtime.checksums import intact, keep
from optima_tpu.runtime.device_memory import device_budget
from optima_tpu.runtime.processes import from_first, is_first, together

CALIBRATION = "calibration.npy"

ADVICE = (
    "to write its own calibration text, take a --mesh with a larger model axis, a --dtype of fewer bytes, shorter windows, a "
    "larger --device_memory, or only stored text: another --calibration.source (c4, file:PATH), no --calibration.written and no "
    "--distill.written"
)
"""What to do if the model does not fit the devices as a whole."""


def written_windows(config: RunConfig) -> int:
    """The number of windows that the dense model writes for a run."""
    return _calibration_windows(config) + _training_windows(config)


def _calibration_windows(config: RunConfig) -> int:
    """How many written windows are calibrated on or held out: the first."""
    text = config.calibration
    return text.windows + text.held_out if _writes_all(config) else text.written


def _training_windows(config: RunConfig) -> int:
    """How many written windows are trained on: the last ones."""
    if config.distill is None:
        return 0
    return config.distill.pass_windows if _writes_all(config) else config.distill.written


def _writes_all(config: RunConfig) -> bool:
    """Whether the model writes all of the calibration text."""
    return parse_source(config.calibration.source).by_model


def self_calibration(config: RunConfig, pretrained: Pretrained, decoder: Decoder, console: Console | None = None) -> Tokens:
    """The windows that the dense model writes, or wrote in an earlier start.

    Calibration windows come first, then training windows. Every process calls it.
    A window begins with the tokenizer's BOS, or with its EOS if it has no BOS: in packed text this token precedes a document.
    After an EOS that the model draws, the next document begins in the same window: with a BOS if the tokenizer puts one before
    every text, otherwise with the next token that the model draws. Every window has its full length.

    Raises:
      UserError: the tokenizer has neither token; the model does not fit the devices as a whole; or its logits are not finite.
    """
    source, text, count = parse_source(config.calibration.source), config.calibration, written_windows(config)
    temperature = source.temperature if isinstance(source, SelfGenerated) else 1.0
    tokenizer = together(lambda: load_tokenizer(pretrained))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = eos if bos is None else bos
    if start is None:
        raise UserError(
            "expected a tokenizer with a BOS or an EOS token, since the text that the model writes begins with one, got a "
            "tokenizer_config.json that names neither: add one, or take only stored text: another --calibration.source and no "
            "--calibration.written"
        )
    ids = from_first(lambda: _kept(config.run_directory, generated_by(config), to_dict(config)))
    if ids is None:
        before_each = list(tokenizer("")["input_ids"][:1]) == [start]
        with Progress(console or Terminal(quiet=not is_first())) as progress:
            sampling = Sampling(
                len(tokenizer), temperature, text.seed, follow=(eos, start) if before_each and eos != start else None
            )
            prompts, budget = [Prompt((start,), text.window_length - 1)] * count, device_budget(config.device_memory)
            plan = plan_generation(decoder, prompts, sampling, advice=ADVICE, budget=budget, room=text.window_length)
            at_once, began = len(plan.batches[0].prompts), time.monotonic()
            progress.stage(
                f"writing {plural(count, 'window')} of {text.window_length} tokens with the dense model, {at_once} at once",
                plan.steps,
            )
            written = generate(decoder, plan, advance=progress.advance)
            ids = np.array([[start, *tokens] for tokens in written], np.int32)
            progress.note(f"{ids.size / (time.monotonic() - began):,.0f} tokens a second")
    how = (
        f"{plural(_calibration_windows(config), 'window')} of {text.window_length} tokens that the model wrote itself, from "
        f"{tokenizer.decode([start])} at temperature {temperature:g}"
        + held_out_text(text.windows, 0 if text.written else text.held_out)
    )
    return Tokens(ids, how, ids.size)


def keep_calibration(directory: Path, manifest: Mapping[str, Any], written: np.ndarray | None) -> None:
    """Saves the model's own text in the directory of its run.

    On another mesh the model might write other text, by rounding.
    """
    if written is not None and _kept(directory, manifest) is None:
        file = io.BytesIO()
        np.save(file, written)
        keep(directory, {CALIBRATION: file.getvalue()})


def generated_by(config: RunConfig) -> Mapping[str, Any]:
    """The manifest's entry for written windows; empty if there are none."""
    training = _training_windows(config)
    settings = dataclasses.asdict(config.calibration) | ({"training": training} if training else {})
    return {"generated": settings} if written_windows(config) else {}


def _kept(directory: Path, wanted: Mapping[str, Any], configuration: Mapping[str, Any] | None = None) -> np.ndarray | None:
    """The windows that a run saved; None if missing or damaged.

    Raises:
      UserError: the run's windows have another source, or were made with other settings than ``wanted["generated"]``.
    """
    if not intact(directory, RUN):
        return None
    refuse_another(directory, {**read_run(directory).manifest, "generated": wanted["generated"]}, configuration)
    if not intact(directory, CALIBRATION):  # written again; if the result differs, its digests refuse it
        return None
    return np.load(io.BytesIO((directory / CALIBRATION).read_bytes()), allow_pickle=False)
