"""What a text names as a model. Imports no family and no transformers."""

import re
from pathlib import Path

from optima_tpu.errors import UserError, did_you_mean
from optima_tpu.runtime.buckets import as_path, in_bucket
from optima_tpu.runtime.processes import may_join


def is_hub_id(spec: str) -> bool:
    """Whether a text is a hub id, org/name or org/name@revision.

    A path in ``runs/`` or to a model's file is none.
    """
    return bool(re.fullmatch(r"(?!runs/)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?", spec)) and not spec.endswith(
        (".gguf", ".safetensors", ".bin")
    )


def opening(spec: str) -> str:
    """The line before a model is opened, true even if the model is missing."""
    path = Path(spec).expanduser()
    if is_hub_id(spec) and not path.exists():
        return f"opening      {spec}: looked up on the Hugging Face hub, then its files are compared with their checksums"
    return f"opening      {spec}" + ": its files are compared with their checksums" * path.is_dir()


def refuse_missing(spec: str) -> None:
    """Raises UserError if no disk, hub or package can have the model."""
    path = Path(spec).expanduser()
    if not (spec.startswith("wheel:") or is_hub_id(spec) or (spec and path.exists())):
        near = did_you_mean(path.name, [each.name for each in path.parent.glob("*")], str(path.parent / "_")[:-1])
        raise UserError(f"no such path: {spec!r}; expected a folder, a .gguf file, a hub id org/name or wheel:NAME{near}")


def refuse_early(coordinator: str | None, *specs: str | None) -> None:
    """As :func:`refuse_missing`, unless other processes may wait for this one.

    Call it before the slow imports.

    Args:
      coordinator: as given on the command line.
      specs: models, or runs, which may be in a bucket and are then looked for later. None is skipped.
    """
    if not may_join(coordinator):
        for spec in filter(None, specs):
            if not in_bucket(as_path(spec)):
                refuse_missing(spec)
