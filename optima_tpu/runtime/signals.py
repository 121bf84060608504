"""Handles SIGTERM and Ctrl-C by a flag, not by an exception.

A handler sets the flag, the work looks at the flag between its steps, and a thread ends work that does not look.

The handler raises nothing. Python runs it wherever the main thread happens to be, and an exception that is raised inside a
destructor or a callback of the garbage collector is printed and lost.

This module imports only small modules of the standard library, so that a command line can listen before it imports JAX.
"""

import atexit
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType, MappingProxyType

RESUME = 75
"""Exit status of a run that SIGTERM stopped (EX_TEMPFAIL in sysexits.h). The same command resumes it."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as of a shell."""

_STATUS: Mapping[int, int] = MappingProxyType({signal.SIGTERM: RESUME, signal.SIGINT: INTERRUPTED})
_GRACE = {signal.SIGTERM: 20.0, signal.SIGINT: 2.0}
"""Signal -> seconds until the thread ends the process, as in the middle of a long compilation. Kubernetes and Slurm kill a
process 30 seconds after SIGTERM: the line and the status come before that. A user waits at Ctrl-C."""
SAVING = "stopping after the save that is under way; a second signal ends at once"
"""What the thread prints where the grace is over and a save keeps the process."""
_SAME = 0.5
"""Seconds in which a signal that comes again counts as the same: ``timeout`` and terminals send one to a process and to its
group."""


class Stopped(BaseException):
    """Ends work after a signal. ``except Exception`` does not catch it."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def listen() -> None:
    """Listens for SIGTERM and Ctrl-C until the process ends.

    Does nothing if the process listens already. A process whose work is done (:func:`ended`) ends after Python's exit handlers.
    """
    if _LISTENER.start():
        atexit.register(_LISTENER.leave)  # registered first and so called last


@contextmanager
def listening(again: str) -> Iterator[None]:
    """Listens for SIGTERM and Ctrl-C while the body of the ``with`` runs.

    Args:
      again: says what the same command does when it is typed again, for the line that the thread prints.
    """
    started = _LISTENER.start()
    _LISTENER.again, _LISTENER.status = again, None
    try:
        yield
    except BaseException:
        _LISTENER.status = None  # Python prints the error, and ends with its own status
        raise
    finally:
        if started:
            _LISTENER.stop()


def check() -> None:
    """Raises :class:`Stopped` after a signal. Call it between long steps."""
    if _LISTENER.number:
        raise Stopped(_LISTENER.number)


def came() -> int:
    """The number of the first signal that has come to this process, or 0."""
    return _LISTENER.number


def status_after(number: int) -> int:
    """The exit status after a signal."""
    return _STATUS[number]


def stop_message(number: int, again: str, when: str = "") -> str:
    """A line that says what stopped the work."""
    return f"stopped{' by SIGTERM' if number == signal.SIGTERM else ''}{when}; {again}"


def end_later(seconds: float) -> None:
    """Gives the work more time after a signal, if others must end first."""
    _LISTENER.later = seconds


def ended(status: int | None) -> None:
    """Declares the work done: a signal then ends the process with ``status``.

    None says that more work follows.

    A command that writes calls it when all is written, before it prints what it wrote: neither a signal nor an output that nobody
    reads makes the command fail then.
    """
    _LISTENER.status = status


def status_given() -> int | None:
    """The status of :func:`ended`; None while the work goes on."""
    return _LISTENER.status


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Keeps the process alive until the body ends, unless two signals come.

    A save then finishes and is not repeated after the restart.
    """
    _LISTENER.saves += 1
    try:
        yield
    finally:
        _LISTENER.saves -= 1
        _LISTENER.saved = time.monotonic()


@contextmanager
def undoing(undo: Callable[[], None]) -> Iterator[None]:
    """Calls ``undo`` if a signal ends the process before the body is done.

    The body is not waited for longer than after Ctrl-C, since nothing of it would be kept.
    """
    _LISTENER.undo.append(undo)
    try:
        yield
    finally:
        _LISTENER.undo.remove(undo)


class _Listener:
    """The flag, the handlers and the thread.

    Attributes:
      again: see :func:`listening`.
      number: the first signal that came; 0 before.
      saves: how many bodies of :func:`uninterrupted` are running.
      saved: when the last of them was done, by the monotonic clock.
      later: see :func:`end_later`.
      status: see :func:`ended`; None before.
      undo: what the running bodies of :func:`undoing` gave.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._reset()
        os.register_at_fork(after_in_child=self._forked)

    def _reset(self) -> None:
        self.again = "the same command does it again"
        self.number, self.saves, self.saved, self.later = 0, 0, 0.0, 0.0
        self.status: int | None = None
        self.undo: list[Callable[[], None]] = []
        self._since = 0.0

    def start(self) -> bool:
        """Installs the handlers and starts the thread, if neither exists.

        Returns False, and does nothing, if they exist or outside the main thread, where Python takes no handlers: the program
        that called from there hears its signals.
        """
        if self._thread is not None or threading.current_thread() is not threading.main_thread():
            return False
        self._reset()
        self._ear, self._mouth = os.pipe()
        os.set_blocking(self._mouth, False)
        # The interpreter's C handler writes the signal's number there at once, even while the main thread waits for the devices.
        self._woken = signal.set_wakeup_fd(self._mouth, warn_on_full_buffer=False)
        # A signal that is ignored stays so: SIGINT in the background of a shell.
        heard = [number for number in _STATUS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in heard}
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return True

    def leave(self) -> None:
        """Ends a process whose work is done; lets any other end by itself.

        Python would go on to free every module, and what the libraries hold. That takes more than a CPU second, and ten seconds
        where SIGTERM stopped a large model on busy cores: a scheduler has few left then.
        """
        for number in self._before:  # Python gives its handlers back to the system and takes a while to end
            signal.signal(number, signal.SIG_IGN)
        if self.status is None:
            return
        with suppress(OSError, ValueError):  # Python itself prints that an output fails only now, and ends with 120
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
            os._exit(self.status)

    def stop(self) -> None:
        """Takes the handlers back and ends the thread."""
        self._restore(self._woken)
        os.close(self._mouth)  # which ends the thread
        if self._thread is not None:
            self._thread.join()
        os.close(self._ear)
        self._thread = None
        self._reset()

    def _restore(self, woken: int) -> None:
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
        signal.set_wakeup_fd(woken)

    def _forked(self) -> None:
        # A forked child shares the pipe: a SIGTERM to the child, as at the end of a pool, would wake the thread of its parent.
        if self._thread is not None:
            self._restore(-1)
            self._thread = None
            self._reset()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.status is not None:
            os._exit(self.status)
        self._first(number)

    def _first(self, number: int) -> None:
        if not self.number:
            self._since = time.monotonic()
            self.number = number

    def _listen(self) -> None:
        again = announced = False
        while True:
            ready, _, _ = select.select([self._ear], [], [], 0.1 if self.number else None)
            data = os.read(self._ear, 1) if ready else b""
            if ready and not data:
                return
            number = data[0] if data else 0
            if number in _STATUS:
                # The signal that stopped the work may be read here only when its line is about to be printed.
                if self.status is not None and (again or not self.number):
                    os._exit(self.status)
                self._first(number)
                # The handler may have been there before this thread: the first signal that comes here is never a second one.
                if again and time.monotonic() > self._since + _SAME:
                    self._end("")
                again = True
            saving = self.saves > 0  # read before the deadline, which the end of a save puts off
            if self.number and self.status is None and time.monotonic() > self._deadline():
                if not saving:
                    self._end(" in the middle of a step")
                if not announced:
                    # Empty lines, so that a progress bar of two lines is drawn below it and not over it.
                    os.write(2, f"\n{SAVING}\n\n".encode() if os.isatty(2) else f"{SAVING}\n".encode())
                announced = True

    def _deadline(self) -> float:
        grace = min(_GRACE.values()) if self.undo else _GRACE[signal.Signals(self.number)]
        return max(self._since, self.saved) + grace + self.later

    def _end(self, when: str) -> None:
        # Not through sys.stderr: the main thread may be stopped while it holds the stream's lock.
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # shows the cursor, which a progress bar hides
        os.write(2, (stop_message(self.number, self.again, when) + "\n").encode())
        for undo in self.undo:
            with suppress(Exception):  # what cannot be undone must not keep the process
                undo()
        os._exit(_STATUS[self.number])


_LISTENER = _Listener()
"""Handlers of signals belong to the whole process, and so does their state."""
