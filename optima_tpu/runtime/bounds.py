"""Bounds of the numbers that a person types. What is beyond them is refused in one line, before anything is made of it.

A number has its own bound where its field is, by :func:`at_least`. Whatever has none is below :data:`MOST`, by :func:`refuse_beyond`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from optima_tpu.errors import UserError

MOST = (1 << 31) - 1
"""The largest number of a setting: devices count in int32."""

MOST_SEED = (1 << 32) - 1
"""The largest seed."""

_MOST_BYTES = 10**18
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?) ?(|KB|MB|GB|TB)")
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")


def whole(text: str) -> int:
    """The whole number that a text is: up to 18 digits from 0 to 9. Raises ValueError for any other text.

    ``int`` reads more, such as the digits of other scripts, 1_0, and numbers for which no machine has memory.
    """
    if not _WHOLE.fullmatch(text.strip()):
        raise ValueError(f"expected a whole number, got {text:.40}")
    return int(text)


def byte_count(name: str, text: int | str) -> int:
    """A number of bytes from 5GB, 200 MB, 1.5TB or 1000, at least 1 and at most an exabyte. Raises UserError for anything else."""
    found = _SIZE.fullmatch(str(text).strip().upper())
    count = round(float(found[1]) * _UNITS[found[2]]) if found else 0
    if not 1 <= count <= _MOST_BYTES:
        raise UserError(f"expected {name} such as 5GB, from 1 byte to 1000000TB, got {text!r}")
    return count


def at_least(least: float, name: str, value: float | None, most: float = MOST) -> None:
    """Raises UserError for a number below its least value, above ``most``, or for NaN."""
    if value is not None and not value >= least:
        raise UserError(f"expected {name} of at least {least}, got {value}")
    if value is not None and value > most:
        raise UserError(f"expected {name} of at most {most}, got {value}")


def refuse_beyond(values: Mapping[str, Any]) -> None:
    """Raises UserError for the first setting, by its name, that is or holds a number that is not finite or beyond any use."""
    for name, value in values.items():
        most = MOST_SEED if name.rpartition(".")[2] == "seed" else MOST
        for number in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"expected {name} to be a finite number, got {number}")
            if isinstance(number, (int, float)) and abs(number) > most:
                raise UserError(f"expected {name} of at most {most}, got {number}")
