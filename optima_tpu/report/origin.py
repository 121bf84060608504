"""Page sections on time and memory, and on the command, settings, files and environment of a run."""

import shlex
from collections.abc import Mapping, Sequence

from optima_tpu.config.parse import dump, recorded_run
from optima_tpu.errors import UserError
from optima_tpu.report import plots
from optima_tpu.report.file import files_in
from optima_tpu.report.numbers import duration, number, percent
from optima_tpu.report.results import devices
from optima_tpu.report.run_record import recorded_words
from optima_tpu.report.runs import FinishedRun
from optima_tpu.report.view import NONE, Key, Section, Table, commands, figure
from optima_tpu.runtime.program import program


def cost(runs: Sequence[FinishedRun]) -> Section:
    """Section on time by stage and by block, and on peak memory."""
    several = len(runs) > 1
    stages = [run.report["seconds"] for run in runs]
    rows = [
        [stage, *(duration(own[stage]) if stage in own else NONE for own in stages)]
        for stage in dict.fromkeys(stage for own in stages for stage in own)
    ]
    totals = [sum(own.values()) for own in stages]
    rows.append(["all stages", *map(duration, totals)])
    if not several and totals[0] > 0:
        for row, seconds in zip(rows, [*stages[0].values(), totals[0]]):
            row.append(percent(seconds / totals[0]))
    peaks = [[name, *(_gib(run, key) for run in runs)] for name, key in (("host", "host_peak"), ("one device", "device_peak"))]
    text = []
    for run in runs:
        if run.earlier:
            text.append(
                f"{run.label if several else 'This run'} was stopped and resumed: the table below shows the stages after the "
                f"last resume. Together with the blocks finished before, the run took {run.time}; the time of other earlier "
                "work was not recorded."
            )
    panel = plots.Panel(
        "Seconds for a block",
        [
            plots.Line(
                run.label if several else "seconds",
                [block.index for block in run.blocks],
                [block.seconds for block in run.blocks],
                index,
            )
            for index, run in enumerate(runs)
        ],
        _seconds,
    )
    elements = (
        [(panel.title, plots.lines([panel], "cost")[0])] if any(block.seconds for run in runs for block in run.blocks) else []
    )
    legend = [Key(run.label, index) for index, run in enumerate(runs)] if several else []
    head = ["stage", *(run.label for run in runs)] if several else ["stage", "time", *(["share"] if totals[0] > 0 else [])]
    return Section(
        "cost",
        "Time and memory",
        text,
        [figure(elements, legend=legend)] if elements else [],
        [
            Table("Time by stage", head, rows, total=True, runs=several),
            Table(
                "Memory at the peak",
                ["", *(run.label for run in runs)] if several else [],
                peaks,
                runs=several,
                note="Host memory is the resident set, including mapped pages of checkpoint files. A CPU has no device memory.",
            ),
        ],
    )


def origin(runs: Sequence[FinishedRun]) -> Section:
    """Section on what was run and in which environment, with the command that repeats the run."""
    several, tables, code, files = len(runs) > 1, [], [], []
    for run in runs:
        label = f", {run.label}" if several else ""
        tables.append(Table(f"What was run{label}", [], _facts(run), words=True))
        configuration = run.report["configuration"]
        try:
            name, words = recorded_words(configuration)
        except UserError as error:
            code.append((f"No command for this version of OPTIMA-TPU{label}", str(error)))
            continue
        code.append((f"Command{label}", _command(words, name)))
        if name == "prune":
            files.append((f"All settings{label}, as a file for --config", dump(recorded_run(configuration))))
    text = [
        commands(
            "Start this command in the same directory to repeat the run. While the run directory exists, the command only prints "
            "the result again and changes nothing; with another `--output` it computes everything again."
        )
    ]
    if any(run.report["environment"].get("processes", 1) > 1 for run in runs):
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
    """Rows of (name, value); a value that was not recorded reads "not recorded"."""
    report, place = run.report, run.report["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in place.get("packages", {}).items() if version)
    facts: Mapping[str, str | None] = {
        "model": report["model"].get("origin") or report["configuration"]["model"],
        "its contents": _digest(report["model"].get("fingerprint")),
        "recipe": report.get("recipe"),
        "calibration text": report["calibration"].get("how"),
        "evaluation text": report["evaluation"]["how"],
        "devices": devices(run) + (f", {place['processes']} processes" if place.get("processes", 1) > 1 else ""),
        "code": report.get("manifest", {}).get("code"),
        "packages": packages or None,
        "system": f"Python {place['python']}, {place['system']}" if {"python", "system"} <= place.keys() else None,
        "read from": run.place,
        **{f"left, {what}": path for what, path in files_in(run.directory, report.get("files", {})).items()},
    }
    return [[name, value or "not recorded"] for name, value in facts.items()]


def _digest(text: str | None) -> str | None:
    return text and f"sha256 {text}"


def _gib(run: FinishedRun, key: str) -> str:
    value = (run.report.get("memory") or {}).get(key)
    return f"{number(value / 2**30)} GiB" if value else "not counted" if run.report.get("memory") else "not recorded"


def _seconds(value: float) -> str:
    return f"{number(value)} s"
