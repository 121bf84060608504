"""Eight simulated devices for all tests, and a run that several tests read."""

import contextlib
import gc
import io
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from optima_tpu.runtime.xla_flags import is_known

# Before jax is imported: what several tests compile alike, and the processes that they start, is compiled once.
_COMPILED = tempfile.TemporaryDirectory(prefix="optima-tpu-tests-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _COMPILED.name)
os.environ["OPTIMA_TPU_CACHE"] = os.path.join(_COMPILED.name, "texts")  # not the one of whoever runs the tests
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Before numpy and torch are imported: the threads of their linear algebra spin while they wait, and the workers need the cores.
os.environ |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1")
os.fsync = lambda descriptor: None  # what a power cut would need, which no test has
# Most of the time here goes to compiling small programs. XLA's passes all run, collectives and fusions are what they are in
# a run; only LLVM optimises the machine code less, and fusions get it from XLA's older emitters, which need less than half of the
# time. Those are on their way out, and XLA ends a process that gives it a flag it does not know. Nor does LLVM get a program in
# parts for several threads: a worker has one core.
_LESS_LLVM = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_WHERE_KNOWN = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"

if _LESS_LLVM not in os.environ.get("XLA_FLAGS", ""):  # the workers have them from the process that starts them
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), _LESS_LLVM, *filter(is_known, [_WHERE_KNOWN])])

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

pytest.register_assert_rewrite("tests.support")  # a failing assertion tells its values there too

from tests.support import checked  # noqa: E402
from tests.support.cells import STAY  # noqa: E402
from tests.support.pages import leave_plots_empty  # noqa: E402

# Whatever the tests call of the method takes and gives the types and shapes that it declares. Before it is imported.
install_import_hook("optima_tpu.method", f"{checked.__name__}.checked")

# No test measures time: a machine with other work on it would fail it.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# Before any array exists. Meshes of fewer devices are made from the first ones.
jax.config.update("jax_num_cpu_devices", 8)
# An array of bfloat16 beside one of float32 is an error in place of a silent float32: the program says where it changes
# precision.
jax.config.update("jax_numpy_dtype_promotion", "strict")

with contextlib.suppress(ImportError):  # a newer Orbax may have it elsewhere
    from orbax.checkpoint._src.path import async_path

    async def _at_once(function, *arguments, **options):
        return function(*arguments, **options)

    # Orbax asks a thread for each look at a file, which took a fifth of the time of its checkpoints: a worker has one core.
    async_path.asyncio = SimpleNamespace(to_thread=_at_once)


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items):
    """Puts the largest files first, and marks cells outside ``STAY`` as slow.

    No worker is left with a long file while the other one has nothing.
    """
    items.sort(key=lambda item: -item.path.stat().st_size)
    for item in items:
        if (stay := STAY.get(item.originalname)) and item.callspec.id not in stay:
            item.add_marker(pytest.mark.slow)
    # Cells that got other names would all be slow, and nobody would see it.
    for name, stay in STAY.items():
        cells = {item.callspec.id for item in items if item.originalname == name}
        if len(cells) > len(stay) and not stay <= cells:
            raise pytest.UsageError(f"tests/support/cells.py: no cell {', '.join(stay - cells)} of {name}")


def pytest_collection_finish():
    """Keeps the garbage collector off imported objects, and calls it seldom.

    Garbage collection took a tenth of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_sessionfinish():
    """Keeps the garbage collector off what the tests have made.

    pytest would collect the garbage twice, just before the process ends.
    """
    gc.freeze()


# Of the 65,530 that Linux gives a process. Every compiled program takes some, and XLA fails where none are left.
_MANY_MAPS = 42_000


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
    """Drops compiled programs after a file of tests if a worker holds many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MANY_MAPS:
        gc.collect()  # decoders and what they compiled refer to each other
        jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def empty_plots(request):
    """Leaves plots out of pages, except in tests/report or with ``DRAWS``."""
    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, "DRAWS", request.path.parent.name == "report"):
            leave_plots_empty(patch)
        yield


@pytest.fixture(autouse=True, scope="module")
def unmeasured_speed(request):
    """Runs that cut a model measure no speed, except in files with ``TIMES``.

    Measuring the speed takes as long as the rest of such a run.
    """
    from optima_tpu.report.contents import Speed

    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, "TIMES", False):
            patch.setattr("optima_tpu.pipeline.speed.speed", lambda *given: Speed("", reason="this is a test"))
        yield


@pytest.fixture(scope="module")
def one_device():
    """Commands without a mesh take one device, which halves compilation."""
    from optima_tpu.evaluate import run as evaluating
    from optima_tpu.pipeline import inputs
    from optima_tpu.pipeline.recover import run as recovering
    from optima_tpu.runtime.mesh import make_mesh
    from tests.support.meshes import mesh

    with pytest.MonkeyPatch.context() as patch:
        for module in (evaluating, inputs, recovering):
            patch.setattr(module, "make_mesh", lambda text: make_mesh(text) if text else mesh(1, 1))
        yield


class FinishedRun(NamedTuple):
    """A run of the command line that nothing interrupted."""

    model: Path
    directory: Path
    arguments: list[str]  # without --output
    printed: str


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> FinishedRun:
    """A run that pruned half of every row of a tiny model, on a 4x2 mesh.

    The tolerance is tight, so that runs on other meshes agree.
    """
    from optima_tpu.launch import main
    from tests.support.runs import SMALL
    from tests.support.tiny_models import tiny_folder

    root = tmp_path_factory.mktemp("finished")
    model = tiny_folder(root / "model")
    arguments = ["--model", str(model), "--mesh", "4x2", "--preset", "fast", "--solver.tolerance", "1e-6", *SMALL]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        leave_plots_empty(patch)  # whichever test comes first
        assert main([*arguments, "--output", str(root / "run")]) == 0
    return FinishedRun(model, root / "run", arguments, printed.getvalue())
