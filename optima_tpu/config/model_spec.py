"""What a text names as a model. Imports nothing that takes long, so that a wrong path is refused at once."""

import re
from pathlib import Path

from optima_tpu.errors import UserError
from optima_tpu.runtime.buckets import as_path, in_bucket


def is_hub_id(spec: str) -> bool:
    """Whether a text has the form org/name or org/name@revision, and is not a path to a file."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?", spec)) and not spec.endswith(
        (".gguf", ".safetensors", ".bin")
    )


def refuse_missing(spec: str) -> None:
    """Raises UserError for a model that is not on the disk, and that no hub and no package can have."""
    if not (spec.startswith("wheel:") or is_hub_id(spec) or (spec and Path(spec).expanduser().exists())):
        raise UserError(f"no such path: {spec!r}; expected a folder, a .gguf file, a hub id org/name or wheel:NAME")


def refuse_missing_runs(*specs: str | None) -> None:
    """As :func:`refuse_missing`, for models that may also be runs in a bucket. None is skipped."""
    for spec in filter(None, specs):
        if not in_bucket(as_path(spec)):
            refuse_missing(spec)
