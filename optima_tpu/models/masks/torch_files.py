"""Masks in files that torch.save wrote.

Only torch can read the format, so torch is imported when such a file is opened.
"""

import pickle
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from optima_tpu.errors import UserError, refusing
from optima_tpu.models.masks.source import UNDERSTOOD, MaskSource, weight_names
from optima_tpu.runtime.inside import own


def open_torch_folder(folder: Path, origin: str) -> MaskSource:
    """Opens a folder in ProxSparse's layout; 1 means kept.

    "<parameter>.pt" holds [d_out, d_in] of 0 and 1 in the dtype of the weight (amazon-science/ProxSparse,
    end-to-end/mask_op.py).

    Raises:
      UserError: torch is not installed.
    """
    _torch(folder)

    def load(key: str, shape: tuple[int, int]) -> np.ndarray:
        path = own(folder, folder / (key + ".pt"))
        return _matrix(_load(path), key, path)

    keys = weight_names((path.stem for path in sorted(folder.glob("*.pt"))), origin)
    return MaskSource(origin, "ProxSparse .pt files", keys, load)


def open_torch_file(path: Path, origin: str) -> MaskSource:
    """Opens {"<parameter>": [d_out, d_in] of 0 and 1}; 1 means kept.

    The file is mapped into memory and not read. MaskLLM's masks have this form before they are packed, and ProxSparse's after
    they are merged for the code of OPTIMA's paper.

    Raises:
      UserError: torch is not installed, the file is damaged, or it holds something else.
    """
    tensors = _load(path)
    if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
        raise UserError(
            f"expected a dictionary of masks by the names of their weights in {path}, got "
            f"{type(tensors).__name__}; known are {UNDERSTOOD}"
        )
    return MaskSource(
        origin, "PyTorch dictionary of masks", weight_names(tensors, origin), lambda key, shape: _matrix(tensors[key], key, path)
    )


def _torch(path: Path) -> ModuleType:
    instead = "pip install torch, or save the masks elsewhere with safetensors.torch.save_file and give that file"
    with refusing(ImportError, f"only PyTorch can read {path}: {instead}"):
        import torch
    return torch


def _load(path: Path) -> Any:
    torch = _torch(path)
    try:
        packed = zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        packed = False
    if not packed:
        raise UserError(
            f"expected a file that torch.save wrote, but {path} is damaged or older than PyTorch 1.6: "
            "get it again, or load and save it once more"
        )
    foreign = (
        f"{path} is damaged or holds other objects than tensors, which are not loaded since they could run code: save the masks "
        "alone"
    )
    # A damaged pickle raises anything. Masks are often saved from a GPU.
    with refusing(Exception, f"{path} can't be read", "get or save it again"), refusing(pickle.UnpicklingError, foreign):
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)


def _matrix(tensor: Any, name: str, path: Path) -> np.ndarray:
    torch = _torch(path)
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise UserError(f"{name}: expected a dense matrix of 0 and 1 in {path}, got {_kind(tensor)}")
    tensor = tensor.detach()
    # numpy has no bfloat16. The cast keeps 0 and 1, and does not turn other values into 0 or 1.
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _kind(value: Any) -> str:
    """The type of a value; for a tensor, what is strange about it."""
    layout = str(getattr(value, "layout", "")).removeprefix("torch.").removeprefix("strided")
    strange = [layout, "quantised" * getattr(value, "is_quantized", False), "empty (meta)" * getattr(value, "is_meta", False)]
    return " ".join([*filter(None, strange), type(value).__name__])
