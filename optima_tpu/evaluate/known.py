"""Task results of an earlier evaluation of a model, in the place of the same tasks run on it again."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import lm_eval
from lm_eval.tasks.manager import TaskDict
from lm_eval.utils import handle_non_serializable

from optima_tpu.errors import UserError, one_line
from optima_tpu.runtime.buckets import as_path


def read_known(folder: str, files: Sequence[str], fingerprint: str) -> dict[str, Any]:
    """What the harness said of a model in an earlier evaluation, of it or of another one beside it.

    Args:
      folder: the ``--output`` of that evaluation.
      files: where in it the harness's results may be.
      fingerprint: of the model, see ``Pretrained``.

    Raises:
      UserError: there are none, or of other models only.
    """
    found = []
    for path in (as_path(folder) / file for file in files):
        try:
            if path.exists():
                known = json.loads(path.read_bytes())
                found.append((known["config"]["model_args"], known))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"expected what an evaluation wrote in {path}, which can't be read ({type(error).__name__}: "
                f"{one_line(error)}): leave --against-results out"
            ) from error
    if not found:
        raise UserError(
            "expected --against-results with the directory of an earlier evaluation with --tasks, got "
            f"{folder}, which has no {files[0]}"
        )
    for arguments, known in found:
        if arguments.get("fingerprint") == fingerprint:
            return known
    raise UserError(
        f"expected --against-results with results of the model that --against names, got {folder} with those of "
        f"{' and '.join(arguments['pretrained'] for arguments, _ in found)}, of other weights or another dtype, or "
        "older than fingerprints in these files: give another, or leave it out"
    )


def check_known(known: Mapping[str, Any], tasks: TaskDict, limit: int | None, max_length: int) -> None:
    """Compares what the tasks were with what they are now.

    Args:
      known: from :func:`read_known`.
      tasks: from ``tasks.load_tasks``.
      limit: documents of each task.
      max_length: tokens that the model reads at once.

    Raises:
      UserError: the numbers would not be those of these tasks.
    """
    missing = sorted(
        {*tasks["tasks"], *(name for name, group in tasks["groups"].items() if group.has_aggregation)} - known["results"].keys()
    )
    if missing:
        raise UserError(
            f"expected --against-results with results of {', '.join(missing)}, which are not there: give the same "
            "--tasks as there, or leave it out"
        )
    compared = {
        "number of documents": (known["config"]["limit"], limit),
        "context": (known["max_length"], max_length),
        "lm-eval": (known["lm_eval_version"], lm_eval.__version__),
    }
    for name, task in tasks["tasks"].items():
        compared[f"number of documents of task {name}"] = known["n-samples"][name]["original"], len(task.eval_docs)
    for what, (then, now) in compared.items():
        if then != now:
            raise UserError(
                f"expected --against-results of the same tasks as here, got another {what}, {then} there, {now} "
                "here: give the same as there, or leave it out"
            )
    for name, task in tasks["tasks"].items():
        now = json.loads(json.dumps(dict(task.dump_config()), default=handle_non_serializable))
        if _settings(known["configs"][name]) != _settings(now):
            raise UserError(
                f"expected --against-results of the same tasks as here, got other settings of task {name} (its file, "
                "--data or --fewshot): give the same as there, or leave it out"
            )


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A task's settings without the place of its file, which moves with the installation."""
    metadata = {name: value for name, value in (config.get("metadata") or {}).items() if name != "config_source"}
    return {**config, "metadata": metadata}
