"""The devices, and what runs on them."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator

import jax

from benchmarks.accelerator.parts import Sizes
from optima_tpu.pipeline.plan.topology import CHIPS, GIB, Chip
from optima_tpu.runtime.device_memory import host_memory
from optima_tpu.runtime.version import code_version

_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
"""JAX's name of a chip -> its key in the plan's table."""


def known_chip() -> Chip | None:
    """The published figures of the first device; None if the plan has none."""
    return CHIPS.get(_KINDS.get(jax.devices()[0].device_kind, ""))


def devices(sizes: Sizes) -> Iterator[tuple[str, str]]:
    """Yields facts about the devices and the software: (what, value)."""
    first, chip = jax.devices()[0], known_chip()
    yield "platform", first.platform
    yield "devices", f"{jax.device_count()} x {_cpu_name() if first.platform == 'cpu' else first.device_kind}"
    limit = (first.memory_stats() or {}).get("bytes_limit")
    yield "memory of a device", f"{limit / GIB:.1f} GiB" if limit else "the host's"
    yield "host", f"{os.cpu_count()} cores, {host_memory() / GIB:.1f} GiB, load {os.getloadavg()[0]:.1f}"
    yield (
        "published peak",
        f"{chip.narrow / 1e12:g} TFLOP/s in bfloat16, {chip.bandwidth / 1e9:g} GB/s ({chip.source})"
        if chip
        else "not in the plan's table",
    )
    yield "optima-tpu", code_version()
    yield "python", platform.python_version()
    installed = {each.metadata["Name"] for each in importlib.metadata.distributions()}
    for name in sorted(installed & {"jax", "jaxlib", "libtpu", "flax", "numpy", "jax-cuda12-plugin", "jax-cuda13-plugin"}):
        yield name, importlib.metadata.version(name)


def _cpu_name() -> str:
    """The name of this machine's CPU."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), platform.machine())
    except OSError:
        return platform.machine()
