"""Several processes as one program: how they find each other, agree, and fail together.

Every process runs the same code on the same global arrays. What only one of them can do (read a text, write a file) is done by
the first; what can fail in any of them is done by all under :func:`together`, so that none waits for one that has given up.
"""

import functools
import importlib.util
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from optima_tpu.errors import UserError

S = TypeVar("S")
T = TypeVar("T")


class SharedError(UserError):
    """A UserError that every process raises: it is enough that one of them tells it."""


_HELLO = b"optima-tpu"


def start(coordinator: str | None, count: int | None, index: int | None, timeout: int) -> None:
    """Joins the other processes. Does nothing for a process that is alone.

    Without arguments a cluster is joined where the platform announces one: Slurm, Open MPI, TPU slices.

    Args:
      coordinator: HOST:PORT at which process 0 is reached.
      count: how many processes there are.
      index: this one's number, from 0.
      timeout: seconds to wait for all to come.

    Raises:
      UserError: the arguments are not complete; a process did not come in time, which is named by its number; Open MPI 5 without
        mpi4py.
    """
    if coordinator is None and count is None and index is None:
        announced = _announced()
        if announced is not False:
            _join_announced(timeout, certain=announced is True)
        return
    if coordinator is None or count is None or index is None or not _names_process(coordinator, count, index):
        raise UserError(
            "expected --coordinator HOST:PORT, --num-processes N and --process-id K with 0 <= K < N together, "
            f"got {coordinator}, {count} and {index}"
        )
    if count == 1:
        return
    _roll_call(coordinator, count, index, timeout)
    _initialize(timeout, coordinator, count, index)


def _names_process(coordinator: str, count: int, index: int) -> bool:
    return 0 <= index < count and coordinator.rpartition(":")[2].isdigit()


def _join_announced(timeout: int, certain: bool) -> None:
    try:
        _initialize(timeout, method="mpi4py" if _open_mpi_5() else None)
    except (ValueError, RuntimeError) as error:
        # A single TPU host: jax found no cluster, or has its devices already, as in a second run of one Python process.
        no_cluster, late = "coordinator_address" in str(error), "must be called before" in str(error)
        if certain or not (no_cluster or (late and alone())):
            raise


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def alone() -> bool:
    """Whether there is only this process."""
    return jax.process_count() == 1


def together(work: Callable[[], T]) -> T:
    """``work()`` in every process. If it raises UserError in one, all raise it, with the number of the process.

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
    """What ``work()`` returns in process 0, in every process. Its UserError is raised by all."""
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
    """``work(item)`` of every item, in order, in every process. Of ``n`` processes the ``k``-th works on items k, k + n, ...

    Every process takes the same number of results; fewer than ``n * at_once`` items behind the last one taken are worked on.
    ``work`` must not communicate. Its UserError is raised by all.
    """
    if alone():
        yield from map(work, items)
        return
    count, index = jax.process_count(), jax.process_index()
    for first in range(0, len(items), count * at_once):
        part = items[first : first + count * at_once]
        everyone: list[list[T]] = everyones(together(functools.partial(list, map(work, part[index::count]))))
        yield from (everyone[place % count][place // count] for place in range(len(part)))


def agree(what: str, values: dict[str, Any]) -> None:
    """Compares values, by name, with those of process 0.

    Raises:
      UserError: in every process, where any differs; names the process, the value and both of its forms.
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
    """``work()`` in process 0 alone, while the others wait. Its UserError is raised by all."""
    together(work if is_first() else lambda: None)


def everywhere(holds: bool) -> bool:
    """Whether something holds in every process."""
    return all(everyones(holds))


def everyones(value: T) -> list[T]:
    """What every process gave, in order of their numbers."""
    return [value] if alone() else [pickle.loads(data) for data in _exchange(pickle.dumps(value))]


def fetch(tree: Any) -> Any:
    """Arrays on the mesh as whole numpy arrays, in every process."""
    return jax.device_get(tree) if alone() else multihost_utils.process_allgather(tree, tiled=True)


def _exchange(data: bytes) -> list[bytes]:
    """What every process gave, in order."""
    sizes = multihost_utils.process_allgather(np.array([len(data)], np.int32))[:, 0]
    padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    return [row[:size].tobytes() for row, size in zip(multihost_utils.process_allgather(padded), sizes)]


def _broadcast(data: bytes) -> bytes:
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.frombuffer(data, np.uint8) if is_first() else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes()


def _announced() -> bool | None:
    """Whether the platform says that this is one process of several; None on a TPU VM, of which jax must find it out."""
    environment = os.environ
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    # srun sets the second one. Without it this is the script of a job, which is alone until it calls srun.
    if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in environment:
        return True
    # jax asks for TPUs by itself where this host has chips and libtpu is installed.
    if "tpu" not in (jax.config.jax_platforms or ""):  # type: ignore[attr-defined]  # options are made at run time
        return False
    # GKE names a slice's workers, as notebooks do with their single host. Elsewhere jax asks the metadata server of the TPU VM.
    workers = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    if workers is None:
        return None
    return "," in workers or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1


def _open_mpi_5() -> bool:
    """Whether Open MPI 5 or newer started this process. jax finds the others by mpi4py alone, and jax 0.10 only if told so."""
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) == 1 or "OMPI_MCA_orte_hnp_uri" in os.environ:
        return False
    if importlib.util.find_spec("mpi4py") is None:
        raise UserError(
            "Open MPI 5 and newer do not say where process 0 is: pip install mpi4py, or give every process --coordinator HOST:PORT "
            "--num-processes $OMPI_COMM_WORLD_SIZE --process-id $OMPI_COMM_WORLD_RANK"
        )
    return True


def _initialize(
    timeout: int, coordinator: str | None = None, count: int | None = None, index: int | None = None, method: str | None = None
) -> None:
    # Its signal handler would take SIGTERM from ours, which closes the journal and says by the exit status what to do next.
    jax.config.update("jax_enable_preemption_service", False)
    # A process that waits for one that is gone hears of it by a closed connection, or, where there was none yet, by this.
    jax.distributed.initialize(
        coordinator, count, index, cluster_detection_method=method, initialization_timeout=timeout, heartbeat_timeout_seconds=30
    )


def _roll_call(coordinator: str, count: int, index: int, timeout: int) -> None:
    """Waits until every process has reported to process 0.

    ``jax.distributed.initialize`` waits too, but in jax 0.10.2 and 0.12.0.1 XLA aborts the waiting processes at its time-out: they
    print a stack trace that names no missing process, and end by SIGABRT instead of with an exit status of this program.
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
    waiting, there = set(range(1, count)), []
    with server:
        try:
            while waiting:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                connection, _ = server.accept()
                connection.settimeout(5)
                number = _number(connection)
                if number in waiting:
                    waiting.discard(number)
                    there.append(connection)
                else:
                    connection.close()
        except TimeoutError:
            missing = ", ".join(map(str, sorted(waiting)))
            for connection in there:
                connection.sendall(f"process {missing} did not come".encode())
            raise UserError(
                f"process {missing} of {count} did not come within {timeout} s: look at its host, or raise --join-timeout"
            ) from None
        for connection in there:
            connection.sendall(b"go")
        for connection in there:  # they close first, so that the port is free at once
            connection.settimeout(5)
            connection.recv(1)
            connection.close()


def _number(connection: socket.socket) -> int | None:
    """Which process is at the other end; None for something else."""
    try:
        word, _, number = connection.recv(64).partition(b" ")
    except OSError:
        return None
    return int(number) if word == _HELLO and number.isdigit() else None


def _report_in(host: str, port: int, index: int, deadline: float, timeout: int) -> None:
    while True:
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                connection.sendall(_HELLO + b" %d" % index)
                connection.settimeout(max(deadline - time.monotonic(), 0.01) + 5)
                answer = connection.recv(1024).decode()
            break
        except OSError as error:  # process 0 is not there yet
            if time.monotonic() > deadline:
                raise UserError(
                    f"process 0 was not found at {host}:{port} within {timeout} s ({error}): start it too, or mend --coordinator"
                ) from None
            time.sleep(0.2)
    if answer != "go":
        raise UserError(answer or "process 0 gave up before all processes had come; see its message")
