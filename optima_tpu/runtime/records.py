"""Reads JSON files into declared types, and encodes records.

A file of another shape is refused in one line that names the file and the field.

A file that this program writes is a :class:`Record`; of a file from elsewhere a TypedDict declares what is read. ``msgspec``
compares the values with the type, so a range stands beside it: ``Annotated[int, msgspec.Meta(ge=1)]``.
"""

import json
import math
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from optima_tpu.errors import UserError, one_line, reading
from optima_tpu.runtime.buckets import BucketError
from optima_tpu.runtime.inside import refuse_special

T = TypeVar("T")

MOST_BYTES = 1 << 30
"""Bytes of a JSON file, at most. The report of a model with 100,000 experts has a tenth of them."""

Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Size = Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
"""One axis of an array."""
Block = Annotated[int, msgspec.Meta(ge=0, lt=1 << 11)]
"""The index of a block of a model."""
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]

DAMAGED = "the file is damaged, or another version of OPTIMA-TPU wrote it"


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of this program, or a part of it, that has no other field."""


class Undeclared(msgspec.Struct, frozen=True):
    """The declared entries of a dictionary, which may have others."""


_AT = re.compile(r" - at `(?:key in )?\$\.?(.*)`$")


def read_record(path: Path, kind: type[T], remedy: str = DAMAGED) -> T:
    """Reads a JSON file into a type. A TypedDict keeps undeclared keys.

    Args:
      remedy: the end of the message.

    Raises:
      UserError: the file is missing, is a pipe or a device, is no JSON, or its values are not of the type.
    """
    refuse_special(path)
    with reading(path):
        data = None if path.stat().st_size > MOST_BYTES else path.read_bytes()
    if data is None:
        raise UserError(f"{path}: expected JSON of at most {MOST_BYTES} bytes, got more; {remedy}")
    return parse_record(data, kind, path, remedy)


def known_record(path: Path, kind: type[T]) -> T | None:
    """As :func:`read_record`, but None for a missing or damaged file."""
    try:
        return read_record(path, kind)
    except BucketError:
        raise
    except UserError:
        return None


def parse_record(data: bytes | str, kind: type[T], where: object, remedy: str = DAMAGED) -> T:
    """As :func:`read_record`, from bytes. ``where`` names the file."""
    try:
        values = json.loads(data)
    except RecursionError:
        raise UserError(f"{where}: expected JSON, got brackets that are nested too deeply; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{where}: expected JSON, got something else ({one_line(error):.100}); {remedy}") from None
    return check_record(values, kind, where, remedy)


def encoded(values: Any, indent: int | None = None) -> bytes:
    """A record as JSON with a line break. Infinity and NaN become null.

    Every record of a run, of an evaluation and of a sweep is written by this function: ``json.dumps`` would end in a traceback,
    or write NaN and Infinity, which JavaScript and jq do not read.
    """
    return f"{json.dumps(json_values(values), indent=indent, allow_nan=False)}\n".encode()


def json_values(value: Any) -> Any:
    """A record in JSON types: tuples as lists, infinity and NaN as None."""
    match value:
        case Record():
            return {name: json_values(getattr(value, name)) for name in value.__struct_fields__}
        case dict():
            return {key: json_values(each) for key, each in value.items()}
        case list() | tuple():
            return [json_values(each) for each in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value


def check_record(values: Any, kind: type[T], where: object, remedy: str = DAMAGED, inside: str = "") -> T:
    """As :func:`parse_record`, from JSON values of the field ``inside``."""
    try:
        read: T = msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{where}: {_field_first(str(error), inside)}; {remedy}") from None
    except RecursionError:
        raise UserError(f"{where}: expected JSON, got brackets that are nested too deeply; {remedy}") from None
    return values if typing.is_typeddict(kind) else read


def within(field: str, values: Mapping[str, Any], kind: type[T]) -> T:
    """Reads the entries of a record's dictionary that a type declares.

    Args:
      field: of the record, for the message.

    Raises:
      ValueError: an entry has another type, of which ``msgspec`` makes the error of the record.
    """
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise ValueError(_field_first(str(error), field)) from None


def _field_first(problem: str, inside: str) -> str:
    """Turns "Expected `int` - at `$.a[3].b`" into "a[3].b: expected int"."""
    match = _AT.search(problem)
    field = ".".join(filter(None, (inside, match and match[1]))).replace(".[", "[")
    problem = (problem[: match.start()] if match else problem).replace("`", "")
    if missing := re.fullmatch(r"Object missing required field (.*)", problem):
        return f"expected a value for {'.'.join(filter(None, (field, missing[1])))}, got none"
    if stray := re.fullmatch(r"Object contains unknown field (.*)", problem):
        return f"expected no field {'.'.join(filter(None, (field, stray[1])))}"
    problem = problem[0].lower() + problem[1:]
    return f"{field}: {problem}" if field else problem
