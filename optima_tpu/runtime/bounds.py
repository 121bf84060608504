"""Bounds of settings. A value out of bounds is refused in one line.

A bound stands beside the type::

    rounds: Annotated[int, Bound(1)] = 4
    share: Annotated[float, Bound(above=0, most=0.5)] = 0.025
    output: Annotated[str | None, Filled("a directory")] = None

in a dataclass that is :class:`Bounded`. A number without a bound is below :data:`MOST`, by :func:`refuse_beyond`.
"""

import dataclasses
import functools
import math
import re
import typing
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

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
    """Reads a whole number of up to 18 digits from 0 to 9.

    Raises ValueError for any other text. ``int`` reads more, such as the digits of other scripts, 1_0, and numbers for which no
    machine has memory.
    """
    if not _WHOLE.fullmatch(text.strip()):
        raise ValueError(f"expected a whole number, written with digits alone, got {text:.40}")
    return int(text)


def byte_count(name: str, text: int | str) -> int:
    """Reads a number of bytes, such as 5GB, 200 MB, 1.5TB or 1000.

    Raises UserError for other texts, less than 1 byte, and more than an exabyte.
    """
    match = _SIZE.fullmatch(str(text).strip().upper())
    count = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not 1 <= count <= _MOST_BYTES:
        raise UserError(f"expected {name} such as 5GB, from 1 byte to 1000000TB, got {text!r}")
    return count


@dataclasses.dataclass(frozen=True)
class Bound:
    """What a number may be. NaN and infinity are beyond every bound.

    Attributes:
      least: the least number, which is allowed.
      most: the largest number, which is allowed.
      above: what a number must be larger than.
      below: what a number must be smaller than.
      hint: what to type, or what is usual, behind the message.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    hint: str = ""

    def refuse(self, name: str, value: float) -> None:
        """Raises UserError if setting ``name`` has a number out of bounds."""
        holds = (
            -math.inf < value < math.inf
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and value <= (MOST if self.most is None else self.most)
        )
        if not holds:
            raise UserError(f"expected {name} {self._words(value)}, got {value}{self.hint and f'; {self.hint}'}")

    def _words(self, value: float) -> str:
        most = MOST if self.most is None and MOST < value < math.inf else self.most
        if self.least is not None and most is not None:
            return f"from {self.least} to {most}"
        ends = (("of at least", self.least), ("above", self.above), ("of at most", most), ("below", self.below))
        words = " and ".join(f"{word} {end}" for word, end in ends if end is not None).replace(" and of at most", " and at most")
        return words if -math.inf < value < math.inf else f"to be a finite number {words}"


@dataclasses.dataclass(frozen=True)
class Filled:
    """A text that has more than blanks.

    Attributes:
      what: the text names it.
      hint: what to type, or what is usual, behind the message.
    """

    what: str
    hint: str = ""

    def refuse(self, name: str, value: str) -> None:
        """Raises UserError for an empty text, by the name of its setting."""
        if not value.strip():
            raise UserError(f"expected {name} to be {self.what}, got an empty text{self.hint and f'; {self.hint}'}")


Seed = Annotated[int, Bound(0, MOST_SEED)]
"""A setting that decides what is drawn at random."""


class Bounded:
    """A dataclass that refuses values out of the bounds of its fields.

    In a field of several numbers each has the bound.

    Attributes:
      setting: what stands before a field's name in a message, such as "solver" in solver.tolerance.
    """

    setting: ClassVar[str] = ""

    def __post_init__(self) -> None:
        kind: type = type(self)
        for name, bound in _bounds(kind).items():
            value = getattr(self, name)
            for each in value if isinstance(value, tuple) else (value,):
                if each is not None:
                    bound.refuse(f"{self.setting}.{name}" if self.setting else name, each)


@functools.cache
def _bounds(cls: type) -> Mapping[str, Any]:
    """The bound of every field that has one."""
    hints = typing.get_type_hints(cls, include_extras=True)
    metadata = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: each for name, own in metadata.items() for each in own if isinstance(each, Bound | Filled)}


def refuse_beyond(values: Mapping[str, Any]) -> None:
    """Raises UserError for a setting that is not finite or beyond any use."""
    for name, value in values.items():
        most = MOST_SEED if name.rpartition(".")[2] == "seed" else MOST
        for number in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"expected {name} to be a finite number, got {number}")
            if isinstance(number, (int, float)) and abs(number) > most:
                raise UserError(f"expected {name} of at most {most}, got {number}")
