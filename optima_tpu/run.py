"""One run, from a checkpoint to a pruned one: what happens after the command line was read."""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from optima_tpu.calibrate import linear_groups
from optima_tpu.checkpoint import CheckpointTensors, Journal, finished_blocks, open_journal, prepare_directory
from optima_tpu.config import RunConfig, to_dict, weights_settings
from optima_tpu.data import Tokens
from optima_tpu.evaluate.perplexity import perplexity
from optima_tpu.export import export, is_export_of
from optima_tpu.files import alone, write_bytes
from optima_tpu.inputs import (Model, Texts, linear_shapes, manifest_of, open_model_on_mesh, read_texts,
                               token_digest)
from optima_tpu.layer_rules import check_layers
from optima_tpu.masks import open_masks
from optima_tpu.models.decoder import Decoder
from optima_tpu.prune import ReadMask, Recipe, walk_block
from optima_tpu.report.file import environment, host_memory_peak, write_report
from optima_tpu.report.progress import Progress, say
from optima_tpu.report.records import BlockReport
from optima_tpu.report.table import print_summary
from optima_tpu.selectors import Imported


def run(config: RunConfig, console: Console | None = None, model: Model | None = None, texts: Texts | None = None,
        dense: float | None = None) -> dict[str, Any]:
    """Prunes a model as ``config`` says, or goes on where the same run was stopped. A finished run is only told again.

    Everything that can be wrong with the input is found before the first block: model, mesh, pattern, texts, output.

    Args:
      model: from :func:`open_model_on_mesh`, where several runs share it.
      texts: from :func:`read_texts`.
      dense: the perplexity of the dense model on these texts, where it is known.

    Returns:
      What report.json holds.

    Raises:
      UserError: something the user can mend; nothing of an earlier run was overwritten.
    """
    console = console or Console()
    model = model or open_model_on_mesh(config)
    pretrained, decoder = model
    texts = texts or read_texts(config, model)
    calibration, evaluation = texts
    manifest = manifest_of(config, model, texts)
    directory = prepare_directory(config.run_directory, manifest)
    _greet(console, config, model, texts, directory)
    if report := _finished_report(config, directory, manifest, evaluation):
        _tell(console, config, report)
        return report

    with alone(directory), Progress(console) as progress:
        if dense is None:
            dense = _dense_perplexity(decoder, evaluation, directory, progress)
        # Only now is anything written: every weight was read, and the model works in this dtype.
        journal = open_journal(directory, manifest, pretrained.assets, to_dict(config))
        _keep_dense(dense, evaluation, directory)
        masks = open_masks(config.selector.path).read if isinstance(config.selector, Imported) else None
        prune_model(decoder, calibration.ids, recipe_of(config), journal, progress, config.calibration.samples, masks)
        progress.stage("writing the checkpoint", 1)
        journal.write_checkpoint(pretrained.tensors)
        progress.advance()
        pruned = _measure("pruned perplexity", dataclasses.replace(decoder, tensors=CheckpointTensors(journal.directory)),
                          evaluation, progress)
        blocks = [BlockReport.from_json(journal.report(index)) for index in range(decoder.config.blocks)]
        folder = journal.directory / "hf"
        files = {"report": str(journal.directory / "report.json"), "checkpoint": str(journal.directory / "checkpoint")}
        if config.export:
            files["transformers"] = str(folder)

        def record() -> dict[str, Any]:
            return write_report(
                journal.directory / "report.json", manifest=manifest, configuration=to_dict(config),
                environment=environment(decoder.mesh),
                model={"origin": pretrained.origin, "fingerprint": pretrained.fingerprint,
                       "architecture": (pretrained.config.architectures or [None])[0], "blocks": decoder.config.blocks},
                calibration={"source": config.calibration.source, "how": calibration.how, "tokens": int(calibration.ids.size)},
                evaluation={"how": evaluation.how, "tokens": int(evaluation.ids.size), "digest": token_digest(evaluation.ids)},
                perplexity={"dense": dense, "pruned": pruned}, blocks=blocks, seconds=progress.seconds,
                memory={"host_peak": host_memory_peak()}, files=files)

        report = record()
        if config.export and not is_export_of(journal.directory, folder):
            progress.stage("exporting for transformers", 1)
            export(journal.directory, folder)
            progress.advance()
    report = record()  # again, now that every stage has its time
    _tell(console, config, report)
    return report


def prune_model(decoder: Decoder, tokens: np.ndarray, recipe: Recipe, journal: Journal, progress: Progress,
                samples: int | None = None, masks: ReadMask | None = None) -> None:
    """Prunes block after block into the journal, from the first that it does not hold.

    Args:
      tokens: [samples + held out, length] int32, the calibration set and the held-out windows after it.
      samples: how many of them calibrate; None stands for all.
      masks: for a recipe without a selector.
    """
    count = decoder.config.blocks
    progress.stage("pruning", count)
    if journal.finished == count:
        return
    groups = linear_groups(decoder)
    hidden = np.array(journal.activations()) if journal.finished else decoder.embed(tokens)
    for index in range(journal.finished, count):
        progress.block(index, count)
        started = time.monotonic()
        parameters, keeps, layers = walk_block(decoder, index, hidden, groups, recipe, progress.layer, samples=samples,
                                               masks=masks)
        report = BlockReport(index, time.monotonic() - started, layers)
        prefix = decoder.prefix(index)
        journal.save(index, {prefix + name: value for name, value in parameters.items()},
                     {prefix + name: value for name, value in keeps.items()}, report.to_json(), hidden)
        del parameters, keeps  # not to be held while the next block is read
        progress.advance()


def recipe_of(config: RunConfig) -> Recipe:
    """The part of a configuration that the walk needs."""
    selector = None if isinstance(config.selector, Imported) else config.selector
    return Recipe(config.pattern, selector, config.solver, config.accept, config.layers)


def _finished_report(config: RunConfig, directory: Path, manifest: dict[str, Any], evaluation: Tokens
                     ) -> dict[str, Any] | None:
    """report.json of a run that has nothing left to do, None of any other."""
    path = directory / "report.json"
    if not path.exists() or (config.export and not is_export_of(directory, directory / "hf")):
        return None
    report = json.loads(path.read_bytes())
    same = report["manifest"] == manifest and report["evaluation"]["digest"] == token_digest(evaluation.ids)
    return report if same else None


def _measure(name: str, decoder: Decoder, tokens: Tokens, progress: Progress) -> float:
    progress.stage(name, decoder.config.blocks + 1)
    return perplexity(decoder, tokens.ids, progress.advance)


def _dense_perplexity(decoder: Decoder, tokens: Tokens, directory: Path, progress: Progress) -> float:
    """Measured once a run: a resumed one finds it in the run directory."""
    path = directory / "dense.json"
    if path.exists():
        known = json.loads(path.read_bytes())
        if known["tokens"] == token_digest(tokens.ids):
            return known["perplexity"]
    return _measure("dense perplexity", decoder, tokens, progress)


def _keep_dense(value: float, tokens: Tokens, directory: Path) -> None:
    path, record = directory / "dense.json", json.dumps({"tokens": token_digest(tokens.ids), "perplexity": value}).encode()
    if not path.exists() or path.read_bytes() != record:
        write_bytes(path, record)


def _greet(console: Console, config: RunConfig, model: Model, texts: Texts, directory: Path) -> None:
    """What is about to happen, before the first long silence."""
    if jax.process_index() != 0:
        return
    decoder = model.decoder
    shapes = {path: shape for path, _, shape in linear_shapes(decoder)}
    weights = sum(math.prod(shapes[path]) for path in check_layers(config.layers, config.pattern, linear_shapes(decoder)))
    settings = weights_settings(config)
    names = [settings[key]["name"] for key in ("selector", "solver") if settings[key]]
    rules = f", {to_dict(config)['layers']}" if config.layers else ""
    shape = decoder.mesh.shape
    lines = [f"model        {model.pretrained.origin}: {decoder.config.blocks} blocks, {weights:,} weights to prune",
             f"recipe       {' + '.join(names)}, {config.pattern}{rules}",
             f"calibration  {texts.calibration.how}",
             f"devices      {decoder.mesh.size} x {jax.devices()[0].device_kind}, mesh {shape['data']}x{shape['model']}",
             f"run          {directory}"]
    if finished := finished_blocks(directory):
        lines.append(f"resuming     {finished} of {decoder.config.blocks} blocks are done")
    say(console, "\n".join(lines) + "\n")


def _tell(console: Console, config: RunConfig, report: dict[str, Any]) -> None:
    """What came out."""
    if jax.process_index() != 0:
        return
    console.print()
    print_summary(console, [BlockReport.from_json(block) for block in report["blocks"]],
                  solver=config.solver and type(config.solver).__name__.lower(), perplexity=report["perplexity"],
                  evaluation=report["evaluation"]["how"], memory=report["memory"], files=report["files"])
