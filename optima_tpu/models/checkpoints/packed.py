"""Packed checkpoints: pruned weights as bit masks and compressed values.

Unpacking gives back every bit. This file imports nothing from its package. A copy of it runs anywhere with numpy and zstandard:

    python packed.py PACKED OUT

The format is described in docs/reference/packed-format.md.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
import struct
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import zstandard

FORMAT, VERSION = "optima-packed", 1
INDEX = "packed.json"
MASKS, SHAPE = "pruning_masks.npz", ".shape"

BITS: Mapping[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""Every dtype of safetensors -> bits of an element."""

PLAIN, PLANES, SPARSE = "plain", "planes", "sparse"

_LARGEST_HEADER = 100_000_000  # as safetensors allows; of the index too
_MOST_ELEMENTS = 2**60  # numpy refuses shapes beyond, also those with a 0
PIECE = 2**20
"""Elements of a tensor that are coded or decoded at a time: their bytes, planes and mask stay in a processor's cache. In
multiples of 8, so that a piece of a mask begins with a byte."""


class PackedError(Exception):
    """A damaged packed folder, or a folder that can't be packed.

    The message is one line and names the tensor or file.
    """

    def __init__(self, message: str):
        # Names in it come from files that may be forged.
        super().__init__("".join(sign if sign.isprintable() else " " for sign in message[:1000]))


class PackedTensor(NamedTuple):
    """What the index says of a tensor.

    Attributes:
      file: the packed file that holds it.
      dtype: as safetensors names it.
      encoding: ``plain``, ``planes`` or ``sparse``.
      parts: bytes of each part, in order: for ``sparse`` the mask and the planes, for ``planes`` the planes.
      sha256: of all parts together, as they are stored.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str
    parts: tuple[int, ...]
    sha256: str

    @property
    def nbytes(self) -> int:
        """Bytes of the unpacked tensor."""
        return nbytes_of(self.dtype, self.shape)

    @property
    def width(self) -> int:
        """Bytes of an element; 1 for dtypes of less than a byte."""
        return width_of(self.dtype)

    @property
    def elements(self) -> int:
        """Elements of that width."""
        return self.nbytes // self.width


class TensorSpan(NamedTuple):
    """A tensor in a safetensors file.

    Attributes:
      dtype: as safetensors names it.
      begin: offset of its first byte behind the header.
      end: offset behind its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Packed:
    """An opened packed folder, whose tensors are decoded one by one.

    Opening reads only the index and the headers.

    Attributes:
      tensors: name -> what the index says of the tensor.
      masks: the names of the pruned weights whose masks are known.
      files: name of every other file -> its SHA-256.

    Raises:
      PackedError: the index or a header is damaged, contradicts itself or points outside its files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        record = _read_index(_inside(folder, INDEX))
        with _expecting(folder / INDEX):
            self.tensors = {name: _parse_tensor(name, entry) for name, entry in record["tensors"].items()}
            self.masks: tuple[str, ...] = tuple(record["masks"])
            self.files: dict[str, str] = {self._own(name): str(digest) for name, digest in record["files"].items()}
            self._weights = {self._own(name): dict(entry) for name, entry in record["weights"].items()}
            self._layouts = {name: _parse_header(entry["header"].encode(), name) for name, entry in self._weights.items()}
            self._begins: dict[str, int] = {}
            for name, entry in self._weights.items():
                self._check_file(name, self._own(entry["packed"]), entry["packed_header"])
            for name in self.tensors.keys() - self._begins.keys():
                raise PackedError(f"the index names the tensor {name}, but no file of weights holds it")
            for name in self.masks:
                tensor = self.tensors.get(name)
                if tensor is None or tensor.encoding != SPARSE or len(tensor.shape) != 2 or BITS[tensor.dtype] < 8:
                    raise PackedError(f"the index says that {name} has a mask, but stores none")

    def _own(self, name: str) -> str:
        """A name of the index, checked to stay inside the folder."""
        _inside(self.folder, name)
        return name

    def _check_file(self, name: str, packed: str, header_sha256: str) -> None:
        """Compares a packed header with the index and the plain header."""
        path = self.folder / packed
        layout = self._layouts[name]
        named = f"{INDEX} says that the file holds {', '.join(list(layout)[:4])}{', ...' if len(layout) > 4 else ''}"
        try:
            header, spans = read_header(path)
        except PackedError as error:
            raise PackedError(f"{error}; {named}") from error
        for tensor in dict.fromkeys([*layout, *spans]):
            record = self.tensors.get(tensor)
            if record is None or tensor not in layout or tensor not in spans or record.file != packed or tensor in self._begins:
                raise PackedError(f"{path}: the file and {INDEX} disagree about the tensor {tensor}: copy the folder again")
            stored = stored_as(record, spans[tensor].begin)
            if stored != spans[tensor] or (record.dtype, record.shape) != layout[tensor][:2]:
                raise PackedError(f"{path}: the header and {INDEX} disagree about the tensor {tensor}: copy the folder again")
            self._begins[tensor] = 8 + len(header) + stored.begin
        if hashlib.sha256(struct.pack("<Q", len(header)) + header).hexdigest() != header_sha256:
            raise PackedError(f"{path}: the header is damaged, its checksum differs: copy the file again; {named}")

    def read(self, name: str) -> np.ndarray:
        """The bytes of an unpacked tensor, [nbytes] uint8.

        Numbers are little-endian, and elements are row by row.

        Raises:
          PackedError: the stored bytes are damaged. They are compared with their checksum before anything is decoded.
        """
        tensor = self.tensors[name]
        with self._room_for(name):
            values, end = np.empty(tensor.nbytes, np.uint8), 0
            for piece in decode(name, tensor, self._parts(name)):
                values[end : end + piece.nbytes] = piece.view(np.uint8)
                end += piece.nbytes
        return values

    def kept(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A tensor whose encoding is ``sparse``, before its zeros are put in.

        Returns:
          The mask, bool of the tensor's shape, and the elements that it keeps in their order, [kept] unsigned integers of the
          tensor's width.

        Raises:
          PackedError: as for :meth:`read`.
        """
        with self._room_for(name):
            tensor, parts = self.tensors[name], self._parts(name)
            bits = _decode_bits(name, tensor, parts[0])
            elements = _Planes(name, parts[1:], _ones(bits), tensor.width).read(_ones(bits))
            keep = np.unpackbits(bits, count=tensor.elements).view(bool)
        return keep.reshape(tensor.shape), elements

    @contextlib.contextmanager
    def _room_for(self, name: str) -> Iterator[None]:
        try:
            yield
        except MemoryError:
            raise PackedError(
                f"{name} unpacks to {self.tensors[name].nbytes:,} bytes, more than this machine has room for"
            ) from None

    def mask(self, name: str) -> np.ndarray:
        """The mask of a pruned weight, bool of its shape, True where kept."""
        tensor = self.tensors[name]
        with self._room_for(name):
            bits = _decode_bits(name, tensor, self._parts(name)[0])
            return np.unpackbits(bits, count=tensor.elements).view(bool).reshape(tensor.shape)

    def _parts(self, name: str) -> list[memoryview]:
        tensor = self.tensors[name]
        path = self.folder / tensor.file
        with path.open("rb") as file:
            stored = memoryview(read_at(file, self._begins[name], sum(tensor.parts)))
        if hashlib.sha256(stored).hexdigest() != tensor.sha256:
            raise PackedError(f"{path}: the tensor {name} is damaged, its checksum differs: copy the file again")
        ends = np.cumsum((0, *tensor.parts)).tolist()
        return [stored[begin:end] for begin, end in itertools.pairwise(ends)]

    def check_file(self, name: str, data: bytes) -> None:
        """Compares the contents of a copied file with its checksum.

        A file that the index does not name passes.

        Raises:
          PackedError: they differ.
        """
        self._check_digest(name, hashlib.sha256(data).hexdigest())

    def _check_digest(self, name: str, digest: str) -> None:
        if self.files.get(name, digest) != digest:
            raise PackedError(f"{self.folder / name} is damaged, its checksum differs from that in {INDEX}: copy the file again")

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed files of weights and of the index."""
        return sum((self.folder / name).stat().st_size for name in (INDEX, *self.packed_files))

    @property
    def packed_files(self) -> list[str]:
        """The names of the packed files of weights."""
        return [entry["packed"] for entry in self._weights.values()]

    @property
    def unpacked_bytes(self) -> int:
        """Bytes of the files of weights that the folder unpacks to."""
        headers = sum(8 + len(entry["header"].encode()) for entry in self._weights.values())
        return headers + sum(tensor.nbytes for tensor in self.tensors.values())

    def unpack(self, out: Path) -> None:
        """Writes the plain folder, each file byte for byte as it was packed.

        Args:
          out: an existing, empty folder.

        Raises:
          PackedError: something is damaged, or the disk has no room for what the index announces.
        """
        if (free := shutil.disk_usage(out).free) < self.unpacked_bytes:
            raise PackedError(f"{self.folder} unpacks to {self.unpacked_bytes:,} bytes, but {out} has room for {free:,}")
        for name in self.files:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(self.folder / name, out / name)
            except FileNotFoundError:
                raise PackedError(f"{self.folder / name} is missing, though {INDEX} names it: copy the folder again") from None
            self._check_digest(name, file_digest(out / name))
        for name, entry in self._weights.items():
            header = entry["header"].encode()
            with (out / name).open("wb") as target:
                target.write(struct.pack("<Q", len(header)) + header)
                for tensor in self._layouts[name]:
                    with self._room_for(tensor):
                        for piece in decode(tensor, self.tensors[tensor], self._parts(tensor)):
                            target.write(piece.data)
        if self.masks:
            write_masks(out / MASKS, ((name, self.mask(name)) for name in self.masks))


def write_masks(path: Path, masks: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes masks, [d_out, d_in] bool, as one bit each.

    One mask is in memory at a time. The file has two arrays for each mask: "<name>", [d_out, ceil(d_in / 8)] uint8 as
    ``numpy.packbits`` packs the inputs of a row, and "<name>.shape", the two sizes.
    """
    # Entry by entry, because np.savez needs all of them in memory.
    with zipfile.ZipFile(path, "w") as archive:
        for name, keep in masks:
            for entry, array in ((name, np.packbits(keep, axis=1)), (name + SHAPE, np.asarray(keep.shape))):
                with archive.open(zipfile.ZipInfo(entry + ".npy"), "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)


# The encodings of a tensor. Nothing here holds more of a tensor than its stored parts, its mask as bits, and a piece.


def decode(name: str, tensor: PackedTensor, parts: Sequence[bytes | memoryview | bytearray]) -> Iterator[np.ndarray]:
    """Yields a tensor's elements as unsigned integers, [at most PIECE] each.

    Raises:
      PackedError: a part has another size than dtype, shape and mask give, or can't be decompressed.
    """
    sizes = [(begin, min(PIECE, tensor.elements - begin)) for begin in range(0, tensor.elements, PIECE)]
    if tensor.encoding == PLAIN:
        elements = np.frombuffer(parts[0], f"<u{tensor.width}")
        yield from (elements[begin : begin + size] for begin, size in sizes)
    elif tensor.encoding == PLANES:
        planes = _Planes(name, parts, tensor.elements, tensor.width)
        yield from (planes.read(size) for _, size in sizes)
    else:
        bits = _decode_bits(name, tensor, parts[0])
        planes = _Planes(name, parts[1:], _ones(bits), tensor.width)
        for begin, size in sizes:
            keep = np.unpackbits(bits[begin // 8 : (begin + size + 7) // 8], count=size)
            places = np.flatnonzero(keep)
            elements = np.zeros(size, f"<u{tensor.width}")
            elements[places] = planes.read(len(places))  # ten times as fast as to assign by a bool mask
            yield elements


def _decode_bits(name: str, tensor: PackedTensor, part: bytes | memoryview | bytearray) -> np.ndarray:
    """A sparse tensor's mask, [ceil(count / 8)] uint8, highest bit first."""
    frame = _Unpacked(name, part, (tensor.elements + 7) // 8)
    bits = frame.read(frame.left)
    if tensor.elements % 8 and bits[-1] & (255 >> tensor.elements % 8):
        raise PackedError(f"{name}: the mask has bits behind its last element")
    return bits


def _ones(bits: np.ndarray) -> int:
    return sum(int(_ONES[bits[begin : begin + PIECE]].sum()) for begin in range(0, len(bits), PIECE))


_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.int64)
"""Number of ones in each byte."""


class _Planes:
    """Reads ``count`` elements of ``width`` bytes from their byte planes."""

    def __init__(self, name: str, parts: Sequence[bytes | memoryview | bytearray], count: int, width: int):
        self._planes = [_Unpacked(name, part, count) for part in parts]
        self._width = width

    def read(self, count: int) -> np.ndarray:
        """The next ``count`` elements, as unsigned integers."""
        table = np.empty((count, self._width), np.uint8)
        for byte, plane in zip(reversed(range(self._width)), self._planes, strict=True):
            table[:, byte] = plane.read(count)
        return table.view(f"<u{self._width}")[:, 0]


class _Unpacked:
    """Reads the ``size`` bytes in a zstd frame, piece by piece.

    Attributes:
      left: how many are still to be read.

    Raises:
      PackedError: the frame announces or holds another number of bytes. No more than is asked for is ever allocated.
    """

    def __init__(self, name: str, part: bytes | memoryview | bytearray, size: int):
        self._name, self.left = name, size
        with self._telling():
            announced = zstandard.frame_content_size(part) if len(part) else 0
            if announced != size:
                raise PackedError(f"{name}: expected {size:,} bytes from a part of the tensor, but it announces {announced:,}")
            self._stream = zstandard.ZstdDecompressor().stream_reader(part, read_across_frames=True)

    def read(self, count: int) -> np.ndarray:
        """The next ``count`` bytes, [count] uint8."""
        buffer, end = np.empty(count, np.uint8), 0
        with self._telling():
            while end < count:
                if not (received := self._stream.readinto(buffer[end:].data)):
                    raise zstandard.ZstdError("it holds less than it announces")
                end += received
            self.left -= count
            if count and not self.left and self._stream.read(1):
                raise zstandard.ZstdError("it holds more than it announces")
        return buffer

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except zstandard.ZstdError as error:
            raise PackedError(f"{self._name}: a part of the tensor can't be decompressed ({error})") from error


# Headers and the index.


def stored_as(tensor: PackedTensor, begin: int) -> TensorSpan:
    """A tensor's entry in its packed file's header; as bytes unless plain."""
    size = sum(tensor.parts)
    if tensor.encoding == PLAIN:
        return TensorSpan(tensor.dtype, tensor.shape, begin, begin + size)
    return TensorSpan("U8", (size,), begin, begin + size)


def read_header(path: Path) -> tuple[bytes, dict[str, TensorSpan]]:
    """The header of a safetensors file, and its tensors by their offsets.

    The header is returned as it is stored, without its length.

    Raises:
      PackedError: the file is missing, or the header does not describe exactly the bytes behind it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))[0]
            if length > min(size - 8, _LARGEST_HEADER):
                raise PackedError(f"{path}: the header is damaged or the file is cut off: copy the file again")
            header = file.read(length)
    except FileNotFoundError:
        raise PackedError(f"{path} is missing: copy the folder again") from None
    spans = _parse_header(header, str(path))
    if (expected := 8 + length + max((span.end for span in spans.values()), default=0)) != size:
        raise PackedError(f"{path} has {size:,} bytes, expected {expected:,} by its header: copy the file again")
    return header, spans


def _parse_header(header: bytes, where: str) -> dict[str, TensorSpan]:
    """The tensors that a header lists, in the order of their offsets.

    They cover the bytes behind the header without gap or overlap.
    """
    try:
        record = json.loads(header.decode())
        entries = {name: entry for name, entry in record.items() if name != "__metadata__"}
    except (ValueError, RecursionError, AttributeError) as error:
        raise PackedError(f"{where}: the header is damaged, it is no JSON object: copy the file again") from error
    spans = {}
    for name, entry in entries.items():
        try:
            begin, end = entry["data_offsets"]
            span = TensorSpan(entry["dtype"], tuple(entry["shape"]), begin, end)
            right = _counts((begin, end, *span.shape)) and span.dtype in BITS and end - begin == nbytes_of(span.dtype, span.shape)
            right = right and math.prod(max(1, size) for size in span.shape) < _MOST_ELEMENTS
        except (TypeError, ValueError, KeyError):
            right = False
        if not right:
            raise PackedError(
                f"{where}: dtype, shape and offsets of the tensor {name} do not fit each other in the header: copy the file again"
            )
        spans[name] = span
    spans = dict(sorted(spans.items(), key=lambda item: item[1][2:]))
    end = 0
    for name, span in spans.items():
        if span.begin != end:
            raise PackedError(f"{where}: the tensor {name} begins at byte {span.begin:,}, expected {end:,}: copy the file again")
        end = span.end
    return spans


def _counts(numbers: Iterable[Any]) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)


def width_of(dtype: str) -> int:
    return max(1, BITS[dtype] // 8)


def nbytes_of(dtype: str, shape: Sequence[int]) -> int:
    return (math.prod(shape) * BITS[dtype] + 7) // 8


def _parse_tensor(name: str, entry: Mapping[str, Any]) -> PackedTensor:
    """A tensor of the index.

    Raises:
      PackedError: the entry is not as the format wants it.
    """
    try:
        tensor = PackedTensor(**entry)._replace(shape=tuple(entry["shape"]), parts=tuple(entry["parts"]))
        parts = {PLAIN: 1, PLANES: tensor.width, SPARSE: 1 + tensor.width}[tensor.encoding]
        right = _counts((*tensor.shape, *tensor.parts)) and len(tensor.parts) == parts
        right = right and (tensor.encoding != PLAIN or tensor.parts == (tensor.nbytes,))
    except (TypeError, KeyError):
        right = False
    if not right:
        raise PackedError(f"{INDEX}: the entry of the tensor {name} is damaged")
    return tensor


def _inside(folder: Path, name: str) -> Path:
    """The path of a name of the index, which must stay inside the folder.

    ``optima_tpu.runtime.inside`` has the reasons.

    Raises:
      PackedError: the name, or a link that it leads through, leaves the folder; or it is a pipe, a socket or a device.
    """
    try:
        encoded = name.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        encoded = b""
    parts = encoded.split(b"/")
    outside = name.startswith("/") or PureWindowsPath(name).drive or {*name} & {*"\\\0"} or {*parts} & {b"", b".", b".."}
    if outside or len(encoded) > 1024 or any(len(part) > 255 for part in parts):
        raise PackedError(f"{INDEX} names {name[:200]!r}, which is not a file of its own folder")
    path, home = folder / name, Path(os.path.realpath(folder))
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]  # of the hub's cache
    target = Path(os.path.realpath(path))
    if not any(map(target.is_relative_to, homes)):
        raise PackedError(f"{path} is a link to {target}, outside of the folder: copy that file into the folder")
    if path.exists() and not (path.is_file() or path.is_dir()):  # whoever read it might wait without end
        raise PackedError(f"expected a file, but {path} is a pipe, a socket or a device: copy its contents into a file")
    return path


def _read_index(path: Path) -> dict[str, Any]:
    try:
        if (size := path.stat().st_size) > _LARGEST_HEADER:
            raise PackedError(f"{path} has {size:,} bytes, expected at most {_LARGEST_HEADER:,}")
        data = path.read_bytes()
    except FileNotFoundError:
        raise PackedError(f"{path.parent} is no packed checkpoint: it has no {INDEX}") from None
    head, body = data[:78], data[78:]
    if head != f'{{"sha256": "{hashlib.sha256(body).hexdigest()}",'.encode():
        raise PackedError(f"{path} is damaged, its checksum differs: copy the file again")
    with _expecting(path):
        record: dict[str, Any] = json.loads(data)
        if (record["format"], record["version"]) != (FORMAT, VERSION):
            raise PackedError(
                f"{path}: expected {FORMAT}, version {VERSION}, got {record['format']}, version {record['version']}; "
                "a newer version of this program reads newer versions"
            )
    return record


@contextlib.contextmanager
def _expecting(path: Path) -> Iterator[None]:
    """Turns whatever a wrong structure of the index raises into one line."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise PackedError(f"{path} is not as the format wants it ({type(error).__name__}: {error})") from error


def read_at(file: BinaryIO, begin: int, size: int) -> bytes:
    file.seek(begin)
    return file.read(size)


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of a copy of this file. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Unpacks a packed checkpoint into the folder that transformers loads.")
    parser.add_argument("packed", type=Path, help=f"folder with {INDEX}")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.out.exists():
            raise PackedError(f"expected a new folder, got {chosen.out}, which exists")
        if (chosen.packed / INDEX).is_file() and chosen.out.resolve().is_relative_to(chosen.packed.resolve()):
            raise PackedError(f"expected a folder outside of {chosen.packed}, got {chosen.out}")
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        # Its name is random, so that it is no other program's, and no other user may enter it.
        with tempfile.TemporaryDirectory(".partial", f"{chosen.out.name[:40]}.", chosen.out.parent) as fresh:
            (partial := Path(fresh) / chosen.out.name).mkdir()
            Packed(chosen.packed).unpack(partial)
            os.rename(partial, chosen.out)
    except (PackedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
