"""One run, from a checkpoint to a pruned one: what happens after the command line was read."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from optima_tpu.config.flat import flat
from optima_tpu.config.run_config import RunConfig, to_dict
from optima_tpu.data import Tokens
from optima_tpu.evaluate.perplexity import perplexity
from optima_tpu.method.allocation import Uniform
from optima_tpu.method.problem import ReadGiven
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.selectors import Imported
from optima_tpu.method.targets import DenseTarget
from optima_tpu.models.activations import Activations
from optima_tpu.models.checkpoints.export import export, is_export_of
from optima_tpu.models.checkpoints.orbax import CHECKPOINT, CheckpointTensors, checkpointed_blocks, write_checkpoint
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.masks import open_given
from optima_tpu.models.model import Model
from optima_tpu.pipeline.allocate import Allocated, allocated, allocation_steps, read_or_make
from optima_tpu.pipeline.calibrate import linear_groups
from optima_tpu.pipeline.greeting import greet, recipe_line
from optima_tpu.pipeline.inputs import Texts, manifest_of, open_model_on_mesh, read_texts, token_digest
from optima_tpu.pipeline.journal import DENSE, HIDDEN, Journal, open_journal, prepare_directory
from optima_tpu.pipeline.memory_plan import described
from optima_tpu.pipeline.self_calibration import keep_calibration
from optima_tpu.pipeline.walk import block_passes, walk_block
from optima_tpu.report.file import environment, memory_peaks, write_report
from optima_tpu.report.numbers import percent
from optima_tpu.report.progress import Progress
from optima_tpu.report.records import BlockReport
from optima_tpu.report.run_record import code_version
from optima_tpu.report.sinks import Steps, check_sinks, opened, write
from optima_tpu.report.table import print_summary
from optima_tpu.runtime.device_memory import device_budget
from optima_tpu.runtime.files import complete, only_program, read_record, refuse_unreachable, write_bytes, writing
from optima_tpu.runtime.processes import agree, first_only, from_first, is_first, together


def run(
    config: RunConfig,
    console: Console | None = None,
    model: Model | None = None,
    texts: Texts | None = None,
    dense: float | None = None,
) -> dict[str, Any]:
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
    console = console or Console(quiet=not is_first())
    agree("settings and code", flat(to_dict(config) | {"process_id": None, "code": code_version()}))
    first_only(lambda: check_sinks(config.sinks))
    refuse_unreachable(together(lambda: config.run_directory))
    model = model or open_model_on_mesh(config)
    pretrained, decoder = model
    texts = texts or read_texts(config, model, console)
    calibration, evaluation = texts
    manifest = manifest_of(config, model, texts)
    budget, recipe = device_budget(config.device_memory), recipe_of(config)
    if not isinstance(config.allocation, Uniform):
        allocation_steps(decoder, recipe, config.allocation)
    fitted = _fitted(decoder, recipe, budget)
    directory = prepare_directory(config.run_directory, manifest)
    greet(console, config, model, texts, directory, fitted)
    if report := from_first(lambda: _finished_report(config, directory, manifest, evaluation)):
        console.print()
        print_summary(console, report, directory)
        return report

    with only_program(directory), Progress(console) as progress, contextlib.ExitStack() as stack:

        def begin() -> Journal:
            journal = open_journal(directory, manifest, pretrained.assets, to_dict(config))
            first_only(lambda: keep_calibration(directory, manifest, calibration))
            return journal

        # Nothing is written before every weight was read and the model works in this dtype: after the dense perplexity, or where
        # the model has written the calibration text, which is not to be lost with it.
        journal = begin() if "generated" in manifest else None
        if dense is None:
            dense = _dense_perplexity(decoder, evaluation, directory, progress)
        journal = journal or begin()
        first_only(lambda: _keep_dense(dense, evaluation, directory))
        sinks = stack.enter_context(opened(config.sinks, directory, to_dict(config)))
        steps = Steps(sinks, journal)
        steps.follow()
        given = open_given(config.selector) if isinstance(config.selector, Imported) else None
        if allocation := _allocation(config, decoder, calibration, recipe, budget, journal.directory, progress):
            recipe = dataclasses.replace(recipe, layers=allocation.rules(decoder, recipe.pattern) + recipe.layers)
        blocks = from_first(lambda: checkpointed_blocks(directory))
        if blocks is None:
            prune_model(
                decoder, calibration.ids, recipe, journal, progress, config.calibration.samples, given, budget, steps.follow
            )
            progress.stage("writing the checkpoint", 1)
            write_checkpoint(journal, pretrained.tensors, decoder.mesh, allocation and allocation.sparsity)
            progress.advance()
            blocks = from_first(lambda: checkpointed_blocks(directory))
        pruned = _measure(
            "pruned perplexity", dataclasses.replace(decoder, tensors=CheckpointTensors(journal.directory)), evaluation, progress
        )
        write(sinks, decoder.config.blocks, {"perplexity/dense": dense, "perplexity/pruned": pruned})
        folder = journal.directory / "hf"
        files = {"report": str(journal.directory / "report.json"), "checkpoint": str(journal.directory / "checkpoint")}
        if config.export:
            files["transformers"] = str(folder)

        def record() -> dict[str, Any]:
            memory = memory_peaks()  # of all processes, where only the first one writes
            return from_first(
                lambda: write_report(
                    journal.directory / "report.json",
                    manifest=manifest,
                    configuration=to_dict(config),
                    environment=environment(decoder.mesh),
                    model={
                        "origin": pretrained.origin,
                        "fingerprint": pretrained.fingerprint,
                        "architecture": (pretrained.config.architectures or [None])[0],
                        "blocks": decoder.config.blocks,
                    },
                    calibration={
                        "source": config.calibration.source,
                        "how": calibration.how,
                        "tokens": int(calibration.ids.size),
                    },
                    evaluation={
                        "how": evaluation.how,
                        "tokens": int(evaluation.ids.size),
                        "digest": token_digest(evaluation.ids),
                    },
                    perplexity={"dense": dense, "pruned": pruned},
                    allocation=allocation and allocation.to_json(),
                    weighed=_weighed(config, decoder),
                    recipe=recipe_line(config, decoder),
                    blocks=list(map(BlockReport.from_json, blocks)),
                    seconds=progress.seconds,
                    memory=memory,
                    files=files,
                )
            )

        report = record()
        if config.export and not from_first(lambda: is_export_of(journal.directory, folder)):
            progress.stage("exporting for transformers", 1)
            first_only(lambda: export(journal.directory, folder))
            progress.advance()
    report = record()  # again, now that every stage has its time
    console.print()
    print_summary(console, report, directory)
    return report


def prune_model(
    decoder: Decoder,
    tokens: np.ndarray,
    recipe: Recipe,
    journal: Journal,
    progress: Progress,
    samples: int | None = None,
    given: ReadGiven | None = None,
    budget: float = math.inf,
    saved: Callable[[], None] = lambda: None,
) -> None:
    """Prunes into the journal the blocks that it does not hold, one after the other.

    Args:
      tokens: [samples + held out, length] int32, the calibration set and the held-out windows after it.
      samples: how many of them calibrate; None stands for all.
      given: masks, and weights, for a recipe without a selector.
      budget: bytes that may be used of each device.
      saved: called after every block that the journal has got.
    """
    count = decoder.config.blocks
    for index, reason in journal.damaged.items():
        progress.note(f"block {index} was damaged since it was saved ({reason}): it is done again")
    progress.stage("pruning", count)
    missing = [index for index in range(count) if index not in journal.finished]
    if not missing:
        return
    groups, hidden, dense, following = linear_groups(decoder), None, None, 0
    for index, parameters in zip(missing, decoder.blocks(missing)):
        if hidden is None or following != index:
            hidden = _states_before(decoder, tokens, index, journal, progress)
            if isinstance(recipe.target, DenseTarget):
                dense = _dense_states_before(decoder, tokens, index, journal)
        progress.block(index, count)
        started = time.monotonic()
        parameters, keeps, layers = walk_block(
            decoder,
            index,
            hidden,
            groups,
            recipe,
            progress.layer,
            samples=samples,
            given=given,
            parameters=parameters,
            budget=budget,
            dense=dense,
        )
        report = BlockReport(index, time.monotonic() - started, layers)
        prefix = decoder.prefix(index)
        journal.save(
            index,
            {prefix + name: value for name, value in parameters.items()},
            {prefix + name: value for name, value in keeps.items()},
            report.to_json(),
            hidden,
            dense,
        )
        saved()
        del parameters, keeps  # not to be held while the next block is placed
        following = index + 1
        progress.advance()


def _states_before(decoder: Decoder, tokens: np.ndarray, index: int, journal: Journal, progress: Progress) -> Activations:
    """The hidden states that enter a block: from the journal, or, where it does not have them, through the finished blocks."""
    first, hidden = _saved_states(decoder, tokens, index, journal, HIDDEN)
    if first < index:
        progress.note(
            f"the hidden states after block {index - 1} were not saved or are damaged: they are computed from those "
            + (f"after block {first - 1}" if first else "that enter the model")
        )
    return _through(dataclasses.replace(decoder, tensors=journal.tensors()), range(first, index), hidden)


def _dense_states_before(decoder: Decoder, tokens: np.ndarray, index: int, journal: Journal) -> Activations:
    """What enters a block in the dense model: from the journal, or through the dense blocks before it."""
    first, hidden = _saved_states(decoder, tokens, index, journal, DENSE)
    return _through(decoder, range(first, index), hidden)


def _saved_states(decoder: Decoder, tokens: np.ndarray, index: int, journal: Journal, name: str) -> tuple[int, Activations]:
    """The last block up to the given one that hidden states can enter without computing, and these."""
    block, hidden = journal.last_activations(decoder.mesh, index, len(tokens), name) or (-1, decoder.embed(tokens))
    return block + 1, hidden


def _through(decoder: Decoder, blocks: range, hidden: Activations) -> Activations:
    """The hidden states, which it changes, behind these blocks."""
    for index, parameters in zip(blocks, decoder.blocks(blocks)):
        decoder.apply(index, parameters, hidden)
    return hidden


def recipe_of(config: RunConfig) -> Recipe:
    """The part of a configuration that the walk needs."""
    selector = None if isinstance(config.selector, Imported) else config.selector
    return Recipe(
        config.pattern,
        selector,
        config.solver,
        config.accept,
        config.layers,
        config.target,
        config.recapture,
        config.tuning,
        config.refine,
    )


def _fitted(decoder: Decoder, recipe: Recipe, budget: float) -> str:
    """What of the run is split or done in parts to fit the devices. Raises UserError where a layer does not."""
    groups = linear_groups(decoder)
    # Blocks differ only where rules or dtypes do: each text once.
    found = (
        [block_passes(decoder, index, groups, recipe, limit) for limit in (budget, math.inf)]
        for index in range(decoder.config.blocks)
    )
    told = [described(here, len(ample)) for here, ample in found]
    return "; ".join(filter(None, dict.fromkeys(told)))


def _finished_report(config: RunConfig, directory: Path, manifest: dict[str, Any], evaluation: Tokens) -> dict[str, Any] | None:
    """report.json of a run that has nothing left to do, None of any other."""
    report = read_record(directory / "report.json")
    if report is None or (config.export and not is_export_of(directory, directory / "hf")):
        return None
    same = report["manifest"] == manifest and report["evaluation"]["digest"] == token_digest(evaluation.ids)
    # A sweep keeps the reports of finished cells, without their models.
    whole = "checkpoint" not in report["files"] or complete(directory / CHECKPOINT)
    return report if same and whole else None


def _allocation(
    config: RunConfig, decoder: Decoder, calibration: Tokens, recipe: Recipe, budget: float, directory: Path, progress: Progress
) -> Allocated | None:
    """The sparsity of every block, None where all have the same. Made once a run, as the perplexity of the dense model."""
    if isinstance(config.allocation, Uniform):
        return None

    def make() -> Allocated:
        progress.stage("allocating", decoder.config.blocks)
        samples = config.calibration.samples
        return allocated(decoder, calibration.ids, recipe, config.allocation, samples, budget, progress.advance)

    found = read_or_make(directory / "allocation.json", make)
    given = [sparsity for sparsity in found.sparsity if sparsity is not None]
    progress.note(f"the blocks lose from {percent(min(given))} to {percent(max(given))}")
    return found


def _measure(name: str, decoder: Decoder, tokens: Tokens, progress: Progress) -> float:
    progress.stage(name, decoder.config.blocks + 1)
    return perplexity(decoder, tokens.ids, progress.advance)


def _dense_perplexity(decoder: Decoder, tokens: Tokens, directory: Path, progress: Progress) -> float:
    """Measured once a run: a resumed one finds it in the run directory."""

    def known() -> float | None:
        record = read_record(directory / "dense.json") or {}
        return record.get("perplexity") if record.get("tokens") == token_digest(tokens.ids) else None

    value = from_first(known)
    return _measure("dense perplexity", decoder, tokens, progress) if value is None else value


def _keep_dense(value: float, tokens: Tokens, directory: Path) -> None:
    path, record = directory / "dense.json", json.dumps({"tokens": token_digest(tokens.ids), "perplexity": value}).encode()
    if not path.exists() or path.read_bytes() != record:
        with writing(path, "make room and repeat the command"):
            write_bytes(path, record)


def _weighed(config: RunConfig, decoder: Decoder) -> list[str]:
    """The layers in a block whose tokens the target weighs: none in a family whose layers add to no residual stream."""
    residuals = decoder.family.residuals if isinstance(config.target, DenseTarget) and config.target.weigh_tokens else ()
    return [name for name in residuals if name in decoder.linears]
