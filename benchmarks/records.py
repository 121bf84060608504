"""Writes what a benchmark measured into a record of docs/results/records, whose other rows and notes stay."""

import collections
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OTHERS = "the others"
"""What a record calls the rows of most of its commits' rows."""


def commit() -> str | None:
    """The commit of this checkout; None if it is none."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


def recorded(path: Path | None) -> dict[str, list[Any]]:
    """The rows of a record by their first cells; none where there is no record yet."""
    record = json.loads(path.read_text()) if path and path.is_file() else {"rows": []}
    return {row[0]: row for row in record["rows"]}


def write_rows(path: Path, facts: Mapping[str, Any], rows: Sequence[Sequence[Any]]) -> None:
    """Puts rows into a record, each in the place of the one with the same first cell, with the commit of this checkout.

    The other rows stay with their commits, and so do the notes and the hardware, which people write.

    Args:
      facts: the record's other fields.
    """
    before = json.loads(path.read_text()) if path.is_file() else {}
    table = recorded(path) | {row[0]: list(row) for row in rows}
    commits = _by_row(before.get("commit"), recorded(path)) | dict.fromkeys((row[0] for row in rows), commit())
    kept = {name: before[name] for name in ("notes", "hardware") if name in before}
    written = before | facts | kept | {"commit": _told(commits), "rows": list(table.values())}
    path.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")


def _by_row(told: Any, names: Mapping[str, Any]) -> dict[str, str | None]:
    if not isinstance(told, dict):
        return dict.fromkeys(names, told)
    named = {name: each for group, each in told.items() if group != OTHERS for name in group.split(", ")}
    return {name: named.get(name, told.get(OTHERS)) for name in names}


def _told(commits: Mapping[str, str | None]) -> str | dict[str, str | None] | None:
    """A record's ``commit``."""
    (most, _), *others = collections.Counter(commits.values()).most_common()
    groups = {each: ", ".join(name for name in commits if commits[name] == each) for each, _ in others}
    return {**{name: each for each, name in groups.items()}, OTHERS: most} if others else most
