"""Loads and runs tasks of the Language Model Evaluation Harness."""

import contextlib
import difflib
import importlib.metadata
import math
import random
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict
from lm_eval.utils import simple_parse_args_string

from optima_tpu.errors import UserError, one_line, plural
from optima_tpu.evaluate.harness import DecoderLM
from optima_tpu.evaluate.task_settings import Asking
from optima_tpu.report.evaluation import TaskResult
from optima_tpu.runtime.error_texts import nltk_resource
from optima_tpu.runtime.inside import refuse_special
from optima_tpu.runtime.processes import SharedError, from_first, is_first

PAPER = ("mmlu", "piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa")
"""The zero-shot tasks whose mean accuracy OPTIMA reports."""

BOOTSTRAP = 1000
"""Bootstrap draws for the standard error of metrics without a formula for it. Accuracies have a formula."""

_SCORED = ("test_split", "validation_split")
_EXAMPLES = ("fewshot_split", "training_split", "validation_split", "test_split")
"""The harness scores the first of ``_SCORED`` that exists, and draws examples from the first of ``_EXAMPLES`` that exists."""
_ANSWER = "7"
"""The written answer that every task must be able to score."""

_SINGLE_TASKS = (
    "give --tasks the group's single tasks, each with a --data NAME=FOLDER of its own (`lm-eval ls subtasks` lists them)"
)
_SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_tasks(
    names: Sequence[str], lm: DecoderLM, asking: Asking = Asking(), include_path: str | None = None, data: Mapping[str, Path] = {}
) -> TaskDict:
    """Loads the harness's tasks and groups, and checks that they can run.

    It builds all requests once, and scores a written answer.

    Args:
      lm: the model that will be asked, for the limits of its context and for its chat template.
      include_path: a folder with task files (YAML) that replace the harness's files of the same name.
      data: task, one of ``names`` -> a folder with its data set in files SPLIT.jsonl, SPLIT.json or SPLIT.parquet.

    Raises:
      UserError: a task or folder does not exist, a data set or a package is not available, a document or the number of examples
        does not fit its task, or a task needs images, code that is run, or sampled answers.
    """
    if include_path is not None and not Path(include_path).expanduser().is_dir():
        raise UserError(f"expected --include_path with a folder of task files, got {include_path}, which is not a folder")
    # The same seeds as lm_eval.simple_evaluate, for tasks that shuffle while they are created.
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    manager = TaskManager(include_path=include_path and str(Path(include_path).expanduser()))
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them all"
            raise UserError(f"expected tasks of the harness, got {name!r}; {hint}")
    collected = TaskDict(tasks={}, groups={}, group_map={})
    for name in names:
        loaded = _load(manager, name, data.get(name))
        for part in collected:
            collected[part] |= loaded[part]
    if asking.generation is not None and all(task.OUTPUT_TYPE != "generate_until" for task in collected["tasks"].values()):
        raise UserError(
            f"expected --gen_kwargs for tasks in which the model writes (none), got {asking.generation}: leave it out"
        )
    for name, task in collected["tasks"].items():
        _configure(task, name, asking)
        # Rolling log-likelihoods use no examples.
        if task.get_config("num_fewshot") and name in data and task.OUTPUT_TYPE != "loglikelihood_rolling":
            _check_examples(manager, name, data[name])
        # The harness runs these steps for all tasks, and its errors do not say which task failed.
        task.build_all_requests = _fitting(name, "made from")(task.build_all_requests)
        task.apply_filters = _fitting(name, "scored on")(task.apply_filters)
        task.process_results = _fitting(name, "scored on")(task.process_results)
        _check_number(task, name)
        _check_documents(task, name, lm, asking)
    return collected


def _configure(task: Task, name: str, asking: Asking) -> None:
    """Sets how a task is asked. Raises UserError for an unsupported task."""
    for what, refused in (("images or sound", "MULTIMODAL"), ("code to be run that the model writes", "UNSAFE_CODE")):
        if getattr(task, refused, False):
            raise UserError(f"task {name} needs {what}: leave it out, or run lm-eval on the exported folder")
    if asking.generation is not None and task.OUTPUT_TYPE == "generate_until":
        task.set_config(key="generation_kwargs", value=simple_parse_args_string(asking.generation), update=True)
    if asking.fewshot is not None and task.get_config("num_fewshot") != 0:
        task.set_config(key="num_fewshot", value=asking.fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)


def _load(manager: TaskManager, name: str, folder: Path | None) -> TaskDict:
    with _fitting(name, "made from"):
        try:
            if folder is None:
                return manager.load(name)
            # The harness lets a group override the settings of its tasks; there is no other way to change them.
            loaded = manager.load({"group": "local", "task": [{"task": name, **_local(manager, name, folder)}]})
            return TaskDict(tasks=loaded["tasks"], groups={}, group_map={})
        except OSError as error:  # no network, an unknown or gated data set, a missing file
            raise UserError(
                f"the data set of task {name} is not on this machine and can't be downloaded ({one_line(error)}): fill the "
                f"Hugging Face cache on a machine with a network{_or_files(manager, name)}"
            ) from error


@contextlib.contextmanager
def _fitting(name: str, what: str) -> Iterator[None]:
    """Names the task in the errors of a step, which ``what`` describes."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a template that does not fit its data can raise any type
        raise _unfit(name, error, what) from error


def _unfit(name: str, error: Exception, what: str) -> UserError:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return UserError(
            f"task {name} needs the package {error.name}, which is not installed: pip install {_package(error.name)}"
        )
    if resource := nltk_resource(error):
        return UserError(
            f"task {name} needs NLTK's {resource}, which is not on this machine: on a machine with a network, "
            f"python -m nltk.downloader {resource}"
        )
    return UserError(
        f"task {name} can't be {what} its data ({type(error).__name__}: {one_line(error)}): expected the fields "
        "and splits that its task file names; correct the data set"
    )


def _package(module: str) -> str:
    """What to install for a module: an extra of the harness, if it has one."""
    for requirement in importlib.metadata.requires("lm_eval") or []:
        if match := re.match(rf"{re.escape(module)}\b.*extra == ['\"](\w+)['\"]", requirement):
            return f"'lm_eval[{match[1]}]'"
    return module


def _or_files(manager: TaskManager, name: str) -> str:
    """The end of a message: how to give the data as files; else empty."""
    if _named_splits(manager, name):
        return f", or give the data as files with --data {name}=FOLDER"
    single = manager.task_index[name].kind.name.endswith("TASK")
    return "" if single else f", or give the data as files with --data: {_SINGLE_TASKS}"


def _local(manager: TaskManager, name: str, folder: Path) -> dict[str, Any]:
    """The settings by which a task reads its data set from a folder."""
    if not folder.is_dir():
        raise UserError(f"expected --data {name}=FOLDER with an existing folder, got {folder}")
    files, wanted = _files(folder), _named_splits(manager, name)
    if not wanted:
        raise UserError(
            f"expected --data {name}=FOLDER for a task whose task file names its splits, got a group or a task whose file "
            f"names no splits: {_SINGLE_TASKS}"
        )
    if not any(wanted.get(key) in files for key in _SCORED):
        raise UserError(
            f"expected {' or '.join(f'{split}.jsonl' for split in wanted.values())} in {folder}, got "
            f"{', '.join(path.name for path in files.values()) or 'no data files'}"
        )
    files = {split: path for split, path in files.items() if split in wanted.values()}
    kinds = {_SUFFIXES[path.suffix] for path in files.values()}
    if len(kinds) > 1:
        raise UserError(f"expected files of one format in {folder}, got {', '.join(path.name for path in files.values())}")
    return {
        "dataset_path": kinds.pop(),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}},
        **{key: None for key, split in wanted.items() if split not in files},
    }


def _check_examples(manager: TaskManager, name: str, folder: Path) -> None:
    """Raises UserError if examples would come from an unexpected split.

    That is another split than the task file names, or the split that is scored. Without this check the harness silently takes
    the next split that exists. The training split may replace the named split.
    """
    if (manager.task_index[name].cfg.get("fewshot_config") or {}).keys() & {"samples", "split"}:
        return  # the task file contains its own examples, or names a split without which the task could not be created
    files, named = _files(folder), _named_splits(manager, name)
    existing = {key: split for key, split in named.items() if split in files}
    drawn, scored = _first(existing, _EXAMPLES), _first(existing, _SCORED)
    expected = list(filter(None, dict.fromkeys([_first(named, _EXAMPLES), named.get("training_split")])))
    if drawn in expected:
        if drawn != scored or drawn == _first(named, _SCORED):
            return
        expected = list(filter(None, [_first(named, _SCORED)]))
    raise UserError(
        f"expected {' or '.join(f'{split}.jsonl' for split in expected)} in {folder} for a task with examples before "
        f"each question, got {', '.join(path.name for path in files.values())}: the examples of {name} would be "
        f"drawn from {drawn}{', whose documents are scored' if drawn == scored else ''}; add the file, or give --fewshot 0"
    )


def _check_number(task: Task, name: str) -> None:
    """Raises UserError if a task has too few documents for its examples."""
    shots, sampler = task.get_config("num_fewshot"), getattr(task, "sampler", None)
    if shots and sampler is not None:
        # The harness draws one extra example if examples and questions share a split, to skip the question's own document.
        most = len(sampler.df) - (task.fewshot_cfg.split == task.config.test_split)
        if shots > most:
            raise UserError(
                f"expected at most {most} examples before a question of task {name}, because they are drawn from "
                f"{plural(len(sampler.df), 'document')}, got {shots}: give a smaller --fewshot"
            )


def _check_documents(task: Task, name: str, lm: DecoderLM, asking: Asking) -> None:
    """Builds all requests, and scores an answer, before the model runs."""
    states = random.getstate(), np.random.get_state()
    chat = {"chat_template": lm.apply_chat_template, "tokenizer_name": lm.tokenizer_name} if asking.chat else {}
    task.build_all_requests(limit=asking.limit, rank=0, world_size=1, **asking.prompts, **chat)
    count, requested = len(task.eval_docs), {request.doc_id for request in task.instances}
    for number in range(min(asking.limit or count, count)):
        if number not in requested:
            raise UserError(f"document {number} of task {name}: expected a text to score, got no choices; correct the data set")
    written = [request for request in task.instances if request.request_type == "generate_until"]
    for request in written:
        lm.rules(request)
        request.resps = [_ANSWER] * request.repeats
    if written and len(written) == len(task.instances):
        task.apply_filters()
        for request in written:
            for answer in request.filtered_resps.values():
                task.process_results(request.doc, [answer])
    random.setstate(states[0])  # so that tasks that shuffle give the same result as without this check
    np.random.set_state(states[1])


def _files(folder: Path) -> dict[str, Path]:
    """Maps splits to files. Raises UserError for pipes, sockets, devices."""
    files = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in _SUFFIXES}
    for path in files.values():
        refuse_special(path)
    return files


def _named_splits(manager: TaskManager, name: str) -> dict[str, str]:
    """The splits that a task's file names."""
    settings = manager.task_index[name].cfg or {}
    return {key: settings[key] for key in _EXAMPLES if settings.get(key)}


def _first(splits: Mapping[str, str], keys: Sequence[str]) -> str | None:
    return next((splits[key] for key in keys if key in splits), None)


def run_tasks(lm: DecoderLM, tasks: TaskDict | None, asking: Asking = Asking(), samples: bool = False) -> dict[str, Any]:
    """Runs tasks on a model. Every process must call it.

    Args:
      tasks: from :func:`load_tasks`, with the same ``asking``; only process 0 needs them.
      samples: keep the model's answers to every document.

    Returns:
      The results of ``lm_eval.evaluate`` with the settings of the run in process 0, an empty dictionary in the others.

    Raises:
      UserError: a document can't be scored.
    """
    if not is_first():
        lm.follow()
        return {}
    assert tasks is not None, "process 0 has loaded the tasks"
    for task in tasks["tasks"].values():  # so that each model sees the same examples
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    try:
        results = evaluate(lm, tasks, limit=asking.limit, bootstrap_iters=BOOTSTRAP, log_samples=samples, **asking.prompts)
    except SharedError:  # the other processes raise it too
        raise
    except (UserError, OverflowError) as error:
        failure = _as_user_error(error)  # the other processes wait for a message, so send them the error
        from_first(lambda: _raise(failure))
    from_first(lambda: None)
    return results | {
        "config": {
            "model": "optima_tpu",
            "limit": asking.limit,
            "gen_kwargs": asking.generation,
            "bootstrap_iters": BOOTSTRAP,
            "random_seed": DEFAULT_RANDOM_SEED,
            "numpy_seed": DEFAULT_OTHER_SEED,
            "fewshot_seed": DEFAULT_OTHER_SEED,
        },
        "lm_eval_version": lm_eval.__version__,
        **settings_of(lm, asking),
    }


def settings_of(lm: DecoderLM, asking: Asking) -> dict[str, Any]:
    """All that answers to the same requests depend on, besides the weights."""
    return {
        "max_length": lm.max_length,
        "chat_template": lm.chat_template(True) if asking.chat else None,
        "system_instruction": asking.system,
        "fewshot_as_multiturn": asking.multiturn,
    }


def _as_user_error(error: UserError | OverflowError) -> UserError:
    """The error itself, or advice if ``exp`` of a large loss overflows."""
    if isinstance(error, UserError):
        return error
    return UserError(
        f"a perplexity among the tasks is larger than any number of 64 bits ({one_line(error)}): the model does not predict the "
        "texts; leave that task out, or check the model"
    )


def _raise(error: UserError) -> None:
    raise error


def task_results(tasks: TaskDict, results: Mapping[str, Any]) -> dict[str, TaskResult]:
    """Results of groups that aggregate their tasks, and of all other tasks.

    A metric of another filter than the harness's default keeps the filter in its name: "exact_match,strict". A standard error
    that the harness does not compute is None.
    """
    groups = {name: group for name, group in tasks["groups"].items() if group.has_aggregation}
    inside = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    inside |= {below.name for group in groups.values() for below in group.get_all_groups()}
    by_name = {}
    for name in [*groups, *tasks["tasks"]]:
        if name not in inside:
            entry = results["results"][name]
            metrics = {
                key.removesuffix(",none"): value if isinstance(value, int | float) and math.isfinite(value) else None
                for key, value in entry.items()
                if "," in key
            }
            by_name[name] = TaskResult(entry["sample_len"], metrics, {})
    return by_name


def paper_average(results: Mapping[str, TaskResult]) -> float | None:
    """The mean accuracy over the paper's six tasks; None if one is missing."""
    accuracies = [value for name in PAPER if name in results and (value := results[name].metrics["acc"]) is not None]
    return statistics.fmean(accuracies) if len(accuracies) == len(PAPER) else None
