"""A sweep's file, for the tests of what it may say, and programs of trainings that are traced once for a file of tests."""

import functools

import pytest

from optima_tpu.pipeline.distill.blocks import Trainer
from tests.support.sweeps import write_sweep


@pytest.fixture
def file(tmp_path):
    """Writes the file of a small sweep with the changes that it is given. Returns the path."""
    return functools.partial(write_sweep, tmp_path / "small.yaml")


@pytest.fixture(autouse=True, scope="module")
def traced_once():
    """Trainers of like blocks on one mesh share their programs. Tracing them again for each took half of a test's time."""
    programs = {}

    def shared(name):
        made = vars(Trainer)[name].func

        def program(trainer):
            decoder, factors = trainer.decoder, tuple(trainer.factors.items())
            dtypes = tuple(trainer.dtype(each) for each in decoder.block_shapes)
            like = name, decoder.graph, decoder.config, decoder.mesh, factors, dtypes
            if like not in programs:
                programs[like] = made(trainer)
            return programs[like]

        return property(program)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("forward", "_kept", "_repeated", "backward", "update"):
            patch.setattr(Trainer, name, shared(name))
        yield
