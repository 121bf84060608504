"""Reads from the TPU compiler's text how the programs of a run multiply, attend, and whether they wait for the host.

    python -m benchmarks.compiled --topology v5e:4x2 -- --model ./folder-with-config.json --mesh 4x2 --preset distilled

No TPU is needed, but the extra `tpu`. The programs are those of `optima plan`, and two more: the forward pass of a pruned block, and
the head that measures perplexity. The body of a loop counts once. The programs are compiled with the least effort, as by `optima
plan --quick`, which changes none of these counts.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from optima_tpu.config.parse import parse
from optima_tpu.evaluate.perplexity import _batch_nll
from optima_tpu.models.decoder import run_block
from optima_tpu.pipeline.calibrate import pass_batch
from optima_tpu.pipeline.plan.compile import Call, Compiled
from optima_tpu.pipeline.plan.hlo import collectives, host_transfers, kernels, products
from optima_tpu.pipeline.plan.model import open_declared
from optima_tpu.pipeline.plan.plan import make_plan
from optima_tpu.pipeline.plan.topology import topology_machine
from optima_tpu.runtime.mesh import DATA, struct_on


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__.split("\n\n")[0])
    parser.add_argument("--topology", default="v5e:4x2", help="as for optima plan")
    options, settings = parser.parse_known_args(argv)
    jax.config.update("jax_platforms", "cpu")
    config = parse([setting for setting in settings if setting != "--"])
    machine = topology_machine(options.topology, config.mesh, quick=True)
    model = open_declared(config.model, config.dtype, config.batch).on(machine.mesh)
    calls: list[Call] = []
    texts: list[tuple[str, str]] = []

    def read(what: str, call: Callable[[], Call]) -> Compiled:
        """Compiles, and keeps the text; the memory of the program does not matter here."""
        start = time.monotonic()
        calls.append(call())
        texts.append((what.rpartition(":")[0] or what, calls[-1].lower().compile(dict(machine.options or {})).as_text() or ""))
        print(f"compiled the {what} in {time.monotonic() - start:.0f} s", file=sys.stderr)
        return Compiled(0.0)

    plan = make_plan(config, model, machine, compile_call=read)
    _, state, hidden, positions, _ = next(call for call in calls if call.function is pass_batch).arguments
    head = model.decoder.head_struct()
    windows = struct_on(machine.mesh, hidden.shape[:2], np.dtype(np.int32), P(DATA))
    forward = Call(run_block, (model.decoder.graph, state, hidden, positions, {}))
    for name, call in (("pruned block forward", forward), ("head for perplexity", Call(_batch_nll, (head, hidden, windows)))):
        read(name, lambda call=call: call)

    print(f"{plan.model.origin} on {plan.machine.name}, mesh {'x'.join(map(str, machine.mesh.shape.values()))}, {model.dtype}\n")
    print("| program | bfloat16 | float32, 6 passes | 3 | 1 | kernels | collectives in loops | waits for the host |")
    print("|---|" + 7 * "---:|")
    for name, text in texts:
        found, used = products(text), kernels(text)
        counts = [
            sum(count for (dtype, _), count in found.items() if dtype != "f32"),
            *(found.get(("f32", n), 0) for n in (6, 3, 1)),
        ]
        sent = sum(collectives(text)[0].values())
        print(f"| {name} | {' | '.join(map(str, counts))} | {sum(used.values())} | {sent} | {len(host_transfers(text))} |")


if __name__ == "__main__":
    main()
