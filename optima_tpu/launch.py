"""The command line: ``python -m optima_tpu.launch``. Kept short; what happens is in ``optima_tpu.run``."""

import os
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from optima_tpu import processes
from optima_tpu.cli import parse
from optima_tpu.errors import UserError, one_line
from optima_tpu.sharding import simulate_devices

RESUME = 75
"""The exit status of a run that was told to stop: sysexits.h calls it a temporary failure. The same command goes on."""
LOST = 69
"""That of a process whose peers have ended (in sysexits.h: something is unavailable). Not ``RESUME``: whoever starts a job again
at 75 would start one again for ever in which a process fails each time. And below it: of several statuses srun has the highest,
which is to be 75 where a process was told to stop and the others lost it."""

_LAST = 3.0  # seconds in which the other processes notice for themselves that a run has ended
# What gloo, NCCL and jax's coordination service say when the other end is gone.
_PEER_GONE = re.compile("gloo|nccl|connection (closed|reset|refused)|coordination|heartbeat|socket closed|broken pipe", re.I)


class Stopped(BaseException):
    """SIGTERM. No Exception, so that nothing on its way takes it for an error that it knows how to handle."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 for something the user can mend, 69 where another process has ended, 75 after SIGTERM,
    130 for Ctrl-C."""
    return guarded(lambda: _launch(sys.argv[1:] if argv is None else argv),
                   "the same command goes on after the last finished block")


def _launch(argv: Sequence[str]) -> None:
    config = parse(argv)
    simulate_devices(config.cpu_devices)
    processes.start(config.coordinator, config.num_processes, config.process_id, config.join_timeout)
    # Only now: what these import asks for the devices.
    from optima_tpu.checkpoint import quiet_orbax
    from optima_tpu.run import run

    quiet_orbax()
    run(config)
    if processes.is_first():
        _draw(config.run_directory)


def guarded(command: Callable[[], None], again: str) -> int:
    """Runs a command as one of several processes, or alone, and says in one line what ended it.

    Args:
      again: what the same command does when it is given again.

    Returns:
      The exit status, see :func:`main`.
    """
    # Or transformers, when it is first imported, says that torch is missing, which is as it should be.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        command()
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()
    except UserError as error:
        told = isinstance(error, processes.SharedError) and not processes.is_first()
        return _ended(2, "" if told else f"error: {error}")
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
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _draw(directory: Path) -> None:
    """Leaves report.html. A run whose page can't be drawn is finished all the same."""
    from optima_tpu.report.page import PAGE, write_page  # matplotlib takes a moment, which --help and errors do not wait for

    path = directory / PAGE
    try:
        write_page([directory], path)
        again = f"python -m optima_tpu.report {shlex.quote(str(directory))}"
        print(f"\nto look at: {path}; side by side with other runs: {again} RUN ...", flush=True)
    except UserError as error:
        print(f"\n{PAGE} was not drawn: {error}", file=sys.stderr, flush=True)


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


if __name__ == "__main__":
    sys.exit(main())
