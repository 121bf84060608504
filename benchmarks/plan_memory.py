"""Compares a plan's device memory with the memory of pruning one block.

    python -m benchmarks.plan_memory --mesh 4x2

A block is pruned on simulated devices as in a run: calibration with held-out windows, pruning, forward pass of the pruned
block, on a random Llama. Simulated devices keep their arrays in this process's memory. So the measured value is the growth of
the resident set: its peak (VmHWM, reset before) minus its size before. A first block is pruned to compile; the second, with new
weights, is measured. Linux only.
"""

import argparse
import ctypes
import dataclasses
import re
import sys
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from optima_tpu.config.run_config import Calibration, RunConfig
from optima_tpu.runtime.mesh import simulate_devices


class RandomTensors:
    """A ``TensorSource`` that draws tensors. Every read returns a new copy."""

    def __init__(self, declared):
        self.declared = declared

    def names(self):
        return self.declared.names()

    def shape(self, name):
        return self.declared.shape(name)

    def dtype(self, name):
        return self.declared.dtype(name)

    def read(self, name, index=(...,)):
        shape = self.shape(name)
        drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32) / np.sqrt(shape[-1])
        return np.array((np.abs(drawn) + 1 if len(shape) == 1 else drawn)[index], self.dtype(name))


def resident(key: str = "VmRSS") -> int:
    """Returns the resident set in bytes; with "VmHWM" its peak since reset."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def settle() -> None:
    """Returns freed memory to the system and resets the peak."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan_memory",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--mesh", default="4x2")
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--d-ff", type=int, default=2048)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args(argv)
    # Fix the mmap threshold (M_MMAP_THRESHOLD), so that freed large arrays always go back to the system.
    ctypes.CDLL(None).mallopt(ctypes.c_int(-3), ctypes.c_int(1 << 16))
    data, model_axis = map(int, options.mesh.split("x"))
    simulate_devices(data * model_axis)

    from transformers import LlamaConfig

    from optima_tpu.models.activations import Activations
    from optima_tpu.pipeline.layer_groups import groups_of_blocks
    from optima_tpu.pipeline.plan.model import open_declared
    from optima_tpu.pipeline.plan.plan import make_plan
    from optima_tpu.pipeline.plan.topology import local_machine
    from optima_tpu.pipeline.walk import Streams, Walk, prune_block

    hf = LlamaConfig(
        vocab_size=512,
        hidden_size=options.d_model,
        intermediate_size=options.d_ff,
        num_hidden_layers=2,
        num_attention_heads=options.d_model // 64,
        num_key_value_heads=options.d_model // 192,
    )
    hf.architectures = ["LlamaForCausalLM"]
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        config = RunConfig(
            folder,
            mesh=options.mesh,
            batch=2,
            calibration=Calibration("random", windows=8 * data, length=options.length, held_out=data),
        )
        model = open_declared(folder, "float32", config.batch)
    target = local_machine(config.mesh, model.dtype)
    model = model.on(target.mesh)
    plan = make_plan(config, model, target, lambda line: print(line, file=sys.stderr))
    worst = max(plan.programs, key=lambda program: program.memory)
    planned = worst.memory * target.mesh.size

    decoder = dataclasses.replace(model.decoder, tensors=RandomTensors(model.decoder.tensors))
    text = config.calibration
    walk = Walk(decoder, config.recipe, groups_of_blocks(decoder), text.windows)
    values = np.random.default_rng(0).standard_normal((text.windows + text.held_out, text.length, options.d_model), np.float32)
    hidden = Activations.of(decoder.mesh, values)
    prune_block(walk, 0, next(decoder.blocks([0])), Streams(hidden.copy()))
    settle()
    before = resident()
    prune_block(walk, 1, next(decoder.blocks([1])), Streams(hidden))
    measured = resident("VmHWM") - before
    for program in plan.programs:
        print(f"{program.name:<32}{program.memory * target.mesh.size / 2**20:8.0f} MiB on {target.mesh.size} devices")
    print(f"planned   {planned / 2**20:8.0f} MiB, in {worst.name}")
    print(f"measured  {measured / 2**20:8.0f} MiB, {100 * measured / planned:.0f}% of the plan")


if __name__ == "__main__":
    main()
