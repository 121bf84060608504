"""Reads settings of which a model here supports only some values."""

import json
from collections.abc import Sequence
from typing import Any

from optima_tpu.errors import UserError


def supported(config: Any, name: str, *values: Any) -> Any:
    """The value of a setting, which is None where the configuration has none.

    Args:
      values: those that the model computes.

    Raises:
      UserError: it is another one.
    """
    value = getattr(config, name, None)
    if value not in values:
        options = " or ".join(map(_as_in_file, values))
        raise UserError(f"expected {name} {options} in a {config.model_type} model, got {_as_in_file(value)}: not supported")
    return value


def of_every_block(config: Any, name: str) -> Sequence[Any]:
    """A setting with one value for each block; raises UserError otherwise."""
    values: Sequence[Any] = getattr(config, name)
    if len(values) != config.num_hidden_layers:
        raise UserError(f"expected {config.num_hidden_layers} {name} in config.json, got {len(values)}: check the file")
    return values


def _as_in_file(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
