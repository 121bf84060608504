"""The stages that every run has, see :mod:`optima_tpu.pipeline.keeping`.

The stages of a training, of cuts and of an allocation are in files of their own. Inside of PRUNING, which is the walk, the
journal keeps block by block.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from msgspec import structs

from optima_tpu.data import Tokens, unigram_perplexity
from optima_tpu.errors import plural
from optima_tpu.models.checkpoints.export import FOLDER, export, is_export_of
from optima_tpu.models.checkpoints.exported import Exported
from optima_tpu.models.checkpoints.orbax import CHECKPOINT, CheckpointTensors, write_checkpoint
from optima_tpu.models.checkpoints.source import total_bytes, weight_count
from optima_tpu.models.model import Model
from optima_tpu.pipeline.allocate import read_allocation, with_sparsities
from optima_tpu.pipeline.cutting import PrunedModel, kept_by, pruned_model, read_left_out, smaller_walk
from optima_tpu.pipeline.distill.outcome import trained_block
from optima_tpu.pipeline.inputs import token_digest
from optima_tpu.pipeline.journal import Journal, finished_blocks, open_journal
from optima_tpu.pipeline.keeping import KeptResult, Stage, StageWork
from optima_tpu.pipeline.memory_plan import block_bytes
from optima_tpu.pipeline.opened import Opened, TextPerplexity
from optima_tpu.pipeline.opening_lines import recipe_line
from optima_tpu.pipeline.perplexities import changes, keep_perplexity, measured, perplexity_steps, read_perplexity
from optima_tpu.pipeline.self_calibration import keep_calibration
from optima_tpu.pipeline.walk import WRITING, Walk, block_steps, prune_model
from optima_tpu.report.contents import Allocated, FileSizes, ModelFacts, Outcome, Perplexities, Report, RunFacts, Speed, TextFacts
from optima_tpu.report.file import REPORT, environment, memory_peaks, size_on_disk, weights_on_disk, write_report
from optima_tpu.report.meaningless import unpredicted
from optima_tpu.report.pace import Step
from optima_tpu.report.sinks import Steps, open_sinks
from optima_tpu.runtime.files import entries_on_disk
from optima_tpu.runtime.processes import first_only, from_first


class Results(NamedTuple):
    """What a run measured, for the exported model's card and the report.

    Attributes:
      dense, pruned: the models' perplexities.
      outcome: of the training; None without one.
      allocation: the sparsity of every block; None where all blocks have the pattern's.
      speed: of the dense and the cut model; None where nothing was cut.
    """

    dense: TextPerplexity
    pruned: TextPerplexity
    outcome: Outcome | None
    allocation: Allocated | None
    speed: Speed | None


def _open(work: StageWork) -> Journal:
    """Opens the journal. From here on the run can be resumed."""
    opened = work.opened
    journal = open_journal(
        opened.directory, opened.manifest, opened.model.pretrained.assets, opened.configuration, opened.config.recompute
    )
    if journal.finished:
        work.progress.note(f"resuming     {len(journal.finished)} of {plural(count_blocks(opened), 'block')} done")
    first_only(lambda: keep_calibration(opened.directory, opened.manifest, opened.texts.written))
    return journal


WRITTEN_TEXT = Stage("keeping the text", _open)
"""Keeps calibration text that the model wrote. It took minutes, and to write it shows that the model works in its dtype."""


def _kept_perplexity(model: str) -> KeptResult[TextPerplexity]:
    return KeptResult(
        lambda opened: read_perplexity(opened.directory, opened.texts.evaluation.ids, model),
        lambda opened, perplexity: keep_perplexity(opened, model, perplexity),
    )


def _measure_dense(work: StageWork) -> TextPerplexity:
    dense = measured(work, work.opened.model.decoder)
    if note := unpredicted(dense.perplexity, unigram_perplexity(work.opened.texts.evaluation.ids)):
        work.progress.note(f"unusual: {note}")
    return dense


DENSE_PERPLEXITY = Stage(
    "dense perplexity",
    _measure_dense,
    KeptResult(lambda opened: opened.dense or _kept_perplexity("dense").read(opened)),
    lambda opened: perplexity_steps(opened, opened.model.decoder),
)
"""The next stage keeps it: a run directory shows that the model works."""


def _record(work: StageWork, dense: TextPerplexity, journal: Journal | None) -> Journal:
    journal = journal or _open(work)
    keep_perplexity(work.opened, "dense", dense)
    return journal


JOURNAL = Stage("recording", _record)
"""Writes into the run directory, as the first unless the model wrote text. By then every weight was read, and the model has
computed in its dtype."""


def _open_sinks(work: StageWork, journal: Journal) -> Steps:
    opened = work.opened
    sinks = work.resources.enter_context(open_sinks(opened.config.sinks, opened.directory, opened.configuration))
    steps = Steps(sinks, journal.finished, journal.report)
    steps.follow()
    return steps


SINKS = Stage("opening the sinks", _open_sinks)


def unfinished(opened: Opened) -> list[int]:
    """The blocks that are not pruned yet, according to the run directory."""
    done = from_first(lambda: finished_blocks(opened.directory))
    blocks = [] if opened.checkpointed else range(len(kept_by(opened)))
    return [index for index in blocks if index not in done]


def count_blocks(opened: Opened) -> int:
    """The number of blocks that the pruned model has."""
    return len(kept_by(opened))


def count_finished(opened: Opened) -> int:
    """The number of pruned blocks, according to the run directory."""
    return count_blocks(opened) - len(unfinished(opened))


def pruning(walk: Walk) -> Stage[[Journal, Steps, Allocated | None], Journal]:
    """The stage whose result is the journal with every block.

    Args:
      walk: what is done to every block of the dense model, with the pattern's sparsity.
    """

    def make(work: StageWork, journal: Journal, sinks: Steps, allocation: Allocated | None) -> Journal:
        opened, progress = work.opened, work.progress
        if allocation:
            progress.note(allocation.in_words)
        if not opened.checkpointed:  # a checkpoint may refer to trained blocks alone, and needs none of the journal
            own = with_sparsities(smaller_walk(opened, walk), allocation)
            own = dataclasses.replace(own, tell=progress.layer, begin=progress.begin)
            prune_model(own, opened.texts.calibration.ids, journal, progress, sinks.follow)
        return journal

    def steps(opened: Opened) -> list[Step]:
        own = with_sparsities(smaller_walk(opened, walk), read_allocation(opened.directory))
        return [step for index in unfinished(opened) for step in block_steps(own, index)]

    return Stage("pruning", make, steps=steps, count=count_blocks, done=count_finished)


def _checkpoint_steps(opened: Opened) -> list[Step]:
    decoder = pruned_model(opened).decoder
    blocks = sum(block_bytes(decoder, index) for index in range(decoder.config.blocks))
    return [Step(WRITING, max(1.0, total_bytes(decoder.tensors) - blocks))]


def _pruned(opened: Opened) -> PrunedModel:
    tensors = CheckpointTensors(opened.directory)
    return PrunedModel(dataclasses.replace(pruned_model(opened).decoder, tensors=tensors), tensors)


def _write_checkpoint(work: StageWork, journal: Journal, outcome: Outcome | None, allocation: Allocated | None) -> PrunedModel:
    pretrained, decoder = pruned_model(work.opened)
    # If no step of the distillation improved the model, the blocks stay as they were pruned.
    directory = work.opened.directory
    entry = functools.partial(trained_block, directory) if outcome and outcome.kept else journal.entry
    sparsity, left_out = allocation.sparsity if allocation else None, read_left_out(directory)
    write_checkpoint(directory, lambda: journal.reports(entry), pretrained.tensors, decoder.mesh, sparsity, left_out)
    work.progress.advance()
    return _pruned(work.opened)


CHECKPOINTING = Stage(
    "writing the checkpoint",
    _write_checkpoint,
    KeptResult(lambda opened: _pruned(opened) if opened.checkpointed else None),
    _checkpoint_steps,
)


def _measure_pruned(work: StageWork, pruned: PrunedModel) -> TextPerplexity:
    return measured(work, pruned.decoder)


PRUNED_PERPLEXITY = Stage(
    "pruned perplexity",
    _measure_pruned,
    _kept_perplexity("pruned"),
    lambda opened: perplexity_steps(opened, pruned_model(opened).decoder),
)


def _send(work: StageWork, sinks: Steps, results: Results) -> None:
    measures = {"perplexity/dense": results.dense.perplexity, "perplexity/pruned": results.pruned.perplexity}
    sinks.write(len(kept_by(work.opened)), measures)


SENDING = Stage("sending the perplexities", _send)


MEMORY = Stage("measuring the memory", lambda work: memory_peaks())
"""Peaks before whole models are on the devices, from all processes."""


def _export_steps(opened: Opened) -> list[Step]:
    return [Step(WRITING, total_bytes(pruned_model(opened).decoder.tensors))]


def _exported(opened: Opened) -> bool | None:
    directory = opened.directory
    return (opened.checkpointed and from_first(lambda: is_export_of(directory, directory / FOLDER))) or None


def _export(work: StageWork, results: Results) -> bool:
    directory, facts = work.opened.directory, _facts(work.opened, results)
    first_only(lambda: export(directory, directory / FOLDER, report=facts))
    work.progress.advance()
    return True


EXPORTING = Stage("exporting for transformers", _export, KeptResult(_exported), _export_steps)


def _report(work: StageWork, results: Results, pruned: PrunedModel, entries: Mapping[str, Any]) -> Report:
    """Writes the report. ``entries`` are fields of it from other stages."""
    opened = work.opened
    directory = opened.directory
    exports = {"transformers": directory / FOLDER} if opened.config.export else {}
    files = {"report": directory / REPORT, "checkpoint": directory / CHECKPOINT} | exports
    facts = _model_facts(opened.model)
    settled = structs.asdict(_facts(opened, results)) | {
        "manifest": opened.manifest,
        "configuration": opened.configuration,
        "environment": environment(opened.model.decoder.mesh),
        "model": facts,
        "left_out": read_left_out(directory),
        "allocation": results.allocation,
        "weighed_layers": tuple(_weighed_layers(opened)),
        "seconds": dict(work.progress.seconds),
        "files": {what: str(path) for what, path in files.items()},
    }

    # Every process asks what was left out; inside of write, process 0 is alone.
    left_out = facts.weights - weight_count(pruned_model(opened).decoder.tensors)

    def write() -> Report:
        exported = Exported.open(directory, pruned.checkpoint)
        measured_here = {
            "sizes": _sizes(opened),
            "tokens": changes(opened, results.dense, results.pruned),
            "cuts": dict(exported.cuts.counts),
            "removed": exported.removed() + left_out,
        }
        return write_report(directory / REPORT, {**settled, **entries, **measured_here}, pruned.checkpoint.run.blocks)

    report: Report = from_first(write)
    return report


REPORTING = Stage("reporting", _report, steps=lambda opened: [Step("reporting", 0)])


def _model_facts(model: Model) -> ModelFacts:
    (pretrained, decoder), weights = model, weight_count(model.pretrained.tensors)
    return ModelFacts(
        origin=pretrained.origin,
        fingerprint=pretrained.fingerprint,
        architecture=next(iter(pretrained.config.architectures or ()), None),
        blocks=decoder.config.blocks,
        weights=weights,
        active=weights - decoder.idle_weights,
    )


def _facts(opened: Opened, results: Results) -> RunFacts:
    """What the exported model's card and the report share."""
    text = opened.config.calibration
    return RunFacts(
        calibration=_text(text.source, opened.texts.calibration),
        recipe=recipe_line(opened.config, opened.model.decoder),
        perplexity=Perplexities(results.dense.perplexity, results.pruned.perplexity),
        evaluation=_text(opened.config.evaluation.source or text.source, opened.texts.evaluation),
        distillation=results.outcome,
        speed=results.speed,
    )


def _text(source: str, tokens: Tokens) -> TextFacts:
    return TextFacts(source, tokens.how, int(tokens.ids.size), token_digest(tokens.ids), unigram_perplexity(tokens.ids))


def _weighed_layers(opened: Opened) -> list[str]:
    """The layers for which the target weighs tokens, by names in a block."""
    decoder = opened.model.decoder
    names = decoder.family.residuals if opened.config.recipe.target.weigh_tokens else ()
    return [name for name in names if any(name in decoder.at(kind).linears for kind in decoder.config.kinds)]


def _sizes(opened: Opened) -> FileSizes:
    """Bytes of the source, the exported weights and the run directory."""
    pretrained, directory = opened.model.pretrained, opened.directory
    left = {path.name: size_on_disk(path) for path in entries_on_disk(directory)}
    exported = weights_on_disk(directory / FOLDER) if opened.config.export else None
    return FileSizes(pretrained.stored, total_bytes(pretrained.tensors), exported, left)
