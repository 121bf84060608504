"""Opens the model and the texts of a run, and makes its manifest."""

import dataclasses
import functools
import json
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from optima_tpu import data
from optima_tpu.config.flat import flat
from optima_tpu.config.run_config import RunConfig, weights_settings
from optima_tpu.data import Draw, Tokens, token_digest
from optima_tpu.data.cache import kept_tokens
from optima_tpu.errors import UserError, naming
from optima_tpu.method.layer_rules import check_layers, with_patterns
from optima_tpu.method.patterns import Pattern
from optima_tpu.method.selectors import Imported
from optima_tpu.models.check import check_checkpoint
from optima_tpu.models.checkpoints import load_tokenizer, open_model, refuse_damaged_model
from optima_tpu.models.checkpoints.cuts import placed, refuse_unreadable
from optima_tpu.models.checkpoints.fewer_blocks import refuse_uncuttable
from optima_tpu.models.checkpoints.fewer_experts import expert_cut
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.masks import check_masks, check_weights, open_given, open_masks
from optima_tpu.models.model import Model, check_ids, window_bos, window_length
from optima_tpu.pipeline.arguments import texts_of
from optima_tpu.pipeline.budget import on_budget
from optima_tpu.pipeline.self_calibration import generated_by, self_calibration, written_windows
from optima_tpu.report.progress import say
from optima_tpu.runtime.mesh import make_mesh
from optima_tpu.runtime.processes import SharedError, agree, alone, first_only, from_first, spread, together
from optima_tpu.runtime.version import code_version


class Texts(NamedTuple):
    """The token windows of a run.

    Attributes:
      calibration: the windows that the model is calibrated on, and after them the held-out windows.
      evaluation: the windows that the model is scored on.
      distillation: [windows, length] int32, the windows that the pruned model is trained on; None without distillation.
      written: [windows, length] int32, those that the dense model wrote, for ``calibration`` and then for ``distillation``; None
        if it wrote none.
    """

    calibration: Tokens
    evaluation: Tokens
    distillation: np.ndarray | None = None
    written: np.ndarray | None = None

    @classmethod
    def of(cls, config: RunConfig, drawn: Tokens, evaluation: Tokens, written: Tokens | None = None) -> "Texts":
        """Splits drawn windows: calibration, then distillation, then held out.

        Args:
          written: what the model wrote beside them, for calibration and then for distillation.
        """
        text, first = config.calibration, config.calibration.windows
        last = first + (config.distill.windows if config.distill else 0)
        training, own = drawn.ids[first:last], drawn.ids[:0] if written is None else written.ids
        parts = [drawn.ids[:first], own[: text.written], drawn.ids[last:]]
        if config.distill and config.distill.written:
            training = np.concatenate([training, own[text.written :]])
            # In one order for every mesh, since a step should read text of both kinds.
            training = training[np.random.default_rng(text.seed).permutation(len(training))]
        return cls(
            drawn._replace(
                ids=np.concatenate(parts), how=f"{written.how}; and {drawn.how}" if written and text.written else drawn.how
            ),
            evaluation,
            training if config.distill else None,
            written.ids if written else None,
        )

    @classmethod
    def of_written(cls, config: RunConfig, written: Tokens, evaluation: Tokens) -> "Texts":
        """Splits the windows that the model wrote, if there is no other text.

        Calibration windows come first, then held-out windows, then distillation windows.
        """
        read = config.calibration.windows + config.calibration.held_out
        training = written.ids[read:] if config.distill else None
        return cls(written._replace(ids=written.ids[:read]), evaluation, training, written.ids)


def open_model_on_mesh(config: RunConfig) -> Model:
    """Opens and checks the model of a run. Reads no weight yet.

    Raises:
      UserError: the model cannot be opened or is not supported, or the mesh does not fit the devices.
    """
    mesh = make_mesh(config.mesh)
    first_only(lambda: refuse_damaged_model(config.model))

    def open_here() -> Model:
        pretrained = open_model(config.model, config.dtype)
        decoder = Decoder.open(pretrained.config, pretrained.tensors, mesh, config.batch, config.family == "general")
        check_checkpoint(decoder)
        return Model(pretrained, decoder)

    return together(open_here)


def read_texts(config: RunConfig, model: Model, console: Console | None = None) -> Texts:
    """The token windows of a run.

    Process 0 reads the texts and sends the tokens to the other processes. If every process can read the calibration text, each
    process reads and tokenises a part of it. The tokens are the same for any number of processes, and with or without the token
    cache. Calibration text that the model writes itself is read from the run directory if an earlier start of the run saved it.

    Args:
      console: prints which texts are read, and the progress while the model writes calibration text.

    Raises:
      UserError: a text can't be read, is too short or does not fit the model; both texts are the same; or a model that writes
        its own calibration text does not fit the devices as a whole.
    """
    config = together(lambda: on_model(config, model.pretrained.config))
    source, other = together(lambda: texts_of(config))
    tokenizer, windows, scored = together(lambda: _windows(config, model))
    draw = functools.partial(data.calibration_tokens, source, tokenizer, windows)
    score = functools.partial(data.evaluation_tokens, other, tokenizer, **scored)
    kept, pretrained = functools.partial(kept_tokens, config.token_cache), model.pretrained

    def draw_together(source: data.TextSource) -> Tokens:
        together(lambda: source.documents("calibration"))  # otherwise one process could fail while the others wait
        try:
            return draw(over=spread)
        except UserError as error:  # the same in every process, which have the same documents
            raise SharedError(str(error)) from error

    def calibration(source: data.Source) -> Tokens:
        read = (lambda: draw_together(source)) if data.read_by_all(source) and not alone() else lambda: from_first(draw)
        return kept(source, "calibration", pretrained, read, **dataclasses.asdict(windows))

    if console:
        say(console, f"reading      {' and '.join(dict.fromkeys(map(str, (other, source))))}")
    # The evaluation text first: an error in it should appear before the model writes for minutes.
    evaluation = kept(other, "evaluation", pretrained, lambda: from_first(score), **scored)
    write = functools.partial(self_calibration, config, *model, console)
    if source.by_model:
        together(lambda: check_ids([evaluation.ids], model))
        return Texts.of_written(config, write(), evaluation)
    drawn = calibration(source)
    together(lambda: check_ids([drawn.ids, evaluation.ids], model))
    return Texts.of(config, drawn, evaluation, write() if written_windows(config) else None)


def on_model(config: RunConfig, model: PretrainedConfig, console: Console | None = None) -> RunConfig:
    """The run with the settings that depend on the model.

    The model sets the length of the calibration windows, and where its layers have the parts that the run cuts.

    Args:
      console: prints that the model's context makes the windows shorter than usual.

    Raises:
      UserError: windows are longer than the context that the model's config.json names, or parts, blocks or experts cannot be
        cut from the model.
    """
    text = config.calibration
    length = window_length(model, "--calibration.length", text.length)
    window_length(model, "--evaluation.length", config.evaluation.length)
    if console and length < text.window_length:
        say(console, f"no --calibration.length was given: windows of {length} tokens, the model's context")
    locate, recipe = functools.partial(placed, model=model), config.recipe
    recipe = dataclasses.replace(recipe, pattern=locate(recipe.pattern), layers=with_patterns(recipe.layers, locate))
    config = dataclasses.replace(config, recipe=recipe, calibration=dataclasses.replace(text, length=length))
    for pattern in recipe.patterns:
        refuse_unreadable(pattern, model)
    refuse_uncuttable(config.cut, model)
    if config.cut.experts:
        expert_cut(config.cut.experts, model)
    return on_budget(config, model, console)


def _windows(config: RunConfig, model: Model) -> tuple[PreTrainedTokenizerBase, Draw, dict[str, Any]]:
    """The tokenizer, the calibration draw and the evaluation's arguments."""
    tokenizer, text, scored = load_tokenizer(model.pretrained), config.calibration, config.evaluation
    count = text.windows + (config.distill.windows if config.distill else 0)
    draw = Draw(count, text.window_length, text.seed, text.held_out, window_bos(model, tokenizer))
    length, bos = scored.length or text.window_length, window_bos(model, tokenizer, scored.bos)
    return tokenizer, draw, {"length": length, "windows": scored.windows, "bos": bos}


def pruned_layers(config: RunConfig, decoder: Decoder) -> dict[str, Pattern]:
    """The pattern of every layer that is pruned, by its whole path.

    Raises:
      UserError: as ``check_layers``, or groups of integers do not divide the inputs of a layer.
    """
    shapes = list(linear_shapes(decoder))
    patterns = check_layers(config.recipe.layers, config.recipe.pattern, shapes, bool(config.cut.counts))
    for path, _, (_, d_in) in shapes:
        if config.recipe.quantize and path in patterns:
            with naming(path):
                config.recipe.quantize.check(d_in)
    return patterns


def manifest_of(config: RunConfig, model: Model, texts: Texts) -> dict[str, Any]:
    """All that decides the pruned weights and the layers' errors.

    Runs with equal manifests have equal results. Reads and checks the masks of a run that imports its masks.

    Raises:
      UserError: pattern, layer rules or masks do not fit the model, or another process has another manifest.
    """
    manifest = together(lambda: _manifest(config, model, texts))
    agree("run", flat(manifest))
    return manifest


def _manifest(config: RunConfig, model: Model, texts: Texts) -> dict[str, Any]:
    patterns = pruned_layers(config, model.decoder)
    fitted, ids = config.calibration.fitted, texts.calibration.ids
    manifest = {
        "model": model.pretrained.fingerprint,
        "recipe": weights_settings(config),
        "calibration": token_digest(ids[:fitted]),
        "held_out": token_digest(ids[fitted:]),
        **({} if texts.distillation is None else {"distillation": token_digest(texts.distillation)}),
        "code": code_version(),
        **({} if config.family == "declared" else {"family": config.family}),
        **generated_by(config),
    }
    if outside := config.outside_code:  # the same name may stand for other code tomorrow
        manifest["methods"] = outside
    if isinstance(config.recipe.selector, Imported):
        shapes = {path: shape for path, _, shape in linear_shapes(model.decoder)}
        pruned = {path + ".weight": shapes[path] for path in patterns}
        manifest["masks"] = check_masks(
            open_masks(config.recipe.selector.path),
            pruned,
            {path + ".weight": pattern for path, pattern in patterns.items()},
            model.pretrained.tensors,
        )
        if config.recipe.selector.weights:
            manifest["weights"] = check_weights(open_given(config.recipe.selector), pruned)
        del manifest["recipe"]["selector"]["path"]  # the masks decide the result, not their path
    return json.loads(json.dumps(manifest))  # as a file holds it, without tuples


def linear_shapes(decoder: Decoder) -> list[tuple[str, str, tuple[int, int]]]:
    """(path, path inside the block, [d_out, d_in]) of every linear layer."""
    return [
        (decoder.prefix(index) + name, name, (d_out, d_in))
        for index in range(decoder.config.blocks)
        for name in decoder.at(index).linears
        for d_out, d_in in [decoder.at(index).block_shapes[name + ".weight"]]
    ]
