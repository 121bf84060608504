"""The command line of a recovery: ``python -m optima_tpu.recover``."""

import functools
import sys

from optima_tpu import launch
from optima_tpu.runtime import command

run = functools.partial(launch.run, work="optima_tpu.pipeline.recover.run:recover")
main = functools.partial(command.main, "recover")

if __name__ == "__main__":
    sys.exit(main())
