"""The command line of a plan: ``python -m optima_tpu.plan``."""

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from optima_tpu.errors import UserError
from optima_tpu.runtime import command, signals
from optima_tpu.runtime.program import Parser, program

if TYPE_CHECKING:
    from rich.console import Console

    from optima_tpu.config.run_config import RunConfig
    from optima_tpu.pipeline.plan.plan import Plan

_PROGRAM = program("plan")
_DESCRIPTION = f"""\
Estimates what a run needs before it starts: device memory of every program, host memory, disk and time.

Of the model only config.json is read, from a folder or a hub id: no weights are needed. The programs of the run are compiled
for the devices of the plan, which need not be attached: no TPU is needed.

examples:
  {_PROGRAM} --config configs/paper/llama-3.1-8b.yaml --topology v5e:4x2
  {_PROGRAM} --model ./folder-with-config.json --topology v5p:4x4x4 --mesh 16x4 --preset fast
  {_PROGRAM} --cpu_devices 8 --mesh 4x2
  {_PROGRAM} --model meta-llama/Llama-3.1-8B --topology v6e:4x4 --mesh 8x2 --recover 50M"""


_OF_RECOVER = {
    "--tokens": "--recover TOKENS",
    "--length": "--calibration.length",
    "--source": "--calibration.source",
    "--held_out": "--calibration.held_out",
    "--windows": "--evaluation.windows",
}
"""What a plan calls the settings of ``optima recover`` that have another name there."""


class AskedPlan(NamedTuple):
    """The plan's own options, and the run that is planned."""

    options: argparse.Namespace
    config: "RunConfig"


def _chooses(setting: str, words: Sequence[str]) -> bool:
    """Whether a command line chooses a method, or names a file that may."""
    options = {word.partition("=")[0] for word in words}
    return bool(options & {f"--{setting}", f"--{setting}.name", "--config"})


def read(argv: Sequence[str]) -> AskedPlan:
    """The plan that a command line asks for.

    Raises:
      UserError: an option or a setting is wrong, or the file to write is another program's.
    """
    from optima_tpu.config.choices import method_name
    from optima_tpu.config.parse import parse
    from optima_tpu.data import check_sources
    from optima_tpu.pipeline.recover.config import RecoverConfig, count_tokens
    from optima_tpu.runtime.outputs import refuse_foreign, refuse_no_folder

    parser = make_parser()
    options, settings = parser.parse_known_args(list(argv))
    recovering = options.recover is not None
    for name in (word.partition("=")[0] for word in settings):
        if name in _OF_RECOVER:
            raise UserError(f"a plan has no {name}, a setting of {program('recover')}; type {_OF_RECOVER[name]}")
    if recovering:
        count_tokens("--recover", options.recover)
    if recovering and any(word.startswith("--distill.") for word in settings) and not _chooses("distill", settings):
        settings += ["--distill", method_name("distill", RecoverConfig.distill)]  # what optima recover does without a choice
    if recovering and not any(word.partition("=")[0] == "--calibration.length" for word in settings):
        settings += ["--calibration.length", "null"]  # a length that a run of this model would take is not one of a recovery
    config = parse(settings, parser.names)
    check_sources(*config.texts)
    if options.json:
        refuse_no_folder("--json", options.json)
        refuse_foreign(options.json, _is_plan, options.force)
    return AskedPlan(options, config)


def run(request: AskedPlan) -> int:
    """Makes the plan and prints it. Returns 1 if something does not fit."""
    options, config = request
    import jax

    from optima_tpu.report.progress import Terminal
    from optima_tpu.runtime.files import write_bytes, writing
    from optima_tpu.runtime.mesh import simulate_devices
    from optima_tpu.runtime.records import encoded

    simulate_devices(config.cpu_devices)
    if options.topology:  # its devices need not be attached, and an attached TPU stays free for other programs
        jax.config.update("jax_platforms", "cpu")
    from optima_tpu.pipeline.plan.table import print_plan  # only now: the import queries the devices

    console = Terminal()
    plan = _made(options, config, console)
    if plan.machine.compiles:
        console.print()
    print_plan(console, plan)
    if options.json:
        with writing(options.json, "choose another --json"):
            write_bytes(options.json, encoded(plan.to_json(), indent=2))
    status = 1 if plan.too_large or plan.refused else 0
    if options.json:
        signals.ended(status)
    return status


def _made(options: argparse.Namespace, config: "RunConfig", console: "Console") -> "Plan":
    """Makes the plan; prints what is planned and each compilation."""
    from optima_tpu.pipeline.inputs import on_model
    from optima_tpu.pipeline.plan.model import open_declared
    from optima_tpu.pipeline.plan.plan import make_plan
    from optima_tpu.pipeline.plan.table import greeting
    from optima_tpu.pipeline.plan.topology import local_machine, topology_machine
    from optima_tpu.pipeline.recover.config import as_run
    from optima_tpu.report.progress import say

    model, compiling = open_declared(config.model, config.dtype, config.batch, config.family == "general"), not options.no_compile
    machine = (
        topology_machine(options.topology, config.mesh, compiling, options.quick)
        if options.topology
        else local_machine(config.mesh, model.dtype, compiling)
    )
    config, recovering = on_model(config, model.config, console), options.recover is not None
    if recovering:
        config = as_run(config, options.recover)
    model = model.on(machine.mesh)
    say(console, "\n".join([*greeting(config, model, machine, recovering), ""]))

    def tell(line: str) -> None:
        signals.check()
        say(console, line)

    return make_plan(config, model, machine, tell, recovering)


def _is_plan(data: bytes) -> bool:
    try:
        plan = json.loads(data)
    except ValueError:
        return False
    return isinstance(plan, dict) and {"model", "programs", "storage", "assumptions"} <= plan.keys()


def make_parser() -> Parser:
    """The parser of the plan's own options."""
    parser = Parser(
        prog=_PROGRAM,
        usage=f"{_PROGRAM} [--topology KIND:AxB] [--SETTING VALUE ...] [--json FILE]",
        description=_DESCRIPTION,
        epilog=f"All settings of a run may follow; {program('prune')} --help explains them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--topology",
        metavar="KIND:AxB",
        help="a TPU slice: v4, v5e, v5p or v6e and its shape, such as v5e:4x2 or v5p:4x4x4 (default: the attached devices)",
    )
    parser.add_argument(
        "--recover",
        metavar="TOKENS",
        help="plan optima recover with so many tokens, such as 50M, and no pruning; settings of --distill say how it trains",
    )
    parser.add_argument("--json", metavar="FILE", type=lambda text: Path(text).expanduser(), help="write the plan to FILE too")
    parser.add_argument("--force", action="store_true", help="let --json replace a file that this program did not write")
    parser.add_argument("--no-compile", action="store_true", help="do not compile: count roughly, which takes only seconds")
    parser.add_argument(
        "--quick", action="store_true", help="with --topology: compile faster; the memory of solvers is then only rough"
    )
    return parser


main = functools.partial(command.main, "plan")

if __name__ == "__main__":
    sys.exit(main())
