"""JSON records of another shape are refused by file and field, in one line."""

import json
import math
from pathlib import Path
from typing import TypedDict

import pytest

from optima_tpu.errors import UserError
from optima_tpu.runtime.records import Count, check_record, encoded, read_record
from tests.support.refusals import refusal


class Record(TypedDict):
    sizes: list[Count]
    inner: dict[str, Count]


@pytest.mark.parametrize(
    ("values", "inside", "message"),
    [
        ({"sizes": [1, -2], "inner": {}}, "", "a.json: sizes[1]: expected int >= 0; "),
        ({"sizes": [1, "2"], "inner": {}}, "text", "a.json: text.sizes[1]: expected int, got str; "),
        ({"inner": {}}, "text", "a.json: expected a value for text.sizes, got none; "),
        ([], "text", "a.json: text: expected object, got array; "),
        ([], "", "a.json: expected object, got array; "),
    ],
)
def test_the_file_and_the_field_are_named(values, inside, message):
    assert refusal(check_record, values, Record, "a.json", inside=inside).startswith(message)


@pytest.mark.parametrize("path", ["/dev/zero", "/nowhere/a.json", "/dev"])
def test_what_is_no_file_is_not_read(path):
    with pytest.raises(UserError, match=path):
        read_record(Path(path), Record)


def test_numbers_that_json_does_not_have_are_null_at_any_depth():
    values = {"a": [1.5, math.nan, (math.inf, {"b": -math.inf})], "c": "NaN", "d": None}
    data = encoded(values, indent=1)
    assert json.loads(data, parse_constant=lambda name: pytest.fail(name)) == {
        "a": [1.5, None, [None, {"b": None}]],
        "c": "NaN",
        "d": None,
    }
    assert encoded({"a": (1, 2)}) == b'{"a": [1, 2]}\n'
