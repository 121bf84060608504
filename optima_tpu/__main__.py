"""``python -m optima_tpu`` is the command ``optima``."""

import sys

from optima_tpu.cli import main

if __name__ == "__main__":
    sys.exit(main())
