"""The memory of the process on the host, which CPU devices use as theirs."""

import ctypes
import platform

# glibc's parameters and what they are set to, in malloc.h and mallopt(3).
_ARENA_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -3, -1
_KEPT = {_ARENA_MAX: 1, _MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: (1 << 31) - 1}


def keep_freed_memory() -> None:
    """Lets the process use freed memory again, where the C library would give arrays of tens of MB back to the system at once.

    XLA's CPU devices allocate the temporary arrays of a program at every call. The system hands out fresh pages, 4 KB at a time,
    filled with zeros: for 100 MB that takes 0.04 s of a core, as long as a product of 8 GFLOP. So up to 2 GiB stay with the process.
    One arena, since each of the others ends at 64 MiB. Call it before anything asks jax for its devices: a thread keeps the arena that
    it has. The setting is the process's. Accelerators have memory of their own, so their programs run as before. Does nothing with
    another C library than glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        for parameter, value in _KEPT.items():
            ctypes.CDLL(None).mallopt(ctypes.c_int(parameter), ctypes.c_int(value))
