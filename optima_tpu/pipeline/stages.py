"""The stages of a run, in their order: what each needs, whether it is done, and how to do it.

A stage writes its result into the run directory. A resumed run reads the results of finished stages and does the other stages.
Inside the stage "pruning", which is the walk, the journal does the same for every block.
"""

import contextlib
import dataclasses
import hashlib
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeVar

import numpy as np
from rich.console import Console

from optima_tpu.config.run_config import RunConfig, to_dict
from optima_tpu.data import unigram_perplexity
from optima_tpu.evaluate.perplexity import perplexity, perplexity_of, token_losses
from optima_tpu.evaluate.token_changes import token_changes
from optima_tpu.method.selectors import Imported
from optima_tpu.models.checkpoints import load_tokenizer
from optima_tpu.models.checkpoints.export import FOLDER, export, is_export_of
from optima_tpu.models.checkpoints.orbax import CHECKPOINT, CheckpointTensors, checkpointed_blocks, write_checkpoint
from optima_tpu.models.checkpoints.source import Layered, total_bytes
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.masks import open_given
from optima_tpu.models.model import Model
from optima_tpu.pipeline.allocate import Allocated, allocated, allocation_steps, read_allocation, write_allocation
from optima_tpu.pipeline.calibrate import groups_of_blocks
from optima_tpu.pipeline.continuations import continuations, read_continuations, write_continuations
from optima_tpu.pipeline.distill.blocks import Trainer
from optima_tpu.pipeline.distill.outcome import Distilled, Outcome, keep_outcome, read_outcome
from optima_tpu.pipeline.distill.spans import distill_by_spans
from optima_tpu.pipeline.distill.train import distill, refuse_large, training_steps
from optima_tpu.pipeline.distill.windows import Inputs, Windows
from optima_tpu.pipeline.greeting import greet, recipe_line
from optima_tpu.pipeline.inputs import Texts, manifest_of, token_digest
from optima_tpu.pipeline.journal import Journal, open_journal, prepare_directory
from optima_tpu.pipeline.loss_gradient import GRADIENT, Squares, Text, forget_all, measure, missing, read
from optima_tpu.pipeline.memory_plan import block_bytes, fitted
from optima_tpu.pipeline.repair import DENSE, LOSSES, faults
from optima_tpu.pipeline.self_calibration import keep_calibration
from optima_tpu.pipeline.walk import WRITING, Walk, block_steps, prune_model
from optima_tpu.report.contents import Continuations, Report
from optima_tpu.report.file import REPORT, environment, memory_peaks, size_on_disk, weights_on_disk, write_report
from optima_tpu.report.meaningless import unpredicted
from optima_tpu.report.pace import Step
from optima_tpu.report.progress import Progress
from optima_tpu.report.records import blocks_from_json
from optima_tpu.report.sinks import Sink, Steps, opened, write
from optima_tpu.runtime.buckets import in_bucket
from optima_tpu.runtime.checksums import MISSING, damage, keep
from optima_tpu.runtime.device_memory import device_budget
from optima_tpu.runtime.files import complete, writing
from optima_tpu.runtime.processes import first_only, from_first
from optima_tpu.runtime.records import Positive, encoded, known_record

_KEPT = 1 << 20
"""The number of evaluation tokens whose single losses are kept: they take 4 MB."""


class Dense(TypedDict):
    """The contents of dense.json: the digest of the text, its perplexity, and the SHA-256 of the losses that belong to it."""

    tokens: str
    perplexity: Positive
    losses: NotRequired[str]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run whose inputs are open and checked. Nothing of it is written yet.

    Attributes:
      manifest: all that decides the pruned weights; see ``inputs.manifest_of``.
      configuration: the settings as they are recorded.
      directory: the directory of the run.
      walk: what is done to every block, with the pattern's sparsity; None where the blocks are pruned already.
    """

    config: RunConfig
    model: Model
    texts: Texts
    manifest: dict[str, Any]
    configuration: dict[str, Any]
    directory: Path
    walk: Walk | None = None

    @classmethod
    def of(cls, config: RunConfig, model: Model, texts: Texts, console: Console) -> "Opened":
        """Checks that all inputs fit together and fit the devices, and prints what the run will do.

        Raises:
          UserError: pattern, rules, masks or allocation do not fit the model, a layer does not fit the devices, or the directory
            holds something else.
        """
        decoder, recipe = model.decoder, config.recipe
        manifest = manifest_of(config, model, texts)
        if config.allocation.measures:
            allocation_steps(decoder, recipe, config.allocation)
        given = open_given(config.selector) if isinstance(config.selector, Imported) else None
        budget, groups = device_budget(config.device_memory), groups_of_blocks(decoder)
        found = fitted(decoder, groups, recipe, texts.calibration.ids.shape, budget)
        walk = Walk(decoder, recipe, groups, config.calibration.fitted, budget - found.states, given, found.states > 0)
        if config.distill:
            refuse_large(Trainer(decoder, config.distill, budget), "--distill null")
        directory = prepare_directory(config.run_directory, manifest, to_dict(config))
        greet(console, config, model, texts, directory, found.told)
        return cls(config, model, texts, manifest, to_dict(config), directory, walk)


@dataclasses.dataclass
class Run:
    """A run in progress: the results of its stages so far.

    Attributes:
      opened: the inputs.
      progress: prints the progress.
      resources: closed at the end of the run.
      dense: the perplexity of the dense model.
      losses: the dense and the pruned model's loss on every token of the first windows of the evaluation text, if this start of
        the run measured them.
      journal: the finished blocks.
      sinks: the services that receive records, in addition to the run directory.
      steps: sends the records of finished blocks to the sinks.
      allocation: the sparsity of every block, if the sparsities differ.
      squares: of the loss's gradient, if the target weighs tokens by it.
      blocks: the report of every block of the checkpoint.
      distilled: the outcome of the distillation; None without one.
      pruned: the perplexity of the pruned model.
      pruned_decoder: reads the checkpoint. Opened once, since Orbax takes 16 ms for the metadata of every block.
      memory: the peaks before whole models are on the devices, see ``memory_peaks``.
      continuations: what both models write after a few prompts; None if that is not tried.
      report: the contents of report.json.
    """

    opened: Opened
    progress: Progress
    resources: contextlib.ExitStack
    dense: float | None = None
    losses: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    journal: Journal | None = None
    sinks: tuple[Sink, ...] = ()
    steps: Steps | None = None
    allocation: Allocated | None = None
    squares: Squares | None = None
    blocks: list[dict[str, Any]] | None = None
    distilled: Outcome | None = None
    pruned: float | None = None
    pruned_decoder: Decoder | None = None
    memory: dict[str, int | None] | None = None
    continuations: Continuations | None = None
    report: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
      name: the name in the progress, and the key of its seconds in the report.
      needs: the names of the earlier stages whose results it reads.
      done: whether the result exists; reads it from the run directory if an earlier start wrote it.
      do: makes the result.
      steps: what it will do, for the time left; empty where this run does not take it, or where it takes no time.
      count: the number of its progress steps, where these have parts.
    """

    name: str
    needs: tuple[str, ...]
    done: Callable[[Run], bool]
    do: Callable[[Run], None]
    steps: Callable[[Run], list[Step]] = lambda run: []
    count: Callable[[Run], int] | None = None

    def take(self, run: Run, later: Sequence["Stage"] = ()) -> None:
        """Does the stage, unless it is done. The stages after it, ``later``, count in the time left."""
        if self.done(run):
            return
        if steps := self.steps(run):
            run.progress.ahead = [ahead for stage in later if (ahead := stage.steps(run))]
            run.progress.stage(self.name, self.count(run) if self.count else len(steps), steps)
        self.do(run)


def finished_report(opened: Opened) -> dict[str, Any] | None:
    """The contents of report.json if the run has nothing left to do, else None. Compares the checksums of its files."""
    directory, config = opened.directory, opened.config
    report = known_record(directory / REPORT, Report)
    digest = token_digest(opened.texts.evaluation.ids)
    if report is None or (report.get("manifest"), report["evaluation"].get("digest")) != (opened.manifest, digest):
        return None
    # A sweep keeps the reports of finished cells, without their models.
    if ("checkpoint" in report.get("files", {}) and not complete(directory / CHECKPOINT)) or faults(directory):
        return None
    return None if config.export and not is_export_of(directory, directory / FOLDER) else dict(report)


T = TypeVar("T")


def _made(result: T | None) -> T:
    """The result of an earlier stage, which the order of :data:`STAGES` guarantees."""
    if result is None:
        raise RuntimeError("a stage ran before a stage that it needs")
    return result


def _open_journal(run: Run) -> None:
    """Writes what a resume must agree with into the run directory. From here on the run can be resumed."""
    opened = run.opened
    run.journal = open_journal(
        opened.directory, opened.manifest, opened.model.pretrained.assets, opened.configuration, opened.config.recompute
    )
    if opened.walk and run.journal.finished:
        run.progress.note(f"resuming     {len(run.journal.finished)} of {_blocks(run)} blocks are done")
    first_only(lambda: keep_calibration(opened.directory, opened.manifest, opened.texts.written))


def _knows_dense(run: Run) -> bool:
    digest = token_digest(run.opened.texts.evaluation.ids)

    def known() -> float | None:
        record = known_record(run.opened.directory / DENSE, Dense)
        return record["perplexity"] if record and record["tokens"] == digest else None

    run.dense = from_first(known) if run.dense is None else run.dense
    return run.dense is not None


def _measure_dense(run: Run) -> None:
    run.dense = _measure(run, "dense", run.opened.model.decoder)
    if told := unpredicted(run.dense, unigram_perplexity(run.opened.texts.evaluation.ids)):
        run.progress.note(f"unusual: {told}")


def _measure(run: Run, which: str, decoder: Decoder) -> float:
    ids = run.opened.texts.evaluation.ids
    losses = token_losses(decoder, ids, run.progress.advance)
    run.losses[which] = losses[: max(1, _KEPT // ids.shape[1])].copy()  # a view would keep all of them
    return perplexity_of(losses.sum(axis=1, dtype=np.float64), ids)


def _record(run: Run) -> None:
    """Writes the results so far into the run directory, opens the sinks and sends them the finished blocks."""
    opened_run, config = run.opened, run.opened.config
    if run.journal is None:
        _open_journal(run)
    journal = _made(run.journal)
    first_only(lambda: _keep_dense(run))
    run.sinks = run.resources.enter_context(opened(config.sinks, opened_run.directory, opened_run.configuration))
    run.steps = Steps(run.sinks, journal)
    run.steps.follow()


def _keep_dense(run: Run) -> None:
    """Writes the dense model's perplexity and losses. The losses come first: dense.json holds their digest."""
    directory, digest = run.opened.directory, token_digest(run.opened.texts.evaluation.ids)
    before = known_record(directory / DENSE, Dense)
    record: Dense = {"tokens": digest, "perplexity": _made(run.dense)}
    if before and "losses" in before and before["tokens"] == digest:
        record["losses"] = before["losses"]
    if "dense" in run.losses:
        file = io.BytesIO()
        np.save(file, run.losses["dense"])
        record["losses"] = hashlib.sha256(file.getvalue()).hexdigest()
        if record != before:
            with writing(directory / LOSSES, "make room and repeat the command"):
                keep(directory, {LOSSES: file.getvalue()})
    if record != before:
        with writing(directory / DENSE, "make room and repeat the command"):
            keep(directory, {DENSE: encoded(record)})


def _dense_losses(run: Run) -> np.ndarray | None:
    """The dense model's losses from this or an earlier start of the run; None if no start saved them."""
    if "dense" in run.losses:
        return run.losses["dense"]
    record = known_record(run.opened.directory / DENSE, Dense)
    try:
        data = (run.opened.directory / LOSSES).read_bytes()
    except OSError:
        return None
    mine = record and hashlib.sha256(data).hexdigest() == record.get("losses")
    return np.load(io.BytesIO(data), allow_pickle=False) if mine else None


def _changes(run: Run) -> dict[str, Any] | None:
    """The tokens of the evaluation text that got worse; None if the dense model's losses were not saved."""
    dense, pruned, ids = _dense_losses(run), run.losses["pruned"], run.opened.texts.evaluation.ids
    if dense is None or dense.shape != pruned.shape:
        return None
    tokenizer = load_tokenizer(run.opened.model.pretrained)
    return token_changes(dense, pruned, ids, lambda few: str(tokenizer.decode(few, clean_up_tokenization_spaces=False)))


def _knows_allocation(run: Run) -> bool:
    if not run.opened.config.allocation.measures:
        return True
    run.allocation = read_allocation(run.opened.directory)
    if run.allocation is not None:
        run.progress.note(run.allocation.told)
    return run.allocation is not None


def _allocation_steps(run: Run) -> list[Step]:
    config = run.opened.model.decoder.config
    measures = run.opened.config.allocation.measures
    return [Step(f"allocating {config.kind_of(index)}") for index in range(config.blocks)] if measures else []


def _allocate(run: Run) -> None:
    opened_run = run.opened
    ids, allocation = opened_run.texts.calibration.ids, opened_run.config.allocation
    run.allocation = allocated(_made(opened_run.walk), ids, allocation, run.progress.advance)
    write_allocation(opened_run.directory, run.allocation)
    run.progress.note(run.allocation.told)


def _gradient_text(run: Run) -> Text:
    walk, config = _made(run.opened.walk), run.opened.config
    prefixes = map(walk.decoder.prefix, range(walk.decoder.config.blocks))
    groups = [walk.recipe.pruned_groups(each, prefix) for each, prefix in zip(walk.groups, prefixes)]
    return Text(walk.decoder, groups, run.opened.texts.calibration.ids, config.calibration.seed)


def _knows_gradient(run: Run) -> bool:
    if not run.opened.config.target.weigh_by_loss or len(_made(run.journal).finished) == _blocks(run):
        return True
    text = _gradient_text(run)
    if missing(text, run.opened.directory):
        return False
    run.squares = read(text, run.opened.directory)
    return True


def _measure_gradient(run: Run) -> None:
    text = _gradient_text(run)
    measure(text, run.opened.directory, run.progress.advance)
    run.squares = read(text, run.opened.directory)


def _gradient_steps(run: Run) -> list[Step]:
    if not run.opened.config.target.weigh_by_loss or run.opened.walk is None:
        return []
    text = _gradient_text(run)
    return [step for part in missing(text, run.opened.directory) for step in text.steps(part)]


def _is_pruned(run: Run) -> bool:
    run.blocks = from_first(lambda: checkpointed_blocks(run.opened.directory))
    return run.blocks is not None


def _walk(run: Run) -> Walk:
    """The walk, with the sparsities that were allocated."""
    walk = _made(run.opened.walk)
    if run.allocation is None:
        return walk
    layers = run.allocation.rules(walk.decoder, walk.recipe.pattern) + walk.recipe.layers
    return dataclasses.replace(walk, recipe=dataclasses.replace(walk.recipe, layers=layers))


def _pruning_steps(run: Run) -> list[Step]:
    finished = run.journal.finished if run.journal else {}
    return [step for index in range(_blocks(run)) if index not in finished for step in block_steps(_walk(run), index)]


def _prune(run: Run) -> None:
    walk = dataclasses.replace(_walk(run), tell=run.progress.layer, begin=run.progress.begin, squares=run.squares)
    prune_model(walk, run.opened.texts.calibration.ids, _made(run.journal), run.progress, _made(run.steps).follow)
    forget_all(run.opened.directory)


def _is_distilled(run: Run) -> bool:
    if run.opened.config.distill is None:
        return True
    run.distilled = read_outcome(run.opened.directory, used=run.blocks is not None)
    return run.distilled is not None or run.blocks is not None


def _distill(run: Run) -> None:
    opened_run, journal, progress = run.opened, _made(run.journal), run.progress
    method, texts, dense = _made(opened_run.config.distill), opened_run.texts, opened_run.model.decoder
    held_out = texts.calibration.ids[opened_run.config.calibration.fitted :]
    budget = device_budget(opened_run.config.device_memory)
    inputs = Inputs(dense, journal, method, Windows(_made(texts.distillation), held_out), budget)
    found = (distill_by_spans if method.by_spans else distill)(inputs, progress)
    progress.note("the perplexity of the model as it was pruned, for a comparison")
    as_pruned = dataclasses.replace(dense, tensors=Layered(journal.tensors(), dense.tensors))
    before = perplexity(as_pruned, texts.evaluation.ids, progress.advance)
    run.distilled = dataclasses.replace(found, perplexity_before=before)
    keep_outcome(opened_run.directory, run.distilled)


def _distillation_steps(run: Run) -> list[Step]:
    method = run.opened.config.distill
    return [] if method is None else [*training_steps(method, _blocks(run)), *_perplexity_steps(run)]


def _perplexity_steps(run: Run) -> list[Step]:
    """The steps of :func:`perplexity`, the same for every model of this shape."""
    config = run.opened.model.decoder.config
    return [*(Step(f"evaluation text {config.kind_of(index)}") for index in range(config.blocks)), Step("evaluation text, head")]


def _checkpoint_steps(run: Run) -> list[Step]:
    decoder = run.opened.model.decoder
    blocks = sum(block_bytes(decoder, index) for index in range(_blocks(run)))
    return [Step(WRITING, max(1.0, total_bytes(decoder.tensors) - blocks))]


def _write_checkpoint(run: Run) -> None:
    pretrained, decoder = run.opened.model
    journal = _made(run.journal)
    # If no step of the distillation improved the model, the blocks stay as they were pruned.
    blocks = Distilled(journal) if run.distilled and run.distilled.kept else journal
    write_checkpoint(blocks, pretrained.tensors, decoder.mesh, run.allocation and run.allocation.sparsity)
    run.progress.advance()
    run.blocks = from_first(lambda: checkpointed_blocks(run.opened.directory))


def _pruned_decoder(run: Run) -> Decoder:
    if run.pruned_decoder is None:
        run.pruned_decoder = dataclasses.replace(run.opened.model.decoder, tensors=CheckpointTensors(run.opened.directory))
    return run.pruned_decoder


def _measure_pruned(run: Run) -> None:
    dense = run.opened.model.decoder
    run.pruned = _measure(run, "pruned", _pruned_decoder(run))
    write(run.sinks, dense.config.blocks, {"perplexity/dense": run.dense, "perplexity/pruned": run.pruned})


def _is_exported(run: Run) -> bool:
    directory = run.opened.directory
    if not run.opened.config.export or from_first(lambda: is_export_of(directory, directory / FOLDER)):
        return True
    why = from_first(lambda: damage(directory / FOLDER) if complete(directory / FOLDER) else "")
    if why and why != MISSING:
        run.progress.note(f"{FOLDER} is damaged: {why}; it is made again")
    return False


def _export_steps(run: Run) -> list[Step]:
    return [Step(WRITING, total_bytes(run.opened.model.decoder.tensors))] if run.opened.config.export else []


def _export(run: Run) -> None:
    directory = run.opened.directory
    facts = _facts(run)
    first_only(lambda: export(directory, directory / FOLDER, report=facts))
    run.progress.advance()


def _continues(run: Run) -> bool:
    """Not without an export, as in sweeps, where nobody uses the model; and not with random tokens, which have no meaning."""
    config = run.opened.config
    return config.export and "random" not in (config.calibration.source, config.evaluation.source)


def _knows_continuations(run: Run) -> bool:
    if not _continues(run):
        return True
    run.continuations = read_continuations(run.opened.directory)
    return run.continuations is not None


def _continue_prompts(run: Run) -> None:
    opened_run = run.opened
    run.memory = memory_peaks()
    budget = device_budget(opened_run.config.device_memory)
    run.continuations = continuations(opened_run.model, _pruned_decoder(run), budget, run.progress)
    write_continuations(opened_run.directory, run.continuations)


def _facts(run: Run) -> dict[str, Any]:
    """The entries that the exported model's card and the report share."""
    calibration, text = run.opened.texts.calibration, run.opened.texts.evaluation
    source = run.opened.config.calibration.source
    return {
        "calibration": {
            "source": source,
            "how": calibration.how,
            "tokens": int(calibration.ids.size),
            "unigram_perplexity": unigram_perplexity(calibration.ids),
        },
        "recipe": recipe_line(run.opened.config, run.opened.model.decoder),
        "perplexity": {"dense": _made(run.dense), "pruned": _made(run.pruned)},
        "evaluation": {
            "how": text.how,
            "tokens": int(text.ids.size),
            "digest": token_digest(text.ids),
            "unigram_perplexity": unigram_perplexity(text.ids),
        },
        "distillation": run.distilled and run.distilled.to_json(),
    }


def _report(run: Run) -> None:
    opened_run, config = run.opened, run.opened.config
    (pretrained, decoder), directory = opened_run.model, opened_run.directory
    residuals = decoder.family.residuals if config.target.weigh_tokens else ()
    files = {"report": directory / REPORT, "checkpoint": directory / CHECKPOINT} | (
        {"transformers": directory / FOLDER} if config.export else {}
    )
    memory = run.memory or memory_peaks()  # collected from all processes; only the first one writes
    model = {
        "origin": pretrained.origin,
        "fingerprint": pretrained.fingerprint,
        "architecture": next(iter(pretrained.config.architectures or ()), None),
        "blocks": decoder.config.blocks,
        "weights": sum(math.prod(pretrained.tensors.shape(name)) for name in pretrained.tensors.names()),
    }
    run.report = from_first(
        lambda: write_report(
            directory / REPORT,
            {
                "manifest": opened_run.manifest,
                "configuration": opened_run.configuration,
                "environment": environment(decoder.mesh),
                "model": model,
                "allocation": run.allocation and run.allocation.to_json(),
                "weighed_layers": [
                    name for name in residuals if any(name in decoder.at(kind).linears for kind in decoder.config.kinds)
                ],
                "seconds": dict(run.progress.seconds),
                "memory": memory,
                "sizes": _sizes(run),
                "tokens": _changes(run),
                "continuations": run.continuations,
                "files": {what: str(path) for what, path in files.items()},
                **_facts(run),
            },
            blocks_from_json(_made(run.blocks), directory / CHECKPOINT),
        )
    )


def _sizes(run: Run) -> dict[str, Any]:
    """Bytes of the source's files and tensors, of the exported weights, and of everything that the run leaves in its directory."""
    pretrained, directory = run.opened.model.pretrained, run.opened.directory
    left = {} if in_bucket(directory) else {path.name: size_on_disk(path) for path in sorted(directory.iterdir())}
    exported = weights_on_disk(directory / FOLDER) if run.opened.config.export else None
    return {"source": pretrained.stored, "dense": total_bytes(pretrained.tensors), "transformers": exported, "left": left}


def _blocks(run: Run) -> int:
    return run.opened.model.decoder.config.blocks


STAGES = (
    # A run writes nothing before every weight was read and the model works in this dtype, which the dense perplexity shows. A
    # model that writes its calibration text shows the same, and this text must not be lost: then the journal opens at once.
    Stage("keeping the text", (), lambda run: "generated" not in run.opened.manifest, _open_journal),
    Stage("dense perplexity", (), _knows_dense, _measure_dense, _perplexity_steps),
    Stage("recording", ("dense perplexity",), lambda run: False, _record),
    Stage("allocating", ("recording",), _knows_allocation, _allocate, _allocation_steps),
    Stage(GRADIENT, ("recording",), _knows_gradient, _measure_gradient, _gradient_steps),
    Stage("pruning", ("recording", "allocating", GRADIENT), _is_pruned, _prune, _pruning_steps, _blocks),
    Stage("training", ("pruning",), _is_distilled, _distill, _distillation_steps),
    Stage(
        "writing the checkpoint",
        ("pruning", "allocating", "training"),
        lambda run: run.blocks is not None,
        _write_checkpoint,
        _checkpoint_steps,
    ),
    Stage("pruned perplexity", ("writing the checkpoint", "recording"), lambda run: False, _measure_pruned, _perplexity_steps),
    Stage("exporting for transformers", ("writing the checkpoint", "pruned perplexity"), _is_exported, _export, _export_steps),
    Stage(
        "continuing prompts with both models",
        ("writing the checkpoint",),
        _knows_continuations,
        _continue_prompts,
        lambda run: [Step("continuing prompts")] * 2 if _continues(run) else [],
    ),
    Stage(
        "reporting",
        ("pruned perplexity", "writing the checkpoint", "continuing prompts with both models"),
        lambda run: False,
        _report,
        lambda run: [Step("reporting")],
    ),
)
"""The stages that follow the opening of model and texts by :class:`Opened`."""
