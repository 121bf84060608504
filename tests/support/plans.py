"""What a plan is made from: a config.json, and the configuration of a run."""

import json

from optima_tpu.config.run_config import Calibration, RunConfig
from optima_tpu.method.layer_rules import parse_layers
from tests.support.tiny_models import tiny_llama

LAST = "self_attn.*=dense,mlp.gate_proj=dense,mlp.up_proj=dense"


def config_folder(path, **settings):
    """A folder that holds config.json and nothing else."""
    config, _ = tiny_llama(**settings)
    (path / "config.json").write_text(json.dumps(config.to_diff_dict() | {"dtype": "bfloat16"}))
    return str(path)


def run_config(folder, **settings):
    text = Calibration("random", windows=16, length=32, held_out=4)
    return RunConfig(folder).changed(**dict(batch=2, calibration=text, layers=parse_layers(LAST, "row")) | settings)
