"""Writes the rows of a benchmark into a record of docs/results/records."""

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
    process = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return process.stdout.strip() or None


def recorded(path: Path | None) -> dict[str, list[Any]]:
    """Returns a record's rows by their first cells; empty without a record."""
    record = json.loads(path.read_text()) if path and path.is_file() else {"rows": []}
    return {row[0]: row for row in record["rows"]}


def write_rows(path: Path, facts: Mapping[str, Any], rows: Sequence[Sequence[Any]]) -> None:
    """Writes rows into a record, with the commit of this checkout.

    A row replaces the row with the same first cell. The other rows keep their commits. Notes and hardware stay, because people
    write them.

    Args:
      facts: the record's other fields.
    """
    before = json.loads(path.read_text()) if path.is_file() else {}
    table = recorded(path) | {row[0]: list(row) for row in rows}
    commits = _by_row(before.get("commit"), recorded(path)) | dict.fromkeys((row[0] for row in rows), commit())
    kept = {name: before[name] for name in ("notes", "hardware") if name in before}
    written = before | facts | kept | {"commit": _grouped(commits), "rows": list(table.values())}
    path.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")


def _by_row(commits: Any, names: Mapping[str, Any]) -> dict[str, str | None]:
    if not isinstance(commits, dict):
        return dict.fromkeys(names, commits)
    named = {name: each for group, each in commits.items() if group != OTHERS for name in group.split(", ")}
    return {name: named.get(name, commits.get(OTHERS)) for name in names}


def _grouped(commits: Mapping[str, str | None]) -> str | dict[str, str | None] | None:
    """Groups rows by their commits, as a record's ``commit`` holds them."""
    (most, _), *others = collections.Counter(commits.values()).most_common()
    groups = {each: ", ".join(name for name in commits if commits[name] == each) for each, _ in others}
    return {**{name: each for each, name in groups.items()}, OTHERS: most} if others else most
