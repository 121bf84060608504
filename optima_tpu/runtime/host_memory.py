"""The memory of the process on the host, which CPU devices use as theirs."""

import ctypes
import os
import platform

# glibc's parameters and what they are set to, in malloc.h and mallopt(3). The threshold first: glibc before 2.35 refuses it, and
# the others alone would make every array ask the system for pages.
_THRESHOLD = (-3, 1 << 30)
_KEPT = {-8: 1, -1: (1 << 31) - 1}  # the number of arenas; the free bytes at the heap's end that are given back


def keep_freed_memory() -> None:
    """Lets the process reuse freed memory instead of returning it at once.

    Otherwise the C library returns arrays of tens of MB to the system.

    XLA's CPU devices allocate the temporary arrays of a program at every call. The system hands out fresh pages, 4 KB at a time,
    filled with zeros: for 100 MB that takes 0.04 s of a core, as long as a product of 8 GFLOP. So arrays of up to 1 GiB come from
    the heap, which keeps what is freed until :func:`give_back_freed_memory`. One arena, since each of the others ends at 64 MiB.
    Call it before any library starts a thread, as pyarrow does, and jax with its devices: the arena of that thread stays, and is
    given to others. Does nothing where JAX_PLATFORMS names no CPU, with another C library than glibc, or with one before 2.35.
    """
    if "cpu" not in os.environ.get("JAX_PLATFORMS", "cpu") or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    if libc.mallopt(*map(ctypes.c_int, _THRESHOLD)):
        for parameter, value in _KEPT.items():
            libc.mallopt(ctypes.c_int(parameter), ctypes.c_int(value))


def give_back_freed_memory() -> None:
    """Gives freed memory back to the system, also between live arrays."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
