"""Sets how long XLA lets one device of a process wait for another.

Does not import jax, because XLA reads its flags only once.
"""

import importlib.metadata
import os
import subprocess
import sys

# Seconds. Each device solves its rows in its own loop, and two loops may end minutes apart: for SmolLM2's down_proj in block 11,
# with the paper's settings, one of two devices was 57 s late. XLA's CPU runtime treats a device that is 60 s late as stuck, its
# GPU runtime one that is 40 s late, and both abort the process.
_WARN, _ABORT = 3_600, 24 * 3_600
_CPU = {"xla_cpu_collective_call_warn_stuck_timeout_seconds": _WARN, "xla_cpu_collective_call_terminate_timeout_seconds": _ABORT}
_GPU = {
    "xla_gpu_executable_warn_stuck_timeout": _WARN,
    "xla_gpu_executable_terminate_timeout": _ABORT,
    "xla_gpu_first_collective_call_warn_stuck_timeout_seconds": _WARN,
    "xla_gpu_first_collective_call_terminate_timeout_seconds": _ABORT,
}


def raise_collective_timeouts(simulated: int | None) -> None:
    """Adds the flags that these devices need to ``XLA_FLAGS``.

    Flags that are already set, or a file of flags, stay unchanged.

    Call it before anything asks jax for its devices.

    Args:
      simulated: the number of simulated CPU devices; None means the devices of the machine, whose CPU the environment may split.
    """
    given = os.environ.get("XLA_FLAGS", "").strip()
    flags: dict[str, int] = {}
    if simulated is None and any(
        "cuda" in plugin.name or "rocm" in plugin.name for plugin in importlib.metadata.entry_points(group="jax_plugins")
    ):
        flags |= _GPU
    divided = "--xla_force_host_platform_device_count" in given or "JAX_NUM_CPU_DEVICES" in os.environ
    if simulated != 1 and (simulated or divided):
        flags |= _CPU
    wanted = [f"--{name}={seconds}" for name, seconds in flags.items() if name not in given]
    if wanted and (not given or given.startswith("-")):
        os.environ["XLA_FLAGS"] = " ".join([given, *filter(is_known, wanted)]).strip()


def is_known(flag: str) -> bool:
    """Whether this XLA knows a flag, tested in another process."""
    read_flags = "from jaxlib import xla_client; xla_client.CompileOptions()"  # without starting a backend
    environment = os.environ | {"XLA_FLAGS": flag}  # of another process: XLA aborts one that sets an unknown flag
    return subprocess.run([sys.executable, "-c", read_flags], env=environment, capture_output=True).returncode == 0
