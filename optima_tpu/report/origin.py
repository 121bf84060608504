"""Page sections on time, memory, command, settings, files and devices."""

import shlex
from collections.abc import Sequence

from optima_tpu.config.parse import recorded_run
from optima_tpu.config.written import dump
from optima_tpu.errors import UserError, plural
from optima_tpu.report import plots
from optima_tpu.report.file import files_in
from optima_tpu.report.numbers import duration, number, percent
from optima_tpu.report.run_record import recorded_words
from optima_tpu.report.runs import FinishedRun
from optima_tpu.report.view import NONE, Section, Table, commands
from optima_tpu.runtime.program import program


def cost(runs: Sequence[FinishedRun]) -> Section:
    """Section on time by stage and by block, and on peak memory."""
    text = [
        f"{run.subject} was stopped and resumed: of the stage in which it was stopped, the table below has the time after the "
        f"resume, and memory was measured since then. Together with the blocks finished before, the run took {run.time}."
        for run in runs
        if run.report.earlier
    ]
    lines = []
    for index, run in enumerate(runs):
        blocks = [block.index for block in run.report.blocks]
        lines.append(plots.Line(run.label or "seconds", blocks, [block.seconds for block in run.report.blocks], index))
    timed = any(any(line.y) for line in lines)
    panels = [plots.Panel("Seconds for a block", lines, lambda value: f"{number(value)} s")] * timed
    return Section(
        "cost", "Time and memory", text, plots.drawn(panels, "cost", plots.keys(runs)), [_stage_table(runs), _memory_table(runs)]
    )


def _stage_table(runs: Sequence[FinishedRun]) -> Table:
    """The time of each stage; for a single run also its share of all."""
    several, stages = len(runs) > 1, [run.report.seconds for run in runs]
    totals = [sum(own.values()) for own in stages]
    rows = [
        [stage, *(duration(own[stage]) if stage in own else NONE for own in stages)]
        for stage in dict.fromkeys(stage for own in stages for stage in own)
    ]
    rows.append(["all stages", *map(duration, totals)])
    shared = not several and totals[0] > 0
    if shared:
        for row, seconds in zip(rows, [*stages[0].values(), totals[0]]):
            row.append(percent(seconds / totals[0]))
    head = ["stage", *(run.label for run in runs)] if several else ["stage", "time", *["share"] * shared]
    return Table("Time by stage", head, rows, total=True, runs=several)


def _memory_table(runs: Sequence[FinishedRun]) -> Table:
    several, peaks = len(runs) > 1, [run.report.memory for run in runs]
    return Table(
        "Memory at the peak",
        ["", *(run.label for run in runs)] if several else [],
        [["host", *(_gib(peak.host_peak) for peak in peaks)], ["one device", *(_gib(peak.device_peak) for peak in peaks)]],
        runs=several,
        note="Host memory is the resident set, including mapped pages of checkpoint files. A CPU has no device memory.",
    )


def origin(runs: Sequence[FinishedRun]) -> Section:
    """Section on what was run, with the command that repeats the run."""
    several, tables, code, files = len(runs) > 1, [], [], []
    for run in runs:
        tables.append(Table(f"What was run{run.behind}", [], _facts(run), words=True))
        configuration = run.report.configuration
        try:
            name, words = recorded_words(configuration)
        except UserError as error:
            code.append((f"No command takes the recorded settings{run.behind}", str(error)))
            continue
        code.append((f"Command{run.behind}", _command(words, name)))
        if name == "prune":
            files.append((f"All settings{run.behind}, as a file for --config", dump(recorded_run(configuration))))
    text = [
        commands(
            "Start this command in the same directory to repeat the run. While the run directory exists, the command only prints "
            "the result again and changes nothing; with another `--output` it computes everything again."
        )
    ]
    if any(run.report.environment.processes > 1 for run in runs):
        text.append(
            commands(
                "The scripts in `launch/` start a run in several processes. Without them, give each process the command with "
                "`--coordinator`, `--num_processes` and `--process_id`."
            )
        )
    return Section(
        "origin",
        "What was run, and how to run it again",
        text,
        tables=() if several else tables,
        folded=tables if several else (),
        code=code,
        files=files,
    )


def _command(words: Sequence[str], name: str) -> str:
    """A shell command; a long one has one setting per line."""
    command, odd = program(name), len(words) % 2
    line = f"{command} {shlex.join(words)}"
    settings = [shlex.join(words[max(0, index) : index + 2]) for index in range(-odd, len(words), 2)]
    return line if len(line) <= 100 else " \\\n    ".join([command, *settings])


def _facts(run: FinishedRun) -> list[list[str]]:
    """Rows of (name, value)."""
    report, machine = run.report, run.report.environment
    facts = {
        "model": report.model.origin,
        "its contents": f"sha256 {report.model.fingerprint}",
        "recipe": report.recipe,
        "calibration text": report.calibration.how,
        "evaluation text": report.evaluation.how,
        "devices": machine.words + (f", {plural(machine.processes, 'process')}" if machine.processes > 1 else ""),
        "code": report.code,
        "packages": ", ".join(f"{name} {version}" for name, version in machine.packages.items() if version),
        "system": f"Python {machine.python}, {machine.system}",
        "read from": run.given_path,
        **{f"left, {what}": path for what, path in files_in(run.directory, report.files).items()},
    }
    return [[name, value] for name, value in facts.items()]


def _gib(count: int | None) -> str:
    return f"{number(count / 2**30)} GiB" if count else "not counted"
