"""Nested settings as flat ones with dotted names; the order of settings."""

import dataclasses
import inspect
import json
from collections.abc import Mapping
from typing import Any


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    joined: dict[str, Any] = {}
    for key, value in values.items():
        joined |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return joined


def options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings under the names that they have on the command line."""
    return {name.removesuffix(".name"): value for name, value in flat(values).items()}


def field_names(cls: type) -> list[str]:
    """The names of a dataclass's fields, inherited ones last."""
    names = [field.name for field in dataclasses.fields(cls)]
    return sorted(names, key=lambda name: name not in inspect.get_annotations(cls))


def typed(value: Any) -> str:
    """A setting as it is typed: null, true, 0.5/row."""
    return value if isinstance(value, str) else json.dumps(value)
