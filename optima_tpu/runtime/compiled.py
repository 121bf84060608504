"""Keeps compiled programs in the user's cache folder, so that the next command with equal shapes does not compile them again."""

import hashlib
import platform as machine
from pathlib import Path

import jax

from optima_tpu.runtime.files import user_cache
from optima_tpu.runtime.mesh import platform

_PROCESSORS = Path("/proc/cpuinfo")


def keep_compiled_programs() -> None:
    """Lets jax read and write compiled programs in the user's cache folder, unless the user chose a folder or turned the cache off.

    Programs for a CPU are machine code of that CPU's instructions: another CPU that shares the home directory might stop at one it
    does not know. So each kind of CPU has its own folder.

    Raises:
      UserError: see :func:`platform`.
    """
    on_cpu = platform() == "cpu"  # first: it refuses devices that are not there, also for who chose a folder
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    folder = user_cache() / "xla"
    if on_cpu:
        folder /= f"cpu-{_kind_of_cpu()}"
        # Half of the time of a tiny run goes to programs that XLA compiles in less than jax's limit of a second.
        if jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 1.0:  # jax's default: the user chose none
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _kind_of_cpu() -> str:
    """A digest of the model and the instructions of this machine's CPU; where the system does not list them, of its name."""
    try:
        lines = _PROCESSORS.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    named = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "CPU implementer", "CPU part", "Features")
    facts = {line.strip() for line in lines if line.partition(":")[0].strip() in named}
    facts = facts or {machine.node(), machine.processor()}
    return hashlib.sha256("\n".join([machine.machine(), *sorted(facts)]).encode()).hexdigest()[:12]
