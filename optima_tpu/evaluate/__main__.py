"""Command line of the evaluation: ``python -m optima_tpu.evaluate MODEL``."""

import functools
import sys

from optima_tpu.runtime import command

main = functools.partial(command.main, "evaluate")

if __name__ == "__main__":
    sys.exit(main())
