"""Hugging Face folders: config.json beside plain or packed safetensors."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from optima_tpu.errors import UserError, reading, refusing
from optima_tpu.models import family_named
from optima_tpu.models.checkpoints import packed
from optima_tpu.models.checkpoints.quantized import without_quantization
from optima_tpu.models.checkpoints.source import (
    LazyTensor,
    Pretrained,
    Tensors,
    TensorSource,
    cast,
    fingerprint,
    parse_dtype,
    read_config,
)
from optima_tpu.models.checkpoints.stacks import stacks_of, unstacked
from optima_tpu.report.licence import CARD
from optima_tpu.runtime.checksums import ALL, changes, listed
from optima_tpu.runtime.inside import inside
from optima_tpu.runtime.program import program
from optima_tpu.runtime.records import read_record

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

CHAT_TEMPLATES = "additional_chat_templates"
"""The folder beside config.json in which transformers keeps the chat templates that have a name."""

_STORED = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class _Index(TypedDict):
    """The entries of an index that are read: the file of each tensor."""

    weight_map: dict[str, str]


_LARGEST = 1 << 28
"""Bytes of a tokenizer, a configuration or a licence, which are read into memory. The largest tokenizers have a tenth of them."""

_CONVERT = (
    "convert the weights once with transformers, AutoModelForCausalLM.from_pretrained(a).save_pretrained(b), which writes "
    "safetensors, and give that folder"
)


class SafetensorsSource(Tensors):
    """Memory-mapped safetensors tensors; a read touches only its slice.

    Raises:
      OSError: a file may not be read.
      UserError: a file is missing, truncated or damaged, two files hold the same tensor, or one has a dtype that
        numpy can't represent. The message names the file.
    """

    def __init__(self, shards: list[Path]):
        tensors: dict[str, LazyTensor] = {}
        holder: dict[str, str] = {}
        for path in shards:
            if not path.is_file():
                raise UserError(f"{path} is missing, though {INDEX} beside it names it: download the folder again")
            with path.open("rb"):  # otherwise a file without read permission would be called damaged
                pass
            with refusing((SafetensorError, OSError), f"{path} is truncated or damaged", "download it again"):
                file = safe_open(path, framework="numpy")
            for name in file.keys():
                if name in holder:
                    raise UserError(f"{path} and {holder[name]} both hold the tensor {name}: keep one model in a folder")
                stored, holder[name] = file.get_slice(name), path.name
                dtype = _dtype(stored.get_dtype(), name, path)
                tensors[name] = LazyTensor(tuple(stored.get_shape()), dtype, functools.partial(_read, stored, dtype))
        super().__init__(tensors)
        self._holder = holder

    def holder(self, name: str) -> str | None:
        """The name of the file that holds a tensor; None if none does."""
        return self._holder.get(name)


def _read(stored: Any, dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
    part: np.ndarray = stored[index]
    return part.astype(dtype, copy=False)


def _dtype(stored: str, name: str, path: Path) -> np.dtype:
    """The dtype of a safetensors name. Raises UserError if numpy has none."""
    if stored not in _STORED:
        raise UserError(f"{path} stores {name} as {stored}; expected one of {', '.join(_STORED)}")
    return np.dtype(_STORED[stored])


class PackedSource(Tensors):
    """Tensors of a packed folder, decoded on demand.

    The last tensor stays decoded, because a mesh requests a tensor slice by slice.

    Raises:
      UserError: the folder is damaged, or has a dtype that numpy can't represent. The message names the tensor or the file.
    """

    def __init__(self, folder: Path):
        with _user_error():
            self._packed = packed.Packed(folder)
        self._decoded: tuple[str, np.ndarray] | None = None
        super().__init__(
            {
                name: LazyTensor(tensor.shape, _dtype(tensor.dtype, name, folder), functools.partial(self._part, name))
                for name, tensor in self._packed.tensors.items()
            }
        )

    def files(self) -> list[Path]:
        """The packed files of weights."""
        return [self._packed.folder / name for name in self._packed.packed_files]

    def check_assets(self, assets: Mapping[str, bytes]) -> None:
        """Compares the folder's other files with their checksums."""
        with _user_error():
            for name, data in assets.items():
                self._packed.check_file(name, data)

    def _part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        if self._decoded is None or self._decoded[0] != name:
            with _user_error():
                self._decoded = name, self._packed.read(name).view(self.dtype(name)).reshape(self.shape(name))
        return self._decoded[1][index].copy()

    def kept(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """As :meth:`packed.Packed.kept`; None for a tensor without a mask."""
        if self._packed.tensors[name].encoding != packed.SPARSE:
            return None
        with _user_error():
            return self._packed.kept(name)


@contextlib.contextmanager
def _user_error() -> Iterator[None]:
    try:
        yield
    except packed.PackedError as error:
        raise UserError(str(error)) from error


def open_folder(folder: Path, origin: str, dtype: str | None = None) -> Pretrained:
    """Opens a folder and checks that all its weight files are complete.

    See :func:`optima_tpu.models.checkpoints.open_model`.
    """
    wanted = parse_dtype(dtype)
    _refuse_outside(folder)
    if not (folder / "config.json").is_file():
        raise UserError(_not_a_model(folder))
    assets = assets_in(folder)
    assets["config.json"], reader = without_quantization(assets["config.json"], str(folder))
    tensors: TensorSource
    if (folder / packed.INDEX).is_file():
        tensors = packed_tensors = PackedSource(folder)
        packed_tensors.check_assets(assets)
        files = packed_tensors.files()
    else:
        stored, files = _open_shards(folder)
        tensors = reader(stored)
    config, assets["config.json"] = read_config(assets["config.json"], str(folder), dtype)
    family = family_named(config.architectures)
    if wanted is not None:
        tensors = cast(tensors, wanted, family.exact if family else ())
    identity = fingerprint(assets["config.json"], tensors, files)
    stacks = stacks_of(config.architectures)
    source: TensorSource = unstacked(tensors, stacks) if stacks else tensors
    return Pretrained(config, source, assets, identity, origin, sum(path.stat().st_size for path in files))


def assets_in(folder: Path) -> dict[str, bytes]:
    """The files of a folder that ``Pretrained.assets`` has."""
    _refuse_outside(folder)
    named = [*filter(_is_asset, folder.iterdir()), *folder.glob(f"{CHAT_TEMPLATES}/*.jinja")]
    paths = sorted(path for path in named if path.is_file())
    for path in paths:
        if (size := path.stat().st_size) > _LARGEST:
            raise UserError(f"{path} has {size:,} bytes, expected at most {_LARGEST:,}: it is damaged, or belongs to no model")
    with reading(folder):
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _open_shards(folder: Path) -> tuple[SafetensorsSource, list[Path]]:
    """The tensors of a folder's safetensors files, and the files."""
    shards, weight_map = _shards(folder)
    tensors = SafetensorsSource(shards)
    for name, shard in weight_map.items():
        if tensors.holder(name) != shard:
            raise UserError(f"{folder / shard} does not hold the tensor {name}, though {INDEX} says so: download both again")
    return tensors, shards


def refuse_damaged(folder: Path) -> None:
    """Raises UserError if a folder that this program exported is damaged.

    Reads all files; other folders have no checksums. The model card may be edited: nothing reads it. Files may be missing: a
    reader that needs one refuses then.
    """
    sums = {name: checksum for name, checksum in listed(folder).items() if name != "README.md" and (folder / name).exists()}
    # A packed folder has checksums of its own, which refuse the file too.
    remedy = f"export the run again, or remove {ALL} to take the folder as it is"
    if (folder / packed.INDEX).is_file():
        remedy = f"copy the file again, or export the run again; {program('verify')} {folder} names every damaged file"
    for name, why in changes(folder, sums).items():
        raise UserError(f"{folder / name} {why}: {remedy}")


def _shards(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files, and each tensor's file (empty for a single file)."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], {}
    if not (folder / INDEX).is_file():
        raise UserError(_no_weights(folder))
    weight_map = read_record(folder / INDEX, _Index, "it is damaged: download it again")["weight_map"]
    shards = sorted(set(weight_map.values()))
    paths = [inside(folder, shard, folder / INDEX) for shard in shards]
    for shard in shards:
        if not shard.endswith(".safetensors"):
            raise UserError(f"{folder / INDEX} names {shard}, which is no safetensors file: {_CONVERT}")
    return paths, weight_map


def _refuse_outside(folder: Path) -> None:
    """Refuses links out of the folder among the files that are read.

    The contents behind such a link would become a part of the pruned model.

    Raises:
      UserError: as :func:`optima_tpu.runtime.inside.inside`.
    """
    for path in sorted([*folder.iterdir(), *folder.glob(f"{CHAT_TEMPLATES}/*")]):
        if path.suffix == ".safetensors" or path.name in (INDEX, CHAT_TEMPLATES, packed.INDEX) or _is_asset(path):
            inside(folder, path.relative_to(folder).as_posix(), folder)  # a run keeps assets under their names


def _not_a_model(folder: Path) -> str:
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        return f"{folder} is no Hugging Face folder (no config.json); to open a GGUF file in it, give that: {ggufs[0]}"
    return f"{folder} is no model: expected config.json and {SINGLE} (or {INDEX} and its files) in it"


def _no_weights(folder: Path) -> str:
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        return f"{folder} has its weights in a GGUF file; to open it, give that: {ggufs[0]}"
    if (folder / "0" / "items").is_dir():
        return (
            f"{folder} has its weights in MaxText's layout, which is written here and not read: give the run, or its hf/ folder"
        )
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if pickles:
        return f"{folder} has its weights only in the pickle format ({pickles[0].name}): {_CONVERT}"
    return f"{folder} has no weights: expected {SINGLE}, or {INDEX} and the files it names"


def _is_asset(path: Path) -> bool:
    """Whether a file of this name is one of the small files that a run keeps.

    An export copies these files unchanged, except the model card.
    """
    name = path.name.lower()
    if path.name == CARD:
        return True
    if name.startswith((".", "readme")) or name.endswith(".index.json") or name in (packed.INDEX, ALL):
        return False
    return name.endswith((".json", ".txt", ".model", ".jinja")) or name.startswith(("license", "licence", "notice"))
