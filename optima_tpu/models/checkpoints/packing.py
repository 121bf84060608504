"""Writes packed folders: ``packed.py`` reads them, and has the format."""

import hashlib
import json
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import zstandard

from optima_tpu.models.checkpoints.packed import (
    FORMAT,
    INDEX,
    PIECE,
    PLAIN,
    PLANES,
    SPARSE,
    VERSION,
    PackedError,
    PackedTensor,
    TensorSpan,
    decode,
    file_digest,
    read_at,
    read_header,
    stored_as,
    width_of,
)

_SPARSE_FROM = 1 / 16
"""Share of zeros from which the sparse encoding is tried on a tensor without a mask."""
_LONG = 10**20  # as an offset it takes more room in a header than any real one
# Bytes of weights hardly ever repeat in longer pieces. A table of 64 entries that is searched for 7 equal bytes finds next to no
# repetition, so zstd codes single bytes by their frequency: smaller than at any of its levels below 13, and as fast as level 1.
_CODER = zstandard.ZstdCompressionParameters(strategy=zstandard.STRATEGY_FAST, hash_log=6, min_match=7, window_log=17)


class Packer:
    """Writes a packed folder: the files of weights, then the index.

    Args:
      out: an existing, empty folder.
    """

    def __init__(self, out: Path):
        self._out = out
        self._tensors: dict[str, PackedTensor] = {}
        self._weights: dict[str, dict[str, str]] = {}
        self._files: dict[str, str] = {}
        self._masks: list[str] = []

    def add_weights(self, path: Path, masks: Mapping[str, np.ndarray] | None = None) -> None:
        """Packs a safetensors file, tensor by tensor.

        Args:
          masks: name of a pruned weight -> bool of its shape, True where it was kept. These masks are stored instead of a mask of
            the bits that are not zero, and make pruning_masks.npz when the folder is unpacked.

        Raises:
          PackedError: the file is damaged, or a weight that the mask prunes has bits other than zero.
        """
        header, spans = read_header(path)
        if twice := sorted(spans.keys() & self._tensors.keys()):
            raise PackedError(f"{path} holds the tensor {twice[0]}, which another file holds too")
        name = f"packed-{path.name}"
        with path.open("rb") as source, (self._out / name).open("wb") as target:
            longest = {
                tensor: span._replace(shape=(*span.shape, _LONG), begin=_LONG, end=_LONG) for tensor, span in spans.items()
            }
            room = len(header_of(longest))
            target.write(bytes(room))
            written: dict[str, TensorSpan] = {}
            begin = 0
            for tensor, span in spans.items():
                raw = _Raw(source, 8 + len(header) + span.begin, span)
                encoding, parts = _encode(tensor, raw, (masks or {}).get(tensor))
                digest = hashlib.sha256()
                for part in parts:
                    digest.update(part)
                    target.write(part)
                record = PackedTensor(name, span.dtype, span.shape, encoding, tuple(map(len, parts)), digest.hexdigest())
                if not all(map(np.array_equal, decode(tensor, record, parts), raw.pieces())):
                    raise RuntimeError(f"{tensor} does not come back from its packed form")
                self._tensors[tensor] = record
                written[tensor] = stored_as(record, begin)
                begin = written[tensor].end
            text = header_of(written, room)
            target.seek(0)
            target.write(text)
        self._weights[path.name] = {"packed": name, "packed_header": hashlib.sha256(text).hexdigest(), "header": header.decode()}
        self._masks += sorted((masks or {}).keys() & spans.keys())

    def add_file(self, path: Path, name: str) -> None:
        """Copies a file that is no weights, and records its checksum.

        Args:
          path: the file; it may be in the folder already.
          name: its path in the folder, with ``/``.
        """
        target = self._out / name
        if path != target:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        self._files[name] = file_digest(target)

    def finish(self) -> None:
        """Writes the index, after which the folder is complete."""
        record = {
            "format": FORMAT,
            "version": VERSION,
            "tensors": {name: {**tensor._asdict(), "shape": list(tensor.shape)} for name, tensor in self._tensors.items()},
            "weights": self._weights,
            "masks": sorted(self._masks),
            "files": self._files,
        }
        (self._out / INDEX).write_bytes(sealed(record))


class _Raw(NamedTuple):
    """A tensor in an open safetensors file, from its byte ``begin`` on."""

    file: BinaryIO
    begin: int
    span: TensorSpan

    @property
    def width(self) -> int:
        return width_of(self.span.dtype)

    @property
    def elements(self) -> int:
        return (self.span.end - self.span.begin) // self.width

    def pieces(self) -> Iterator[np.ndarray]:
        """Its elements as unsigned integers, [at most PIECE] at a time."""
        for begin in range(0, self.elements, PIECE):
            size = min(PIECE, self.elements - begin) * self.width
            yield np.frombuffer(read_at(self.file, self.begin + begin * self.width, size), f"<u{self.width}")


def _encode(name: str, raw: _Raw, keep: np.ndarray | None) -> tuple[str, list[bytes | bytearray]]:
    """A tensor's smallest encoding (``sparse`` for a mask), and its parts."""
    if keep is not None:
        return SPARSE, _sparse(name, raw, int(np.count_nonzero(keep)), keep.reshape(-1))
    kept = sum(int(np.count_nonzero(piece)) for piece in raw.pieces())  # by the bits: -0.0 is kept
    encodings = {PLANES: _planes(raw.pieces(), raw.elements, raw.width)}
    if raw.elements - kept >= _SPARSE_FROM * raw.elements:
        encodings[SPARSE] = _sparse(name, raw, kept, None)
    best = min(encodings, key=lambda encoding: sum(map(len, encodings[encoding])))
    size = raw.span.end - raw.span.begin
    return (best, encodings[best]) if sum(map(len, encodings[best])) < size else (PLAIN, [read_at(raw.file, raw.begin, size)])


def _sparse(name: str, raw: _Raw, kept: int, keep: np.ndarray | None) -> list[bytes | bytearray]:
    """The mask and the planes of the ``kept`` elements.

    The mask ``keep`` [count] says which elements are kept; without ``keep``, elements that are not zero are kept.
    """
    mask = _Frame((raw.elements + 7) // 8)

    def elements() -> Iterator[np.ndarray]:
        for index, piece in enumerate(raw.pieces()):
            here = piece != 0
            if keep is not None:
                filled, here = here, keep[index * PIECE : (index + 1) * PIECE]
                if np.any(filled & ~here):
                    raise PackedError(f"{name}: the mask prunes weights whose bits are not zero")
            mask.add(np.packbits(here))
            yield np.compress(here, piece)

    planes = _planes(elements(), kept, raw.width)
    return [mask.end(), *planes]


def _planes(pieces: Iterable[np.ndarray], count: int, width: int) -> list[bytes | bytearray]:
    """The compressed byte planes of ``count`` elements, highest byte first."""
    frames = [_Frame(count) for _ in range(width)]
    for piece in pieces:
        table = piece.view(np.uint8).reshape(-1, width)
        for frame, byte in zip(frames, reversed(range(width)), strict=True):
            frame.add(np.ascontiguousarray(table[:, byte]))
    return [frame.end() for frame in frames]


class _Frame:
    """Writes ``size`` bytes into a zstd frame; no bytes make no frame."""

    def __init__(self, size: int):
        self._coder = zstandard.ZstdCompressor(compression_params=_CODER).compressobj(size=size) if size else None
        self._written = bytearray()

    def add(self, piece: np.ndarray) -> None:
        if self._coder is not None:
            self._written += self._coder.compress(piece.data)

    def end(self) -> bytearray:
        if self._coder is not None:
            self._written += self._coder.flush()
        return self._written


def header_of(spans: Mapping[str, TensorSpan], room: int = 0) -> bytes:
    """The header of a safetensors file, with its length in front.

    It has ``room`` bytes, or a multiple of 8 if it is longer.
    """
    entries = {
        name: {"dtype": span.dtype, "shape": list(span.shape), "data_offsets": [span.begin, span.end]}
        for name, span in spans.items()
    }
    text = json.dumps({"__metadata__": {"format": FORMAT, "version": str(VERSION)}, **entries}, separators=(",", ":")).encode()
    text = text.ljust(room - 8)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def sealed(record: Mapping[str, Any]) -> bytes:
    """The index as JSON, its first line a checksum of all that follows."""
    body = json.dumps(record, indent=1, allow_nan=False)[1:].encode()
    return f'{{"sha256": "{hashlib.sha256(body).hexdigest()}",'.encode() + body
