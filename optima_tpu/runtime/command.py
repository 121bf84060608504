"""Runs a command: reads arguments, takes devices, sets the exit status."""

import errno
import os
import signal
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from optima_tpu.errors import UserError, legible, one_line, panics_refused
from optima_tpu.runtime import printing, signals
from optima_tpu.runtime.error_texts import peer_gone
from optima_tpu.runtime.host_memory import keep_freed_memory
from optima_tpu.runtime.light import lightly, real, rehearsed
from optima_tpu.runtime.program import COMMANDS, refuse_undecodable
from optima_tpu.runtime.version import code_version

if TYPE_CHECKING:
    from optima_tpu.runtime.devices import Devices

LOST = 69
"""Exit status of a process whose peers have ended (EX_UNAVAILABLE in sysexits.h). Not 75, ``signals.RESUME``: a scheduler that
restarts jobs on 75 would restart a permanently failing job for ever. And lower than 75: srun returns the highest of several
statuses, which must be 75 if one process was stopped and the others lost it."""

_REMEDIES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "expected files that this user may read and write"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room and repeat the command"),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP), "check the path"),
}
"""Number of an operating system's error that is about the user's files -> what to do."""


def main(name: str, argv: Sequence[str] | None = None) -> int:
    """Runs a command of the table and returns its status (:func:`guarded`).

    Args:
      name: its subcommand of ``optima``.
      argv: its arguments; None takes those of the process.
    """
    command, words = COMMANDS[name], list(sys.argv[1:] if argv is None else argv)
    keep_freed_memory()  # before the arguments are read: some of them load libraries that start threads

    def work() -> int | None:
        request = rehearsed(command.reader, words, first=lambda request: announce(command.opens(request)))
        # Loaded only now: most modules import JAX, which arguments need not wait for.
        return real(command.runner)(request)

    return guarded(work, command.again)


def announce(config: Any) -> None:
    """Prints the first line of a command that opens a model.

    The libraries load for seconds, and before they are loaded nothing is known of the model. Processes of a job print no such
    line, because which of them is the first is known only after they joined.

    Args:
      config: has the model and the processes, see ``Command.opens``; None for a command that opens no model.
    """
    if config and not lightly("optima_tpu.runtime.processes:may_join", config.coordinator):
        print(
            legible(f"starting     optima-tpu {code_version()}: loads JAX and the other libraries, then opens {config.model}"),
            flush=True,
        )


def take_devices(config: "Devices", alone: bool = False) -> None:
    """Joins the other processes and takes the devices that are configured.

    Call it before the first array exists.

    Args:
      alone: the command runs in one process and joins no others.

    Raises:
      UserError: see :func:`processes.start` and :func:`platform`.
    """
    import jax  # imported late, like the modules that import it: arguments are read and refused without it

    from optima_tpu.runtime import processes
    from optima_tpu.runtime.compiled import keep_compiled_programs
    from optima_tpu.runtime.mesh import simulate_devices
    from optima_tpu.runtime.xla_flags import raise_collective_timeouts

    signals.check()
    # By default XLA leaves a quarter of a GPU unused. The tenth that is left here is for cuBLAS and NCCL.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # its old name; XLA refuses both together
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.9")
    keep_freed_memory()
    raise_collective_timeouts(config.cpu_devices)
    simulate_devices(config.cpu_devices)
    if not alone:
        processes.start(config.coordinator, config.num_processes, config.process_id, config.join_timeout)
    if jax.distributed.is_initialized() and processes.is_first():  # without it jax aborts the other processes
        signals.end_later(processes.LAST)
    keep_compiled_programs()


def guarded(command: Callable[[], int | None], again: str) -> int:
    """Runs a command, in any number of processes, and prints what ended it.

    Args:
      command: returns its exit status; None means 0.
      again: says what the same command does when it is typed again.

    Returns:
      The command's exit status, even if a signal came before the command's end and the command finished all the same; 2 for an
      error that the user can correct, 69 if another process has ended, 75 after SIGTERM, 130 after Ctrl-C. Any other error: 1 in
      one of several processes, while a process that is alone raises the error. A process that joined others only inside the
      command ends here instead if they could not leave in order.
    """
    host = _joined()  # who joined the processes before, as Ray does, also leaves them, and goes on whatever the status is

    def leaving() -> int:
        status = command() or 0
        if not host and _joined() and (processes := _processes()):
            processes.leave()
        return status

    with signals.listening(again), warnings.catch_warnings():
        if not sys.warnoptions:  # python -W and PYTHONWARNINGS show the libraries' warnings to who develops
            warnings.simplefilter("ignore")
        status = _status(leaving, again)
        signals.ended(status)
        if not host and _joined() and (processes := _processes()):
            # An orderly shutdown would wait for processes that may never arrive. Process 0 exits last: without it jax aborts the
            # other processes, which then could not print how they ended.
            sys.stdout.flush()
            if processes.is_first():
                time.sleep(processes.LAST)
            os._exit(status)
        return status


def _processes() -> types.ModuleType | None:
    """The module ``processes``; None if it was not imported yet."""
    return sys.modules.get("optima_tpu.runtime.processes")


def _status(command: Callable[[], int], again: str) -> int:
    try:
        with panics_refused("a library in Rust ended the command; a file that it read may be damaged"):
            return _printed(command)
    except _Unprinted as refused:
        return _unprinted(refused.error, again)
    except UserError as error:
        processes = _processes()
        printed_by_first = processes is not None and isinstance(error, processes.SharedError) and not processes.is_first()
        return _ended(2, "" if printed_by_first else f"error: {legible(str(error))}")
    except signals.Stopped as stopped:
        return _ended(signals.status_after(stopped.number), signals.stop_message(stopped.number, again))
    except KeyboardInterrupt:
        return _ended(signals.INTERRUPTED, signals.stop_message(signal.SIGINT, again))
    except Exception as error:
        processes = _processes()
        if processes is None or processes.alone():
            raise
        if not peer_gone(error):
            return _ended(1, traceback.format_exc())
        # Print the caught error too: it may be this process's own, such as a broken download or NCCL without a network.
        cause = f"{type(error).__name__}: {one_line(error)}"
        return _ended(LOST, f"process {processes.number()}: another process has ended, see its message (here: {cause}); {again}")


class _Unprinted(Exception):
    """The standard output refuses what a command prints."""

    def __init__(self, error: OSError):
        super().__init__(error)
        self.error = error


def _printed(command: Callable[[], int]) -> int:
    """The exit status of a command. Raises _Unprinted if its output fails."""
    try:
        status = _unless_stopped(command)
    except SystemExit as exits:
        if isinstance(exits.__context__, BrokenPipeError):  # what rich makes of it
            raise _Unprinted(exits.__context__) from exits
        raise SystemExit(printing.status_of_text(printing.refused()) or exits.code) from exits  # --help
    if refused := printing.refused():
        raise _Unprinted(refused)
    return status


def _of_output(error: OSError) -> OSError | None:
    """The error of the standard output, if ``error`` is one; else None."""
    # Without a buffer (python -u) only another text shows whether the output fails.
    nameless = error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return printing.printed() if nameless else printing.refused() or (error if isinstance(error, BrokenPipeError) else None)


def _unprinted(error: OSError, again: str) -> int:
    if (status := signals.status_given()) is not None:
        return _ended(status, f"all is written, but the output could not be printed: {error.strerror}")
    if isinstance(error, BrokenPipeError):
        return _ended(2, f"error: {printing.UNREAD}; {again}")
    return _ended(2, f"error: the output could not be written: {error.strerror}; {again}")


def _unless_stopped(command: Callable[[], int]) -> int:
    """The exit status of a command. Raises Stopped if a signal ended its work.

    A command that returns has finished, whatever signal came meanwhile.
    """
    signals.check()
    try:
        return command()
    except Exception as error:
        if isinstance(error, OSError) and (refused := _of_output(error)):
            raise _Unprinted(refused) from error
        signals.check()  # the error is then often a consequence, as when the signal has ended another process too
        if isinstance(error, UnicodeEncodeError):
            refuse_undecodable([error.object])  # such as the name of a file in a folder
        if isinstance(error, OSError) and (remedy := _REMEDIES.get(error.errno or 0)):
            raise UserError(f"{error.filename or 'a file'}: {error.strerror}; {remedy}") from error
        raise


def _ended(status: int, message: str) -> int:
    signals.ended(status)
    if message:
        print(message, file=sys.stderr, flush=True)
    return status


def _joined() -> bool:
    """Whether this process, or the program that calls, has joined others."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()
