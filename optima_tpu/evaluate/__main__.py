"""Command line of the evaluation: ``python -m optima_tpu.evaluate MODEL``."""

import sys
from collections.abc import Sequence

from optima_tpu.config.model_spec import refuse_early
from optima_tpu.evaluate.config import parse
from optima_tpu.evaluate.start import start
from optima_tpu.runtime.command import guarded, take_devices


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status, see :func:`guarded`."""
    return guarded(
        lambda: _evaluate(sys.argv[1:] if argv is None else argv),
        "the same command goes on with what was not measured to its end",
    )


def _evaluate(argv: Sequence[str]) -> None:
    config = parse(argv)
    refuse_early(config.coordinator, config.model, config.against)
    take_devices(config)
    start(config)


if __name__ == "__main__":
    sys.exit(main())
