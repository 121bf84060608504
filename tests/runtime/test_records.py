"""Records of JSON: what has another shape is refused in one line that names the file and the field."""

from pathlib import Path
from typing import TypedDict

import pytest

from optima_tpu.errors import UserError
from optima_tpu.runtime.records import Count, check_record, read_record


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
    with pytest.raises(UserError) as raised:
        check_record(values, Record, "a.json", inside=inside)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("path", ["/dev/zero", "/nowhere/a.json", "/dev"])
def test_what_is_no_file_is_not_read(path):
    with pytest.raises(UserError, match=path):
        read_record(Path(path), Record)
