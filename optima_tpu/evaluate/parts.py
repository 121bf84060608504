"""Measured parts of an evaluation, on disk until the evaluation ends.

An evaluation that was stopped goes on after its measured parts.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lm_eval.tasks.manager import TaskDict
from lm_eval.utils import handle_non_serializable

from optima_tpu.runtime.checksums import forget, intact, keep
from optima_tpu.runtime.processes import first_only, from_first
from optima_tpu.runtime.records import Record, check_record, json_values, known_record

PARTS = "evaluation-parts.json"
T = TypeVar("T")


class _Kept(Record, frozen=True):
    """The contents of evaluation-parts.json."""

    of: dict[str, Any]
    parts: dict[str, dict[str, Any]]


class Parts:
    """The measured parts of one evaluation: a text, or the tasks on one model.

    Args:
      of: all that decides what is measured. Parts of another evaluation are not taken.
      note: called with a line for each part that need not be measured again.
    """

    def __init__(self, folder: Path, of: Mapping[str, Any], note: Callable[[str], None]):
        self._folder, self._of, self._note = folder, _as_json(of), note
        self._parts = from_first(self._read)

    def _read(self) -> dict[str, dict[str, Any]]:
        record = known_record(self._folder / PARTS, _Kept) if intact(self._folder, PARTS) else None
        return record.parts if record and record.of == self._of else {}

    def measured(self, name: str, kind: type[T], work: Callable[[], T], version: str = "") -> T:
        """Returns the saved result of a part, or measures and saves it.

        Every process calls it.

        Args:
          name: of the part, for the user.
          version: tells parts of one name apart that measure different things.
        """
        key = f"{name} {version}"
        if key in self._parts:
            self._note(f"{name}: measured before this evaluation was stopped")
        else:
            self._parts[key] = _as_json(work())
            first_only(self._write)
        return check_record(self._parts[key], kind, PARTS, inside=name)

    def _write(self) -> None:
        keep(self._folder, {PARTS: _dumped({"of": self._of, "parts": self._parts})})

    def remove(self) -> None:
        """Removes the parts from the disk; process 0 calls it at the end."""
        (self._folder / PARTS).unlink(missing_ok=True)
        forget(self._folder, [PARTS])


def questions_digest(tasks: TaskDict) -> str:
    """Hashes all that tasks ask, the documents they use, and the scoring."""
    digest = hashlib.sha256()
    for name, task in sorted(tasks["tasks"].items()):
        digest.update(_dumped([name, dict(task.dump_config())]))
        for request in task.instances:
            digest.update(_dumped([request.request_type, request.args, request.doc]))
    return digest.hexdigest()


def _as_json(values: Any) -> Any:
    """Values as JSON gives them back."""
    return json.loads(_dumped(values))


def _dumped(values: Any) -> bytes:
    return json.dumps(json_values(values), default=handle_non_serializable).encode()
