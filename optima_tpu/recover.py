"""The command line of a recovery: ``python -m optima_tpu.recover MODEL --tokens N``."""

import functools
import sys
from typing import TYPE_CHECKING

from optima_tpu.launch import draw_page
from optima_tpu.runtime import command

if TYPE_CHECKING:
    from optima_tpu.pipeline.recover.config import RecoverConfig


def run(config: "RecoverConfig") -> None:
    """Trains, and draws the page of the result."""
    command.take_devices(config)
    # Imported only now: the imports of these modules query the devices.
    from optima_tpu.data import check_files
    from optima_tpu.models.checkpoints.orbax import quiet_orbax
    from optima_tpu.pipeline.recover.run import recover
    from optima_tpu.runtime import processes

    processes.first_only(lambda: check_files(config.source, config.evaluation))
    quiet_orbax()
    recover(config)
    if processes.is_first():
        draw_page(config.directory)


main = functools.partial(command.main, "recover")

if __name__ == "__main__":
    sys.exit(main())
