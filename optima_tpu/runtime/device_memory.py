"""The number of bytes that a run may use of each device."""

import contextlib
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import jax

from optima_tpu.runtime.processes import everyones

GIB = 2**30

# The rest is for compiled programs, fragmentation and what XLA's scheduling adds; on the CPU also for the host's own data.
_DEVICE_SHARE, _CPU_SHARE = 0.8, 0.5

# Files with the memory limit of a container, in both versions of Linux control groups.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def device_budget(gib: float | None, memory: float | None = None) -> float:
    """The bytes that a run may use of each device; the same on every process.

    Args:
      gib: GiB that the user allows; None takes a share of the memory that the devices report. CPU devices report nothing: they
        share the machine's memory.
      memory: bytes of a device that is not attached; None queries the attached devices.
    """
    if gib is not None:
        return gib * GIB
    if memory is not None:
        return _DEVICE_SHARE * memory
    devices = jax.local_devices()
    limits = [limit for device in devices if (limit := (device.memory_stats() or {}).get("bytes_limit"))]
    if len(limits) == len(devices):
        budget = _DEVICE_SHARE * min(limits)
    else:
        beside = everyones(platform.node()).count(platform.node())  # processes on this machine
        budget = _CPU_SHARE * host_memory() / (len(devices) * beside)
    # All processes must run the same program, so all take the smallest budget.
    return min(everyones(budget))


def host_memory(limits: Sequence[str] = _LIMITS) -> int:
    """The bytes of this machine's memory, or of its container's lower limit.

    Args:
      limits: files that may hold a limit; those that are missing or say "max" hold none.
    """
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in limits:
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(Path(path).read_text()))
    return min(sizes)
