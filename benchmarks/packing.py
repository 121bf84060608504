"""Measures the size and time of packed weights, beside a copy and zstd.

    python -m benchmarks.packing FOLDER [FOLDER ...] [--dtype bfloat16]

Each folder holds a plain export. Prints for each:

- the bytes of its safetensors files, of the same files compressed by zstd as they are, and packed; the bits that a weight of the
  pruned matrices takes when packed, and the share of their plain bytes
- the seconds of each way there and back, the fastest of several runs in alternation, with files in the page cache
- the peak resident set of a process that packs and unpacks the folder, and the same folder with its tensors several times over

Everything runs in one thread. Linux only.
"""

import argparse
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
import zstandard

from optima_tpu.models.checkpoints import open_model, packed
from optima_tpu.models.checkpoints.export import MASKS, read_masks
from optima_tpu.models.checkpoints.packed import Packed
from optima_tpu.models.checkpoints.packing import Packer

LEVEL = 3  # zstd's default

_PEAK = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
import packed
sys.modules["optima_tpu.models.checkpoints.packed"] = packed  # without the package above it, whose libraries take memory
import packing
source, room = map(pathlib.Path, sys.argv[2:])
for name in ("packed", "out"):
    (room / name).mkdir()
packer = packing.Packer(room / "packed")
for path in sorted(source.glob("*.safetensors")):
    packer.add_weights(path)
packer.finish()
packed.Packed(room / "packed").unpack(room / "out")
# Not ru_maxrss, which begins with the memory of the process that started this one.
status = pathlib.Path("/proc/self/status").read_text()
print(1024 * int(status.partition("VmHWM:")[2].split()[0]))
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.packing",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", help="plain exports, or any model that optima prune reads")
    parser.add_argument("--dtype", help="round the weights to this dtype first")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each; the fastest one counts")
    parser.add_argument("--copies", type=int, default=4, help="how often the larger model holds each tensor")
    arguments = parser.parse_args(argv)
    sizes, times, peaks = [], [], []
    for name in arguments.folders:
        with tempfile.TemporaryDirectory() as temporary:
            room = Path(temporary)
            plain = plain_folder(name, arguments.dtype, room / "plain")
            record, seconds = measured(plain, room, arguments.repeats)
            sizes.append("| " + " | ".join((name, *record)) + " |")
            copied = seconds["copy"]
            for way, elapsed in seconds.items():
                times.append(f"| {name} | {way} | {elapsed:.3f} | {elapsed / copied:.1f} |")
            large = plain_folder(name, arguments.dtype, room / "large", arguments.copies)
            for folder in (plain, large):
                peaks.append(f"| {name} | {weight_bytes(folder) / 2**20:.0f} | {peak(folder) / 2**20:.0f} |")
    head = "| folder | plain, bytes | zstd, bytes | packed, bytes | packed, share | matrices, bits a weight | matrices, share |"
    print("\n".join((head, "|---|" + "---|" * 6, *sizes, "")))
    print("\n".join(("| folder | way | seconds | times a copy |\n|---|---|---|---|", *times, "")))
    print("\n".join(("| folder | weights, MiB | peak of the process, MiB |\n|---|---|---|", *peaks)))


def plain_folder(model: str, dtype: str | None, folder: Path, copies: int = 1) -> Path:
    """Writes a model's weights, a file for each copy, and its masks if any."""
    folder.mkdir()
    source = open_model(model, dtype).tensors
    tensors = {name: source.read(name) for name in source.names()}
    for copy in range(copies):
        prefix = f"copy {copy}." if copy else ""
        path = folder / f"model-{copy}.safetensors"
        safetensors.numpy.save_file({prefix + name: array for name, array in tensors.items()}, path, {"format": "pt"})
    if (masks := Path(model) / MASKS).is_file():
        shutil.copy(masks, folder / MASKS)
    return folder


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def masks_in(folder: Path) -> dict[str, np.ndarray]:
    return read_masks(folder) if (folder / MASKS).is_file() else {}


def pack(folder: Path, out: Path, masks: dict[str, np.ndarray]) -> None:
    packer = Packer(fresh(out))
    for path in sorted(folder.glob("*.safetensors")):
        packer.add_weights(path, masks)
    packer.finish()


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def measured(plain: Path, room: Path, repeats: int) -> tuple[list[str], dict[str, float]]:
    """Returns the row of sizes, and the fastest seconds of each way."""
    (path,) = plain.glob("*.safetensors")
    masks = masks_in(plain)
    small, unpacked, compressed, copy = (room / name for name in ("packed", "unpacked", "compressed.zst", "copy"))
    ways: dict[str, Callable[[], object]] = {
        "copy": lambda: shutil.copyfile(path, copy),
        "zstd": lambda: stream(path, compressed, zstandard.ZstdCompressor(level=LEVEL).copy_stream),
        "pack": lambda: pack(plain, small, masks),
        "zstd, back": lambda: stream(compressed, copy, zstandard.ZstdDecompressor().copy_stream),
        "unpack": lambda: Packed(small).unpack(fresh(unpacked)),
    }
    best: dict[str, float] = {}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - started)
    assert (unpacked / path.name).read_bytes() == path.read_bytes()
    opened = Packed(small)
    pruned = [opened.tensors[name] for name in opened.masks]
    before, after = sum(tensor.nbytes for tensor in pruned), sum(sum(tensor.parts) for tensor in pruned)
    weights = sum(math.prod(tensor.shape) for tensor in pruned)
    sizes = path.stat().st_size, compressed.stat().st_size, opened.packed_bytes
    matrices = (f"{8 * after / weights:.2f}", f"{after / before:.3f}") if pruned else ("-", "-")
    return [*(f"{size:,}" for size in sizes), f"{sizes[2] / sizes[0]:.3f}", *matrices], best


def stream(source: Path, target: Path, codec: Callable) -> None:
    with source.open("rb") as read, target.open("wb") as write:
        codec(read, write)


def peak(folder: Path) -> int:
    """Returns the peak memory of packing and unpacking a folder, in bytes.

    The process imports nothing but the module.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        command = [sys.executable, "-c", _PEAK, str(Path(packed.__file__).parent), str(folder), temporary]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
