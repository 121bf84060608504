"""Counts the outcomes of damaged files, random commands, signals and kills.

    python -m benchmarks.hostile files --cases 0:2000 --add hostile.json
    python -m benchmarks.hostile signals --processes 2 --cases 0:252 --add hostile.json
    python -m benchmarks.hostile pairs --cases 0:20

Case n of a seed is always the same one, so that a campaign can be done in parts; ``--add`` adds the counts to those of earlier
parts.

- files: a file of each kind that the program reads, with flipped bits, cut short, or with another value in its JSON.
- lines: a command with random words and settings. Settings of a run that are not refused are run.
- signals: SIGTERM and Ctrl-C, the first 202 cases every 50 ms from 0 to 5 s after a process of Python was started, the others at
  random moments of a run; then the run goes on, and its weights are compared with those of a run that nothing stopped.
- kills: SIGKILL at random moments of a run, of one or of all of its processes; then as above.
- pairs: two commands that write one folder, the second begun at a random moment of the first: two of four exports and unpackings,
  and in every fifth case two runs. The folder must be that of a command that ended with 0, byte for byte.

Stops at random moments come four to a run: three interrupt one that goes on already. Their processes are forked from one that has
imported everything, which only saves time.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import jax
import pytest
from hypothesis import strategies as st

import optima_tpu.models.checkpoints.orbax
import optima_tpu.pipeline.run
import optima_tpu.report.page  # noqa: F401  Imported before processes are forked, as the two above.
from optima_tpu import cli, launch
from optima_tpu.config.parse import parse
from optima_tpu.config.written import flags
from optima_tpu.errors import UserError
from optima_tpu.evaluate.config import EvaluateConfig
from optima_tpu.pipeline.recover.config import RecoverConfig
from optima_tpu.pipeline.repair import verified
from optima_tpu.runtime.program import COMMANDS
from optima_tpu.runtime.signals import INTERRUPTED, RESUME, listen
from tests.support.pages import leave_plots_empty
from tests.support.processes import free_port, hearing_ctrl_c, process_environment, without_gloo
from tests.support.runs import SMALL
from tests.support.tiny_models import tiny_folder

START = 202
"""Cases of signals in the first five seconds: every 50 ms, SIGTERM and Ctrl-C."""
CHAIN = 4
"""Stops of one run at random moments."""
SECONDS = 20
"""Of a core: a refusal that needs more is wrong, and a command that works longer is ended."""
BATCH = 20
"""Command lines that are drawn together; begin at a multiple of it, so that a case is always the same one."""
HANGS = 150
"""Seconds after which a process is killed."""
JOINING = "did not join within|was not found at|gave up before all"
"""What a process says of one that was killed before it joined."""
STARTING = ("Could not import runpy module", "Fatal Python error: init_")
"""What Python itself says of a Ctrl-C in its own start, before the first line of a program; it ends with 1."""
ENDS = {signal.SIGTERM: (RESUME, "stopped by SIGTERM"), signal.SIGINT: (INTERRUPTED, "stopped")}


class Tally:
    """Counts of outcomes. What is wrong is printed as well."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()

    def good(self, outcome: str) -> None:
        self.counts[outcome] += 1

    def wrong(self, outcome: str, *facts: object) -> None:
        self.counts[f"WRONG: {outcome}"] += 1
        print(f"WRONG: {outcome}:", *facts, sep="\n  ", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a case went wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile", description=__doc__.split("\n\n")[0])
    parser.add_argument("campaign", choices=CAMPAIGNS)
    parser.add_argument("--cases", default="0:10", help="FIRST:END or FIRST:END:STEP of the cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="of a run that is stopped")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no case after this time")
    parser.add_argument("--work", type=Path, help="folder for the runs that are stopped, kept from part to part")
    parser.add_argument("--compile", action="store_true", help="compile anew in every process, without a cache")
    parser.add_argument("--add", type=Path, help="file of counts, to which those of these cases are added")
    options = parser.parse_args(argv)
    cases = range(*map(int, options.cases.split(":")))
    tally, until, done = Tally(), time.monotonic() + options.seconds, cases.start
    warnings.filterwarnings("ignore", message=".*os.fork")
    with tempfile.TemporaryDirectory(prefix="hostile-") as temporary:
        folder = Path(options.work or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for each in CAMPAIGNS[options.campaign](tally, options, cases, folder):
            done = each
            if time.monotonic() > until:
                break
    what = [options.campaign, *([f"{options.processes} processes"] if options.campaign in ("signals", "kills") else [])]
    print(f"{', '.join(what)}: cases {cases.start}:{done} in {time.monotonic() - until + options.seconds:.0f} s")
    for outcome, count in sorted(tally.counts.items()):
        print(f"{count:6} {outcome}")
    if options.add:
        earlier = json.loads(options.add.read_text()) if options.add.exists() else {}
        counts = collections.Counter(earlier.get(", ".join(what), {})) + tally.counts
        options.add.write_text(json.dumps(earlier | {", ".join(what): dict(sorted(counts.items()))}, indent=1))
    return int(any(outcome.startswith("WRONG") for outcome in tally.counts))


def drawn(strategy: st.SearchStrategy, number: int, seed: str, check: Callable[[Any], None]) -> None:
    """Calls ``check`` with ``number`` values, at most."""
    settings = hypothesis.settings(
        max_examples=number,
        phases=[hypothesis.Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    @hypothesis.seed(seed)
    @settings
    @hypothesis.given(strategy)
    def run(value: Any) -> None:
        check(value)

    run()


# Files.


def files(tally: Tally, options: argparse.Namespace, cases: range, folder: Path) -> Iterator[int]:
    """Tries damaged files, with equally many cases for every kind."""
    from tests import test_fuzz as fuzz  # which imports torch

    kinds = fuzz.KINDS | {"configurations": None}
    share = {name: len(range(number, len(cases), len(kinds))) for number, name in enumerate(kinds)}
    done = cases.start
    for name, kind in kinds.items():
        own = folder / name
        if kind is None:
            own.mkdir()
            kind, strategy, original = fuzz.Kind("config.json", own.mkdir, fuzz.read_declared), fuzz.configurations(), b""
        else:
            if kind.write is not tiny_folder:
                own.mkdir()
            kind.write(own)
            original = (own / kind.file).read_bytes()
            strategy = fuzz.damaged(original)
        if share[name]:
            check = functools.partial(_file, tally, name, kind, own, fuzz.outcome, original)
            drawn(strategy, share[name], f"{name} {options.seed} {cases.start}", check)
        done += share[name]
        yield done
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if peak > 2 << 20:
        tally.wrong("more than 2 GiB", f"{peak} KiB")


def _file(tally: Tally, name: str, kind: Any, folder: Path, outcome: Callable[..., str], original: bytes, changed: bytes) -> None:
    began = time.process_time()
    try:
        result = outcome(kind, folder, changed)
    except Exception:
        tally.wrong("a traceback", name, changed[:300], traceback.format_exc())
        return
    if time.process_time() - began > SECONDS:
        tally.wrong(f"more than {SECONDS} s", name, changed[:300])
    elif kind.checked and result == "read" and changed != original:
        tally.wrong("believed against its checksum", name, changed[:300])
    else:
        tally.good({"read": "read", "refused": "refused in one line"}[result])


# Processes.


def forked(work: Callable[[], int | None], printed: Path, errors: Path) -> int:
    """Forks a process that does ``work``. Returns its process id."""
    if child := os.fork():
        return child
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored
        for path, stream in ((printed, 1), (errors, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        status = work() or 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def ended(child: int) -> tuple[int, float]:
    """Waits for a process. Returns its exit status and its CPU seconds.

    The status is negative for the signal that ended the process. Kills a process that hangs.
    """
    until, finished = time.monotonic() + HANGS, 0
    while not finished:
        time.sleep(0.01)
        finished, status, used = os.wait4(child, os.WNOHANG)
        if not finished and time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime


def in_child(folder: Path, work: Callable[[], int | None]) -> None:
    """Does in another process what would take the devices of this one."""
    status, _ = ended(forked(work, folder / "printed", folder / "said"))
    if status:
        raise RuntimeError((folder / "said").read_text())


def write_model(folder: Path) -> None:
    if not (folder / "model").exists():
        in_child(folder, lambda: tiny_folder(folder / "model", num_hidden_layers=2) and None)


# Command lines.


def lines(tally: Tally, options: argparse.Namespace, cases: range, folder: Path) -> Iterator[int]:
    """Tries random command lines: nine of ten are runs.

    The others go to all commands. Of the runs whose settings are read, one of eight is done.
    """
    from tests import test_fuzz as fuzz

    write_model(folder)
    model = str(folder / "model")
    small = ["prune", "--model", model, *SMALL, "--preset", "fast"]
    in_child(folder, lambda: cli.main([*small, "--output", str(folder / "run")]))
    shutil.copytree(folder, folder / "whole", ignore=shutil.ignore_patterns("whole"))
    (folder / "a.txt").write_text("a text " * 200)
    paths = st.sampled_from([".", "nowhere", "a.txt", "run", "run/hf", "run/checkpoint", "run/report.json", "model", "new"])
    words = paths | paths | fuzz.WORDS
    settings_of = {"evaluate": EvaluateConfig, "recover": RecoverConfig}
    named = {name: [field.name for field in dataclasses.fields(kind)] for name, kind in settings_of.items()}
    for name in COMMANDS.keys() - named.keys() - {"prune"}:
        named[name] = [word.lstrip("-") for action in command_parser(name)._actions for word in action.option_strings]
    runs = fuzz.command_lines().map(lambda argv: [*small, "--output", "new", *argv])
    few = {"evaluate": ["--perplexity", "random", "--length", "16", "--windows", "2"], "recover": ["--tokens", "2k"]}
    few["plan"] = ["--model", "model", "--no-compile"]

    def others(name: str) -> st.SearchStrategy[list[str]]:
        option = st.tuples(st.sampled_from(named[name]).map("--{}".format), words).map(list)
        return st.tuples(
            paths.map(lambda path: [path]) | st.just([]), st.lists(option | words.map(lambda word: [word]), max_size=4)
        ).map(lambda drawn: [name, *drawn[0], *few.get(name, []), *itertools.chain.from_iterable(drawn[1])])

    commands = st.sampled_from(sorted(named)).flatmap(others)
    for start in range(cases.start, cases.stop, BATCH):
        part, argvs = range(start, min(start + BATCH, cases.stop)), list[list[str]]()
        drawn(runs if start // BATCH % 10 else commands, len(part) + 1, f"{options.seed} {start}", argvs.append)
        # Hypothesis draws the simplest value first, which is always the same one.
        for number, argv in zip(part, argvs[1:]):
            _line(tally, folder, argv, number % 8 == 1)
        yield part.stop


def command_parser(name: str) -> argparse.ArgumentParser:
    module = importlib.import_module(COMMANDS[name].reader.partition(":")[0])
    return module.make_parser()


def _line(tally: Tally, folder: Path, argv: list[str], work_too: bool) -> None:
    if argv[0] == "prune":
        try:
            config = parse(argv[1:])
            if parse(flags(config)) != config:
                tally.wrong("other settings when written as a command line", argv)
        except UserError as error:
            if "\n" in str(error):
                tally.wrong("refused in several lines", argv, error)
            else:
                tally.good("refused in one line")
            return
        except BaseException:
            tally.wrong("a traceback", argv, traceback.format_exc())
            return
        if not work_too:
            tally.good("settings that are the same when written as a command line")
            return
    own = Path(shutil.copytree(folder / "whole", folder / "own"))
    shutil.copy(folder / "a.txt", own)

    def work() -> int:
        os.chdir(own)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        sys.argv = ["optima", *argv]
        return cli.main()

    status, used = ended(forked(work, folder / "printed", folder / "said"))
    stderr_text = (folder / "said").read_text(errors="replace")
    facts = (argv, f"status {status}, {used:.1f} s", stderr_text[-1500:])
    shutil.rmtree(own)
    if "Traceback" in stderr_text:
        tally.wrong("a traceback", *facts)
    elif status == 2 and stderr_text.startswith("error: ") and stderr_text.count("\n") == 1:
        tally.good("refused in one line")
    elif status == 0 or (status == 1 and argv[0] == "verify"):
        tally.good("done")
    elif used > SECONDS - 1 and status in (-signal.SIGKILL, -signal.SIGXCPU) and not stderr_text:
        tally.good(f"at work after {SECONDS} s of a core")
        print("at work:", *argv)
    else:
        tally.wrong("another end", *facts)


# Stops.


class Stops:
    """A run that nothing stopped, and ways to start it."""

    def __init__(self, folder: Path, count: int, compile_anew: bool):
        write_model(folder)
        leave_plots_empty(pytest.MonkeyPatch())  # matplotlib takes a second of a run
        self.folder, self.count = folder, count
        if not compile_anew:
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
            os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
            jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        if not (folder / "whole").exists():
            self.finish(folder / "whole")
        began = time.monotonic()
        self.finish(folder / "again")  # now everything is compiled
        self.seconds = time.monotonic() - began
        if wrong := self.compare(folder / "again"):
            raise RuntimeError(wrong)
        shutil.rmtree(folder / "again")

    def arguments(self, output: Path, number: int, port: int) -> list[str]:
        devices = (
            ["--mesh", "2x2", "--cpu-devices", "4"] if self.count == 1 else ["--mesh", f"{self.count}x1", "--cpu-devices", "1"]
        )
        if self.count > 1:
            devices += ["--coordinator", f"localhost:{port}", "--num-processes", str(self.count), "--process-id", str(number)]
            devices += ["--join-timeout", str(HANGS // 2)]
        return ["--model", str(self.folder / "model"), *SMALL, "--preset", "fast", *devices, "--output", str(output)]

    def fork(self, output: Path) -> list[int]:
        """Forks the processes of the run. Returns their process ids."""
        port = free_port()

        def work(number: int) -> int:
            sys.argv = ["launch", *self.arguments(output, number, port)]
            listen()
            return launch.main()

        return [
            forked(functools.partial(work, number), self.folder / f"printed{number}", self.folder / f"said{number}")
            for number in range(self.count)
        ]

    def begin(self, output: Path) -> list[int]:
        """Starts the processes of the run, each a new Python."""
        port, environment = free_port(), process_environment()
        with hearing_ctrl_c():
            return [
                subprocess.Popen(
                    [sys.executable, "-W", "ignore", "-m", "optima_tpu.launch", *self.arguments(output, number, port)],
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=(self.folder / f"said{number}").open("w"),
                ).pid
                for number in range(self.count)
            ]

    def said(self) -> list[str]:
        return [(self.folder / f"said{number}").read_text() for number in range(self.count)]

    def finish(self, output: Path) -> None:
        statuses = [ended(child)[0] for child in self.fork(output)]
        if any(statuses):
            raise RuntimeError(f"a run that nothing stops ended with {statuses}: {self.said()}")

    def compare(self, output: Path) -> str:
        """Names files that differ from the unstopped run's; empty if none."""
        expected = self.folder / "whole/hf"
        names = [path.name for path in expected.iterdir() if path.suffix in (".safetensors", ".npz")]
        different = [name for name in names if (output / "hf" / name).read_bytes() != (expected / name).read_bytes()]
        return f"other bits in {', '.join(different)}" if different or len(names) != 2 else ""

    def go_on(self, tally: Tally, output: Path, facts: object) -> None:
        """Finishes a run that was stopped, and compares it. Removes it."""
        try:
            self.finish(output)
            wrong = self.compare(output)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            tally.wrong("went on to something else", facts, wrong)
        else:
            tally.good("went on to the same bits")
        shutil.rmtree(output, ignore_errors=True)


def signals(tally: Tally, options: argparse.Namespace, cases: range, folder: Path) -> Iterator[int]:
    """Sends SIGTERM or Ctrl-C to all processes of a run, as schedulers do."""
    stops, output, facts = Stops(folder, options.processes, options.compile), folder / "run", []
    for number in cases:
        chance = random.Random(f"signals {options.seed} {number}")
        sent, early = (signal.SIGTERM, signal.SIGINT)[number % 2], number < START
        moment = number // 2 * 0.05 if early else chance.uniform(0.05, 0.95) * stops.seconds
        started = (stops.begin if early else stops.fork)(output)
        time.sleep(moment)
        for child in started:
            os.kill(child, sent)
        facts.append((number, sent.name, moment))
        statuses = [ended(child)[0] for child in started]
        stopped = tally_signal(tally, sent, statuses, stops.said(), moment if early else 9.0, facts[-1])
        if early and not (output / "run.json").exists():
            if left := [path.name for path in output.rglob("*") if path.name != "run.lock"]:
                tally.wrong("stopped before anything was written, and left files", facts[-1], left)
            else:
                tally.good("nothing was written yet")
            shutil.rmtree(output, ignore_errors=True)
        elif early or not stopped or len(facts) >= CHAIN or number == cases[-1]:
            stops.go_on(tally, output, facts)
        else:
            yield number + 1
            continue
        facts = []
        yield number + 1


def tally_signal(
    tally: Tally, sent: signal.Signals, statuses: list[int], errors: list[str], moment: float, facts: object
) -> bool:
    """Counts how a signalled run ended. Returns whether it was stopped."""
    status, line = ENDS[sent]
    texts = [without_gloo(text) for text in errors]
    python = [
        exit_status == -sent or (exit_status == 1 and text.startswith(STARTING)) for exit_status, text in zip(statuses, errors)
    ]
    if moment < 0.2 and any(python) and all(own or exit_status == status for own, exit_status in zip(python, statuses)):
        tally.good("ended by the signal before Python was up")
    elif statuses == [0] * len(statuses):
        tally.good("was done already, status 0")
        return False
    elif statuses != [status] * len(statuses):
        tally.wrong("another status", facts, statuses, errors)
    elif not all(len(text) == 1 and text[0].startswith(line) for text in texts):
        tally.wrong("something else than one line", facts, statuses, errors)
    else:
        tally.good(f"status {status} and one line")
    return True


def kills(tally: Tally, options: argparse.Namespace, cases: range, folder: Path) -> Iterator[int]:
    """Sends SIGKILL to one process of a run, or to all."""
    stops, output, facts = Stops(folder, options.processes, options.compile), folder / "run", []
    for number in cases:
        chance = random.Random(f"kills {options.seed} {number}")
        moment = chance.uniform(0.02, 1.0) * stops.seconds
        victims = chance.choice([(0,), (1,), (0, 1)]) if stops.count > 1 else (0,)
        started = stops.fork(output)
        time.sleep(moment)
        for victim in victims:
            os.kill(started[victim], signal.SIGKILL)
        statuses = [ended(child)[0] for child in started]
        facts.append((number, moment, victims, statuses))
        for index, status in enumerate(statuses):
            if index not in victims:
                survivor(tally, status, stops.said()[index], facts[-1])
        tally.good("killed" if any(statuses) else "was done already")
        if len(facts) >= CHAIN or not any(statuses) or number == cases[-1]:
            stops.go_on(tally, output, facts)
            facts = []
        yield number + 1


def survivor(tally: Tally, status: int, errors: str, facts: object) -> None:
    """Counts how a process ended whose peer was killed."""
    # jax aborts a process that waits for another to connect.
    expected = {0: "ended with 0", 69: "ended with 69", -signal.SIGABRT: "aborted by jax"}
    if status == 2 and re.search(JOINING, errors):
        tally.good("the other process waited for it to join, and ended with 2")
    elif status not in expected or (status == 69 and "Traceback" in errors):
        tally.wrong("the other process ended otherwise", facts, errors)
    else:
        tally.good(f"the other process {expected[status]}")


# Two commands at once.


class Writers:
    """Commands that write a folder, and what each one writes when alone."""

    def __init__(self, folder: Path, stops: Stops):
        self.folder, run, other = folder, stops.folder / "whole", folder / "other"
        if not other.exists():
            in_child(folder, lambda: launch.main([*stops.arguments(other, 0, 0), "--pattern", "0.25"]))
        packed = folder / "packed" / "out"  # a model card names its folder
        self.commands = {
            "export": ["export", str(run)],
            "export of another run": ["export", str(other)],
            "export --packed": ["export", "--packed", str(run)],
            "unpack": ["unpack", str(packed)],
        }
        self.alone: dict[str, dict[str, bytes]] = {}
        self.seconds: dict[str, float] = {}
        for name in ("export --packed", "unpack", "export", "export of another run"):
            out = packed if name == "export --packed" else folder / name / "out"
            shutil.rmtree(out.parent, ignore_errors=True)
            began = time.monotonic()
            in_child(folder, functools.partial(cli.main, [*self.commands[name], str(out)]))
            self.seconds[name] = time.monotonic() - began
            self.alone[name] = contents(out)

    def start(self, argv: list[str], number: int) -> int:
        return forked(lambda: cli.main(argv), self.folder / f"printed{number}", self.folder / f"said{number}")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pairs(tally: Tally, options: argparse.Namespace, cases: range, folder: Path) -> Iterator[int]:
    """Two commands that write one folder at once."""
    stops = Stops(folder, 1, options.compile)
    writers = Writers(folder, stops)
    for number in cases:
        chance = random.Random(f"pairs {options.seed} {number}")
        runs, pair = number % 5 == 4, folder / "pair"
        names = ["run", "run"] if runs else chance.choices([*writers.commands], k=2)
        moment = chance.uniform(0, 1) * (stops.seconds if runs else writers.seconds[names[0]])
        shutil.rmtree(pair, ignore_errors=True)
        started = []
        for which, name in enumerate(names):
            argv = ["prune", *stops.arguments(pair / "out", 0, 0)] if runs else [*writers.commands[name], str(pair / "out")]
            started.append(writers.start(argv, which))
            time.sleep(0 if which else moment)
        statuses = [ended(child)[0] for child in started]
        errors = [(folder / f"said{which}").read_text() for which in range(2)]
        tally_pair(tally, writers, stops, pair, names, statuses, errors, (number, names, moment))
        yield number + 1


def tally_pair(
    tally: Tally,
    writers: Writers,
    stops: Stops,
    pair: Path,
    names: list[str],
    statuses: list[int],
    errors: list[str],
    facts: object,
) -> None:
    """Compares a folder that two commands wrote with what the winner writes.

    The winner is the command that ended with 0.
    """
    winners = [name for name, status in zip(names, statuses) if not status]
    out, runs = pair / "out", names == ["run", "run"]
    # What is whole already ends with 0 again: a finished run, and an export or an unpacking of the same run to the same folder.
    # The bytes below decide whether it was whole.
    if sorted(statuses) not in ([0, 2], [0, 0]):
        tally.wrong("other statuses", facts, statuses, errors)
    elif any(text.count("\n") != 1 or not text.startswith("error: ") for text, status in zip(errors, statuses) if status):
        tally.wrong("not one line", facts, errors)
    elif [path.name for path in pair.iterdir()] != ["out"]:
        tally.wrong("something is left beside it", facts, sorted(pair.iterdir()))
    elif (checked := verified(out)).damaged or checked.unlisted:
        tally.wrong("it does not verify", facts, checked)
    elif stops.compare(out) if runs else contents(out) != writers.alone[winners[0]]:
        tally.wrong("it is neither command's", facts, errors)
    else:
        late = "was done already" if all(not status for status in statuses) else "said so"
        tally.good(f"one {'run' if runs else 'command'} won whole, and the other {late}")


CAMPAIGNS = {"files": files, "lines": lines, "signals": signals, "kills": kills, "pairs": pairs}

if __name__ == "__main__":
    sys.exit(main())
