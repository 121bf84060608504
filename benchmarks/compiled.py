"""Counts products, kernels and host transfers in programs compiled for a TPU.

    python -m benchmarks.compiled --topology v5e:4x2 -- --model ./folder-with-config.json --mesh 4x2 --preset distilled

The counts come from the compiler's text. This needs no TPU, but the extra `tpu`. The programs are those of `optima plan`, and
two more: the forward pass of a pruned block, and the head that measures perplexity. The body of a loop counts once. The
programs are compiled with the least effort, as by `optima plan --quick`, which changes none of these counts.
"""

import argparse
import collections
import re
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from optima_tpu.config.parse import parse
from optima_tpu.evaluate.perplexity import _batch_nll
from optima_tpu.models.decoder import run_block
from optima_tpu.pipeline.calibrate import pass_batch
from optima_tpu.pipeline.plan.compile import Compiled
from optima_tpu.pipeline.plan.hlo import collectives
from optima_tpu.pipeline.plan.model import open_declared
from optima_tpu.pipeline.plan.plan import make_plan
from optima_tpu.pipeline.plan.topology import topology_machine
from optima_tpu.pipeline.programs import Call
from optima_tpu.runtime.mesh import DATA, struct_on

_PASSES = {"highest": 6, "high": 3, "default": 1}


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

    def read(what: str, call: Call) -> Compiled:
        """Keeps a call and its compiled text. Does not measure its memory."""
        start = time.monotonic()
        calls.append(call)
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
        passes, used = products(text), kernels(text)
        counts = [
            sum(count for (dtype, _), count in passes.items() if dtype != "f32"),
            *(passes.get(("f32", n), 0) for n in (6, 3, 1)),
        ]
        sent = sum(collectives(text)[0].values())
        print(f"| {name} | {' | '.join(map(str, counts))} | {sum(used.values())} | {sent} | {len(host_transfers(text))} |")


def products(hlo: str) -> dict[tuple[str, int], int]:
    """Counts a TPU program's matrix products by dtype and number of passes.

    The dtype is the wider one of the factors, passes are those of the matrix unit. ``("f32", 6)`` are float32 products at full
    precision. A product of bfloat16 arrays is exact in one pass at every precision. The body of a loop counts once. The text
    does not show what a kernel multiplies.
    """
    made = dict(re.findall(r"^\s*(?:ROOT )?%?([\w.\-]+) = \(?(\w+)\[", hlo, re.MULTILINE))
    passes: collections.Counter[tuple[str, int]] = collections.Counter()
    for factors, rest in re.findall(r" (?:convolution|dot)\(([^)]*)\)(.*)", hlo):
        dtypes = {made[name.split("%")[-1].strip()] for name in factors.split(",")}
        match = re.search(r"operand_precision=\{(\w+)", rest)
        wide = max(dtypes, key=lambda dtype: int(re.sub(r"\D", "", dtype) or 0))
        passes[wide, _PASSES[match[1] if match else "default"] if wide == "f32" else 1] += 1
    return dict(passes)


def kernels(hlo: str) -> dict[str, int]:
    """Counts the kernels for TPUs in a program, by name."""
    named = re.findall(r'^\s*(?:ROOT )?%?([a-z_]+)[\w.\-]* = .*custom_call_target="tpu_custom_call"', hlo, re.MULTILINE)
    return dict(collections.Counter(named))


def host_transfers(hlo: str) -> list[str]:
    """Lists what waits for the host or exchanges arrays with it at run time.

    An entry is the name of an instruction or the target of a call.
    """
    return [
        *re.findall(r" (infeed|outfeed)\(", hlo),
        *re.findall(r" (send|recv)\([^\n]*is_host_transfer=true", hlo),
        *re.findall(r'custom_call_target="([^"]*(?:[Hh]ost|callback)[^"]*)"', hlo),
    ]


if __name__ == "__main__":
    main()
