"""What every command line does around its work: the devices, the exit status, and one line for what ended it."""

import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import jax

from optima_tpu.errors import UserError, one_line
from optima_tpu.runtime import processes
from optima_tpu.runtime.files import user_cache
from optima_tpu.runtime.mesh import simulate_devices
from optima_tpu.runtime.xla_flags import raise_collective_timeouts

RESUME = 75
"""The exit status of a run that was told to stop: sysexits.h calls it a temporary failure. The same command goes on."""
LOST = 69
"""That of a process whose peers have ended (in sysexits.h: something is unavailable). Not ``RESUME``: whoever starts a job again
at 75 would start one again for ever in which a process fails each time. And below it: of several statuses srun has the highest,
which is to be 75 where a process was told to stop and the others lost it."""

_LAST = 3.0  # seconds in which the other processes notice for themselves that a run has ended
_GRACE = 30.0  # seconds after SIGTERM; Slurm's script and clouds give a minute or less
# What gloo, NCCL and jax's coordination service say when the other end is gone.
_PEER_GONE = re.compile(
    "gloo|nccl|connection (closed|reset|refused)|coordination|heartbeat|socket closed|broken pipe", re.IGNORECASE
)


class Stopped(BaseException):
    """SIGTERM. No Exception, so that nothing on its way takes it for an error that it knows how to handle."""


class OnDevices(Protocol):
    """The settings of a command that say where it runs; see ``config.RunConfig``. Properties, since settings are frozen."""

    @property
    def cpu_devices(self) -> int | None: ...
    @property
    def coordinator(self) -> str | None: ...
    @property
    def num_processes(self) -> int | None: ...
    @property
    def process_id(self) -> int | None: ...
    @property
    def join_timeout(self) -> int: ...


def take_devices(config: OnDevices, alone: bool = False) -> None:
    """Joins the other processes and takes the devices, as the settings say. To be called before the first array exists.

    Args:
      alone: the command knows nothing of other processes, and joins none.

    Raises:
      UserError: see :func:`processes.start`.
    """
    # Of a GPU XLA would leave a quarter unused; what is left here is for what it does not allocate itself (cuBLAS, NCCL).
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # its old name; XLA refuses both together
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.9")
    raise_collective_timeouts(config.cpu_devices)
    simulate_devices(config.cpu_devices)
    if not alone:
        processes.start(config.coordinator, config.num_processes, config.process_id, config.join_timeout)
    # Compilers of accelerators take minutes, which a run that goes on would take again. Those of CPUs are quick.
    if jax.default_backend() != "cpu" and jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(user_cache() / "xla"))


def guarded(command: Callable[[], int | None], again: str) -> int:
    """Runs a command as one of several processes, or alone, and says in one line what ended it.

    Args:
      command: returns its exit status; None is 0.
      again: what the same command does when it is given again.

    Returns:
      The exit status: that of the command, 2 for something the user can mend, 69 where another process has ended, 75 after
      SIGTERM, 130 for Ctrl-C. Of several processes 1 for any other error, which one that is alone raises.
    """
    # Or transformers, when it is first imported, says that torch is missing, which is as it should be.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        with _stoppable(again):
            status = command()
            if jax.distributed.is_initialized():
                jax.distributed.shutdown()
            return status or 0
    except UserError as error:
        told = isinstance(error, processes.SharedError) and not processes.is_first()
        return _ended(2, "" if told else f"error: {error}")
    except PermissionError as error:
        place = error.filename or "a file"
        return _ended(2, f"error: {place}: {error.strerror}; expected files that this user may read and write")
    except Stopped:
        return _ended(RESUME, f"stopped by SIGTERM; {again}")
    except KeyboardInterrupt:
        return _ended(130, f"stopped; {again}")
    except Exception as error:
        if processes.alone():
            raise
        if not _PEER_GONE.search(str(error)):
            return _ended(1, traceback.format_exc())
        # What was caught is said too: it may be this process's own, a download that broke off or an NCCL that found no network.
        found = f"{type(error).__name__}: {one_line(error)}"
        return _ended(LOST, f"process {jax.process_index()}: another process has ended, see its message (here: {found}); {again}")


@contextmanager
def _stoppable(again: str) -> Iterator[None]:
    """SIGTERM raises ``Stopped``, or ends the process where that is not heard.

    Python hears a signal between two of its own instructions: not while it waits for a program on the devices, which may take
    longer than whoever stops it will wait. A thread that the interpreter's own handler wakes at once then ends the process.
    """
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    before, woken = signal.signal(signal.SIGTERM, _stop), signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    done = threading.Event()
    listener = threading.Thread(target=_listen, args=(ear, done, again), daemon=True)
    listener.start()
    # A forked child has the pipe too: its own SIGTERM, such as that at the end of a pool, would be heard here.
    os.register_at_fork(after_in_child=lambda: done.is_set() or signal.signal(signal.SIGTERM, before))
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGTERM, before)
        os.close(mouth)  # which ends the thread
        listener.join()
        os.close(ear)


def _listen(ear: int, done: threading.Event, again: str) -> None:
    while number := os.read(ear, 1):
        if number[0] != signal.SIGTERM:
            continue
        until = time.monotonic() + _GRACE
        # Another handler than ours puts the stop off until a save is finished (files.uninterrupted).
        while time.monotonic() < until or signal.getsignal(signal.SIGTERM) is not _stop:
            if done.wait(0.1):
                return
        print(f"stopped by SIGTERM while the devices worked; {again}", file=sys.stderr, flush=True)
        os._exit(RESUME)


def _stop(number: int, frame: object) -> None:
    raise Stopped


def _ended(status: int, message: str) -> int:
    if message:
        print(message, file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        # An orderly end would wait for processes that may never come. Process 0 goes last: without it jax aborts the others,
        # which then could not say how they ended.
        sys.stdout.flush()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would change how this ends
        if processes.is_first():
            time.sleep(_LAST)
        os._exit(status)
    return status
