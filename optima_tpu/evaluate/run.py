"""Runs one evaluation, after its settings, and writes evaluation.json."""

import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jax.sharding import Mesh
from lm_eval.tasks.manager import TaskDict
from msgspec import structs
from rich.console import Console

from optima_tpu import data
from optima_tpu.config.flat import flat
from optima_tpu.config.model_spec import opening
from optima_tpu.data import Tokens, token_digest, unigram_perplexity
from optima_tpu.errors import UserError, plural
from optima_tpu.evaluate.config import EvaluateConfig
from optima_tpu.evaluate.distance import distance
from optima_tpu.evaluate.earlier_results import check_known, read_known
from optima_tpu.evaluate.harness import DecoderLM
from optima_tpu.evaluate.model import Evaluated, check_pair, open_evaluated
from optima_tpu.evaluate.parts import Parts, questions_digest
from optima_tpu.evaluate.perplexity import perplexity, text_steps
from optima_tpu.evaluate.table import print_evaluation
from optima_tpu.evaluate.task_settings import Asking
from optima_tpu.evaluate.tasks import load_tasks, paper_average, run_tasks, settings_of, task_results
from optima_tpu.models.model import check_ids, window_bos, window_length
from optima_tpu.report.contents import Environment
from optima_tpu.report.evaluation import EvaluationRecord, Identities, Identity, TaskResult, TextResult, TextScore
from optima_tpu.report.file import environment
from optima_tpu.report.meaningless import poor_text, unpredicted
from optima_tpu.report.pace import Step
from optima_tpu.report.page import PAGE, write_page
from optima_tpu.report.progress import Progress, Terminal, say
from optima_tpu.report.run_record import RUN, default_folder
from optima_tpu.runtime import signals
from optima_tpu.runtime.buckets import as_path, in_bucket
from optima_tpu.runtime.checksums import forget, keep
from optima_tpu.runtime.device_memory import device_budget
from optima_tpu.runtime.files import only_program, refuse_unreachable, writing
from optima_tpu.runtime.mesh import devices_words, make_mesh
from optima_tpu.runtime.processes import agree, check_signals, first_only, from_first, is_first
from optima_tpu.runtime.records import encoded, known_record
from optima_tpu.runtime.version import code_version

T = TypeVar("T")

RECORD = "evaluation.json"
HARNESS = {"model": "lm_eval.json", "against": "lm_eval_against.json"}
"""Files with the evaluation harness's own results, one for each model."""


@dataclasses.dataclass(frozen=True)
class _Subject:
    """What an evaluation measures, checked and opened.

    Attributes:
      models: "model", and "against" if there is one.
      reused: name of a model -> the harness's results of an earlier evaluation.
      texts: source -> its windows.
      folder: where the results go.
    """

    config: EvaluateConfig
    mesh: Mesh
    models: Mapping[str, Evaluated]
    reused: Mapping[str, Any]
    texts: Mapping[str, Tokens]
    folder: Path

    @property
    def decides(self) -> dict[str, Any]:
        """All that decides what is measured."""
        return {
            "settings": _settings(self.config),
            "code": code_version(),
            "environment": self.environment,
            "evaluated": self.identities,
            "texts": {source: token_digest(tokens.ids) for source, tokens in self.texts.items()},
        }

    @functools.cached_property
    def environment(self) -> Environment:
        return environment(self.mesh)

    @functools.cached_property
    def identities(self) -> Identities:
        by_name = {
            name: Identity(opened.model.pretrained.fingerprint, opened.run.manifest) for name, opened in self.models.items()
        }
        return Identities(by_name["model"], by_name.get("against"))


def evaluate(config: EvaluateConfig, console: Console | None = None) -> EvaluationRecord:
    """Measures a model, writes and returns its record, and prints a table.

    Models, mesh, texts, tasks and their data are all checked before the first block is computed. Only process 0 has the results
    of tasks.

    Raises:
      UserError: an input error that the user can correct.
    """
    console = console or Terminal(quiet=not is_first())
    agree("settings and code", flat(_settings(config) | {"code": code_version()}))
    check_signals()
    subject = _prepare(config, console)
    folder = subject.folder
    say(console, "\n".join(_greeting(subject)) + "\n")
    with only_program(folder, leave_file=(folder / RUN).exists()), Progress(console) as progress:
        parts = Parts(folder, subject.decides, progress.note)
        record, results = _measured(subject, parts, progress)
        first_only(lambda: _write(folder, record, results, subject.models))
        first_only(parts.remove)
    files = {"record": RECORD} | ({"harness": HARNESS["model"]} if results else {})
    if is_first() and _draw_page(config, folder, console):
        files["report"] = PAGE
    signals.ended(0)
    print_evaluation(console, record, {name: str(folder / file) for name, file in files.items()}, _strange(record))
    return record


def _settings(config: EvaluateConfig) -> dict[str, Any]:
    """The settings that decide what is measured."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in ("process_id", "force")}


def _prepare(config: EvaluateConfig, console: Console) -> _Subject:
    """Opens models and texts, and makes the folder, or raises UserError."""
    mesh = make_mesh(config.mesh)
    models = _open(config, mesh, console)
    check_signals()
    reused = {}
    if (earlier := config.against_results) is not None:
        fingerprint = models["against"].model.pretrained.fingerprint
        reused["against"] = from_first(lambda: read_known(earlier, [*HARNESS.values()], fingerprint))
    from_first(lambda: _check_texts(config.texts, models))
    texts = {}
    for source in config.texts:
        say(console, f"reading      {source}")
        texts[source] = from_first(functools.partial(_read, source, config, models))
    folder = (
        as_path(config.output) if config.output else models["model"].run.directory or default_folder("evaluate", config.model)
    )
    with writing(folder, "choose another --output"):
        first_only(lambda: _make_writable(folder, config.force))
    return _Subject(config, mesh, models, reused, texts, folder)


def _measured(subject: _Subject, parts: Parts, progress: Progress) -> tuple[EvaluationRecord, dict[str, Any]]:
    """What was measured, and the harness's results of each model."""
    config, models, texts = subject.config, subject.models, subject.texts
    # First, because an error in the tasks should appear before hours of texts.
    questions = _Questions.prepare(config, models, subject.reused, progress)
    by_source = {}
    for number, (source, tokens) in enumerate(texts.items(), 1):
        decoder, both = models["model"].model.decoder, "against" in models
        later = [text_steps(decoder, each.ids, both, config.per_block) for each in [*texts.values()][number:]]
        progress.ahead = [*later, *questions.ahead(len(questions.testers))]
        measure = functools.partial(_on_text, source, tokens, models, progress, config.per_block)
        by_source[source] = parts.measured(source, TextResult, measure)
    results = {**questions.answers(parts, config.asking, progress), **subject.reused}
    tasks = _task_results(questions.tasks, results)
    record = EvaluationRecord(
        config.model,
        config.against,
        subject.identities,
        _settings(config),
        subject.environment,
        {source: part.perplexity for source, part in by_source.items()},
        {source: part.distance for source, part in by_source.items() if part.distance},
        tasks,
        paper_average(tasks),
    )
    return record, results


def _strange(record: EvaluationRecord) -> list[str]:
    """Lines about poor texts, and about texts that a model predicts poorly."""
    remarks = ((_poor(source, score.unigram_perplexity), _unpredicted(score)) for source, score in record.perplexity.items())
    return [line for line in itertools.chain(*remarks) if line]


def _open(config: EvaluateConfig, mesh: Mesh, console: Console) -> dict[str, Evaluated]:
    """Opens "model" and "against", and refuses models that do not fit."""
    models = {}
    for name, spec in (("model", config.model), ("against", config.against)):
        if spec is not None:
            say(console, opening(spec))
            models[name] = open_evaluated(spec, mesh, config.dtype, config.batch)
    if config.against is not None:
        check_pair(**models)
    if config.apply_chat_template:
        _check_chat(models.values())
    return models


def _draw_page(config: EvaluateConfig, folder: Path, console: Console) -> bool:
    """Draws a finished run's page with this evaluation; False if it can't."""
    if not (folder / "report.json").exists():
        return False
    try:
        (run,) = write_page([folder], folder / PAGE)
    except UserError as error:
        say(console, f"{PAGE} was not written: {error}")
        return False
    if run.another:
        say(console, f"{PAGE} does not show this evaluation: {config.model} was not made by the run in {folder}")
    return True


class _Questions(NamedTuple):
    """The tasks of an evaluation, and the models that answer them.

    Attributes:
      tasks: in process 0; None in the others, and if there are none.
      testers: name of a model -> its adapter to the harness. A model whose results are reused has none.
      digest: of what is asked.
    """

    tasks: TaskDict | None
    testers: Mapping[str, DecoderLM]
    digest: str

    @classmethod
    def prepare(
        cls, config: EvaluateConfig, models: Mapping[str, Evaluated], reused: Mapping[str, Any], progress: Progress
    ) -> "_Questions":
        """Loads the tasks. Raises UserError if a task can't be asked."""
        if not config.task_names:
            return cls(None, {}, "")
        testers = {
            name: DecoderLM(opened.model, opened.tokenizer, progress, name, config.context, device_budget(config.device_memory))
            for name, opened in models.items()
            if name not in reused
        }
        # Only process 0 loads the tasks; it sends the others the requests for the model.
        progress.stage("preparing the tasks", 1)
        tasks = _of_first(lambda: _load_tasks(config, reused, testers["model"]))
        digest = from_first(lambda: questions_digest(tasks))
        progress.advance()
        return cls(tasks, testers, digest)

    def ahead(self, models: int) -> list[list[Step]]:
        """The stages of the last ``models`` models, by kind of request."""
        tasks = self.tasks["tasks"].values() if self.tasks else ()
        kinds = dict.fromkeys(request.request_type for task in tasks for request in task.instances)
        return [[Step(kind)] for kind in kinds] * models

    def answers(self, parts: Parts, asking: Asking, progress: Progress) -> dict[str, Any]:
        """Name of a model -> the harness's results, in process 0 alone."""
        results = {}
        for number, (name, tester) in enumerate(self.testers.items()):
            progress.ahead = self.ahead(len(self.testers) - number)
            work = functools.partial(run_tasks, tester, self.tasks, asking)
            results[name] = parts.measured(f"tasks of {name}", dict[str, Any], work, self.digest)
        return results


def _check_chat(models: Iterable[Evaluated]) -> None:
    """Raises UserError if one of the models has no chat template."""
    for opened in models:
        if not opened.tokenizer.chat_template:
            raise UserError(
                f"expected --apply_chat_template with a tokenizer that has a chat template, got none in "
                f"{opened.model.pretrained.origin}, as base models have none: leave it out, or put chat_template.jinja there"
            )


def _check_texts(sources: Iterable[str], models: Mapping[str, Evaluated]) -> None:
    """Raises UserError if a model was calibrated on one of the texts."""
    for source, opened in itertools.product(sources, models.values()):
        calibration = opened.run.calibration
        if calibration and _has_seen(calibration, data.parse_source(source)):
            raise UserError(
                f"expected --perplexity with a text that {opened.model.pretrained.origin} was not calibrated on, got "
                f"{source} (calibrated on {calibration}): give another text, such as wikitext2, pydoc or file:PATH"
            )


def _has_seen(calibration: str, text: data.Source) -> bool:
    """Whether a model calibrated on a text or a mix has seen ``text``."""

    def seen(part: data.Source) -> bool:
        try:
            return data.shared(part, text) is not None
        except UserError:  # the calibration data set is not on this machine, so it cannot be the text to measure on
            return False

    return any(map(seen, data.parse_source(calibration).each_text()))


def _read(source: str, config: EvaluateConfig, models: Mapping[str, Evaluated]) -> Tokens:
    """The windows of a text, tokenised as in the evaluation of a run."""
    model, tokenizer, _ = models["model"]
    length = window_length(model.pretrained.config, "--length", config.length)
    tokens = data.evaluation_tokens(
        data.parse_source(source), tokenizer, length=length, windows=config.windows, bos=window_bos(model, tokenizer, config.bos)
    )
    for opened in models.values():
        check_ids([tokens.ids], opened.model)
    return tokens


def _on_text(source: str, tokens: Tokens, models: Mapping[str, Evaluated], progress: Progress, per_block: bool) -> TextResult:
    pruned, both = models["model"].model.decoder, "against" in models
    steps = text_steps(pruned, tokens.ids, both, per_block)
    progress.stage(f"{'both models' if both else 'perplexity'} on {source}", len(steps), steps)
    if not both:
        value = perplexity(pruned, tokens.ids, progress.advance, between=progress.advance)
        apart, dense = None, None
    else:
        against, left_out = models["against"].model.decoder, models["model"].run.left_out
        apart, dense, value = distance(against, pruned, tokens.ids, progress.advance, per_block, left_out)
    score = TextScore(value, dense, int(tokens.ids.size), tokens.how, unigram_perplexity(tokens.ids))
    if progress.ahead and (remark := _unpredicted(score)):  # behind the last stage the summary says it
        progress.note(f"unusual: {remark}")
    return TextResult(score, apart)


def _poor(source: str, unigram: float) -> str:
    """What is wrong with a text; empty if nothing is."""
    return poor_text(source, unigram, "--perplexity")


def _unpredicted(score: TextScore) -> str:
    """A warning if a model, or the one compared with, predicts poorly."""
    dense = score.against
    which, value = ("model", score.perplexity) if dense is None else ("model of --against", dense)
    return unpredicted(value, score.unigram_perplexity, which)


def _load_tasks(config: EvaluateConfig, reused: Mapping[str, Mapping[str, Any]], lm: DecoderLM) -> TaskDict:
    tasks = load_tasks(config.task_names, lm, config.asking, config.include_path, config.folders)
    for results in reused.values():
        check_known(results, tasks, config.limit, settings_of(lm, config.asking))
    return tasks


def _of_first(work: Callable[[], T]) -> T | None:
    """``work()`` in process 0, None in the others. All raise its UserError."""
    result: list[T] = []
    from_first(lambda: result.append(work()))
    return result[0] if result else None


def _task_results(tasks: TaskDict | None, results: Mapping[str, Mapping[str, Any]]) -> dict[str, TaskResult]:
    if tasks is None:
        return {}
    by_model = {name: task_results(tasks, result) for name, result in results.items()}
    against = by_model.get("against", {})
    return {
        task: structs.replace(result, against=against[task].metrics if task in against else {})
        for task, result in by_model["model"].items()
    }


def _make_writable(folder: Path, force: bool) -> None:
    """Makes a writable folder, and refuses one with files of others."""
    theirs = [folder / name for name in (RECORD, *HARNESS.values()) if (folder / name).exists()]
    if theirs and not force and known_record(folder / RECORD, EvaluationRecord) is None:
        raise UserError(
            f"expected --output with a new folder or that of an evaluation, got {folder}, which holds another {theirs[0].name}: "
            "choose another, or add --force true to replace it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if in_bucket(folder):
        refuse_unreachable(folder)
    else:
        tempfile.TemporaryFile(dir=folder).close()


def _write(folder: Path, record: EvaluationRecord, results: Mapping[str, Any], models: Mapping[str, Evaluated]) -> None:
    remedy = "make room and repeat the command, or choose another --output"
    with writing(folder, remedy):
        for path in HARNESS.values():  # files of an earlier evaluation could be mistaken for results of this one
            (folder / path).unlink(missing_ok=True)
        forget(folder, HARNESS.values())
        files = {RECORD: encoded(record, indent=2)}
        for name, result in results.items():
            result["config"]["model_args"] = {
                "pretrained": getattr(record, name),
                "fingerprint": models[name].model.pretrained.fingerprint,
            }
            files[HARNESS[name]] = encoded(result, indent=2)
        keep(folder, files, remedy)


def _greeting(subject: _Subject) -> list[str]:
    """Lines that describe the evaluation before its long computations."""
    config, texts, record = subject.config, subject.texts, subject.folder / RECORD
    lines = [
        f"{name:<12} {opened.model.pretrained.origin}: {plural(opened.model.decoder.config.blocks, 'block')}"
        for name, opened in subject.models.items()
    ]
    lines += [f"perplexity   {', '.join(texts)}"] if texts else []
    remarks = [_poor(source, unigram_perplexity(tokens.ids)) for source, tokens in texts.items()]
    lines += [f"unusual      {line}" for line in remarks if line]
    reused = f"; results of {config.against} from {config.against_results}" if config.against_results else ""
    lines += [f"tasks        {', '.join(config.task_names)}{reused}"] if config.task_names else []
    return [
        *lines,
        f"devices      {devices_words(subject.mesh)}",
        f"output       {subject.folder}" + (f", replaces its {RECORD}" if record.exists() else ""),
    ]
