"""The command line: ``python -m optima_tpu.launch``. Kept short; what happens is in ``optima_tpu.run``."""

import os
import sys
from collections.abc import Sequence

from optima_tpu.cli import parse
from optima_tpu.errors import UserError
from optima_tpu.sharding import simulate_devices


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 for something the user can mend, 130 for Ctrl-C."""
    # Or transformers, when it is first imported, says that torch is missing, which is as it should be.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        simulate_devices(config.cpu_devices)
        # Only now: what these import asks for the devices.
        from optima_tpu.checkpoint import quiet_orbax
        from optima_tpu.run import run

        quiet_orbax()
        run(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last finished block", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
