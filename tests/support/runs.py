"""What is needed to start a run, and to compare what two runs left."""

from pathlib import Path

import numpy as np
import safetensors.numpy

from optima_tpu.config.run_config import RunConfig
from optima_tpu.models.checkpoints import check_names, open_model
from optima_tpu.models.checkpoints.export import read_masks
from optima_tpu.models.checkpoints.orbax import CheckpointTensors
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.model import Model
from optima_tpu.pipeline.journal import Journal
from tests.support.meshes import mesh

SMALL = [
    "--calibration.source",
    "random",
    "--calibration.windows",
    "8",
    "--calibration.length",
    "32",
    "--evaluation.source",
    "random",
    "--evaluation.windows",
    "8",
]
"""The settings of a run over a :func:`tiny_folder` that takes a second or two.

Both texts have as many windows of one length, so that both take the same programs.
"""


def opened(config: RunConfig, shape: tuple[int, int]) -> Model:
    """As ``open_model_on_mesh``, on a mesh of fewer devices than there are."""
    pretrained = open_model(config.model, config.dtype)
    decoder = Decoder.open(pretrained.config, pretrained.tensors, mesh(*shape), config.batch, config.family == "general")
    check_names(decoder.tensor_names(), pretrained.tensors, decoder.family.ignored)
    return Model(pretrained, decoder)


def stop_after_the_first_block(monkeypatch) -> None:
    """Raises KeyboardInterrupt once a run has saved its first block."""
    save = Journal.save

    def stopped(journal, index, *rest):
        save(journal, index, *rest)
        if index == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "save", stopped)


def only_error(said: str) -> str:
    """Asserts that a refused command printed one line, an error."""
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


def folder_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor in the safetensors files of a folder."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(path)
    return tensors


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Maps a directory and its files to (size, mtime_ns); empty without it."""
    paths = [directory, *directory.rglob("*")] if directory.exists() else []
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def assert_same_weights(directory: Path, expected: Path) -> None:
    """Asserts that exported files and checkpoint hold the same bits."""
    names = sorted(path.name for path in (expected / "hf").iterdir() if path.suffix in (".safetensors", ".npz"))
    assert "pruning_masks.npz" in names and len(names) == 2
    for name in names:
        assert (directory / "hf" / name).read_bytes() == (expected / "hf" / name).read_bytes(), name
    ours, theirs = CheckpointTensors(directory), CheckpointTensors(expected)
    assert ours.names() == theirs.names() and ours.pruned() == theirs.pruned()
    for name in ours.names():
        assert ours.read(name).tobytes() == theirs.read(name).tobytes(), name


def assert_close_weights(directory: Path, expected: Path) -> None:
    """Asserts equal masks, and weights equal up to the order of summation."""
    masks, expected_masks = (read_masks(path / "hf") for path in (directory, expected))
    weights, expected_weights = (folder_tensors(path / "hf") for path in (directory, expected))
    assert masks.keys() == expected_masks.keys() and weights.keys() == expected_weights.keys()
    for name, weight in expected_weights.items():
        assert np.abs(weights[name] - weight).max() < 1e-3 * np.abs(weight).max(), name
        assert name not in masks or (masks[name] == expected_masks[name]).all(), name
