"""GGUF files: tensors dequantised on reading, under Hugging Face names."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, ReaderTensor, dequantize

from optima_tpu.errors import UserError, refusing
from optima_tpu.models.checkpoints.gguf_architectures import ARCHITECTURES, Architecture, renamed
from optima_tpu.models.checkpoints.gguf_metadata import (
    INSTEAD,
    General,
    Vocabulary,
    config_json,
    generation_config_json,
    head_counts,
    metadata,
)
from optima_tpu.models.checkpoints.gguf_tokenizer import tokenizer_files
from optima_tpu.models.checkpoints.source import DTYPES, LazyTensor, Pretrained, Tensors, fingerprint, read_config
from optima_tpu.report.licence import CARD, Licence
from optima_tpu.runtime.inside import refuse_special
from optima_tpu.runtime.records import check_record

_WILD = 1e4
_ARRAY_HEAD = np.dtype([("kind", np.uint32), ("count", np.uint64)])  # packed: 12 bytes
ROPE_FACTORS = "rope_freqs.weight"
"""Not a weight: the llama3 rope scaling, written out per frequency. It goes into the configuration."""


def rope_row_order(rows: int, heads: int) -> np.ndarray:
    """The row in a GGUF file of each Hugging Face row of q or k, int[rows].

    llama.cpp rotates neighbouring rows of a head, Hugging Face the rows i and i + d_head/2; its converter therefore
    interleaves the halves of each head (``permute`` in llama.cpp's convert_hf_to_gguf.py). This is the inverse.
    """
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).ravel()


class GGUFSource(Tensors):
    """Tensors in a GGUF file, dequantised in float32 and then cast once.

    The file is memory-mapped, and a read touches only the bytes of its rows. Rows of q_proj and k_proj are in Hugging Face's
    order, and norm weights are Hugging Face's: a Gemma's are one smaller than in the file.

    Args:
      heads: number of query heads and of key-value heads.

    Raises:
      UserError: a tensor that the architecture does not have, or a block format that the gguf library can't
        dequantise.
    """

    def __init__(self, reader: GGUFReader, architecture: Architecture, heads: tuple[int, int], dtype: np.dtype):
        named = [(renamed(tensor.name, architecture.names), tensor) for tensor in reader.tensors if tensor.name != ROPE_FACTORS]
        super().__init__(
            {
                # GGUF lists the fastest axis first.
                name: LazyTensor(tuple(map(int, tensor.shape[::-1])), dtype, functools.partial(self._part, tensor, name))
                for name, tensor in named
                if name
            }
        )
        self._heads = {"self_attn.q_proj": heads[0], "self_attn.k_proj": heads[1]} if architecture.interleaved else {}
        self._norm_shift = np.float32(architecture.norm_shift)
        strange = [tensor.name for name, tensor in named if not name]
        if strange:
            raise UserError(
                f"the GGUF file holds tensors that {architecture.model} does not have ({', '.join(strange[:4])}): {INSTEAD}"
            )
        for kind, tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.items():
            unread = (
                f"the GGUF file stores {tensor.name} as {GGMLQuantizationType(kind).name}, which the gguf library can't "
                "dequantise: give another quantisation of the model"
            )
            with refusing(NotImplementedError, unread):
                dequantize(np.asarray(tensor.data[:1]) if tensor.data.ndim > 1 else np.asarray(tensor.data), kind)

    def _part(self, tensor: ReaderTensor, name: str, index: tuple[slice, ...]) -> np.ndarray:
        rows, *columns = index
        order = np.arange(self.shape(name)[0])
        for part, heads in self._heads.items():
            if f".{part}." in name:
                order = rope_row_order(len(order), heads)
        if columns:
            values = dequantize(np.asarray(tensor.data[order[rows]]), tensor.tensor_type)[:, *columns]
            _refuse_wild(tensor.name, values)
        else:  # a norm or a bias; bfloat16 is stored as bytes, so decode before slicing
            values = dequantize(np.asarray(tensor.data), tensor.tensor_type)[order[rows]]
            if self._norm_shift and name.endswith("norm.weight"):
                values = values - self._norm_shift
        return np.array(values, self.dtype(name))


class _Reader(GGUFReader):
    """Reads arrays of the metadata whole, but not beyond the end of the file.

    The library makes four arrays for each string of a vocabulary, which takes seconds. Beyond the end the library finds nothing
    and goes on, 2^60 times if the header says so.
    """

    def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **others: Any) -> np.ndarray:
        self._refuse_beyond(int(offset) + np.dtype(dtype).itemsize * int(count))
        return super()._get(offset, dtype, count, *rest, **others)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        head = _ARRAY_HEAD.newbyteorder(self.byte_order)
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = self._get(orig_offs, head)[0].tolist()
        begin = orig_offs + head.itemsize
        if kind == GGUFValueType.STRING:
            values: list[Any] = list(self._strings(begin, count))
            size = sum(map(len, values)) + len(values) * np.dtype(np.uint64).itemsize
        elif kind in self.gguf_scalar_to_np:
            values = [self._get(begin, self.gguf_scalar_to_np[GGUFValueType(kind)], count)]
            size = values[0].nbytes
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        return head.itemsize + size, values, list(range(len(values))), [GGUFValueType.ARRAY, GGUFValueType(kind)]

    def _strings(self, begin: int, count: int) -> Iterator[memoryview]:
        """``count`` strings, each behind its length."""
        data, length = self.data.data, np.dtype(np.uint64).newbyteorder(self.byte_order)
        for _ in range(count):
            self._refuse_beyond(begin + length.itemsize)
            first = begin + length.itemsize
            begin = first + int(np.frombuffer(data, length, 1, begin)[0])
            self._refuse_beyond(begin)
            yield data[first:begin]

    def _refuse_beyond(self, end: int) -> None:
        if end > len(self.data):
            raise ValueError(f"it has {len(self.data)} bytes, and its header points to byte {end}")


def _refuse_wild(name: str, values: np.ndarray) -> None:
    """Refuses a matrix with a value that no trained model has.

    GGUF stores no checksums. A flipped bit in the exponent of a block's scale makes such a value; a flipped low bit does not.

    Raises:
      UserError: a value is more than ``_WILD`` times the median of the values that are not 0.
    """
    sizes = np.abs(values[values != 0])
    if sizes.size and (largest := float(sizes.max())) > _WILD * float(np.median(sizes)):
        raise UserError(
            f"expected {name} to hold values of about one size, got {largest:.3g} where half of them are below "
            f"{float(np.median(sizes)):.3g}: the GGUF file is damaged, download it again"
        )


def open_gguf(path: Path, origin: str, dtype: str | None = None) -> Pretrained:
    """Opens a GGUF file; its metadata give configuration and tokenizer.

    Raises:
      UserError: the file is not a complete GGUF file, its architecture is not in :data:`ARCHITECTURES`, its metadata asks for
        another computation than Hugging Face's model of that name, or its tokenizer can't be rebuilt exactly.
    """
    reader, fields = _read_metadata(path)
    general = check_record(fields, General, path, "download it again")
    vocabulary = check_record(fields, Vocabulary, path, "download it again")
    if reader.byte_order != "I":
        raise UserError(f"{path} has the other byte order: convert it with gguf-convert-endian of the gguf package")
    architecture = ARCHITECTURES.get(general.architecture or "")
    if architecture is None:
        raise UserError(
            f"{path} holds the architecture {general.architecture!r}; GGUF files are supported for {', '.join(ARCHITECTURES)}: "
            f"{INSTEAD}"
        )
    if general.split_count > 1:
        raise UserError(f"{path} is one of {general.split_count} parts: join them with `llama-gguf-split --merge`")
    prefix, stored, dtype = f"{architecture.name}.", {tensor.name: tensor for tensor in reader.tensors}, dtype or "float32"
    own = {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)}
    factors = dequantize(stored[ROPE_FACTORS].data, stored[ROPE_FACTORS].tensor_type) if ROPE_FACTORS in stored else None
    config = config_json(own, vocabulary, architecture, set(stored), factors, dtype)
    parsed, config = read_config(config, str(path))
    tensors = GGUFSource(reader, architecture, head_counts(own), DTYPES[dtype])
    rows = tensors.shape("model.embed_tokens.weight")[0] if "token_embd.weight" in stored else None
    if rows != parsed.vocab_size:
        raise UserError(
            f"{path} is inconsistent: its metadata has {parsed.vocab_size} tokens, the rows of its "
            f"embedding are {rows}: download it again"
        )
    assets = {"config.json": config, "generation_config.json": generation_config_json(vocabulary)}
    assets |= tokenizer_files(vocabulary, architecture, own["context_length"])
    if general.license is not None:
        assets[CARD] = Licence(general.license, general.license_name, general.license_link).card()
    return Pretrained(parsed, tensors, assets, fingerprint(config, tensors, [path]), origin, path.stat().st_size)


def _read_metadata(path: Path) -> tuple[_Reader, dict[str, Any]]:
    """The reader of a file, and the metadata of the file.

    Raises:
      UserError: the file is no GGUF file, or not all of one.
    """
    refuse_special(path)
    try:
        reader = _Reader(path)
        return reader, metadata(reader)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        with path.open("rb") as file:
            begun = file.read(4) == b"GGUF"
        size = f"{path.stat().st_size:,} bytes"
        what = (
            f"truncated or damaged: its header asks for more than its {size}"
            if begun
            else f"no GGUF file: its {size} do not begin so"
        )
        raise UserError(f"{path} is {what}; download it again") from error
