"""The interface of pretrained checkpoints, the same for all file formats."""

import dataclasses
import functools
import hashlib
import json
import math
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from transformers import AutoConfig, PretrainedConfig

from optima_tpu.errors import UserError, one_line, panics_refused, plural, some
from optima_tpu.models import family_named, refuse_architecture
from optima_tpu.models.checkpoints.declared import DECIDING, Declared, DeclaredKind
from optima_tpu.runtime.records import check_record, parse_record

_CHECK = "check the file, or download it again"

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
"""The floating dtypes a checkpoint can be read in, by the names that config.json uses."""

_FLOATS = {np.dtype(np.float64), *DTYPES.values()}

Index = tuple[slice | EllipsisType, ...]


class TensorSource(Protocol):
    """The tensors of a checkpoint under their Hugging Face names.

    Only :meth:`read` reads data, and nothing is cached.
    """

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; linear weights are [d_out, d_in]."""

    def dtype(self, name: str) -> np.dtype:
        """The dtype of :meth:`read`, which may be ``ml_dtypes.bfloat16``."""

    def read(self, name: str, index: Index = (...,)) -> np.ndarray:
        """A new array of what slices and at most one ``...`` select."""


class LazyTensor(NamedTuple):
    """A tensor of a checkpoint.

    Attributes:
      read: reads a part of it, from one slice for each axis, see :func:`whole_slices`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple[slice, ...]], np.ndarray]

    @classmethod
    def of(cls, source: TensorSource, name: str) -> "LazyTensor":
        """A tensor of another source, unchanged, to list by any name."""
        return cls(tuple(source.shape(name)), source.dtype(name), lambda index: source.read(name, index or (...,)))


class Tensors:
    """A ``TensorSource`` of tensors by their names."""

    def __init__(self, tensors: Mapping[str, LazyTensor]):
        self._tensors = tensors

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._tensors))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, index: Index = (...,)) -> np.ndarray:
        tensor = self._tensors[name]
        return tensor.read(whole_slices(index, tensor.shape))


class ComputedTensors(Tensors):
    """The tensors of a checkpoint, of which some are computed on reading.

    Args:
      hidden: names in ``stored`` of what they are computed from, which are no tensors of the model.
      stacks: the tensors in files of which some are parts, see ``stacks``.
    """

    def __init__(
        self, stored: TensorSource, computed: Mapping[str, LazyTensor], hidden: Collection[str] = (), stacks: Iterable[str] = ()
    ):
        others = {name: LazyTensor.of(stored, name) for name in {*stored.names()}.difference(hidden, computed)}
        super().__init__({**others, **computed})
        self.stacks = tuple(sorted(stacks))


def cast(source: TensorSource, dtype: np.dtype, exact: tuple[str, ...] = ()) -> ComputedTensors:
    """The floating-point tensors of a checkpoint in one dtype, rounded once.

    Args:
      exact: ``Family.exact``, the ends of the names of tensors that keep the dtype in which they are stored.
    """

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        return source.read(name, index).astype(dtype, copy=False)

    ends = tuple("." + name for name in exact)
    names = (name for name in source.names() if source.dtype(name) in _FLOATS and not name.endswith(ends))
    return ComputedTensors(source, {name: LazyTensor(source.shape(name), dtype, functools.partial(read, name)) for name in names})


def layered(above: TensorSource, below: TensorSource) -> ComputedTensors:
    """The tensors of ``above``, and of ``below`` for all other names."""
    return ComputedTensors(below, {name: LazyTensor.of(above, name) for name in above.names()})


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """An opened checkpoint.

    Attributes:
      config: as ``transformers.AutoConfig`` reads config.json.
      assets: file name -> bytes of every file but the weights that an exported folder needs: config.json,
        generation_config.json, tokenizer files, licence, and the model card, which may name it. The original bytes, except that
        config.json names the dtype that the caller asked for. For a GGUF file all of them are made from its metadata.
      fingerprint: see :func:`fingerprint`.
      origin: what the user typed.
      stored: bytes of the weight files; None if it is not known.
    """

    config: PretrainedConfig
    tensors: TensorSource
    assets: Mapping[str, bytes]
    fingerprint: str
    origin: str
    stored: int | None = None


def architecture_of(config: PretrainedConfig) -> str:
    """The name of a model's class, for messages."""
    return ", ".join(config.architectures or [config.model_type])


def parse_dtype(dtype: str | None) -> np.dtype | None:
    """The numpy dtype of a name in :data:`DTYPES`; None stays None.

    Raises:
      UserError: the name is another one.
    """
    if dtype is None:
        return None
    if dtype not in DTYPES:
        raise UserError(f"expected a dtype out of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def whole_slices(index: Index, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """``index`` as one slice for each axis, with bounds of at least 0.

    Raises:
      IndexError: more entries than axes, a negative step, or an entry that is no slice.
    """
    if ... in index:
        at = index.index(...)
        index = index[:at] + (slice(None),) * (len(shape) - len(index) + 1) + index[at + 1 :]
    index += (slice(None),) * (len(shape) - len(index))
    slices = [entry for entry in index if isinstance(entry, slice) and (entry.step or 1) > 0]
    if not len(slices) == len(index) == len(shape):
        raise IndexError(f"expected at most {len(shape)} slices with positive steps, got {index}")
    return tuple(slice(*entry.indices(size)) for entry, size in zip(slices, shape, strict=True))


def read_config(config: bytes, where: str, dtype: str | None = None) -> tuple[PretrainedConfig, bytes]:
    """The configuration in the bytes of a config.json, and bytes to export.

    Args:
      where: the name of the model in messages.
      dtype: the dtype to which the weights are cast, or None. If config.json names another dtype, the returned bytes name this
        one.

    Raises:
      UserError: the file is no JSON object, a size in it is above every bound, transformers does not know the model type, the
        file names no architecture or one that does not fit, or the weights are quantised.
    """
    record: dict[str, Any] = dict(parse_record(config, DeclaredKind, f"{where}: config.json", _CHECK))
    refuse_architecture(record.get("architectures") or (), record.get("model_type"))  # before its sizes look wrong
    # What transformers leaves open for a model of another family is its own affair.
    stated = dict if family_named(record.get("architectures")) else _stated
    check_record(stated(record), Declared, f"{where}: config.json", _CHECK)
    if (text := record.get("text_config")) is not None:
        check_record(text, Declared, f"{where}: config.json", _CHECK, inside="text_config")
    key = "dtype" if "dtype" in record else "torch_dtype"
    if dtype is not None and record.get(key) != dtype:
        record[key] = dtype
        config = json.dumps(record, indent=2).encode() + b"\n"
    parsed: PretrainedConfig = read_by_transformers(
        AutoConfig,
        {"config.json": config},
        "config.json",
        where,
        f"{where}: config.json is not a model configuration that transformers can read",
        "give a model that transformers has without such code",
    )
    if not record.get("architectures"):
        raise UserError(f'{where}: config.json names no model under "architectures": add it, e.g. ["LlamaForCausalLM"]')
    if record.get("quantization_config"):
        method = record["quantization_config"].get("quant_method", "an unnamed method")
        raise UserError(f"{where}: the weights are quantised ({method}): give the unquantised model")
    # Call this again, as transformers does when it builds the model: it moves settings that are beside rope_parameters into them.
    text = parsed.get_text_config()
    # Again, since a configuration has some entries under several names, and others block by block.
    for layer in text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]:
        entries = {name: getattr(layer, name) for name in DECIDING if hasattr(layer, name)}
        check_record(stated(entries), Declared, f"{where}: config.json", _CHECK)
    if getattr(text, "rope_parameters", None):  # without any it would warn
        text.standardize_rope_params()
    return parsed, config


def read_by_transformers(auto: Any, files: Mapping[str, bytes], settings: str, where: str, what: str, remedy: str) -> Any:
    """What a class of ``transformers`` makes of files in memory.

    Args:
      auto: AutoConfig or AutoTokenizer.
      files: name -> content.
      settings: the one of the files that may ask for code of the model's own.
      where: the name of the model in messages.
      what: the message for files that it cannot read.
      remedy: what to do about code of the model's own.

    Raises:
      UserError: the settings ask for such code, or transformers or a library below cannot read the files.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            path = Path(folder) / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        try:
            with panics_refused("the tokenizers library fails"):
                return auto.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # from KeyError to their own classes; the tokenizers library raises plain Exception
            if json.loads(files.get(settings, b"{}")).get("auto_map"):
                own = f"{where}: {settings} asks for code of the model's own (auto_map), which is never run"
                raise UserError(f"{own}: {remedy}") from error
            raise UserError(f"{what} ({one_line(error).replace(folder, where)}): {_CHECK}") from error


def _stated(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if value is not None}


_PIECES, _PIECE = 16, 1 << 16


def total_bytes(tensors: TensorSource) -> int:
    """Bytes of all tensors in the dtypes they are read in, zeros included."""
    return sum(math.prod(tensors.shape(name)) * tensors.dtype(name).itemsize for name in tensors.names())


def weight_count(tensors: TensorSource) -> int:
    """How many numbers all tensors have."""
    return sum(math.prod(tensors.shape(name)) for name in tensors.names())


def fingerprint(config: bytes, tensors: TensorSource, files: Iterable[Path]) -> str:
    """Identifies a checkpoint without reading all of it.

    SHA-256 over the bytes of config.json, the sorted (name, shape, dtype) of all tensors as read, and of every weight
    file (in order of name) its size and 16 evenly spaced pieces of 64 KiB, the first and the last bytes among them. A
    change that keeps every size and lies wholly between the pieces is not seen: this guards against mistaking one model
    for another, not against tampering. The path of the files does not matter.
    """
    digest = hashlib.sha256(hashlib.sha256(config).digest())
    for name in sorted(tensors.names()):
        digest.update(f"{name} {tensors.shape(name)} {tensors.dtype(name)}\n".encode())
    for path in sorted(files, key=lambda path: path.name):
        size = path.stat().st_size
        digest.update(f"{size}\n".encode())
        with path.open("rb") as file:
            for offset in sorted({max(0, size - _PIECE) * piece // (_PIECES - 1) for piece in range(_PIECES)}):
                file.seek(offset)
                digest.update(file.read(_PIECE))
    return digest.hexdigest()


IGNORABLE = {
    r"lm_head\.weight": "a stored copy of a tied head: the model reads its embedding instead",
    r".*\.rotary_emb\.inv_freq": "a buffer that older checkpoints stored: it follows from the configuration",
}
"""Names that a checkpoint may hold although the model does not read them -> the reason."""


def check_names(expected: Iterable[str], source: TensorSource, ignored: Mapping[str, str] = {}) -> None:
    """Compares the tensors that a model reads with a checkpoint's tensors.

    Args:
      ignored: the family's additions to :data:`IGNORABLE`: regular expression -> reason.

    Raises:
      UserError: names are missing, or unexpected and not ignored; both are reported together.
    """
    expected, present = set(expected), set(source.names())
    missing = expected - present
    rules = [*IGNORABLE, *ignored]
    unexpected = {name for name in present - expected if not any(re.fullmatch(rule, name) for rule in rules)}
    report = [
        f"{plural(len(names), 'tensor')} {kind} ({some(names)})"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if report:
        raise UserError(f"the weights don't match the model that config.json describes: {'; '.join(report)}")


def check_dtypes(expected: Iterable[str], source: TensorSource) -> None:
    """Refuses dtypes that this program does not compute in.

    Pruned weights could not be put back into such a checkpoint.

    Raises:
      UserError: a tensor that the model reads has another dtype than float32, bfloat16 or float16.
    """
    by_dtype: dict[np.dtype, list[str]] = {}
    for name in expected:
        by_dtype.setdefault(np.dtype(source.dtype(name)), []).append(name)
    for dtype in by_dtype.keys() - set(DTYPES.values()):
        remedy = "take --dtype float32" if dtype == np.float64 else "give the model as it was before it was quantised"
        raise UserError(
            f"expected float32, bfloat16 or float16, got {plural(len(by_dtype[dtype]), 'tensor')} in {dtype} "
            f"({some(by_dtype[dtype])}); {remedy}"
        )
