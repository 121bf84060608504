"""Models that several files prune, saved and pruned once."""

import functools

import pytest


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Function of a model's name: the folder of its first variant."""
    from tests.launch.test_families import save_first

    root = tmp_path_factory.mktemp("families")
    return functools.cache(lambda name: save_first(name, root / name))


@pytest.fixture(scope="session")
def halved(saved, tmp_path_factory):
    """Function of a model's name: its first variant's export, pruned 2:4."""
    from tests.launch.test_families import BEST, BY_TORCH, HALF, pruned

    root = tmp_path_factory.mktemp("halved")
    return functools.cache(lambda name: pruned(saved(name), root / name, (1, 1), **(BEST if name in BY_TORCH else HALF)) / "hf")
