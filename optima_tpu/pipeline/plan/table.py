"""The plan for the person at the terminal."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from optima_tpu.config.run_config import RunConfig
from optima_tpu.config.written import on_preset
from optima_tpu.errors import plural
from optima_tpu.pipeline.distill.blocks import Trainer
from optima_tpu.pipeline.opening_lines import recipe_line, training_words
from optima_tpu.pipeline.plan.model import DeclaredModel
from optima_tpu.pipeline.plan.plan import Plan
from optima_tpu.pipeline.plan.topology import GIB, Machine
from optima_tpu.report.numbers import duration, number
from optima_tpu.report.progress import plain_table, say, show
from optima_tpu.runtime.mesh import DATA, MODEL


def print_plan(console: Console, plan: Plan) -> None:
    """Prints what each program and the whole run need.

    Begins with the reason if a run would be refused, and ends with the assumptions behind the time.
    """
    if plan.refused:
        say(console, f"the run would be refused: {plan.refused}\n")
    show(console, program_table(plan))
    lines = ["", *_legend(plan), "", *summary(plan), "", f"Time, about {duration(sum(plan.seconds.values()))} in all:"]
    lines += [f"  {duration(seconds):>11}  {stage}" for stage, seconds in plan.seconds.items()]
    say(console, "\n".join([*lines, "assuming that", *(f"  - {words}" for words in plan.assumptions)]))


def greeting(config: RunConfig, model: DeclaredModel, machine: Machine, recovering: bool = False) -> list[str]:
    """The lines about the planned run, printed before the first long step."""
    shape, text = machine.mesh.shape, config.calibration
    hosts = "" if machine.hosts == 1 else f", {machine.hosts} hosts"
    written = f", {text.written} x {text.window_length} that the model writes" if text.written else ""
    recipe = [f"preset   {on_preset(config)}", f"recipe   {recipe_line(config, model.decoder)}"]
    if config.distill:
        training = f"training {training_words(config.distill, text.window_length)}"
        recipe = [f"{training}; nothing is pruned"] if recovering else [*recipe, training]
    idle = config.distill and Trainer(model.decoder, config.distill).idle
    return [
        f"model    {model.origin}: {config.cut.of_blocks(model.decoder.config.blocks)}, only its configuration is read",
        *recipe,
        f"text     {text.source}, {text.windows} x {text.window_length} tokens{written}, and {plural(text.held_out, 'window')} "
        "held out",
        f"devices  {machine.name}: {machine.mesh.size} x {machine.chip.name}, {_gib(machine.chip.memory)} GiB each, "
        f"mesh {shape['data']}x{shape['model']}{hosts}",
        *(f"note     {note}" for note in (*machine.notes, *filter(None, [idle]))),
    ]


def program_table(plan: Plan) -> Table:
    """One row for each program."""
    headings = ["program", "calls", "rows on\na device", f"GiB of\n{_gib(plan.machine.chip.memory)}", "TFLOP", "GB", "seconds"]
    headings += ["collectives\nin loops", "and\noutside", "compiled\nin s"] if plan.machine.compiles else []
    rows = []
    for program in plan.programs:
        work = program.work
        cells = [
            program.name,
            f"{program.calls:,}",
            "-" if program.rows is None else f"{program.rows:,}",
            "does not fit" if program.refused else _gib(program.memory),
            number(work.flops / 1e12),
            number(work.traffic / 1e9) if work.traffic else "-",
            number(work.seconds(plan.machine)),
        ]
        if program.compiled:
            figures = program.compiled
            cells += ["-", "-"] if figures.refused else [str(sum(kind.values())) for kind in (figures.inside, figures.outside)]
            cells += [f"{figures.seconds:.0f}"]
        rows.append(cells)
    return plain_table(headings, rows)


_LEAVING = 0.75
"""A plan that takes a larger share of a device's memory may be of a run that does not fit, see docs/guides/plans.md."""


def summary(plan: Plan) -> list[str]:
    """What fits, and what the run needs of its hosts.

    For a run that would be refused, no line says that it fits.
    """
    stored = plan.storage
    return [
        *_fits(plan),
        _rows(plan),
        *_host(plan),
        f"disk         at most {_sum(stored.disk)}",
        f"             {_gib(stored.left)} GiB at the end; in all it writes {plan.written:.2f} times the model's own bytes",
        *_served(plan),
    ]


def _fits(plan: Plan) -> list[str]:
    chip = plan.machine.chip
    if not plan.programs:
        return [f"nothing is pruned: the settings leave every layer of {plan.model.origin} dense"]
    if plan.too_large:
        return [
            *(
                f"does not fit {program.name}: "
                + (program.refused or f"needs {_gib(program.memory)} GiB of {_gib(chip.memory)} GiB")
                for program in plan.too_large
            ),
            f"             {_advice(plan)}",
        ]
    if plan.refused:
        return []
    worst = plan.largest
    closely = worst.memory > _LEAVING * chip.memory
    return [
        f"{'fits closely' if closely else 'fits':<13}every program: at most {_gib(worst.memory)} of {_gib(chip.memory)} GiB, "
        f"{'compiled' if plan.machine.compiles else 'counted'}, in {worst.name}",
        *["             a run's programs can be larger than a plan's: to be sure, leave a quarter free"] * closely,
    ]


def _rows(plan: Plan) -> str:
    solved = [(program.name, program.layout) for program in plan.programs if program.layout]
    parts = [
        f"{layout.rows or 'all'} of {name}" + ", Hessian split over model" * layout.split
        for name, layout in solved
        if layout.rows or layout.split
    ]
    rows = "; ".join([*parts, "all others"]) if parts else "all rows of a group"
    at_once = f"{rows} at once; " if solved else ""
    return f"row batch    {at_once}{plural(plan.batch, 'window')} a device in a step of the forward pass"


def _host(plan: Plan) -> list[str]:
    machine, host = plan.machine, plan.storage.host
    lines = [f"host memory  {'on each host: ' if machine.hosts > 1 else ''}{_sum(host)}"]
    if machine.platform == "cpu" and plan.programs:
        taken, total = sum(host.values()) + plan.largest.memory * machine.mesh.size, machine.chip.memory * machine.mesh.size
        lines.append(f"             a CPU's programs are in the same memory: in all about {_gib(taken)} of {_gib(total)} GiB")
    return lines


def _served(plan: Plan) -> list[str]:
    if plan.serving is None:
        return []
    dense, cut = plan.serving
    every = cut.active == cut.weights
    read = "which each written token reads" if every else f"a token passes through {_gib(cut.active)} of them"
    cache = f"{_gib(cut.cache)} GiB instead of {_gib(dense.cache)}"
    if cut.cache == dense.cache:
        cache = f"{_gib(cut.cache)} GiB, as before,"
    return [
        f"cut model    {_gib(cut.weights)} GiB of weights instead of {_gib(dense.weights)}, {read};",
        f"             {cache} of keys and values for a window as long as those of the text",
    ]


def _advice(plan: Plan) -> str:
    calibration = any(program.rows is None for program in plan.too_large)
    rows = any(program.rows is not None for program in plan.too_large)
    fewer = [f"--batch {max(1, plan.batch // 2)}"] if calibration and plan.batch > 1 else []
    more = [f"{_larger_model_axis(plan.machine)}more devices"] if rows or not fewer else []
    quick = "the same without --quick, which can make programs larger; then " if plan.machine.options else ""
    return f"try {quick}{' and '.join(fewer + more)}"


def _larger_model_axis(machine: Machine) -> str:
    """Advice to type a mesh with a larger model axis; empty without one."""
    data, model = machine.mesh.shape[DATA], machine.mesh.shape[MODEL]
    return f"--mesh {data // 2}x{2 * model}, which splits more over the same devices, or " if data % 2 == 0 else ""


def _legend(plan: Plan) -> list[str]:
    lines = ["Memory, FLOPs and bytes are for one call on one device; memory includes what else the run holds there."]
    if not plan.machine.compiles:
        counted = "All numbers are counted by a simple model, and none is compiled."
        return [*lines, f"{counted} A compiled plan of the same run has other numbers."]
    return [
        *lines,
        "Compiled: memory and collectives. Counted: FLOPs and bytes, in the run's own programs, host memory, disk and,",
        "from all of these, seconds. The collectives:",
        *(
            f"  {program.name}: {_counts(program.compiled.inside)} in loops, {_counts(program.compiled.outside)} outside"
            + _moved(program.compiled.moved)
            for program in plan.programs
            if program.compiled is not None and not program.refused
        ),
    ]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"


def _moved(sizes: Mapping[str, int]) -> str:
    words = ", ".join(f"{number(size / 1e6)} MB of {name}" for name, size in sorted(sizes.items()))
    return f"; on a device {words}" if words else ""


def _sum(parts: Mapping[str, int]) -> str:
    words = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
    return f"{_gib(sum(parts.values()))} GiB ({words})"


def _gib(size: float) -> str:
    return number(size / GIB)
