"""How many bytes a run may use of each device."""

import contextlib
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import jax

from optima_tpu.runtime.processes import everyones

GIB = 2**30

# The rest is for compiled programs, fragmentation and what XLA's scheduling adds; on the CPU also for what the host holds.
_DEVICE_SHARE, _CPU_SHARE = 0.8, 0.5

# Of a container, in both versions of Linux' control groups.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def device_budget(gib: float | None, memory: float | None = None) -> float:
    """The bytes that a run may use of each device; the same on every process.

    Args:
      gib: what the user allows; None stands for a share of what the devices report. CPU devices report nothing: they share
        the machine's memory.
      memory: bytes of a device that is not here; None asks those that are.
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
    # All processes must run one program.
    return min(everyones(budget))


def host_memory(limits: Sequence[str] = _LIMITS) -> int:
    """Bytes of memory of this machine, or fewer where a container may have no more.

    Args:
      limits: files that may hold a limit; those that are missing or say "max" hold none.
    """
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in limits:
        with contextlib.suppress(OSError, ValueError):
            found.append(int(Path(path).read_text()))
    return min(found)
