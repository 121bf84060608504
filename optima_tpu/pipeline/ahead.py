"""Compiles the solvers' programs in threads while the walk reads text."""

import concurrent.futures
import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax

from optima_tpu.pipeline.programs import Call

_MOST = 8
"""Programs that are compiled at once: a TPU's compiler takes a core and some GiB of the host for each."""


class Ahead(NamedTuple):
    """The programs being compiled, by the kind of the step that calls them.

    A call whose arrays have the shapes, dtypes and shardings of the structs uses the compiled program.
    """

    compiling: Mapping[str, Sequence[concurrent.futures.Future[None]]] = {}

    def wait(self, kind: str) -> None:
        """Waits until the programs of these steps are compiled.

        If a compilation failed, the program's call compiles it again and raises.
        """
        concurrent.futures.wait(self.compiling.get(kind, ()))


@contextlib.contextmanager
def compiled_ahead(programs: Mapping[str, Sequence[Call]]) -> Iterator[Ahead]:
    """Compiles programs in parallel, each once, in the order of their calls.

    The processes of a run on GPUs share the tuning of a program and wait for each other, so all must compile in the same order,
    one program at a time. For such a run each program is compiled where it is called.

    Args:
      programs: by the kind of the step that calls them.
    """
    if jax.process_count() > 1 and jax.default_backend() == "gpu":
        yield Ahead()
        return
    threads = concurrent.futures.ThreadPoolExecutor(min(_MOST, os.cpu_count() or 1))
    started: list[tuple[Call, concurrent.futures.Future[None]]] = []

    def start(call: Call) -> concurrent.futures.Future[None]:
        if (earlier := next((future for other, future in started if other == call), None)) is not None:
            return earlier
        started.append((call, threads.submit(_compile, call)))
        return started[-1][1]

    try:
        yield Ahead({kind: [start(call) for call in calls] for kind, calls in programs.items()})
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def side_by_side(seconds: Sequence[float], cores: int | None) -> float:
    """The least number of seconds that :func:`compiled_ahead` takes.

    Args:
      seconds: of each program, compiled alone.
      cores: of the host; None for the host of a TPU, which has more cores than are used.
    """
    return max(max(seconds, default=0.0), sum(seconds) / min(_MOST, cores or _MOST))


def _compile(call: Call) -> None:
    call.lower().compile()
