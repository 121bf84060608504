"""Command line of the evaluation: ``python -m optima_tpu.evaluate MODEL``."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from optima_tpu.runtime.command import announce, guarded, take_devices
from optima_tpu.runtime.light import rehearsed

if TYPE_CHECKING:
    from optima_tpu.evaluate.config import EvaluateConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status, see :func:`guarded`."""
    return guarded(
        lambda: _evaluate(sys.argv[1:] if argv is None else argv),
        "the same command goes on with what was not measured to its end",
    )


def _evaluate(argv: Sequence[str]) -> None:
    config: EvaluateConfig = rehearsed("optima_tpu.evaluate.arguments:read", argv, first=announce)
    take_devices(config)
    from optima_tpu.evaluate.start import start

    start(config)


if __name__ == "__main__":
    sys.exit(main())
