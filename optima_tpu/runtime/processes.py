"""Several processes as one program: they connect, agree, and fail together.

Every process runs the same code on the same global arrays. The first process alone does what only one may do, such as reading a
text or writing a file. Work that can fail in any process runs in all of them under :func:`together`, so that no process waits for
one that has failed.
"""

import functools
import importlib.util
import os
import pickle
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from optima_tpu.errors import UserError, refusing
from optima_tpu.runtime import signals
from optima_tpu.runtime.bounds import Bound, whole
from optima_tpu.runtime.error_texts import no_cluster
from optima_tpu.runtime.mesh import has_devices

S = TypeVar("S")
T = TypeVar("T")


class SharedError(UserError):
    """A UserError that every process raises and only one needs to print."""


LAST = 3.0
"""Seconds for the other processes to notice by themselves that process 0 ends the run."""

MOST = 1 << 16
"""Processes of one run."""

_HELLO = b"optima-tpu"


def start(coordinator: str | None, count: int | None, index: int | None, timeout: int) -> None:
    """Joins the other processes, unless this one is alone or has joined them.

    Without arguments a cluster is joined where the platform announces one: Slurm, Open MPI, TPU slices.

    Args:
      coordinator: HOST:PORT at which process 0 is reached.
      count: how many processes there are.
      index: the number of this process, from 0.
      timeout: seconds to wait for all processes.

    Raises:
      UserError: the arguments are not complete; a process did not join in time (the message has its number); Open MPI 5 without
        mpi4py; arguments of a process that has joined others before.
    """
    refuse_incomplete(coordinator, count, index)
    if joined():
        if coordinator is not None:
            raise UserError(
                f"expected no --coordinator where the processes have joined before this command, got {coordinator}: leave out "
                "--coordinator, --num_processes and --process_id"
            )
    elif coordinator is None or count is None or index is None:
        announced = _announced()
        if announced is not False:
            _join_announced(timeout, certain=announced is True)
    elif count > 1:
        _roll_call(coordinator, count, index, timeout)
        _initialize(timeout, coordinator, count, index)


def refuse_incomplete(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Raises UserError for incomplete or wrong arguments of :func:`start`."""
    if coordinator is None and count is None and index is None:
        return
    if coordinator is None or count is None or index is None or not (0 <= index < count and 0 < _port(coordinator) < 1 << 16):
        raise UserError(
            "expected --coordinator HOST:PORT, --num_processes N and --process_id K with 0 <= K < N together, "
            f"with a port from 1 to 65535, got {coordinator}, {count} and {index}"
        )
    Bound(most=MOST).refuse("num_processes", count)


def may_join(coordinator: str | None) -> bool:
    """Whether :func:`start` may join others, which would wait for this one."""
    return coordinator is not None or _announced() is not False


def _port(coordinator: str) -> int:
    """The port of HOST:PORT; 0 where there is none."""
    try:
        return whole(coordinator.rpartition(":")[2])
    except ValueError:
        return 0


def _join_announced(timeout: int, certain: bool) -> None:
    if not certain and has_devices() and alone():
        return  # a single TPU host, in a second run of one Python process
    try:
        _initialize(timeout, method="mpi4py" if _open_mpi_5() else None)  # jax 0.10 uses mpi4py only if it is named
    except ValueError as error:
        if certain or not no_cluster(error):
            raise


def number() -> int:
    """The number of this process, from 0."""
    return jax.process_index()


def joined() -> bool:
    """Whether this process has joined others."""
    return jax.distributed.is_initialized()


def leave() -> None:
    """Leaves the other processes in order, once all of them have finished."""
    jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def alone() -> bool:
    """Whether there is only this process."""
    return jax.process_count() == 1


def together(work: Callable[[], T]) -> T:
    """Runs ``work()`` in every process. A UserError of one is raised in all.

    ``work`` must not communicate: the others would wait for the one that failed.
    """
    if alone():
        return work()
    failure = None
    try:
        result = work()
    except UserError as error:
        failure = str(error)
    failures = {number: text for number, text in enumerate(everyones(failure)) if text is not None}
    if failures:
        number, text = next(iter(failures.items()))
        raise SharedError(text if len(failures) == jax.process_count() or number == 0 else f"process {number}: {text}")
    return result


def from_first(work: Callable[[], T]) -> T:
    """Runs ``work()`` in process 0. All processes get its result or error."""
    if alone():
        return work()
    outcome = b""
    if is_first():
        try:
            outcome = pickle.dumps((work(), None))
        except UserError as error:
            outcome = pickle.dumps((None, str(error)))
    result, failure = pickle.loads(_broadcast(outcome))
    if failure is not None:
        raise SharedError(failure)
    return result


def spread(work: Callable[[S], T], items: Sequence[S], at_once: int = 16) -> Iterator[T]:
    """Yields ``work(item)`` of all items, in order, in every process.

    Process ``k`` of ``n`` works on items k, k + n, ... Every process must take the same number of results. At most
    ``n * at_once - 1`` items after the last result taken are worked on. ``work`` must not communicate. All processes raise its
    UserError.
    """
    if alone():
        yield from map(work, items)
        return
    count, index = jax.process_count(), jax.process_index()
    for first in range(0, len(items), count * at_once):
        part = items[first : first + count * at_once]
        everyone: list[list[T]] = everyones(together(functools.partial(list, map(work, part[index::count]))))
        yield from (everyone[index % count][index // count] for index in range(len(part)))


def agree(what: str, values: dict[str, Any]) -> None:
    """Checks that every process has the same values, by name, as process 0.

    Raises:
      UserError: in every process, if any value differs; the message has the process, the name and both values.
    """
    if alone():
        return
    everyone = everyones(values)
    for number, theirs in enumerate(everyone):
        different = [
            f"{key}: {everyone[0].get(key)} in process 0, {theirs.get(key)} in process {number}"
            for key in sorted(everyone[0] | theirs)
            if everyone[0].get(key) != theirs.get(key)
        ]
        if different:
            raise SharedError(
                f"expected the same {what} in every process, got another in process {number} "
                f"({'; '.join(different)}): start all of them with one command from one installation"
            )


def first_only(work: Callable[[], Any]) -> None:
    """Runs ``work()`` in process 0; others wait. All raise its UserError."""
    together(work if is_first() else lambda: None)


def check_signals() -> None:
    """Ends the work in every process if a signal has come to any of them.

    Every process calls it between two steps.

    Raises:
      signals.Stopped: a signal has come.
    """
    if alone():
        signals.check()
    elif number := int(multihost_utils.process_allgather(np.int32(signals.came())).max()):
        raise signals.Stopped(number)


def everywhere(holds: bool) -> bool:
    """Whether something holds in every process."""
    return all(everyones(holds))


def everyones(value: T) -> list[T]:
    """The value of every process, in the order of their numbers."""
    return [value] if alone() else [pickle.loads(data) for data in _exchange(pickle.dumps(value))]


def fetch(tree: Any) -> Any:
    """Gathers sharded arrays into numpy arrays, in every process."""
    return jax.device_get(tree) if alone() else multihost_utils.process_allgather(tree, tiled=True)


def _exchange(data: bytes) -> list[bytes]:
    """The bytes of every process, in order."""
    sizes = multihost_utils.process_allgather(np.array([len(data)], np.int32))[:, 0]
    padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    return [row[:size].tobytes() for row, size in zip(multihost_utils.process_allgather(padded), sizes)]


def _broadcast(data: bytes) -> bytes:
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.frombuffer(data, np.uint8) if is_first() else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes()


def _announced() -> bool | None:
    """Whether several processes are announced; None if jax must find out."""
    environment = os.environ
    if _declared("OMPI_COMM_WORLD_SIZE") > 1:
        return True
    # srun sets SLURM_STEP_NODELIST. Without it this is the script of a job, which is alone until it calls srun.
    if _declared("SLURM_NTASKS") > 1 and "SLURM_STEP_NODELIST" in environment:
        return True
    if not _has_tpus():
        return False
    # GKE names a slice's workers, as notebooks do with their single host. Elsewhere jax asks the metadata server of the TPU VM.
    workers = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    if workers is None:
        return None
    return "," in workers or _declared("MEGASCALE_NUM_SLICES") > 1


def _declared(variable: str) -> int:
    """A number of processes or slices in the environment; 1 if not set."""
    text = os.environ.get(variable) or "1"
    wrong = f"expected a whole number in the environment variable {variable}, got {text!r}: correct it, or unset it"
    with refusing(ValueError, wrong):
        return whole(text)


def _has_tpus() -> bool:
    """Whether TPUs are among jax's platforms; jax adds them with libtpu."""
    environment = os.environ
    named = "tpu" in environment.get("JAX_PLATFORMS", "") or {"JAX_FORCE_TPU_INIT", "TPU_LIBRARY_PATH"} & environment.keys()
    # Answered before jax is imported, where there is no doubt: the arguments of a command are read without jax.
    if "jax" not in sys.modules and not named and importlib.util.find_spec("libtpu") is None:
        return False
    return "tpu" in (jax.config.jax_platforms or "")  # type: ignore[attr-defined]  # options are made at run time


def _open_mpi_5() -> bool:
    """Whether Open MPI 5 or newer runs this process; jax needs mpi4py then."""
    if _declared("OMPI_COMM_WORLD_SIZE") == 1 or "OMPI_MCA_orte_hnp_uri" in os.environ:
        return False
    if importlib.util.find_spec("mpi4py") is None:
        raise UserError(
            "Open MPI 5 and newer do not say where process 0 is: pip install mpi4py, or give every process --coordinator "
            "HOST:PORT --num_processes $OMPI_COMM_WORLD_SIZE --process_id $OMPI_COMM_WORLD_RANK"
        )
    return True


def _initialize(
    timeout: int, coordinator: str | None = None, count: int | None = None, index: int | None = None, method: str | None = None
) -> None:
    # The signal handler of this service would replace ours, which lets a save finish and sets the exit status.
    jax.config.update("jax_enable_preemption_service", False)
    # A process that waits for a dead one notices the closed connection or, if there was none yet, this time-out.
    jax.distributed.initialize(
        coordinator, count, index, cluster_detection_method=method, initialization_timeout=timeout, heartbeat_timeout_seconds=30
    )


def _roll_call(coordinator: str, count: int, index: int, timeout: int) -> None:
    """Waits until every process has reported to process 0.

    ``jax.distributed.initialize`` waits too, but in jax 0.10.2 and 0.12.0.1 XLA aborts the waiting processes at its time-out:
    they print a stack trace that names no missing process, and end by SIGABRT instead of with an exit status of this program.
    """
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + timeout
    if index:
        _report_in(host, int(port), index, deadline, timeout)
        return
    try:
        server = socket.create_server(("", int(port)))
    except OSError as error:
        raise UserError(f"could not listen at port {port} of this host: {error.strerror}; choose another --coordinator") from None
    waiting, connections = set(range(1, count)), []
    with server:
        try:
            while waiting:
                connection = _accepted(server, deadline)
                connection.settimeout(5)
                number = _number(connection)
                if number in waiting:
                    waiting.discard(number)
                    connections.append(connection)
                else:
                    connection.close()
        except TimeoutError:
            missing = ", ".join(map(str, sorted(waiting)))
            for connection in connections:
                connection.sendall(f"process {missing} did not join".encode())
            raise UserError(
                f"process {missing} of {count} did not join within {timeout} s: check its host, or raise --join_timeout"
            ) from None
        for connection in connections:
            connection.sendall(b"go")
        for connection in connections:  # the other ends close first, so that the port is free at once
            connection.settimeout(5)
            connection.recv(1)
            connection.close()


def _accepted(server: socket.socket, deadline: float) -> socket.socket:
    """The next connection. Looks for signals while it waits."""
    while True:
        signals.check()
        left = deadline - time.monotonic()
        server.settimeout(min(max(left, 0.01), 0.2))
        try:
            return server.accept()[0]
        except TimeoutError:
            if left <= 0:
                raise


def _number(connection: socket.socket) -> int | None:
    """The number of the process at the other end; None for anything else."""
    try:
        word, _, number = connection.recv(64).partition(b" ")
    except OSError:
        return None
    return int(number) if word == _HELLO and number.isdigit() else None


def _report_in(host: str, port: int, index: int, deadline: float, timeout: int) -> None:
    while True:
        signals.check()
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                connection.sendall(_HELLO + b" %d" % index)
                connection.settimeout(max(deadline - time.monotonic(), 0.01) + 5)
                answer = connection.recv(1024).decode()
            break
        except OSError as error:  # process 0 does not listen yet
            if time.monotonic() > deadline:
                raise UserError(
                    f"process 0 was not found at {host}:{port} within {timeout} s ({error}): start it, or correct --coordinator"
                ) from None
            time.sleep(0.2)
    if answer != "go":
        raise UserError(answer or "process 0 gave up before all processes had joined; see its message")
