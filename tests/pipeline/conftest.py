"""A sweep's file, for the tests of what it may say."""

import functools

import pytest

from tests.support.sweeps import write_sweep


@pytest.fixture
def file(tmp_path):
    """Writes the file of a small sweep with the changes that it is given. Returns the path."""
    return functools.partial(write_sweep, tmp_path / "small.yaml")
