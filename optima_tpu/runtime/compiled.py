"""Keeps compiled programs in the user's cache folder for later commands."""

import contextlib
import hashlib
import platform as machine
from pathlib import Path

import jax

from optima_tpu.runtime.files import user_cache
from optima_tpu.runtime.mesh import platform

_PROCESSORS = Path("/proc/cpuinfo")

_MOST = 2 << 30
"""Bytes of compiled programs that a command leaves in the user's cache folder when it starts. A program for a CPU took 20 kB in
the middle and 265 kB at most, those of an evaluation and of half a run of SmolLM2-135M together 1 MB: so nobody who prunes a few
models loses one, and the folder of who tries a thousand shapes stays small beside a model. Not by
``jax_compilation_cache_max_size``: jax then reads a file for every stored program at every new one, keeps nothing more in a
folder that it filled without the limit, nor behind a program that was killed between its two files."""


def keep_compiled_programs() -> None:
    """Lets jax cache compiled programs in the user's cache folder.

    Does nothing if the user chose a folder or turned the cache off.

    Programs for a CPU are machine code of that CPU's instructions: another CPU that shares the home directory might stop at one
    it does not know. So each kind of CPU has its own folder.

    Raises:
      UserError: see :func:`platform`.
    """
    on_cpu = platform() == "cpu"  # first: it refuses devices that are not there, also for who chose a folder
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    folder = user_cache() / "xla"
    _remove_oldest(folder)
    if on_cpu:
        folder /= f"cpu-{_kind_of_cpu()}"
        # Half of the time of a tiny run goes to programs that XLA compiles in less than jax's limit of a second.
        if jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 1.0:  # jax's default: the user chose none
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _remove_oldest(folder: Path) -> None:
    """Removes the least recently read files until ``_MOST`` bytes remain.

    File systems may note the day of the last reading alone, or only that of the writing.
    """
    files = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another process removes files too
            if path.is_file() and not path.is_symlink():
                state = path.stat()
                files.append((max(state.st_atime, state.st_mtime), state.st_size, path))
    left = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if left <= _MOST:
            return
        with contextlib.suppress(OSError):
            path.unlink()
            left -= size


def _kind_of_cpu() -> str:
    """A digest of this CPU's model and instructions, or of its name."""
    try:
        lines = _PROCESSORS.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    named = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "CPU implementer", "CPU part", "Features")
    facts = {line.strip() for line in lines if line.partition(":")[0].strip() in named}
    facts = facts or {machine.node(), machine.processor()}
    return hashlib.sha256("\n".join([machine.machine(), *sorted(facts)]).encode()).hexdigest()[:12]
