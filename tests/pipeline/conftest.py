"""Fixtures: a small sweep's file, and training programs traced once a file."""

import functools

import pytest

from optima_tpu.pipeline.distill.blocks import Trainer
from tests.support.sweeps import write_sweep


@pytest.fixture
def file(tmp_path):
    """Function of changes: writes a small sweep's file, returns its path."""
    return functools.partial(write_sweep, tmp_path / "small.yaml")


@pytest.fixture(autouse=True, scope="module")
def traced_once():
    """Lets trainers of equal blocks on one mesh share their traced programs.

    Tracing the programs again for each trainer took half of a test's time.
    """
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
