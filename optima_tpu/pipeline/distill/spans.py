"""Training of spans of blocks, one after the other, toward the dense model's hidden states.

    RUN/distilled/block_0000   a trained block, or one that keeps its weights; its metadata say what its span came to

The devices hold the blocks of one span, whatever the depth of the model. In host memory wait the hidden states of all windows: those
that enter the span in the pruned model, and those that leave it in the dense one.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from optima_tpu.errors import plural
from optima_tpu.models.activations import Activations
from optima_tpu.models.checkpoints.orbax import OrbaxTensors, read_custom
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline.distill.blocks import HIDDEN_STATE, Goal, Trainer, next_token
from optima_tpu.pipeline.distill.model import TrainedBlocks
from optima_tpu.pipeline.distill.outcome import FOLDER, trained_block
from optima_tpu.pipeline.distill.states import States, write_blocks
from optima_tpu.pipeline.distill.train import CHECK, TRAINING_STEP, Training, finite
from optima_tpu.pipeline.distill.windows import READING, Inputs, TrainingParts, TrainingStream
from optima_tpu.pipeline.journal import Journal
from optima_tpu.report.contents import Check, Outcome, Span
from optima_tpu.report.numbers import percent
from optima_tpu.report.progress import Progress
from optima_tpu.runtime.checksums import damage
from optima_tpu.runtime.processes import from_first
from optima_tpu.runtime.records import Record, json_values


class _SavedSpan(Record, frozen=True):
    """The metadata of a trained block; ``seconds`` are those of its span."""

    span: Span
    seconds: float


def distill_by_spans(inputs: Inputs, progress: Progress) -> Outcome:
    """As ``train.distill``, for a method that trains by spans.

    A run that was stopped computes the hidden states again, through the finished spans as they were saved, and goes on in the span
    that it was stopped in.
    """
    dense, journal, method, windows = inputs.dense, inputs.journal, inputs.method, inputs.windows
    trainer, blocks = inputs.trainer, inputs.pruned.config.blocks
    spans = method.spans(blocks)
    parts = TrainingParts.of(method, len(windows.training), 1)
    windows = windows._replace(training=windows.training[: parts.steps * parts.batch])  # the others fill no step
    training, held_out = (_begin(dense, tokens) for tokens in windows)
    trained = from_first(lambda: _trained(journal, spans))
    if trained:
        progress.note(f"resuming  {trained[-1].span.last + 1} of {plural(blocks, 'block')} trained")
    for number, span in enumerate(spans):
        for index in span:
            progress.begin(READING, "the dense model reads the text")
            _through(dense, inputs.dense_blocks(index), training.dense, held_out.dense)
            progress.advance()
        if number == len(trained):
            model = TrainedBlocks.open(trainer, journal, span, HIDDEN_STATE, windows.training.shape[1])
            trained.append(_train(model, journal, training, held_out, progress))
            progress.note(", ".join(filter(None, [_told(trained[-1].span, blocks), progress.left()])))
            del model  # two spans would be on the devices while the next one is opened
        else:
            progress.skip([CHECK] * (1 + len(method.check_steps())) + [TRAINING_STEP] * method.steps)
        # From what was saved, and so rounded, in every start of the run.
        saved = {trained_block(journal.directory, index) for index in span}
        after = dataclasses.replace(inputs.pruned, tensors=OrbaxTensors(saved))
        _through(after, span, training.entering, held_out.entering)
        progress.advance()
    progress.note("the model as it was pruned reads the held-out text, for a comparison with the trained one")
    before = dense.embed(windows.held_out)
    _through(trainer.decoder, range(blocks), before, advance=progress.advance)
    goal = next_token(method, dense.head())
    checks = (
        Check(step, finite(loss, step), None, perplexity)
        for step, stream in ((0, held_out._replace(entering=before)), (method.steps, held_out))
        for loss, perplexity in [_measure(trainer, goal, stream, progress)]
    )
    first, last = checks
    return Outcome(
        (first, last),
        last.step if last.held_out < first.held_out else 0,
        method.tokens(windows.training.shape[1]),
        seconds=sum(each.seconds for each in trained),
        spans=tuple(each.span for each in trained),
    )


def _begin(dense: Decoder, tokens: np.ndarray) -> TrainingStream:
    """Windows before the first block of both models."""
    embedded = dense.embed(tokens)
    return TrainingStream(tokens, embedded, embedded.copy())


def _train(
    model: TrainedBlocks, journal: Journal, stream: TrainingStream, held_out: TrainingStream, progress: Progress
) -> _SavedSpan:
    """Trains the blocks of a span, and saves them, with the weights of the best check or as they were pruned."""
    span, method = model.span, model.trainer.method
    # The lines of its checks would be a hundred for a model of thirty blocks.
    training = Training(model, States(journal.directory / FOLDER, f"block_{span.start:04d}_"), progress, speaks=False)
    training.resume()
    parts = TrainingParts.of(method, len(stream.tokens), 1)

    def windows(step: int) -> TrainingStream:
        first = step % parts.steps * parts.batch
        return stream.part(first, first + parts.batch)

    best = training.run(held_out, windows)
    moved = training.best
    if not moved:
        opened = zip(model.trainers, model.trainer.decoder.blocks(span))
        moved = [{name: parameters[name] for name in trainer.factors} for trainer, parameters in opened]
    record = _SavedSpan(Span(tuple(training.checks), best.step, span.start, span[-1]), training.seconds)
    write_blocks(model, moved, journal, json_values(record))
    return record


def _trained(journal: Journal, spans: Sequence[range]) -> list[_SavedSpan]:
    """The records of the first spans whose blocks are all saved and not damaged."""
    found = []
    for span in spans:
        entries = [trained_block(journal.directory, index) for index in span]
        if any(damage(entry) for entry in entries):
            break
        found.append(read_custom(entries[0], _SavedSpan))
    return found


def _through(decoder: Decoder, blocks: range, *streams: Activations, advance: Callable[[], None] = lambda: None) -> None:
    for index, parameters in zip(blocks, decoder.blocks(blocks)):
        for hidden in streams:
            decoder.apply(index, parameters, hidden)
        advance()


def _measure(trainer: Trainer, goal: Goal, stream: TrainingStream, progress: Progress) -> tuple[float, float | None]:
    """Loss and perplexity of what left the last block."""
    found = TrainedBlocks(trainer, range(0), [], goal, []).measure(stream)
    progress.advance()
    return found


def _told(span: Span, blocks: int) -> str:
    where = f"block{'s' * (span.first < span.last)} {span.blocks}"
    left = f", {plural(blocks - 1 - span.last, 'block')} to go"
    if not span.kept:
        return f"{where}: no step lowered the held-out error of the hidden states, {percent(span.before)}; the weights stay{left}"
    return f"{where}: held-out error of the hidden states {percent(span.before)} -> {percent(span.after)}, step {span.kept}{left}"
