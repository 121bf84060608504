"""A model is read block by block: memory does not grow with its depth."""

import io
import math
import weakref

import numpy as np
from rich.console import Console

from optima_tpu.config.run_config import Calibration, Evaluation, RunConfig
from optima_tpu.method.selectors import Magnitude
from optima_tpu.models.checkpoints import open_model
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.model import Model
from optima_tpu.pipeline.run import run
from tests.support.meshes import mesh
from tests.support.tiny_models import tiny_folder


class Watched:
    """A TensorSource that counts the bytes of its arrays still in memory."""

    def __init__(self, source):
        self.source, self.given, self.peak = source, [], 0

    def __getattr__(self, name):
        return getattr(self.source, name)

    def read(self, name, index=(...,)):
        array = np.array(self.source.read(name, index))
        # A view: whoever keeps the data keeps it, and numpy's own arrays can be referred to weakly.
        self.given = [(reference, size) for reference, size in self.given if reference() is not None] + [
            (weakref.ref(array), array.nbytes)
        ]
        self.peak = max(self.peak, sum(size for _, size in self.given))
        return array.view()


def test_a_run_never_holds_more_of_the_checkpoint_than_two_blocks_and_the_embedding(tmp_path):
    model = tiny_folder(tmp_path / "model", num_hidden_layers=12, vocab_size=258)
    config = RunConfig(
        model=str(model),
        output=str(tmp_path / "run"),
        export=False,
        calibration=Calibration("random", windows=4, length=16, held_out=2),
        evaluation=Evaluation("random", windows=2),
    ).changed(selector=Magnitude(), solver=None)
    pretrained = open_model(config.model)
    watched = Watched(pretrained.tensors)
    decoder = Decoder.open(pretrained.config, watched, mesh(2, 2))
    run(config, Console(file=io.StringIO()), Model(pretrained, decoder))
    block = 4 * sum(map(math.prod, decoder.block_shapes.values()))
    embedding = 4 * math.prod(decoder.end_shapes["model.embed_tokens.weight"])
    assert watched.peak >= embedding
    assert watched.peak <= 2 * block + embedding
    assert 12 * block > 3 * (2 * block + embedding), "the model must be much larger than the bound"
