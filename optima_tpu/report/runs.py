"""Reads finished runs from their files, and labels them for a comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from optima_tpu.config.flat import field_names, flat
from optima_tpu.errors import UserError, plural
from optima_tpu.report.contents import Report
from optima_tpu.report.evaluation import EvaluationRecord
from optima_tpu.report.file import REPORT
from optima_tpu.report.numbers import duration
from optima_tpu.report.run_record import RUN, read_run, recorded_command
from optima_tpu.report.settings import RunSettings
from optima_tpu.runtime.buckets import as_path
from optima_tpu.runtime.checksums import read_intact
from optima_tpu.runtime.devices import Devices
from optima_tpu.runtime.inside import refuse_links

# Settings that change neither weights nor layer errors; labels leave them out.
_ELSEWHERE = ("output", "export", "evaluation", "recompute", "sinks", *field_names(Devices))


class FinishedRun(NamedTuple):
    """A finished run.

    Attributes:
      label: method and the settings that distinguish it from the other runs: "wanda + cg, 2:4"; empty for a run alone.
      given_path: the path that the user gave: the run directory or its report.json.
      evaluation: contents of evaluation.json; None if the run was evaluated only on its own perplexity.
      another: the model in evaluation.json if it is not this run's model, otherwise None.
    """

    label: str
    given_path: str
    report: Report
    evaluation: EvaluationRecord | None
    another: str | None = None

    @property
    def directory(self) -> Path:
        """The run directory, see :func:`run_of`."""
        return run_of(self.given_path)

    @property
    def subject(self) -> str:
        """What begins a sentence about the run."""
        return self.label or "This run"

    @property
    def before(self) -> str:
        """What stands before a general sentence; empty for a run alone."""
        return f"{self.label}: " if self.label else ""

    @property
    def behind(self) -> str:
        """What stands behind a caption; empty for a run alone."""
        return f", {self.label}" if self.label else ""

    @property
    def cell(self) -> list[str]:
        """The first cell of a row in a table; none for a run alone."""
        return [self.label] if self.label else []

    @property
    def beside(self) -> str:
        """The model that the evaluation compares with: "dense" or its name."""
        against, other = (self.evaluation.against, self.evaluation.evaluated.against) if self.evaluation else (None, None)
        same = other is not None and other.fingerprint == self.report.model.fingerprint
        return "dense" if same or against is None or against == self.report.settings.model else against

    @property
    def time(self) -> str:
        """The time of stages and of blocks before a resume, as text.

        Of a resumed run, "at least" so long: other earlier work was not recorded.
        """
        elapsed = duration(sum(self.report.seconds.values()) + self.report.earlier)
        return f"at least {elapsed}" if self.report.earlier else elapsed


def read_runs(given_paths: Sequence[str | Path]) -> tuple[str, list[FinishedRun]]:
    """Reads runs; returns a title with the settings they share, and the runs.

    Args:
      given_paths: run directories, or report.json files.

    Raises:
      UserError: a run is not finished or given twice, or its files are damaged.
    """
    paths = [str(run) for run in given_paths]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"expected each run once, got {path} twice: leave one out")
    reports = {path: read_report(path) for path in paths}
    title, labels = names(reports)
    twins = {run for run, label in labels.items() if list(labels.values()).count(label) > 1}
    labels |= {run: f"{labels[run]}, {run}" for run in twins}  # runs with the same settings are distinguished by path
    if len(reports) == 1:
        labels = dict.fromkeys(reports, "")
    return title, [FinishedRun(labels[run], run, report, *_evaluation(run, report)) for run, report in reports.items()]


def read_report(run: str) -> Report:
    """The report of a finished run, from its directory or report.json.

    Raises:
      UserError: as :func:`read_runs`.
    """
    path = as_path(run)
    if path.is_dir():
        refuse_links(path)
        if not (path / REPORT).exists():
            if (path / RUN).exists():
                command = recorded_command(read_run(path).configuration) or "its command"
                raise UserError(f"{run} is not finished: it has no {REPORT} yet; to finish it, repeat {command}")
            raise UserError(f"expected a run directory, got {run}, which has no {REPORT}: check the path")
        path /= REPORT
    return read_intact(path, Report, remedy="it is no report of a run, it is damaged, or another version of OPTIMA-TPU wrote it")


def names(reports: Mapping[str, Report]) -> tuple[str, dict[str, str]]:
    """A title with the settings that runs share, and a name for each run.

    A name has the settings that differ: "wanda + cg, 2:4". Runs with the same settings get the same name.
    """
    facts = {run: _facts(report.settings) for run, report in reports.items()}
    first = next(iter(facts.values()))
    common = [fact for fact in first if len({own[fact] for own in facts.values()}) == 1]
    named = {
        run: ", ".join([reports[run].settings.method, *(own[fact] for fact in own if fact not in common)])
        for run, own in facts.items()
    }
    for name in set(named.values()):
        alike = {run: reports[run].configuration for run in named if named[run] == name}
        if len(alike) > 1:  # add all other settings that differ
            differing = differences(
                {run: {key: value for key, value in values.items() if key not in _ELSEWHERE} for run, values in alike.items()}
            )
            named |= {
                run: ", ".join([name, *(_setting(key, values[run]) for key, values in differing.items() if run in values)])
                for run in alike
            }
    return ", ".join(first[fact] for fact in common), named


def differences(configurations: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The settings that differ between runs: setting -> run -> value.

    Nested settings have names with dots. A setting has no entry for a run that does not have it, because the run uses another
    method.
    """
    settings = {run: flat(values) for run, values in configurations.items()}
    return {
        key: {run: own[key] for run, own in settings.items() if key in own}
        for key in dict.fromkeys(key for own in settings.values() for key in own)
        if len({str(own.get(key)) for own in settings.values()}) > 1
    }


def _setting(key: str, value: Any) -> str:
    """A setting as on the command line: "target dense", "recapture true"."""
    return f"{key.removesuffix('.name')} {str(value).lower() if isinstance(value, bool) else value}"


def _facts(settings: RunSettings) -> dict[str, str]:
    """The facts about a run that a title may contain."""
    text = settings.calibration
    written = f" and {plural(text.written, 'window')} that the model wrote" if text.written else ""
    pattern = settings.pattern if ":" in settings.pattern else f"sparsity {settings.pattern}"
    return {
        "model": settings.model_name,
        "pattern": pattern + (f" ({settings.layers})" if settings.layers else ""),
        "calibration": f"{'trained' if settings.recover else 'calibrated'} on {text.source}, {text.windows} x {text.length} "
        f"tokens{written}",
    }


def run_of(given_path: str) -> Path:
    """The run directory, also if the user gave the path of its report.json."""
    path = as_path(given_path)
    return path if path.is_dir() else path.parent


def _evaluation(given_path: str, report: Report) -> tuple[EvaluationRecord | None, str | None]:
    """The evaluation of a run, and the other model that was evaluated.

    At most one of both is not None: evaluation.json may be about a model that is not this run's.
    """
    path = run_of(given_path) / "evaluation.json"
    if not path.exists():
        return None, None
    remedy = "move the file away, or evaluate again"
    evaluation = read_intact(path, EvaluationRecord, remedy, remedy)
    same = evaluation.evaluated.model.manifest == report.manifest
    return (evaluation, None) if same else (None, evaluation.model)
