"""Runs one part in its own process, and prints each row at once as JSON.

``python -m benchmarks.accelerator`` starts it.
"""

import importlib
import json
import math
import os
import sys
from typing import Any

from benchmarks.accelerator.parts import FULL, SMALL


def rounded(value: Any) -> Any:
    """Rounds a number to three digits; one that is not finite is None."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.3g}") if math.isfinite(value) else None


def main() -> None:
    function, (small, alone, *case) = sys.argv[1], json.loads(sys.argv[2])
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries and runs print is no row
    module, _, name = function.partition(":")
    if not alone:
        from optima_tpu.runtime.command import take_devices
        from optima_tpu.runtime.devices import Devices

        if os.environ.get("JAX_PLATFORMS"):
            os.environ["JAX_PLATFORMS"] += ",cpu"  # what results are compared with
        take_devices(Devices(), alone=True)  # with a run's share of the memory and its cache of compiled programs
    for row in getattr(importlib.import_module(module), name)(SMALL if small else FULL, *case):
        print(json.dumps([rounded(value) for value in row]), file=rows, flush=True)


if __name__ == "__main__":
    main()
