"""A file of checksums answers for itself, too."""

import pytest

from optima_tpu.errors import UserError
from optima_tpu.runtime.checksums import ALL, changes, listed, write_sums


def test_every_bit_of_a_file_of_checksums_counts(tmp_path):
    (tmp_path / "a").write_bytes(b"model")
    write_sums(tmp_path)
    data, sums = (tmp_path / ALL).read_bytes(), listed(tmp_path)
    assert not changes(tmp_path)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / ALL).write_bytes(flipped)
        try:
            assert listed(tmp_path)["a"] == sums["a"], bit
        except UserError as error:
            assert ALL in str(error)
        assert changes(tmp_path) or listed(tmp_path) == sums, bit


def test_a_file_that_is_no_longer_listed_is_not_taken_as_it_is(tmp_path):
    (tmp_path / "a").write_bytes(b"model")
    write_sums(tmp_path)
    (tmp_path / ALL).write_text((tmp_path / ALL).read_text().replace('"a"', '"b"'))
    with pytest.raises(UserError, match=f"{ALL} has changed since it was written"):
        listed(tmp_path)
