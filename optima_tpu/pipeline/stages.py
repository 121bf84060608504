"""The stages of a run, in their order: what each needs, whether it is done, and how to do it.

A stage leaves its result in the run directory, so a run that was stopped takes the stages that are done from there and does the
others. Inside the walk, whose stage is called "pruning", the journal does the same for every block.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from optima_tpu.config.run_config import RunConfig, to_dict
from optima_tpu.evaluate.perplexity import perplexity
from optima_tpu.method.selectors import Imported
from optima_tpu.models.checkpoints.export import export, is_export_of
from optima_tpu.models.checkpoints.orbax import CHECKPOINT, CheckpointTensors, checkpointed_blocks, write_checkpoint
from optima_tpu.models.masks import open_given
from optima_tpu.models.model import Model
from optima_tpu.pipeline.allocate import Allocated, allocated, allocation_steps, read_allocation, write_allocation
from optima_tpu.pipeline.calibrate import linear_groups
from optima_tpu.pipeline.greeting import greet, recipe_line
from optima_tpu.pipeline.inputs import Texts, manifest_of, token_digest
from optima_tpu.pipeline.journal import Journal, open_journal, prepare_directory
from optima_tpu.pipeline.memory_plan import fitted
from optima_tpu.pipeline.self_calibration import keep_calibration
from optima_tpu.pipeline.walk import Walk, prune_model
from optima_tpu.report.file import environment, memory_peaks, write_report
from optima_tpu.report.progress import Progress
from optima_tpu.report.records import BlockReport
from optima_tpu.report.sinks import Sink, Steps, opened, write
from optima_tpu.runtime.device_memory import device_budget
from optima_tpu.runtime.files import complete, read_record, write_bytes, writing
from optima_tpu.runtime.processes import first_only, from_first

FOLDER, REPORT = "hf", "report.json"
_DENSE = "dense.json"


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run whose inputs are open and checked. Nothing of it is written yet.

    Attributes:
      manifest: what decides the pruned weights; see ``inputs.manifest_of``.
      walk: what is done to every block, with the pattern's sparsity.
      directory: of the run.
    """

    config: RunConfig
    model: Model
    texts: Texts
    manifest: dict[str, Any]
    walk: Walk
    directory: Path

    @classmethod
    def of(cls, config: RunConfig, model: Model, texts: Texts, console: Console) -> "Opened":
        """Checks that everything fits together and the devices, and says what will be done.

        Raises:
          UserError: pattern, rules, masks or allocation do not fit the model, a layer does not fit the devices, or the directory
            holds something else.
        """
        decoder, recipe = model.decoder, config.recipe
        manifest = manifest_of(config, model, texts)
        if config.allocation.measures:
            allocation_steps(decoder, recipe, config.allocation)
        given = open_given(config.selector) if isinstance(config.selector, Imported) else None
        walk = Walk(
            decoder, recipe, linear_groups(decoder), config.calibration.samples, device_budget(config.device_memory), given
        )
        told = fitted(decoder, walk.groups, recipe, walk.budget)
        directory = prepare_directory(config.run_directory, manifest)
        greet(console, config, model, texts, directory, told)
        return cls(config, model, texts, manifest, walk, directory)


@dataclasses.dataclass
class Run:
    """A run on its way: what its stages have made so far.

    Attributes:
      opened: its inputs.
      progress: what the person sees.
      resources: closed at the end of the run.
      dense: the perplexity of the dense model.
      journal: the finished blocks.
      sinks: where records are sent too, and steps, which sends them.
      allocation: the sparsity of every block, where they differ.
      blocks: the report of every block of the checkpoint.
      pruned: the perplexity of the pruned model.
      report: what report.json holds.
    """

    opened: Opened
    progress: Progress
    resources: contextlib.ExitStack
    dense: float | None = None
    journal: Journal | None = None
    sinks: tuple[Sink, ...] = ()
    steps: Steps | None = None
    allocation: Allocated | None = None
    blocks: list[dict[str, Any]] | None = None
    pruned: float | None = None
    report: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
      name: what the person reads, and the key of its seconds in the report.
      needs: the names of the stages before it whose results it reads.
      done: whether the result is there; takes it from the run directory where an earlier start left it.
      do: makes the result.
      steps: how many steps of progress it has; None for a stage of which nothing is said.
    """

    name: str
    needs: tuple[str, ...]
    done: Callable[[Run], bool]
    do: Callable[[Run], None]
    steps: Callable[[Run], int] | None = None

    def take(self, run: Run) -> None:
        """Does what is not done."""
        if self.done(run):
            return
        if self.steps:
            run.progress.stage(self.name, self.steps(run))
        self.do(run)


def finished_report(opened: Opened) -> dict[str, Any] | None:
    """report.json of a run that has nothing left to do, None of any other."""
    directory, config = opened.directory, opened.config
    report = read_record(directory / REPORT)
    if report is None or (config.export and not is_export_of(directory, directory / FOLDER)):
        return None
    same = (report["manifest"], report["evaluation"]["digest"]) == (opened.manifest, token_digest(opened.texts.evaluation.ids))
    # A sweep keeps the reports of finished cells, without their models.
    whole = "checkpoint" not in report["files"] or complete(directory / CHECKPOINT)
    return report if same and whole else None


T = TypeVar("T")


def _made(result: T | None) -> T:
    """The result of an earlier stage: :data:`STAGES` has them in an order in which it is there."""
    if result is None:
        raise RuntimeError("a stage was taken before one that it needs")
    return result


def _open_journal(run: Run) -> None:
    """The run directory gets what a resume must agree with. From here on the run goes on where it was stopped."""
    opened = run.opened
    run.journal = open_journal(opened.directory, opened.manifest, opened.model.pretrained.assets, to_dict(opened.config))
    first_only(lambda: keep_calibration(opened.directory, opened.manifest, opened.texts.calibration))


def _knows_dense(run: Run) -> bool:
    path, digest = run.opened.directory / _DENSE, token_digest(run.opened.texts.evaluation.ids)

    def known() -> float | None:
        record = read_record(path) or {}
        return record.get("perplexity") if record.get("tokens") == digest else None

    run.dense = from_first(known) if run.dense is None else run.dense
    return run.dense is not None


def _measure_dense(run: Run) -> None:
    run.dense = perplexity(run.opened.model.decoder, run.opened.texts.evaluation.ids, run.progress.advance)


def _record(run: Run) -> None:
    """What was found so far goes into the run directory, and from there to the sinks."""
    opened_run, config = run.opened, run.opened.config
    if run.journal is None:
        _open_journal(run)
    journal = _made(run.journal)
    path = opened_run.directory / _DENSE
    record = json.dumps({"tokens": token_digest(opened_run.texts.evaluation.ids), "perplexity": run.dense}).encode()

    def keep() -> None:
        if not path.exists() or path.read_bytes() != record:
            with writing(path, "make room and repeat the command"):
                write_bytes(path, record)

    first_only(keep)
    run.sinks = run.resources.enter_context(opened(config.sinks, opened_run.directory, to_dict(config)))
    run.steps = Steps(run.sinks, journal)
    run.steps.follow()


def _knows_allocation(run: Run) -> bool:
    if not run.opened.config.allocation.measures:
        return True
    run.allocation = read_allocation(run.opened.directory)
    if run.allocation is not None:
        run.progress.note(run.allocation.told)
    return run.allocation is not None


def _allocate(run: Run) -> None:
    opened_run = run.opened
    ids, allocation = opened_run.texts.calibration.ids, opened_run.config.allocation
    run.allocation = allocated(opened_run.walk, ids, allocation, run.progress.advance)
    write_allocation(opened_run.directory, run.allocation)
    run.progress.note(run.allocation.told)


def _is_pruned(run: Run) -> bool:
    run.blocks = from_first(lambda: checkpointed_blocks(run.opened.directory))
    return run.blocks is not None


def _prune(run: Run) -> None:
    walk = dataclasses.replace(run.opened.walk, tell=run.progress.layer)
    if run.allocation is not None:
        layers = run.allocation.rules(walk.decoder, walk.recipe.pattern) + walk.recipe.layers
        walk = dataclasses.replace(walk, recipe=dataclasses.replace(walk.recipe, layers=layers))
    prune_model(walk, run.opened.texts.calibration.ids, _made(run.journal), run.progress, _made(run.steps).follow)


def _write_checkpoint(run: Run) -> None:
    pretrained, decoder = run.opened.model
    write_checkpoint(_made(run.journal), pretrained.tensors, decoder.mesh, run.allocation and run.allocation.sparsity)
    run.progress.advance()
    run.blocks = from_first(lambda: checkpointed_blocks(run.opened.directory))


def _measure_pruned(run: Run) -> None:
    dense = run.opened.model.decoder
    decoder = dataclasses.replace(dense, tensors=CheckpointTensors(run.opened.directory))
    run.pruned = perplexity(decoder, run.opened.texts.evaluation.ids, run.progress.advance)
    write(run.sinks, dense.config.blocks, {"perplexity/dense": run.dense, "perplexity/pruned": run.pruned})


def _is_exported(run: Run) -> bool:
    directory = run.opened.directory
    return not run.opened.config.export or from_first(lambda: is_export_of(directory, directory / FOLDER))


def _export(run: Run) -> None:
    directory = run.opened.directory
    facts = _facts(run)
    first_only(lambda: export(directory, directory / FOLDER, report=facts))
    run.progress.advance()


def _facts(run: Run) -> dict[str, Any]:
    """What the card of the exported model and the report both say."""
    text = run.opened.texts.evaluation
    return {
        "recipe": recipe_line(run.opened.config, run.opened.model.decoder),
        "perplexity": {"dense": _made(run.dense), "pruned": _made(run.pruned)},
        "evaluation": {"how": text.how, "tokens": int(text.ids.size), "digest": token_digest(text.ids)},
    }


def _report(run: Run) -> None:
    opened_run, config = run.opened, run.opened.config
    (pretrained, decoder), directory = opened_run.model, opened_run.directory
    calibration, residuals = opened_run.texts.calibration, decoder.family.residuals if config.target.weigh_tokens else ()
    files = {"report": directory / REPORT, "checkpoint": directory / CHECKPOINT} | (
        {"transformers": directory / FOLDER} if config.export else {}
    )
    run.progress.end_stage()
    memory = memory_peaks()  # of all processes, where only the first one writes
    model = {
        "origin": pretrained.origin,
        "fingerprint": pretrained.fingerprint,
        "architecture": next(iter(pretrained.config.architectures or ()), None),
        "blocks": decoder.config.blocks,
    }
    run.report = from_first(
        lambda: write_report(
            directory / REPORT,
            manifest=opened_run.manifest,
            configuration=to_dict(config),
            environment=environment(decoder.mesh),
            model=model,
            calibration={"source": config.calibration.source, "how": calibration.how, "tokens": int(calibration.ids.size)},
            allocation=run.allocation and run.allocation.to_json(),
            weighed=[name for name in residuals if name in decoder.linears],
            blocks=list(map(BlockReport.from_json, _made(run.blocks))),
            seconds=run.progress.seconds,
            memory=memory,
            files={what: str(path) for what, path in files.items()},
            **_facts(run),
        )
    )


def _blocks(run: Run) -> int:
    return run.opened.model.decoder.config.blocks


STAGES = (
    # Nothing is written before every weight was read and the model works in this dtype: after the dense perplexity, or where the
    # model has written the calibration text, which is not to be lost with it.
    Stage("keeping the text", (), lambda run: "generated" not in run.opened.manifest, _open_journal),
    Stage("dense perplexity", (), _knows_dense, _measure_dense, lambda run: _blocks(run) + 1),
    Stage("recording", ("dense perplexity",), lambda run: False, _record),
    Stage("allocating", ("recording",), _knows_allocation, _allocate, _blocks),
    Stage("pruning", ("recording", "allocating"), _is_pruned, _prune, _blocks),
    Stage(
        "writing the checkpoint", ("pruning", "allocating"), lambda run: run.blocks is not None, _write_checkpoint, lambda run: 1
    ),
    Stage(
        "pruned perplexity",
        ("writing the checkpoint", "recording"),
        lambda run: False,
        _measure_pruned,
        lambda run: _blocks(run) + 1,
    ),
    Stage("exporting for transformers", ("writing the checkpoint", "pruned perplexity"), _is_exported, _export, lambda run: 1),
    Stage("reporting", ("pruned perplexity", "writing the checkpoint"), lambda run: False, _report),
)
"""The stages behind the opening of model and texts, which :class:`Opened` is."""
