"""Records of runs, changed as if the program had written them so."""

import json
from pathlib import Path
from typing import Any

from optima_tpu.runtime.checksums import keep


def put(path: Path, text: str) -> None:
    """Writes a record with its checksum."""
    keep(path.parent, {path.name: text.encode()})


def put_json(path: Path, values: Any) -> None:
    """Writes a record of JSON values with its checksum."""
    put(path, json.dumps(values))
