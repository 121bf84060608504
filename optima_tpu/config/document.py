"""Settings in the layout of the YAML files, with methods in long form."""

import dataclasses
from pathlib import Path
from typing import Any

from optima_tpu.config import yaml12
from optima_tpu.config.choices import CHOICES
from optima_tpu.config.names import ELSEWHERE, by_own_names
from optima_tpu.config.run_config import PARTS, SETTINGS
from optima_tpu.config.unknown import refuse_unknown
from optima_tpu.errors import UserError
from optima_tpu.runtime.inside import refuse_special


def load(text: str, origin: str) -> dict[str, Any]:
    """A configuration file's settings, with every method in its long form.

    Args:
      origin: the source of the text, for messages.

    Raises:
      UserError: the text is not YAML, or does not hold settings.
    """
    document = yaml12.load(text, origin)
    document = {} if document is None else document
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise UserError(f"{origin}: expected settings such as 'model: PATH', got {document!r:.60}")
    return long_form(document, origin)


def long_form(document: dict[str, Any], origin: str) -> dict[str, Any]:
    """Settings with every method in long form, ``{"name": ..., options}``."""
    for setting, value in document.items():
        if setting in CHOICES:
            document[setting] = method_settings(value)
        elif setting in PARTS:
            if not isinstance(value, dict):
                refuse_unknown([setting] if setting in ELSEWHERE else [], {*SETTINGS} - {setting}, "")
                example = yaml12.dump({field.name: field.default for field in dataclasses.fields(PARTS[setting])[:1]}).strip()
                raise UserError(f"{origin}: expected settings under {setting}, such as {example!r}, got {value!r}")
            document[setting] = by_own_names(setting, value, origin)
    return document


def load_file(path: str | Path, what: str = "a YAML file") -> dict[str, Any]:
    """As :func:`load`, from a file; ``what`` names it in messages.

    Raises:
      UserError: as :func:`load`, or the file cannot be read, or is a pipe that this process was not started with.
    """
    file_path = Path(path).expanduser()
    refuse_special(file_path)
    try:
        with file_path.open(encoding="utf-8") as file:
            text = file.read(yaml12.MOST_LETTERS + 1)  # a device has no end
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"expected {what}, cannot read {path}: {reason}") from None
    return load(text, str(path))


def method_settings(value: Any) -> dict[str, Any]:
    """A method in its long form: ``cg`` as ``{"name": "cg"}``."""
    method = dict(value) if isinstance(value, dict) else {"name": value}
    return method | {"name": "null"} if method.get("name", "") is None else method
