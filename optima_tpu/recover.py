"""The command line of a recovery: ``python -m optima_tpu.recover MODEL --tokens N``."""

import sys
from collections.abc import Sequence

from optima_tpu.config.model_spec import refuse_early
from optima_tpu.launch import draw_page
from optima_tpu.pipeline.recover.config import parse
from optima_tpu.runtime import processes
from optima_tpu.runtime.command import guarded, take_devices


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status, see :func:`guarded`."""
    return guarded(
        lambda: _recover(sys.argv[1:] if argv is None else argv),
        "the same command goes on at the last saved step, or begins again where none was saved",
    )


def _recover(argv: Sequence[str]) -> None:
    config = parse(argv)
    refuse_early(config.coordinator, config.model, config.against)
    from optima_tpu.data import check_files, check_sources  # imports pyarrow and more, which --help does not wait for

    check_sources(config.source, config.evaluation)
    take_devices(config)
    processes.first_only(lambda: check_files(config.source, config.evaluation))
    # Imported only now: the imports of these modules query the devices.
    from optima_tpu.models.checkpoints.orbax import quiet_orbax
    from optima_tpu.pipeline.recover.run import recover

    quiet_orbax()
    recover(config)
    if processes.is_first():
        draw_page(config.directory)


if __name__ == "__main__":
    sys.exit(main())
