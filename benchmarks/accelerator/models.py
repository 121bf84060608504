"""Models with drawn weights, on the mesh of all devices."""

import dataclasses
import tempfile

from transformers import LlamaConfig

from benchmarks.accelerator.parts import SHAPES
from benchmarks.plan_memory import RandomTensors
from optima_tpu.config.parse import parse
from optima_tpu.config.run_config import RunConfig
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline.plan.model import DeclaredModel, open_declared
from optima_tpu.runtime.mesh import make_mesh


def declared(shape: str, dtype: str, *settings: str) -> tuple[RunConfig, DeclaredModel]:
    """A run of a shape on all devices, and its model without weights."""
    with tempfile.TemporaryDirectory() as folder:
        tied = shape != "Llama-3.1-8B"
        config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=tied, max_position_embeddings=4096)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        run = parse(["--model", folder, "--dtype", dtype, "--calibration.source", "random", *settings])
        return run, open_declared(folder, dtype, run.batch).on(make_mesh(None))


def with_weights(model: DeclaredModel) -> Decoder:
    """The decoder with weights that are drawn as they are read."""
    return dataclasses.replace(model.decoder, tensors=RandomTensors(model.decoder.tensors))
