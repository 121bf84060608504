"""One run, from a checkpoint to a pruned one: what happens after the command line was read."""

import dataclasses
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from optima_tpu import data
from optima_tpu.calibrate import linear_groups
from optima_tpu.checkpoint import (CheckpointTensors, Journal, code_version, finished_blocks, open_journal,
                                   prepare_directory)
from optima_tpu.config import RunConfig, to_dict, weights_settings
from optima_tpu.data import Tokens
from optima_tpu.errors import UserError
from optima_tpu.evaluate.perplexity import perplexity
from optima_tpu.export import export, is_export_of
from optima_tpu.files import write_bytes
from optima_tpu.models.decoder import Decoder
from optima_tpu.prune import Recipe, walk_block
from optima_tpu.report.file import environment, write_report
from optima_tpu.report.progress import Progress
from optima_tpu.report.records import BlockReport
from optima_tpu.report.table import print_summary
from optima_tpu.sharding import make_mesh
from optima_tpu.weights import Pretrained, check_names, load_tokenizer, open_model


def run(config: RunConfig, console: Console | None = None) -> dict[str, Any]:
    """Prunes a model as ``config`` says, or goes on where the same run was stopped.

    Everything that can be wrong with the input is found before the first block: model, mesh, pattern, texts, output.

    Returns:
      What report.json holds.

    Raises:
      UserError: something the user can mend; nothing of an earlier run was overwritten.
    """
    console = console or Console()
    mesh = make_mesh(config.mesh)
    pretrained = open_model(config.model, config.dtype)
    decoder = Decoder.open(pretrained.config, pretrained.tensors, mesh, config.batch)
    check_names(decoder.tensor_names(), pretrained.tensors)
    _check_pattern(config, decoder)
    calibration, evaluation = _tokens(config, pretrained)
    manifest = {"model": pretrained.fingerprint, "recipe": weights_settings(config),
                "calibration": _digest(calibration.ids), "code": code_version()}
    directory = prepare_directory(config.run_directory, manifest)
    _greet(console, config, decoder, pretrained, calibration, directory)

    with Progress(console) as progress:
        dense = _dense_perplexity(decoder, evaluation, directory, progress)
        # Only now is anything written: every weight was read, and the model works in this dtype.
        journal = open_journal(directory, manifest, pretrained.assets, to_dict(config))
        _keep_dense(dense, evaluation, directory)
        prune_model(decoder, calibration.ids, recipe_of(config), journal, progress)
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
                journal.directory / "report.json", configuration=to_dict(config), environment=environment(mesh),
                model={"origin": pretrained.origin, "fingerprint": pretrained.fingerprint,
                       "architecture": (pretrained.config.architectures or [None])[0], "blocks": decoder.config.blocks},
                calibration={"source": config.calibration.source, "how": calibration.how, "tokens": int(calibration.ids.size)},
                evaluation={"how": evaluation.how, "tokens": int(evaluation.ids.size)},
                perplexity={"dense": dense, "pruned": pruned}, blocks=blocks, seconds=progress.seconds, files=files)

        report = record()
        if config.export and not is_export_of(journal.directory, folder):
            progress.stage("exporting for transformers", 1)
            export(journal.directory, folder)
            progress.advance()
    report = record()  # again, now that every stage has its time
    if jax.process_index() == 0:
        solver = config.solver and type(config.solver).__name__.lower()
        console.print()
        print_summary(console, blocks, solver=solver, perplexity=report["perplexity"], evaluation=evaluation.how, files=files)
    return report


def prune_model(decoder: Decoder, tokens: np.ndarray, recipe: Recipe, journal: Journal, progress: Progress) -> None:
    """Prunes block after block into the journal, from the first that it does not hold.

    Args:
      tokens: [samples, length] int32, the calibration set.
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
        parameters, masks, layers = walk_block(decoder, index, hidden, groups, recipe, progress.layer)
        report = BlockReport(index, time.monotonic() - started, layers)
        prefix = decoder.prefix(index)
        journal.save(index, {prefix + name: value for name, value in parameters.items()},
                     {prefix + name: value for name, value in masks.items()}, report.to_json(), hidden)
        progress.advance()


def recipe_of(config: RunConfig) -> Recipe:
    """The part of a configuration that the walk needs."""
    return Recipe(config.pattern, config.selector, config.solver, config.accept)


def _check_pattern(config: RunConfig, decoder: Decoder) -> None:
    """An N:M that does not divide a layer is known before any work is done."""
    for name in decoder.family.LINEARS:
        config.pattern.pruned_count(decoder.block_shapes[name + ".weight"])


def _tokens(config: RunConfig, pretrained: Pretrained) -> tuple[Tokens, Tokens]:
    tokenizer = load_tokenizer(pretrained)
    source = data.parse_source(config.calibration.source)
    held_out = data.parse_source(config.evaluation.source or config.calibration.source)
    data.refuse_overlap(source, held_out)
    length = config.calibration.length
    limit = getattr(pretrained.config, "max_position_embeddings", None)
    for name, value in (("calibration.length", length), ("evaluation.length", config.evaluation.length or length)):
        if limit and value > limit:
            raise UserError(f"expected {name} of at most {limit}, the model's context, got {value}")
    calibration = data.calibration_tokens(source, tokenizer, samples=config.calibration.samples, length=length,
                                          seed=config.calibration.seed)
    evaluation = data.evaluation_tokens(held_out, tokenizer, length=config.evaluation.length or length,
                                        windows=config.evaluation.windows)
    return calibration, evaluation


def _measure(name: str, decoder: Decoder, tokens: Tokens, progress: Progress) -> float:
    progress.stage(name, decoder.config.blocks + 1)
    return perplexity(decoder, tokens.ids, progress.advance)


def _dense_perplexity(decoder: Decoder, tokens: Tokens, directory: Path, progress: Progress) -> float:
    """Measured once a run: a resumed one finds it in the run directory."""
    path = directory / "dense.json"
    if path.exists():
        known = json.loads(path.read_bytes())
        if known["tokens"] == _digest(tokens.ids):
            return known["perplexity"]
    return _measure("dense perplexity", decoder, tokens, progress)


def _keep_dense(value: float, tokens: Tokens, directory: Path) -> None:
    path, record = directory / "dense.json", json.dumps({"tokens": _digest(tokens.ids), "perplexity": value}).encode()
    if not path.exists() or path.read_bytes() != record:
        write_bytes(path, record)


def _digest(ids: np.ndarray) -> str:
    return hashlib.sha256(f"{ids.shape}".encode() + np.ascontiguousarray(ids, np.int32).tobytes()).hexdigest()


def _greet(console: Console, config: RunConfig, decoder: Decoder, pretrained: Pretrained, calibration: Tokens,
           directory: Path) -> None:
    """What is about to happen, before the first long silence."""
    if jax.process_index() != 0:
        return
    shapes = [decoder.block_shapes[name + ".weight"] for name in decoder.family.LINEARS]
    weights = decoder.config.blocks * sum(map(math.prod, shapes))
    settings = weights_settings(config)
    names = [settings[key]["name"] for key in ("selector", "solver") if settings[key]]
    shape = decoder.mesh.shape
    lines = [f"model        {pretrained.origin}: {decoder.config.blocks} blocks, {weights:,} weights to prune",
             f"recipe       {' + '.join(names)}, {config.pattern}",
             f"calibration  {calibration.how}",
             f"devices      {decoder.mesh.size} x {jax.devices()[0].device_kind}, mesh {shape['data']}x{shape['model']}",
             f"run          {directory}"]
    if finished := finished_blocks(directory):
        lines.append(f"resuming     {finished} of {decoder.config.blocks} blocks are done")
    console.print("\n".join(lines) + "\n", markup=False, highlight=False, soft_wrap=True)

