"""The command line ``optima prune``, or ``python -m optima_tpu.launch``.

:mod:`optima_tpu.runtime.program` lists the commands. :func:`optima_tpu.runtime.command.main` turns signals and errors into an
exit status. First :mod:`optima_tpu.runtime.light` reads the arguments without the libraries of a run, and prints a mistake at
once. Then :func:`run` takes the devices and calls ``pipeline.run.run``, which does the work.
"""

import functools
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from optima_tpu.errors import UserError
from optima_tpu.runtime import command
from optima_tpu.runtime.light import real
from optima_tpu.runtime.program import program

if TYPE_CHECKING:
    from optima_tpu.config.run_config import RunConfig
    from optima_tpu.pipeline.recover.config import RecoverConfig


def run(config: "RunConfig | RecoverConfig", work: str = "optima_tpu.pipeline.run:run") -> None:
    """Does the work of a run, "module:name", and draws its page."""
    command.take_devices(config)
    # Imported only now: the imports of these modules query the devices.
    from optima_tpu.data import check_files
    from optima_tpu.models.checkpoints.orbax import quiet_orbax
    from optima_tpu.runtime import processes

    processes.first_only(lambda: check_files(*config.texts))
    quiet_orbax()
    real(work)(config)
    if processes.is_first():
        draw_page(config.run_directory)


def draw_page(directory: Path) -> None:
    """Writes report.html, or prints why the page cannot be drawn."""
    from optima_tpu.report.page import PAGE, write_page  # matplotlib is slow, and --help and errors need not wait for it

    path = directory / PAGE
    try:
        write_page([directory], path)
        again = f"{program('report')} {shlex.quote(str(directory))}"
        print(f"report      {path}: open it in a browser; to compare with other runs: {again} RUN ...", flush=True)
    except UserError as error:
        print(f"\n{PAGE} was not drawn: {error}", file=sys.stderr, flush=True)


main = functools.partial(command.main, "prune")

if __name__ == "__main__":
    sys.exit(main())
