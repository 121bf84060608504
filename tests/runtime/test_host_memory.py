"""The process keeps memory that it has freed."""

import platform

import pytest

from optima_tpu.runtime import command
from tests.support.processes import python

FREED = """
import ctypes, resource, threading
from optima_tpu.runtime.host_memory import keep_freed_memory

keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def fresh_pages(size=128 << 20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    array = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
    ctypes.memset(array, 1, size)
    libc.free(array)
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

found = []
for _ in range(2):
    thread = threading.Thread(target=fresh_pages)
    thread.start()
    thread.join()
print(*found)
"""


GLIBC = platform.libc_ver()


@pytest.mark.skipif(GLIBC[0] != "glibc" or tuple(map(int, GLIBC[1].split("."))) < (2, 35), reason="needs glibc of 2.35 or newer")
def test_memory_that_one_thread_has_freed_serves_the_next_one():
    first, second = map(int, python("-c", FREED).stdout.split())
    assert first > 32 > second


def test_a_command_keeps_memory_before_it_reads_arguments(monkeypatch):
    """Reading arguments may load a library that starts threads.

    The arenas of these threads would then serve the devices.
    """
    done = []
    monkeypatch.setattr(command, "keep_freed_memory", lambda: done.append("kept"))
    monkeypatch.setattr(command, "rehearsed", lambda *_, **__: done.append("read"))
    monkeypatch.setattr(command, "real", lambda _: lambda arguments: 0)
    assert command.main("plan", []) == 0
    assert done == ["kept", "read"]
