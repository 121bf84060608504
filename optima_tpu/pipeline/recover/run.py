"""One recovery: a run that trains blocks which are pruned already."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from optima_tpu import data
from optima_tpu.config.flat import flat
from optima_tpu.config.model_spec import opening
from optima_tpu.config.run_config import Calibration, Evaluation, RunConfig, to_dict, weights_settings
from optima_tpu.data import Draw, Tokens, token_digest
from optima_tpu.data.cache import kept_tokens
from optima_tpu.errors import UserError, plural
from optima_tpu.models.model import check_ids, window_bos, window_length
from optima_tpu.pipeline import stages
from optima_tpu.pipeline.arguments import recovery_texts
from optima_tpu.pipeline.cutting import pruned_model, take_left_out
from optima_tpu.pipeline.distill.blocks import Trainer
from optima_tpu.pipeline.distill.train import refuse_large
from optima_tpu.pipeline.inputs import Texts, on_model
from optima_tpu.pipeline.journal import Journal, prepare_directory, refuse_unusable
from optima_tpu.pipeline.keeping import Keep, Stage, StageWork, finish
from optima_tpu.pipeline.opened import Opened
from optima_tpu.pipeline.opening_lines import training_words
from optima_tpu.pipeline.recover.config import RecoverConfig
from optima_tpu.pipeline.recover.start import Start, open_start
from optima_tpu.pipeline.run import measuring
from optima_tpu.report.contents import Report
from optima_tpu.report.pace import Step
from optima_tpu.report.progress import Terminal, say
from optima_tpu.runtime.device_memory import device_budget
from optima_tpu.runtime.mesh import devices_words, make_mesh
from optima_tpu.runtime.processes import agree, check_signals, fetch, from_first, is_first, together
from optima_tpu.runtime.version import code_version


def recover(config: RecoverConfig, console: Console | None = None) -> Report:
    """Trains a pruned model, or goes on with a recovery that was stopped.

    Returns:
      The contents of report.json: ``perplexity`` has the dense model's and the trained one's, ``distillation`` the rest.

    Raises:
      UserError: a mistake that the user can correct. Nothing of the pruned model was changed.
    """
    console = console or Terminal(quiet=not is_first())
    settings = config.to_dict()
    agree("settings and code", flat(settings | {"process_id": None, "code": code_version()}))
    directory = together(lambda: config.run_directory)
    refuse_unusable(directory)
    check_signals()
    start = open_start(config, make_mesh(config.mesh), lambda spec: say(console, opening(spec)))
    dense = config.against or start.record.dense
    assert dense is not None, "open_start opened it"
    source, evaluation = _sources(config, start)
    length = window_length(start.dense.pretrained.config, "--length", config.length or start.window_length)
    say(console, f"reading      {' and '.join(dict.fromkeys((evaluation, source)))}")
    with _naming_options(config):
        drawn, scored = _texts(config, start, source, evaluation, length)
    windows = config.distill.filled(max(0, len(drawn.ids) - config.held_out))
    if windows < 1:
        raise UserError(
            f"expected a text of more than {plural(config.held_out, 'window')} of {length} tokens, which are held out, got "
            f"{len(drawn.ids)} in {source}: give a longer text, or fewer --held-out"
        )
    run_config = _run_config(config, start.base(dense, config.model), source, evaluation, length, windows)
    run_config = together(lambda: on_model(run_config, start.dense.pretrained.config))
    method = run_config.distill
    assert method is not None
    refuse_large(Trainer(start.decoder, method, device_budget(config.device_memory)))
    held_out, training, _ = np.split(drawn.ids, [config.held_out, config.held_out + windows])
    texts = Texts(drawn._replace(ids=np.concatenate([training, held_out])), scored, training)
    manifest = _manifest(run_config, start, texts)
    agree("recovery", flat(manifest))
    base = flat(RecoverConfig(config.model, config.tokens, distill=type(config.distill)()).to_dict()) | {"distill.name": "kl"}
    changed = {name: value for name, value in flat(settings).items() if name in ("model", "tokens") or value != base[name]}
    configuration = to_dict(run_config) | {"recover": changed}
    directory = prepare_directory(directory, manifest, configuration)
    opened = Opened(run_config, start.dense, texts, manifest, configuration, directory)
    say(console, "\n".join(_greeting(config, opened, start, drawn)))
    return finish(opened, functools.partial(recovering, run_config, start), console)


@contextlib.contextmanager
def _naming_options(config: RecoverConfig) -> Iterator[None]:
    """Adds to an error the options that replace the texts of the record."""
    taken = {"--source": config.source, "--evaluation": config.evaluation or config.source}
    named = " and ".join(name for name, given in taken.items() if given is None)
    try:
        yield
    except UserError as error:
        more = f"; {named} would replace the text that the record of {config.model} names" if named else ""
        raise UserError(f"{error}{more}") from None


def recovering(config: RunConfig, start: Start, keep: Keep) -> Report:
    """Runs the stages of a run, except that the blocks are pruned already."""
    dense = keep(stages.DENSE_PERPLEXITY)
    journal = keep(stages.JOURNAL, dense, None)
    sinks = keep(stages.SINKS, journal)
    blocks = keep(_taking(start), journal)
    return measuring(config, keep, dense, blocks, sinks)


def _taking(start: Start) -> Stage[[Journal], Journal]:
    def take(work: StageWork, journal: Journal) -> Journal:
        take_left_out(work.opened.directory, start.record.left_out)
        decoder = pruned_model(work.opened).decoder
        missing = [index for index in range(decoder.config.blocks) if index not in journal.finished]
        for index, parameters in zip(missing, start.decoder.blocks(missing)):
            _take_block(journal, start, index, parameters, decoder.prefix(index))
            work.progress.advance()
        return journal

    return Stage(
        "taking the pruned blocks",
        take,
        steps=lambda opened: [Step("taking")] * len(stages.unfinished(opened)),
        count=stages.count_blocks,
        done=stages.count_finished,
    )


def _take_block(journal: Journal, start: Start, index: int, parameters: dict[str, jax.Array], prefix: str) -> None:
    layers = [name + ".weight" for name in start.decoder.at(index).linears]  # in the order in which a run reports them
    loaded = together(lambda: {name: start.mask(index, name) for name in layers})
    masks = {name: keep for name, keep in loaded.items() if keep is not None}
    placed = {name: jax.device_put(keep, parameters[name].sharding) for name, keep in masks.items()}
    for name, stays in placed.items():
        if fetch(jnp.any((parameters[name] != 0) & ~stays)):
            raise UserError(f"{start.decoder.prefix(index)}{name} of {start.masks.origin} has weights where its mask prunes")
        parameters[name] = jnp.where(stays, parameters[name], jnp.zeros((), parameters[name].dtype))  # no -0.0
    weights = {prefix + name: array for name, array in parameters.items()}
    journal.save(index, weights, {prefix + name: stays for name, stays in placed.items()}, start.report(index, masks))


def _sources(config: RecoverConfig, start: Start) -> tuple[str, str]:
    """The names of the text to train on and of the text to measure on."""
    settings = start.record.settings
    source = config.source or (settings.calibration.source if settings else None)
    if source is None:
        raise UserError(f"expected --source with a text to train on, got none, and {config.model} has no record of its text")
    measured = settings.evaluation.source if settings and not config.source else None
    evaluation = config.evaluation or measured
    recovery_texts(source, evaluation)
    return source, evaluation or source


def _texts(config: RecoverConfig, start: Start, source: str, evaluation: str, length: int) -> tuple[Tokens, Tokens]:
    """The windows to train on, and the windows to measure on.

    The first windows to train on are held out. Process 0 reads the texts.
    """
    model, tokenizer = start.dense, start.pruned.tokenizer
    bos = together(lambda: window_bos(model, tokenizer))
    parsed, other = data.parse_source(source), data.parse_source(evaluation)
    windows = config.held_out + config.training_windows(length)
    score: dict[str, Any] = {"length": length, "windows": config.windows, "bos": bos}
    draw = Draw(windows, length, config.seed, bos=bos)
    # The text to measure on first: an error in it should appear before millions of tokens are read.
    measure = functools.partial(data.evaluation_tokens, other, tokenizer, **score)
    kept = functools.partial(kept_tokens, config.token_cache)
    scored = kept(other, "evaluation", model.pretrained, lambda: from_first(measure), **score)
    read = functools.partial(data.stream_tokens, parsed, tokenizer, draw)
    drawn = kept(parsed, "calibration", model.pretrained, lambda: from_first(read), stream=1, **dataclasses.asdict(draw))
    together(lambda: check_ids([drawn.ids, scored.ids], model))
    return drawn, scored


def _run_config(config: RecoverConfig, base: RunConfig, source: str, evaluation: str, length: int, windows: int) -> RunConfig:
    """The settings by which the model was pruned, with the training added."""
    return dataclasses.replace(
        base.on(config),
        dtype=config.dtype,
        token_cache=config.token_cache,
        output=str(config.run_directory),
        distill=dataclasses.replace(config.distill, windows=windows),
        calibration=Calibration(source, windows, length, config.seed, config.held_out),
        evaluation=Evaluation(evaluation, length, config.windows),
    )


def _manifest(config: RunConfig, start: Start, texts: Texts) -> dict[str, Any]:
    """All that decides the trained weights."""
    recipe = weights_settings(config)
    recipe["selector"].pop("path", None)  # the model's contents decide the result, not its path
    windows, ids = config.calibration.windows, texts.calibration.ids
    return {
        "model": start.dense.pretrained.fingerprint,
        "start": start.pruned.model.pretrained.fingerprint,
        "recipe": recipe,
        "calibration": token_digest(ids[:windows]),
        "held_out": token_digest(ids[windows:]),
        "code": code_version(),
    }


def _greeting(config: RecoverConfig, opened: Opened, start: Start, drawn: Tokens) -> list[str]:
    method, text = opened.config.distill, opened.config.calibration
    assert method is not None
    lines = [
        f"model        {config.model}: {opened.config.cut.of_blocks(opened.model.decoder.config.blocks)}, "
        f"{plural(len(start.names), 'pruned matrix')}",
        f"dense model  {start.dense.pretrained.origin}",
        f"training     {training_words(method, text.window_length)}",
        "             this is training, not one-shot pruning",
        *(f"             {idle}" for idle in filter(None, [Trainer(opened.model.decoder, method).idle])),
        f"text         {', '.join(filter(None, (drawn.how, drawn.cache)))}, the first {config.held_out} of them held out",
    ]
    if text.windows < config.training_windows(text.window_length):
        lines.append(
            f"             {text.source} has no more: {config.token_count:,} tokens were asked for; more --distill.passes read "
            "the windows again"
        )
    scored = opened.texts.evaluation
    lines.append(f"evaluation   {', '.join(filter(None, (scored.how, scored.cache)))}")
    lines.append(f"devices      {devices_words(opened.model.decoder.mesh)}")
    return [*lines, f"run          {opened.directory}"]
