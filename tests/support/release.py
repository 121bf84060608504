"""Writes a tiny run, its export and a packed folder for later versions.

    python -m tests.support.release FOLDER

Later versions must open them. FOLDER/VERSION gets the dense model, a random Llama of one block, the run directory with its
export in ``hf/``, without report.html, and the packed folder. ``tests/launch/test_released.py`` opens every version that
``tests/released`` has.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import safetensors.numpy
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.support.tiny_models import tiny_llama

PRUNE = [
    *("prune", "model", "--output", "run", "--preset", "fast", "--layers", "self_attn.*=dense", "--token_cache", "false"),
    *(
        "--calibration.source",
        "random",
        "--calibration.windows",
        "4",
        "--calibration.length",
        "16",
        "--calibration.held_out",
        "2",
    ),
    *("--evaluation.source", "random", "--evaluation.windows", "2"),
]


def make(folder: Path) -> None:
    """Writes the model, the run and the packed folder into an empty folder."""
    config, source = tiny_llama(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(config.to_diff_dict() | {"dtype": "bfloat16"}, indent=1))
    arrays = {name: array.astype(ml_dtypes.bfloat16) for name, array in source.arrays.items()}
    safetensors.numpy.save_file(arrays, folder / "model" / "model.safetensors")
    words = Tokenizer(models.WordLevel({f"word{index}": index for index in range(config.vocab_size)}, unk_token="word0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "model")
    for command in (PRUNE, ["export", "run", "packed", "--packed"]):
        subprocess.run([sys.executable, "-m", "optima_tpu.cli", *command], cwd=folder, check=True)
    (folder / "run" / "report.html").unlink()  # ``optima report`` writes it again


def main() -> None:
    target = Path(sys.argv[1]) / importlib.metadata.version("optima-tpu")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        map(os.path.abspath, filter(None, sys.path))
    )  # the run has another working directory
    with tempfile.TemporaryDirectory(prefix="release-") as folder:
        make(Path(folder))
        shutil.copytree(folder, target)


if __name__ == "__main__":
    main()
