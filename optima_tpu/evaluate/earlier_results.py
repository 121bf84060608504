"""Reuses a model's task results from an earlier evaluation."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import lm_eval
from lm_eval.tasks.manager import TaskDict
from lm_eval.utils import handle_non_serializable

from optima_tpu.errors import UserError
from optima_tpu.runtime.buckets import as_path
from optima_tpu.runtime.checksums import read_intact


class _Arguments(TypedDict):
    pretrained: str
    fingerprint: str


class _Config(TypedDict):
    model_args: _Arguments
    limit: float | None


class _Documents(TypedDict):
    original: int


Known = TypedDict(
    "Known",
    {
        "config": _Config,
        "results": dict[str, dict[str, Any]],
        "configs": dict[str, dict[str, Any]],
        "n-samples": dict[str, _Documents],
        "max_length": int,
        "chat_template": str | None,
        "system_instruction": str | None,
        "fewshot_as_multiturn": bool,
        "lm_eval_version": str,
    },
)
"""What is read of the harness's results."""


def read_known(folder: str, files: Sequence[str], fingerprint: str) -> dict[str, Any]:
    """Reads the harness's results for a model from an earlier evaluation.

    The model was MODEL or ``--against`` in that evaluation.

    Args:
      folder: the ``--output`` of that evaluation.
      files: names of files in the folder that may hold the harness's results.

    Raises:
      UserError: the folder has no results, or only results of other models.
    """
    results = []
    for path in (as_path(folder) / file for file in files):
        if path.exists():
            remedy = "it holds no results of an evaluation, or it is damaged: leave --against_results out"
            earlier = read_intact(path, Known, remedy, remedy)
            results.append((earlier["config"]["model_args"], earlier))
    if not results:
        raise UserError(
            "expected --against_results with the directory of an earlier evaluation with --tasks, got "
            f"{folder}, which has no {files[0]}"
        )
    for arguments, earlier in results:
        if arguments["fingerprint"] == fingerprint:
            return dict(earlier)
    raise UserError(
        f"expected --against_results with results of the model that --against names, got {folder} with results of "
        f"{' and '.join(arguments['pretrained'] for arguments, _ in results)} (other weights, or another dtype): give another "
        "directory, or leave --against_results out"
    )


def check_known(earlier: Mapping[str, Any], tasks: TaskDict, limit: int | None, settings: Mapping[str, Any]) -> None:
    """Checks that earlier results have the same tasks and settings.

    Args:
      earlier: from :func:`read_known`.
      tasks: from ``tasks.load_tasks``.
      settings: from ``tasks.settings_of``.

    Raises:
      UserError: the tasks or their settings differ.
    """
    missing = sorted(
        {*tasks["tasks"], *(name for name, group in tasks["groups"].items() if group.has_aggregation)} - earlier["results"].keys()
    )
    if missing:
        raise UserError(
            f"expected --against_results with results of {', '.join(missing)}, got none of them: give the same --tasks as in "
            "that evaluation, or leave --against_results out"
        )
    compared = {
        "number of documents": (earlier["config"]["limit"], limit),
        "context": (earlier["max_length"], settings["max_length"]),
        "system instruction": (earlier["system_instruction"], settings["system_instruction"]),
        "--fewshot_as_multiturn": (earlier["fewshot_as_multiturn"], settings["fewshot_as_multiturn"]),
        "chat template": (earlier["chat_template"], settings["chat_template"]),
        "lm-eval": (earlier["lm_eval_version"], lm_eval.__version__),
    }
    for name, task in tasks["tasks"].items():
        compared[f"number of documents of task {name}"] = earlier["n-samples"][name]["original"], len(task.eval_docs)
    for what, (then, now) in compared.items():
        if then != now:
            raise UserError(
                f"expected --against_results of the same tasks, got another {what}: {then!s:.60} in that evaluation, {now!s:.60} "
                "here: use the same value, or leave --against_results out"
            )
    for name, task in tasks["tasks"].items():
        now = json.loads(json.dumps(dict(task.dump_config()), default=handle_non_serializable))
        if _settings(earlier["configs"][name]) != _settings(now):
            raise UserError(
                f"expected --against_results of the same tasks, got other settings of task {name} (its file, --data, "
                "--fewshot or --gen_kwargs): use the settings of that evaluation, or leave --against_results out"
            )


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A task's settings without the path of its file, which may differ."""
    metadata = {name: value for name, value in (config.get("metadata") or {}).items() if name != "config_source"}
    return {**config, "metadata": metadata}
