"""Packed checkpoints are exact; damage and false claims are refused."""

import filecmp
import hashlib
import json
import math
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from optima_tpu import launch, verify
from optima_tpu import unpack as unpacking
from optima_tpu.errors import UserError
from optima_tpu.export import main as export_main
from optima_tpu.models.checkpoints import open_model, packed, packing, refuse_damaged_model
from optima_tpu.models.checkpoints.export import export, is_export_of, read_masks
from optima_tpu.models.checkpoints.forms import Options
from optima_tpu.models.checkpoints.packed import BITS, INDEX, Packed, PackedError
from optima_tpu.models.checkpoints.packing import Packer
from optima_tpu.runtime import checksums
from optima_tpu.runtime.files import begin
from tests.support import refusals
from tests.support.fake_run import finished_run, small_model
from tests.support.runs import assert_same_weights, only_error, snapshot
from tests.support.tiny_models import tiny_folder

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
"""Name -> dtype of safetensors, shape, bytes."""


def write_file(path: Path, tensors: Tensors, padding: int = 0) -> Path:
    """A safetensors file of any dtypes, with spaces behind its header."""
    entries, end = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + len(data)]}
        end += len(data)
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode() + b" " * padding
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"".join(data for *_, data in tensors.values()))
    return path


def packed_folder(folder: Path, tensors: Tensors, masks=None) -> Path:
    source = write_file(folder / "plain" / "model.safetensors", tensors)
    out = folder / "packed"
    out.mkdir()
    packer = Packer(out)
    packer.add_weights(source, masks)
    packer.finish()
    return out


def pack(folder: Path, out: Path) -> None:
    """Packs every safetensors file of a folder, and copies its other files."""
    packer = Packer(out)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.suffix == ".safetensors":
            packer.add_weights(path)
        else:
            packer.add_file(path, path.relative_to(folder).as_posix())
    packer.finish()


def restored(source: Path, out: Path) -> Path:
    out.mkdir()
    Packed(source).unpack(out)
    return out


def assert_same_folder(actual: Path, expected: Path) -> None:
    names = [{path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in (actual, expected)]
    assert names[0] == names[1]
    assert [name for name in names[0] if not filecmp.cmp(actual / name, expected / name, shallow=False)] == []


def bf16(values) -> tuple[str, tuple[int, ...], bytes]:
    array = np.asarray(values, ml_dtypes.bfloat16)
    return "BF16", array.shape, array.tobytes()


@st.composite
def tensors_of_any_kind(draw) -> tuple[Tensors, dict[str, np.ndarray]]:
    """Draws tensors with random bits and zeros, and masks for some of them.

    A mask keeps every weight whose bits are not all zero, and some zeros.
    """
    tensors: Tensors = {}
    masks = {}
    for index in range(draw(st.integers(0, 4))):
        dtype = draw(st.sampled_from(sorted(BITS)))
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        if BITS[dtype] < 8:
            shape = (*shape, 4)  # whole bytes
        random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        count, width = math.prod(shape), max(1, BITS[dtype] // 8)
        keep = random.random(count) >= draw(st.sampled_from([0, 0.03, 0.5, 0.97, 1]))
        if BITS[dtype] < 8:
            data = random.integers(0, 256, count * BITS[dtype] // 8, np.uint8)
        else:
            data = random.integers(0, 256, (count, width), np.uint8)
            data[~keep] = 0
            data[: count // 3] &= draw(st.sampled_from([0x80, 0xFF]))  # zeros, and values that are -0.0
            if len(shape) == 2 and draw(st.booleans()):
                masks[f"tensor {index}"] = (keep | data.any(axis=1)).reshape(shape)
        tensors[f"tensor {index}"] = dtype, shape, data.tobytes()
    return tensors, masks


@given(tensors_of_any_kind(), st.integers(0, 9))
def test_every_file_comes_back_byte_for_byte(tmp_path_factory, drawn, padding):
    tensors, masks = drawn
    folder = tmp_path_factory.mktemp("any")
    source = write_file(folder / "plain" / "model.safetensors", tensors, padding)
    (folder / "packed").mkdir()
    packer = Packer(folder / "packed")
    packer.add_weights(source, masks)
    packer.finish()
    out = restored(folder / "packed", folder / "out")
    assert (out / "model.safetensors").read_bytes() == source.read_bytes()
    stored = read_masks(out) if masks else {}
    assert stored.keys() == masks.keys() and all(np.array_equal(stored[name], masks[name]) for name in masks)
    opened = Packed(folder / "packed")
    for name, (dtype, shape, data) in tensors.items():
        assert opened.read(name).tobytes() == data and opened.tensors[name][1:3] == (dtype, shape)
    with safe_open(folder / "packed" / "packed-model.safetensors", "np") as file:  # the packed file is itself one of safetensors
        assert set(file.keys()) == set(tensors)


def test_the_dtypes_are_those_of_safetensors(tmp_path):
    write_file(tmp_path / "file", {"x": ("NONE", (0,), b"")})
    with pytest.raises(Exception, match="unknown variant") as error:
        safe_open(tmp_path / "file", "np")
    assert set(str(error.value).partition("expected one of ")[2].partition(" at line")[0].replace("`", "").split(", ")) == set(
        BITS
    )


def test_rows_without_and_full_of_weights_signs_of_zero_and_payloads_of_nan(tmp_path):
    payloads = np.array([0x7FC0, 0x7F81, 0xFFFF, 0x8000, 0x0001, 0], np.uint16)
    weight = np.zeros((4, 6), np.uint16)
    weight[1], weight[2, ::2] = payloads, 0x8000
    column = np.zeros((5, 1), np.uint16)
    column[3] = 0x8000
    tensors = {
        "weight": ("BF16", weight.shape, weight.tobytes()),
        "column": ("BF16", column.shape, column.tobytes()),
        "norm": ("BF16", payloads.shape, payloads.tobytes()),
        "scalar": ("F32", (), struct.pack("<f", 1.5)),
        "zero": ("F64", (3, 0, 2), b""),
    }
    out = packed_folder(tmp_path, tensors, {"weight": weight != 0, "column": column != 0})
    assert_same_folder_but_masks(restored(out, tmp_path / "out"), tmp_path / "plain")
    assert Packed(out).tensors["weight"].encoding == "sparse"


def assert_same_folder_but_masks(actual: Path, expected: Path) -> None:
    (actual / packed.MASKS).unlink()
    assert_same_folder(actual, expected)


def test_a_mask_that_prunes_a_minus_zero_is_refused(tmp_path):
    with pytest.raises(PackedError, match="weight: the mask prunes weights whose bits are not zero"):
        packed_folder(tmp_path, {"weight": bf16([[-0.0, 1]])}, {"weight": np.array([[False, True]])})


def pruned_matrix(share: float, shape=(256, 512), nm: bool = False) -> np.ndarray:
    """Normal weights, the smallest zeroed overall or in each group of four."""
    weight = np.random.default_rng(0).standard_normal(shape).astype(ml_dtypes.bfloat16)
    size = np.abs(weight.astype(np.float32))
    if nm:
        groups = size.reshape(-1, 4)
        keep = (np.argsort(np.argsort(groups)) >= 2).reshape(shape)
    else:
        keep = size > np.quantile(size, share)
    return np.where(keep, weight, np.zeros((), weight.dtype))


@pytest.mark.parametrize(
    ("weight", "bits"),
    # Bits a weight: those of the mask by its entropy (1, 0.88, 0.65), and some 10 for each kept weight.
    [(pruned_matrix(0.5), 6.2), (pruned_matrix(0.7), 4.1), (pruned_matrix(0, nm=True), 6.0)],
    ids=["half", "70%", "2:4"],
)
def test_a_pruned_matrix_takes_what_its_mask_and_its_values_take(tmp_path, weight, bits):
    (tensor,) = Packed(packed_folder(tmp_path, {"w": bf16(weight)})).tensors.values()
    assert tensor.encoding == "sparse"
    assert bits - 0.5 < 8 * sum(tensor.parts) / weight.size < bits


def test_the_smallest_encoding_is_taken(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)
    tensors = {
        "noise": ("U8", noise.shape, noise.tobytes()),
        "dense": bf16(np.random.default_rng(0).standard_normal(4096)),
        "zeros": bf16(np.zeros(4096)),
    }
    stored = Packed(packed_folder(tmp_path, tensors)).tensors
    assert {name: tensor.encoding for name, tensor in stored.items()} == {"noise": "plain", "dense": "planes", "zeros": "sparse"}


# Damage.


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A packed folder: a tensor of each encoding, a mask, a copied file."""
    folder = tmp_path_factory.mktemp("small")
    noise = np.random.default_rng(0).integers(0, 256, 40, np.uint8)
    weight = np.zeros((8, 24), ml_dtypes.bfloat16)
    weight[:, ::3] = np.random.default_rng(1).standard_normal((8, 8))
    tensors = {"noise": ("U8", noise.shape, noise.tobytes()), "weight": bf16(weight), "dense": bf16(np.ones(64))}
    out = packed_folder(folder, tensors, {"weight": weight != 0})
    packer_file = out / "config.json"
    packer_file.write_text("{}\n")
    change_index(out, lambda record: record["files"].update({"config.json": hashlib.sha256(b"{}\n").hexdigest()}))
    assert [tensor.encoding for tensor in Packed(out).tensors.values()] == ["plain", "sparse", "planes"]
    return out


def change_index(folder: Path, change) -> None:
    """What a forger can do: another index with the right checksum."""
    record = json.loads((folder / INDEX).read_bytes())
    del record["sha256"]
    change(record)
    (folder / INDEX).write_bytes(packing.sealed(record))


@pytest.fixture
def copy(small, tmp_path) -> Path:
    return shutil.copytree(small, tmp_path / "copy")


def refusal(folder: Path) -> str:
    """Returns a folder's one-line refusal; checks that nothing is left."""
    line = refusals.refusal(unpacking.unpack, folder, folder.with_name("out"))
    assert not list(folder.parent.glob("out*"))
    return line


def test_no_byte_of_a_tensor_can_change_unseen(copy, small):
    path = copy / "packed-model.safetensors"
    data = path.read_bytes()
    length = 8 + struct.unpack("<Q", data[:8])[0]
    opened = Packed(small)
    owner = {length + at: name for name, span in packed.read_header(path)[1].items() for at in range(span.begin, span.end)}
    assert set(owner) == set(range(length, len(data)))
    for at, name in owner.items():
        for bit in (0x01, 0x80):
            path.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
            for other in opened.tensors:
                if other != name:
                    Packed(copy).read(other)
            with pytest.raises(PackedError, match=f"the tensor {name} is damaged"):
                Packed(copy).read(name)
    assert name in refusal(copy)


@pytest.mark.parametrize("file", ["packed-model.safetensors", INDEX])
def test_no_byte_of_a_header_or_of_the_index_can_change_unseen(copy, file):
    path = copy / file
    data = path.read_bytes()
    length = 8 + struct.unpack("<Q", data[:8])[0] if file != INDEX else len(data)
    for at in range(length):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        with pytest.raises(PackedError, match=file) as error:
            Packed(copy)
        assert re.search("copy the (file|folder) again", str(error.value))
    for damaged in (data[:-1], data + b"\0", b"", data[:5]):
        path.write_bytes(damaged)
        assert file in (message := refusal(copy)) and "copy the file again" in message
    path.unlink()
    assert file in refusal(copy)


def test_a_damaged_file_of_weights_is_named_with_its_sizes_and_tensors(copy, small):
    path = copy / "packed-model.safetensors"
    data, tensors = path.read_bytes(), ", ".join(Packed(small).tensors)
    path.write_bytes(data[:-3])
    holds = f"copy the file again; {INDEX} says that the file holds {tensors}"
    assert refusal(copy) == f"{path} has {len(data) - 3:,} bytes, expected {len(data):,} by its header: {holds}"
    path.write_bytes(data[:8] + b"[" + data[9:])
    assert refusal(copy) == f"{path}: the header is damaged, it is no JSON object: {holds}"


def test_a_copied_file_is_checked_too(copy):
    (copy / "config.json").write_text("{ }\n")
    assert "config.json is damaged" in refusal(copy)
    (copy / "config.json").unlink()
    assert "config.json is missing" in refusal(copy)


# Lies: the checksums are right, because whoever made the folder made them.


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: r.update(version=2), "expected optima-packed, version 1, got optima-packed, version 2"),
        (lambda r: r.update(tensors=[]), "is not as the format wants it"),
        (lambda r: r.pop("weights"), "is not as the format wants it"),
        (lambda r: r["tensors"].pop("dense"), "disagree about the tensor dense"),
        (lambda r: r["tensors"].update(more=r["tensors"]["dense"]), "names the tensor more, but no file of weights holds it"),
        (lambda r: r["tensors"].update({"a\nb\x1b": r["tensors"]["dense"]}), "names the tensor a b , but no file of weights"),
        (lambda r: r["tensors"]["weight"].update(shape=[8, 25]), "disagree about the tensor weight"),
        (lambda r: r["tensors"]["weight"].update(shape=[8, "24"]), "the entry of the tensor weight is damaged"),
        (lambda r: r["tensors"]["weight"].update(shape=[-8, -24]), "the entry of the tensor weight is damaged"),
        (lambda r: r["tensors"]["weight"].update(dtype="F16"), "disagree about the tensor weight"),
        (lambda r: r["tensors"]["weight"].update(dtype="pickle"), "the entry of the tensor weight is damaged"),
        (lambda r: r["tensors"]["weight"].update(parts=[1, 2]), "the entry of the tensor weight is damaged"),
        (lambda r: r["tensors"]["weight"].update(parts=[1, 2, 3]), "disagree about the tensor weight"),
        (lambda r: r["tensors"]["weight"].update(encoding="code"), "the entry of the tensor weight is damaged"),
        (
            lambda r: r["tensors"]["weight"].update(file="../x"),
            "disagree about the tensor noise|disagree about the tensor weight",
        ),
        (lambda r: r["tensors"]["noise"].update(parts=[10**15]), "the entry of the tensor noise is damaged"),
        (lambda r: r.update(masks=["dense"]), "says that dense has a mask, but stores none"),
        (lambda r: r["files"].update({"../config.json": "0"}), "'../config.json', which is not a file of its own folder"),
        (lambda r: r["files"].update({"/etc/passwd": "0"}), "'/etc/passwd', which is not a file of its own folder"),
        (lambda r: r["files"].update({"a\\..\\b": "0"}), "which is not a file of its own folder"),
        (lambda r: r["weights"]["model.safetensors"].update(packed="../x"), "'../x', which is not a file of its own folder"),
        (lambda r: r["weights"].update({"../x": r["weights"].pop("model.safetensors")}), "'../x', which is not a file"),
        (lambda r: r["weights"].update(again=r["weights"]["model.safetensors"]), "disagree about the tensor noise"),
        (lambda r: r["weights"]["model.safetensors"].update(header="{"), "the header is damaged, it is no JSON object"),
        (lambda r: r["weights"]["model.safetensors"].update(header="[" * 10**5), "the header is damaged, it is no JSON object"),
        (lambda r: r["weights"]["model.safetensors"].update(header="{}"), "disagree about the tensor noise"),
    ],
)
def test_an_index_that_lies_is_refused_in_one_line(copy, change, expected):
    change_index(copy, change)
    with pytest.raises(PackedError, match=expected) as error:
        Packed(copy)
    assert refusal(copy) == str(error.value)


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [
        (0, 10**9, "dtype, shape and offsets of the tensor noise do not fit"),
        (10**9, 10**9 + 40, "the tensor weight begins at byte 40, expected 0"),
        (-40, 0, "dtype, shape and offsets of the tensor noise do not fit"),
        (10**30, 10**30 + 40, "the tensor weight begins at byte 40, expected 0"),
        (0.0, 40, "dtype, shape and offsets of the tensor noise do not fit"),
    ],
)
def test_offsets_outside_the_file_are_refused(copy, begin, end, expected):
    path = copy / "packed-model.safetensors"
    header, _ = packed.read_header(path)
    record = json.loads(header)
    record["noise"]["data_offsets"] = [begin, end]
    lie = json.dumps(record).encode()
    path.write_bytes(struct.pack("<Q", len(lie)) + lie + path.read_bytes()[8 + len(header) :])
    assert expected in refusal(copy)


def with_part(folder: Path, index: int, part: bytes) -> None:
    """Replaces a part of ``weight`` and updates every size and checksum."""
    opened = Packed(folder)
    parts = [bytes(stored) for stored in opened._parts("weight")]
    parts[index] = part
    tensor = opened.tensors["weight"]
    tensor = tensor._replace(parts=tuple(map(len, parts)), sha256=hashlib.sha256(b"".join(parts)).hexdigest())
    spans, body, end = {}, b"", 0
    for name, old in opened.tensors.items():
        stored = b"".join(parts if name == "weight" else map(bytes, opened._parts(name)))
        spans[name] = packed.stored_as(tensor if name == "weight" else old, end)
        body, end = body + stored, end + len(stored)
    header = packing.header_of(spans)
    (folder / "packed-model.safetensors").write_bytes(header + body)

    def change(record):
        record["tensors"]["weight"] = tensor._asdict()
        record["weights"]["model.safetensors"]["packed_header"] = hashlib.sha256(header).hexdigest()

    change_index(folder, change)


def frame(size: int, **how) -> bytes:
    return zstandard.ZstdCompressor(**how).compress(bytes(size))


def announcing(size: int) -> bytes:
    """A Zstandard frame that announces ``size`` bytes and holds none.

    Magic number, descriptor of a size of 8 bytes in one segment, the size, an empty last block.
    """
    return b"\x28\xb5\x2f\xfd" + b"\xe0" + struct.pack("<Q", size) + b"\x01\x00\x00"


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (frame(10**8), "weight: expected 24 bytes from a part of the tensor, but it announces 100,000,000"),
        (announcing(2**62), "weight: expected 24 bytes from a part of the tensor, but it announces 4,611,"),
        (frame(24, write_content_size=False), "weight: expected 24 bytes"),
        (frame(23), "weight: expected 24 bytes from a part of the tensor, but it announces 23"),
        (b"", "weight: expected 24 bytes from a part of the tensor, but it announces 0"),
        (b"no frame at all, but some text", "weight: a part of the tensor can't be decompressed"),
        (frame(24) + frame(10**7), "weight: a part of the tensor can't be decompressed"),
        (announcing(24), "weight: a part of the tensor can't be decompressed"),
        (frame(24), "weight: expected 0 bytes from a part of the tensor, but it announces 64"),  # a mask of other weights
    ],
)
def test_a_part_never_grows_beyond_its_tensor(copy, part, expected):
    with_part(copy, 0, part)
    tracemalloc.start()
    assert expected in refusal(copy)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6  # less than a copy of the smallest bomb


def test_a_mask_has_no_bits_behind_its_last_element():
    tensor, bits = packed.PackedTensor("file", "BF16", (1, 5), packed.SPARSE, (0, 0, 0), ""), zstandard.ZstdCompressor()
    assert packed._decode_bits("weight", tensor, bits.compress(b"\xf8")) == 0xF8
    with pytest.raises(PackedError, match="weight: the mask has bits behind its last element"):
        packed._decode_bits("weight", tensor, bits.compress(b"\xfc"))


def test_a_folder_that_the_disk_has_no_room_for_is_not_begun(copy, monkeypatch):
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 0, 100))
    assert "bytes, but" in refusal(copy)


def test_a_tensor_beyond_the_memory_is_refused_by_name(copy, monkeypatch):
    def full(*arguments):
        raise MemoryError

    monkeypatch.setattr(packed._Planes, "read", full)
    assert "weight unpacks to 384 bytes, more than this machine has room for" in refusal(copy)


def test_a_damaged_plain_file_is_not_packed(tmp_path):
    path = write_file(tmp_path / "plain" / "model.safetensors", {"a": bf16(np.ones(8))})
    path.write_bytes(path.read_bytes()[:-1])
    (tmp_path / "out").mkdir()
    with pytest.raises(PackedError, match=f"has {path.stat().st_size} bytes, expected {path.stat().st_size + 1} by its header"):
        pack(tmp_path / "plain", tmp_path / "out")


def test_memory_does_not_grow_with_the_number_of_tensors(tmp_path):
    weight = pruned_matrix(0.5)
    peaks = []
    for count in (2, 12):
        folder = tmp_path / str(count)
        write_file(folder / "plain" / "model.safetensors", {str(index): bf16(weight) for index in range(count)})
        (folder / "packed").mkdir()
        (folder / "out").mkdir()
        tracemalloc.start()
        pack(folder / "plain", folder / "packed")
        Packed(folder / "packed").unpack(folder / "out")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + weight.nbytes  # ten more tensors


# The module alone, the command lines, the program.


def test_a_copy_of_the_module_unpacks_alone(small, tmp_path):
    (tmp_path / "packed.py").write_bytes(Path(packed.__file__).read_bytes())
    code = (
        "import sys; known = set(sys.modules); sys.path.insert(0, '.'); import packed; status = packed.main(sys.argv[1:])\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - known} - set(sys.stdlib_module_names) - {'packed'}\n"
        "print(sorted(name for name in new if not name.startswith('_'))); sys.exit(status)"
    )

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-I", "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path)

    done = run(str(small), "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["wrote out", "['numpy', 'zstandard']"]
    assert_same_folder(tmp_path / "out", restored(small, tmp_path / "expected"))
    again = run(str(small), "out")
    assert again.returncode == 2 and "which exists" in only_error(again.stderr)
    nothing = run(str(tmp_path), "other")
    assert nothing.returncode == 2 and "no packed checkpoint" in only_error(nothing.stderr)
    assert not list(tmp_path.glob("other*"))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("finished") / "run"
    finished_run(directory, small_model(), model="owner/small@v1.0")
    return directory


@pytest.mark.parametrize("limit", [pytest.param("5GB", marks=pytest.mark.slow), "0.9KB"])
def test_a_packed_export_unpacks_to_the_plain_export(run, tmp_path, limit, capsys):
    export(run, tmp_path / "plain" / "out", Options(limit))
    (tmp_path / "small").mkdir()
    killed = begin(tmp_path / "small" / "out").parent
    assert export_main([str(run), str(tmp_path / "small" / "out"), "--packed", "--max-shard-size", limit]) == 0
    printed = capsys.readouterr().out
    assert f"left over: {killed}: " in printed and killed.is_dir()
    assert verify.main([str(tmp_path / "small" / "out")]) == 0
    assert f"left over: {killed}: " in capsys.readouterr().out
    plain = sum(path.stat().st_size for path in (tmp_path / "plain" / "out").glob("*.safetensors"))
    small = sum(path.stat().st_size for path in (tmp_path / "small" / "out").glob("*.safetensors"))
    small += (tmp_path / "small" / "out" / INDEX).stat().st_size
    assert f"weight files: plain {plain:,} bytes, packed {small:,} ({small / plain:.3f} of the plain)" in printed
    assert "1,152 weights; bits a weight: plain 16.00, packed " in printed
    assert unpacking.main([str(tmp_path / "small" / "out"), str(tmp_path / "out")]) == 0
    assert_same_folder(tmp_path / "out", tmp_path / "plain" / "out")
    assert unpacking.main([str(tmp_path / "out"), str(tmp_path / "again")]) == 2
    assert f"{tmp_path / 'out'} is a plain folder already" in capsys.readouterr().err and not (tmp_path / "again").exists()
    file = next((tmp_path / "small" / "out").glob("*.safetensors"))
    assert unpacking.main([str(file), str(tmp_path / "again")]) == 2
    assert f"expected a packed folder, got the file {file}: give {file.parent}\n" in capsys.readouterr().err
    assert is_export_of(run, tmp_path / "out") and not is_export_of(run, tmp_path / "small" / "out")


def test_what_exists_is_not_overwritten(run, small, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    for command, source in ((unpacking.main, small), (lambda words: export_main([*words, "--packed"]), run)):
        assert command([str(source), str(tmp_path)]) == 2
        assert "not empty" in only_error(capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_full_disk_leaves_nothing(run, small, tmp_path, monkeypatch):
    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Packer, "finish", full)
    monkeypatch.setattr(Packed, "_parts", full)
    with pytest.raises(UserError, match="No space left on device; nothing was left there"):
        export(run, tmp_path / "out", form="packed")
    with pytest.raises(UserError, match="No space left on device; nothing was left there"):
        unpacking.unpack(small, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_is_unpacked_into_the_packed_folder(copy):
    before = snapshot(copy)
    for out in (copy / "sub", copy / "sub" / "deeper"):
        with pytest.raises(UserError, match="expected a folder outside of the packed folder"):
            unpacking.unpack(copy, out)
        assert packed.main([str(copy), str(out)]) == 2
    assert snapshot(copy) == before


def test_two_programs_that_unpack_at_once_leave_one_whole_folder(small, tmp_path, monkeypatch):
    """The second begins while the first writes, and ends before it."""
    unpack = Packed.unpack

    def overtaken(opened, folder):
        unpack(opened, folder)
        monkeypatch.setattr(Packed, "unpack", unpack)
        unpacking.unpack(small, tmp_path / "out")

    monkeypatch.setattr(Packed, "unpack", overtaken)
    with pytest.raises(UserError, match="another program has written .*out meanwhile, and this one has written nothing"):
        unpacking.unpack(small, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not checksums.damage(tmp_path / "out")


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_packed_folder_is_a_model(tmp_path, dtype):
    plain = tiny_folder(tmp_path / "plain")
    (tmp_path / "packed").mkdir()
    pack(plain, tmp_path / "packed")
    expected, actual = (open_model(str(folder), dtype) for folder in (plain, tmp_path / "packed"))
    assert actual.assets == expected.assets  # without the index, which would make another folder a packed one
    assert actual.tensors.names() == expected.tensors.names()
    for name in actual.tensors.names():
        assert actual.tensors.shape(name) == expected.tensors.shape(name) and actual.tensors.dtype(
            name
        ) == expected.tensors.dtype(name)
        for index in ((...,), (slice(1, 3),), (..., slice(None, None, 2))):
            np.testing.assert_array_equal(actual.tensors.read(name, index), expected.tensors.read(name, index))
            assert actual.tensors.read(name, index).flags.writeable


def test_a_packed_model_is_pruned_as_the_plain_one(finished, tmp_path):
    (tmp_path / "packed").mkdir()
    pack(finished.model, tmp_path / "packed")
    words = [str(tmp_path / "packed") if word == str(finished.model) else word for word in finished.arguments]
    assert launch.main([*words, "--output", str(tmp_path / "run")]) == 0
    assert_same_weights(tmp_path / "run", finished.directory)


def test_a_damaged_packed_model_is_refused_where_it_is_read(tmp_path):
    (tmp_path / "packed").mkdir()
    pack(tiny_folder(tmp_path / "plain"), tmp_path / "packed")
    opened = Packed(tmp_path / "packed")
    name = "model.norm.weight"
    path = tmp_path / "packed" / opened.tensors[name].file
    data = bytearray(path.read_bytes())
    data[opened._begins[name]] ^= 1
    path.write_bytes(data)
    model = open_model(str(tmp_path / "packed"))
    with pytest.raises(UserError, match=f"the tensor {name} is damaged"):
        model.tensors.read(name)
    config = tmp_path / "packed" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(UserError, match="config.json is damaged"):
        open_model(str(tmp_path / "packed"))
    checksums.write_sums(tmp_path / "packed")
    config.write_text(config.read_text() + " ")
    with pytest.raises(
        UserError, match="config.json has .* copy the file again, or export the run again; .*verify .* names every"
    ):
        refuse_damaged_model(str(tmp_path / "packed"))
