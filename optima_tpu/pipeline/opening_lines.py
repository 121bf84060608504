"""The lines that a run prints about itself before its first long step."""

import math
from pathlib import Path

from rich.console import Console

from optima_tpu.config.run_config import Calibration, RunConfig, weights_settings
from optima_tpu.config.written import on_preset
from optima_tpu.data import parse_source, unigram_perplexity
from optima_tpu.errors import plural
from optima_tpu.method.distillation import Distillation
from optima_tpu.method.patterns import DENSE, Dense
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.model import Model, without_last
from optima_tpu.pipeline.distill.blocks import Trainer
from optima_tpu.pipeline.inputs import Texts, linear_shapes, pruned_layers
from optima_tpu.report.meaningless import poor_text
from optima_tpu.report.numbers import trained_on
from optima_tpu.report.progress import say
from optima_tpu.runtime.mesh import devices_words

_FEW, _ENOUGH = 8, 16
"""Calibration tokens for each input of a layer: below the first they are few; the second is what more windows should reach."""


def greet(console: Console, config: RunConfig, model: Model, texts: Texts, directory: Path, fitted: str) -> None:
    """Prints model, recipe, texts, devices and directory of a run.

    Args:
      fitted: from :func:`memory_plan.fitted`: what is split or done in parts to fit the devices; empty if nothing is.
    """
    decoder = without_last(model, config.cut.blocks).decoder
    shapes = {path: shape for path, _, shape in linear_shapes(decoder)}
    weights = {True: 0, False: 0}  # by whether the layer loses some
    for path, pattern in pruned_layers(config, decoder).items():
        weights[pattern.prunes(shapes[path])] += math.prod(shapes[path])
    # Which blocks leave is not chosen yet, and those before the first of them stay as they are.
    refitted = f", {'up to ' * bool(config.cut.blocks)}{weights[False]:,} to re-fit" if weights[False] else ""
    lines = [
        f"model        {model.pretrained.origin}: {config.cut.of_blocks(model.decoder.config.blocks)}, {weights[True]:,} weights "
        f"to prune{refitted}",
        f"preset       {on_preset(config)}",
        f"recipe       {recipe_line(config, decoder)}",
        f"calibration  {', '.join(filter(None, (texts.calibration.how, texts.calibration.cache)))}",
        f"evaluation   {', '.join(filter(None, (texts.evaluation.how, texts.evaluation.cache)))}",
        f"devices      {devices_words(decoder.mesh)}",
        f"run          {directory}",
    ]
    if weights[False] and not weights[True] and not moves_alone(config):
        idle = "prunes no weight, and nothing moves one: take a larger --pattern, or cut something with --target dense"
        lines.append(f"unusual      {config.recipe.pattern} {idle}")
    if few := short_text(config.calibration, max(d_in for _, d_in in shapes.values()), decoder.config.generates):
        lines.insert(4, f"             {few}")
    for which, tokens in (("calibration", texts.calibration), ("evaluation", texts.evaluation)):
        lines += [f"unusual      {warning}"] if (warning := poor_text(which, unigram_perplexity(tokens.ids))) else []
    if config.distill:
        lines.append(f"training     {training_words(config.distill, config.calibration.window_length)}")
        lines += [f"             {idle}"] if (idle := Trainer(decoder, config.distill).idle) else []
    if decoder.family.note:
        lines.insert(1, f"family       {decoder.family.note}")
    if fitted:
        lines.append(f"solver       {fitted}")
    say(console, "\n".join(lines))


def moves_alone(config: RunConfig) -> bool:
    """Whether a run changes weights where its pattern prunes none.

    It quantises them, or moves them toward the dense model after a cut.
    """
    return bool(config.recipe.quantize or (config.cut.counts and config.recipe.target.dense_stream))


def training_words(method: Distillation, length: int) -> str:
    """Describes a training's loss, weights and ``length``-token windows."""
    batch = plural(min(method.batch, method.pass_windows), "window")
    wrote = (
        f", {method.written:,} of the {plural(method.pass_windows, 'window')} written by the dense model"
        if method.written
        else ""
    )
    times = "once" if method.passes == 1 else plural(method.passes, "time")
    amount = trained_on(method.steps, method.tokens(length))
    return f"{method.words}, {method.train}: {amount}, {batch} of {length} in a step, each read {times}{wrote}"


def short_text(text: Calibration, widest: int, writes: bool) -> str:
    """Advice on a calibration text that is too short; empty if it is not.

    Args:
      widest: the number of inputs of the widest layer.
      writes: whether the model can write text.
    """
    tokens, more = text.fitted * text.window_length, -(-_ENOUGH * widest // text.window_length) - text.fitted
    if tokens >= _FEW * widest:
        return ""
    advice = f"{tokens:,} tokens are few for layers of {widest:,} inputs: take --calibration.windows {text.windows + more}"
    if not writes or parse_source(text.source).by_model:
        return advice
    return f"{advice}, or let the model write more by --calibration.written {text.written + more}"


def recipe_line(config: RunConfig, decoder: Decoder) -> str:
    """The recipe in a line: mask, update, pattern, other active settings."""
    recipe, settings, adding = config.recipe, weights_settings(config), bool(decoder.family.residuals)
    if recipe.patterns == [Dense()]:  # no method acts on any layer
        return ", ".join([DENSE, f"{config.cut.words} cut", *([config.distill.done] if config.distill else [])])
    methods = [settings[key] for key in ("selector", "solver") if settings[key]]
    words = [" + ".join(method["name"] + " weights" * method.get("weights", False) for method in methods), str(recipe.pattern)]
    words += [f"{rule.path}={rule.pattern or DENSE}" for rule in recipe.layers]
    words += [f"{config.cut.words} cut"] if config.cut.counts else []
    if recipe.target.dense_stream:
        words.append(f"dense target {recipe.target.alpha:g}")
        words += [f"residual drift {recipe.target.gamma:g}"] if recipe.target.gamma and adding else []
        words += ["weighted tokens"] if recipe.target.weigh_tokens and adding else []
    if recipe.recapture:
        words.append("recapture")
    if recipe.borrow and decoder.family.shared:
        words.append(f"experts borrow {recipe.borrow:g} tokens an input")
    if recipe.refine:
        words.append(f"{plural(recipe.refine.rounds, 'round')} of exchanges")
    if recipe.quantize:
        words.append(str(recipe.quantize))
    if config.allocation.measures:
        words.append(f"{weights_settings(config)['allocation']['name']} allocation")
    if config.distill:
        words.append(config.distill.done)
    return ", ".join(words)
