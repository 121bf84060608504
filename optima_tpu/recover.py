"""The command line of a recovery: ``python -m optima_tpu.recover MODEL --tokens N``."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from optima_tpu.launch import draw_page
from optima_tpu.runtime.command import announce, guarded, take_devices
from optima_tpu.runtime.light import rehearsed

if TYPE_CHECKING:
    from optima_tpu.pipeline.recover.config import RecoverConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status, see :func:`guarded`."""
    return guarded(
        lambda: _recover(sys.argv[1:] if argv is None else argv),
        "the same command goes on at the last saved step, or begins again where none was saved",
    )


def _recover(argv: Sequence[str]) -> None:
    config: RecoverConfig = rehearsed("optima_tpu.pipeline.arguments:read_recovery", argv, first=announce)
    take_devices(config)
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


if __name__ == "__main__":
    sys.exit(main())
