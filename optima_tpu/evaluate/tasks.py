"""The tasks of the Language Model Evaluation Harness: found, given their data, run, and told in numbers."""

import difflib
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict

from optima_tpu.errors import UserError, one_line
from optima_tpu.evaluate.harness import DecoderLM
from optima_tpu.report.numbers import plural
from optima_tpu.runtime.processes import from_first, is_first

PAPER = ("mmlu", "piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa")
"""The zero-shot tasks whose mean accuracy OPTIMA reports."""

BOOTSTRAP = 1000
"""Draws for the standard error of a metric that has no formula for it; accuracies have one."""

_SCORED = ("test_split", "validation_split")
_EXAMPLES = ("fewshot_split", "training_split", "validation_split", "test_split")
"""Where the harness takes what is scored and what stands before it: from the first of these splits that there is."""
_SINGLE_TASKS = (
    "give --tasks the group's single tasks, each with a --data NAME=FOLDER of its own (`lm-eval ls subtasks` lists them)"
)
_SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_tasks(
    names: Sequence[str],
    include_path: str | None = None,
    data: Mapping[str, Path] = {},
    fewshot: int | None = None,
    limit: int | None = None,
) -> TaskDict:
    """Tasks and groups of the harness by their names, with their data sets. Each has asked its questions once, to nobody.

    Args:
      include_path: a folder with task files (YAML) that go over the harness's own.
      data: task out of ``names`` -> a folder with its data set in files SPLIT.jsonl, SPLIT.json or SPLIT.parquet.
      fewshot: examples before every question; None takes what the task says. A task that says 0 keeps it.
      limit: documents of each task, the first ones; None takes all.

    Raises:
      UserError: there is no such task or folder, a data set can't be had, a document or the number of examples does not fit a
        task, or a task is not one that scores texts.
    """
    if include_path is not None and not Path(include_path).expanduser().is_dir():
        raise UserError(f"expected --include-path with a folder of task files, got {include_path}: there is no such folder")
    # As lm_eval.simple_evaluate, for tasks that shuffle while they are made.
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    manager = TaskManager(include_path=include_path and str(Path(include_path).expanduser()))
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them all"
            raise UserError(f"there is no task {name!r}; {hint}")
    found = TaskDict(tasks={}, groups={}, group_map={})
    for name in names:
        loaded = _load(manager, name, data.get(name))
        for part in found:
            found[part] |= loaded[part]
    for name, task in found["tasks"].items():
        if task.OUTPUT_TYPE == "generate_until" or getattr(task, "MULTIMODAL", False):
            raise UserError(
                f"task {name} lets the model write or look at pictures, and here texts are only scored: leave it "
                "out, or run lm-eval on the exported folder"
            )
        if fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        # Of a rolling likelihood the examples are no part.
        if task.get_config("num_fewshot") and name in data and task.OUTPUT_TYPE != "loglikelihood_rolling":
            _check_examples(manager, name, data[name])
        # The harness runs the steps of all tasks, and what they raise names none of them.
        task.build_all_requests = _named(task.build_all_requests, name, "made from")
        task.process_results = _named(task.process_results, name, "scored on")
        _check_number(task, name)
        _check_documents(task, name, limit)
    return found


def _load(manager: TaskManager, name: str, folder: Path | None) -> TaskDict:
    try:
        if folder is None:
            return manager.load(name)
        # Of a task inside a group the settings can be changed, which is no other way to change them.
        loaded = manager.load({"group": "local", "task": [{"task": name, **_local(manager, name, folder)}]})
        return TaskDict(tasks=loaded["tasks"], groups={}, group_map={})
    except UserError:
        raise
    except OSError as error:  # no network, no such data set, a gated one, a file that is not there
        raise UserError(
            f"the data of task {name} are not here and can't be had ({one_line(error)}): fill the Hugging Face "
            f"cache where there is a network{_or_files(manager, name)}"
        ) from error
    except Exception as error:  # anything, from templates and data that do not fit each other
        raise _unfit(name, error) from error


def _named(work: Callable[..., Any], name: str, what: str) -> Callable[..., Any]:
    """A step of a task that tells of its errors by the task's name; ``what`` it does with the data."""

    def step(*arguments, **options):
        try:
            return work(*arguments, **options)
        except UserError:
            raise
        except Exception as error:  # as in _load
            raise _unfit(name, error, what) from error

    return step


def _unfit(name: str, error: Exception, what: str = "made from") -> UserError:
    return UserError(
        f"task {name} can't be {what} its data ({type(error).__name__}: {one_line(error)}): expected the fields "
        "and splits that its task file names"
    )


def _or_files(manager: TaskManager, name: str) -> str:
    """How the data are given as files, for the end of a message; nothing for a task in Python, which reads them itself."""
    if _named_splits(manager, name):
        return f", or give them as files with --data {name}=FOLDER"
    single = manager.task_index[name].kind.name.endswith("TASK")
    return "" if single else f", or give them as files with --data: {_SINGLE_TASKS}"


def _local(manager: TaskManager, name: str, folder: Path) -> dict[str, Any]:
    """The settings that make a task read the files of a folder."""
    if not folder.is_dir():
        raise UserError(f"expected --data {name}=FOLDER with a folder, got {folder}: there is none")
    files, wanted = _files(folder), _named_splits(manager, name)
    if not wanted:
        raise UserError(
            f"expected --data {name}=FOLDER of a task whose file names its splits, got a group of tasks or one that "
            f"names none: {_SINGLE_TASKS}"
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
    """Refuses files with which examples come from another split than the task's file says, or from what is scored.

    Left to itself the harness takes the next split that there is. The training split may stand for the split of the examples.
    """
    if (manager.task_index[name].cfg.get("fewshot_config") or {}).keys() & {"samples", "split"}:
        return  # the task has examples of its own, or could not have been made without that split
    files, named = _files(folder), _named_splits(manager, name)
    there = {key: split for key, split in named.items() if split in files}
    drawn, scored = _first(there, _EXAMPLES), _first(there, _SCORED)
    expected = list(filter(None, dict.fromkeys([_first(named, _EXAMPLES), named.get("training_split")])))
    if drawn in expected:
        if drawn != scored or drawn == _first(named, _SCORED):
            return
        expected = list(filter(None, [_first(named, _SCORED)]))
    raise UserError(
        f"expected {' or '.join(f'{split}.jsonl' for split in expected)} in {folder} for a task with examples before "
        f"each question, got {', '.join(path.name for path in files.values())}: the examples of {name} would be "
        f"drawn from {drawn}{', whose documents are scored' if drawn == scored else ''}; add it, or give --fewshot 0"
    )


def _check_number(task: Task, name: str) -> None:
    """Refuses more examples before a question than there are documents to draw them from."""
    shots, sampler = task.get_config("num_fewshot"), getattr(task, "sampler", None)
    if shots and sampler is not None:
        # As the harness has it: one more is drawn, in case that it is the document of the question.
        most = len(sampler.df) - (task.fewshot_cfg.split == task.config.test_split)
        if shots > most:
            raise UserError(
                f"expected at most {most} examples before a question of task {name}, which are drawn from "
                f"{plural(len(sampler.df), 'document')}, got {shots}: give a smaller --fewshot"
            )


def _check_documents(task: Task, name: str, limit: int | None) -> None:
    """Makes all requests once, so that a document that does not fit the task is found before the model has run."""
    states = random.getstate(), np.random.get_state()
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    count, asked = len(task.eval_docs), {request.doc_id for request in task.instances}
    random.setstate(states[0])  # tasks that shuffle do it as if nothing had been asked before
    np.random.set_state(states[1])
    for number in range(min(limit or count, count)):
        if number not in asked:
            raise UserError(f"document {number} of task {name}: expected a text to score, got no choices; mend the data set")


def _files(folder: Path) -> dict[str, Path]:
    """Split -> its file."""
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in _SUFFIXES}


def _named_splits(manager: TaskManager, name: str) -> dict[str, str]:
    """The splits that a task's file names."""
    settings = manager.task_index[name].cfg or {}
    return {key: settings[key] for key in _EXAMPLES if settings.get(key)}


def _first(splits: Mapping[str, str], keys: Sequence[str]) -> str | None:
    return next((splits[key] for key in keys if key in splits), None)


def run_tasks(lm: DecoderLM, tasks: TaskDict | None, limit: int | None = None, samples: bool = False) -> dict[str, Any]:
    """Runs tasks on a model. Every process calls it; the first one needs the tasks and runs the harness.

    Args:
      tasks: from :func:`load_tasks`.
      limit: documents of each task, the first ones; None takes all.
      samples: keep what the model said to every document.

    Returns:
      What ``lm_eval.evaluate`` does, in the first process; an empty dictionary in the others.

    Raises:
      UserError: a document can't be scored.
    """
    if not is_first():
        lm.follow()
        return {}
    assert tasks is not None, "process 0 has loaded the tasks"
    for task in tasks["tasks"].values():  # each model sees the same examples
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    try:
        results = evaluate(lm, tasks, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=samples)
    except UserError as error:
        failure = error  # which the others wait for
        from_first(lambda: _raise(failure))
    from_first(lambda: None)
    return results | {
        "config": {
            "model": "optima_tpu",
            "limit": limit,
            "bootstrap_iters": BOOTSTRAP,
            "random_seed": DEFAULT_RANDOM_SEED,
            "numpy_seed": DEFAULT_OTHER_SEED,
            "fewshot_seed": DEFAULT_OTHER_SEED,
        },
        "lm_eval_version": lm_eval.__version__,
        "max_length": lm.max_length,
    }


def _raise(error: UserError) -> None:
    raise error


def metrics(tasks: TaskDict, results: Mapping[str, Any]) -> dict[str, dict[str, float | int | None]]:
    """The numbers of every group that has some of its own, and of every task in no such group: {"piqa": {"acc": 0.7, ...}}.

    A metric of another filter than the harness's default keeps its name: "exact_match,strict". A standard error that the harness
    does not give is None. "documents" is how many there were.
    """
    groups = {name: group for name, group in tasks["groups"].items() if group.has_aggregation}
    inside = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    inside |= {below.name for group in groups.values() for below in group.get_all_groups()}
    found = {}
    for name in [*groups, *tasks["tasks"]]:
        if name not in inside:
            entry = results["results"][name]
            found[name] = {
                key.removesuffix(",none"): value if isinstance(value, int | float) else None
                for key, value in entry.items()
                if "," in key
            } | {"documents": entry["sample_len"]}
    return found


def paper_average(found: Mapping[str, Mapping[str, float | int | None]]) -> float | None:
    """The mean accuracy over the paper's tasks; None where one is missing."""
    return float(np.mean([found[name]["acc"] for name in PAPER])) if set(PAPER) <= found.keys() else None
