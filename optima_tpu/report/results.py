"""Page sections on results: perplexity, tasks, distance, comparison."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from optima_tpu.errors import plural
from optima_tpu.report import plots
from optima_tpu.report.evaluation import Distance
from optima_tpu.report.facts import Fact, facts, running, sizes
from optima_tpu.report.findings import unusual_count
from optima_tpu.report.meaningless import meaningless_lines
from optima_tpu.report.numbers import number, percent, times
from optima_tpu.report.published import Published, comparable
from optima_tpu.report.runs import FinishedRun, differences
from optima_tpu.report.view import NONE, Section, Table, command, without_folders

T = TypeVar("T")
_SPREAD = "In brackets: the ratio two standard errors lower and higher, over windows that both models read."
_SHOWN = 4
"""Most commands that the page shows for several runs."""


def tiles(run: FinishedRun) -> list[Fact]:
    """The facts of one run; its evaluation's results follow perplexity."""
    first, *others = facts(run.report)
    evaluated = []
    for text, distance in _distances(run).items():
        divergence, where = number(distance.kl), f"{_against(run.beside)} on {text}"
        rows = {f"divergence{where}, nats": divergence, f"same token{where}": percent(distance.agreement)}
        evaluated.append(Fact(f"Divergence from {run.beside}", [divergence], f"nats per token, on {text}", rows=rows))
    if run.evaluation and run.evaluation.average is not None:
        average, asked = percent(run.evaluation.average), run.evaluation.asked
        rows = {f"mean accuracy of six tasks, {asked}": average}
        evaluated.append(Fact("Six tasks", [average], f"mean accuracy, {asked}", rows=rows))
    again = ", including the parts before it was resumed" if run.report.earlier else ""
    time = Fact("Time", [run.time], f"on {run.report.environment.words}{again}")
    return [first, *evaluated, *others, time, *[_unusual(run)] * bool(run.report.layers)]


def _unusual(run: FinishedRun) -> Fact:
    count = unusual_count(run.report.layers)
    rows = {"layers with anything unusual": f"{count:,}"}
    if meaningless_lines(run.report):
        return Fact("Unusual", ["no meaning"], "text or dense model, named below", rows=rows)
    words = (plural(count, "layer"), "named below") if count else ("nothing", "in any layer")
    return Fact("Unusual", [words[0]], words[1], rows=rows)


def comparison(runs: Sequence[FinishedRun]) -> Section:
    """Section that compares runs: the settings that differ, the results."""
    settings = differences({run.given_path: {**run.report.configuration, **_elsewhere(run)} for run in runs})
    settings.pop("output", None)
    rows = [[name, *(_setting(values, run) for run in runs)] for name, values in settings.items()]
    labels = [run.label for run in runs]
    same = len({run.report.evaluation.digest for run in runs}) == 1
    text, results = [] if same else [_other_texts(runs)], _headlines(runs)
    return Section(
        "comparison",
        "Side by side",
        text,
        tables=[
            Table(
                "Settings that differ",
                ["setting", *labels],
                rows,
                words=True,
                runs=True,
                note="" if rows else "None: these runs have the same settings, code and devices.",
            ),
            Table(
                "Results",
                ["", *labels],
                [[name, *values] for name, values in results.items()],
                runs=True,
                note=_spread(results["pruned / dense"]),
            ),
        ],
    )


def _other_texts(runs: Sequence[FinishedRun]) -> str:
    """Says how the evaluation texts of the runs differ."""
    texts = [run.report.evaluation for run in runs]
    hows = dict.fromkeys(without_folders(text.how) for text in texts)
    what = "different texts" if len({text.source for text in texts}) > 1 else "different windows of one text"
    if len(hows) == 1:
        what = "texts of one name that are not the same tokens"
    return f"These runs measured perplexity on {what}, so their perplexities are not comparable: {'; '.join(hows)}."


def outcome(runs: Sequence[FinishedRun]) -> Section:
    """Section on perplexity and tasks, dense against pruned."""
    several = len(runs) > 1
    missing = [run for run in runs if not run.evaluation]
    which = "this run" if not several else "these runs" if missing == list(runs) else f"{len(missing)} of these runs"
    text: list[str] = (
        [f"Nobody evaluated {which} on other texts and tasks. The commands below do this and then update this page."]
        if missing
        else []
    )
    code = [(f"Measure the distance to the dense model{run.behind}", _evaluate(run)) for run in missing[:_SHOWN]]
    text += [
        f"The evaluation.json of {run.label or 'this run'} is not shown: it evaluates {run.another}, which this run did not make."
        for run in runs
        if run.another
    ]
    files = {sizes(run.report): run for run in runs}
    if len(files) == 1:
        text += [f"Size: {words}." for words in files]
    else:
        text += [f"Size of {run.label}: {words}. {running(run.report)}" for words, run in files.items()]
    tables = [*_perplexity_tables(runs), *_task_tables(runs)]
    folded = [_published_table(rows) for run in runs if not several and (rows := comparable(run.report))]
    return Section("outcome", "Dense against pruned", text, tables=tables, folded=folded, code=code)


def _published_table(rows: Sequence[Published]) -> Table:
    """What published methods reach with this pattern at about this size."""
    return Table(
        f"Published perplexity at {rows[0].pattern}, models of about this size, lower is better",
        ["model", "method", "text", "dense", "pruned", "pruned / dense", "source"],
        [
            [row.model, row.method, row.text, number(row.dense, 4), number(row.pruned, 4), f"{number(row.ratio)}×", row.source]
            for row in rows
        ],
        "For each model the smallest and the largest ratio that the sources name. Masks by magnitude are left out.",
        words=True,
    )


def _beside(
    runs: Sequence[FinishedRun],
    rows: Callable[[FinishedRun], Iterable[tuple[str, list[str]]]],
    caption: Callable[[str], str],
    names: Sequence[str],
    columns: Callable[[str], Sequence[str]],
) -> list[Table]:
    """A table for each model that the pruned models are compared with.

    The rows of a run stand behind the label of the run.

    Args:
      rows: of a run, each with the model that it compares with.
      names: the headings of the cells that name a row.
      columns: the headings of the numbers.
    """
    by_model: dict[str, list[list[str]]] = {}
    for run in runs:
        for other, row in rows(run):
            by_model.setdefault(other, []).append([*run.cell, *row])
    names = [*["run"] * (len(runs) > 1), *names]
    return [Table(caption(other), [*names, *columns(other)], cells, names=len(names)) for other, cells in by_model.items()]


def _perplexity_tables(runs: Sequence[FinishedRun]) -> list[Table]:
    tables = _beside(
        runs,
        _perplexities,
        lambda other: f"Perplexity{_against(other)}, lower is better",
        ["text"],
        lambda other: [other, "pruned", f"pruned / {other}", "tokens"],
    )
    return [table._replace(note=_spread(row[-2] for row in table.rows)) for table in tables]


def _perplexities(run: FinishedRun) -> Iterator[tuple[str, list[str]]]:
    report, text = run.report, run.report.evaluation
    both, error = report.perplexity, report.log_ratio_stderr
    yield "dense", _perplexity_row(without_folders(text.how), both.dense, both.pruned, error, text.tokens)
    for name, score in _by_short_name(run.evaluation.perplexity if run.evaluation else {}).items():
        how, apart = without_folders(score.how), _distances(run).get(name)
        description, error = how if name in how else f"{name}: {how}", apart.log_ratio_stderr if apart else None
        yield run.beside, _perplexity_row(description, score.against, score.perplexity, error, score.tokens)


def _perplexity_row(text: str, before: float | None, pruned: float, error: float | None, tokens: int) -> list[str]:
    first, ratio = (NONE, NONE) if before is None else (number(before, 4), times(pruned / before, error))
    return [text, first, number(pruned, 4), ratio, f"{tokens:,}"]


def _task_tables(runs: Sequence[FinishedRun]) -> list[Table]:
    asked = {run.label: run.evaluation.asked for run in runs if run.evaluation and run.evaluation.tasks}
    alike = set(asked.values()) if len(set(asked.values())) == 1 else ()
    note = "" if alike else " ".join(f"{label}: {how}." for label, how in asked.items())
    tables = _beside(
        runs,
        _tasks,
        lambda other: ", ".join([f"Tasks{_against(other)}", *alike, "± one standard error"]),
        ["task", "metric"],
        lambda other: [other, "pruned", "documents"],
    )
    return [table._replace(note=note) for table in tables]


def distance(runs: Sequence[FinishedRun]) -> list[Section]:
    """Section on the distance from the dense or another model; or empty."""
    curves: dict[tuple[str, str], list[plots.Line]] = {}
    for index, run in enumerate(runs):
        for text, distance in _distances(run).items():
            for key, name in _BY_BLOCK.items():
                if values := getattr(distance, key):
                    values = [math.nan if value is None else value for value in values]  # a value that was not finite
                    line = plots.Line(run.label or "pruned", range(len(values)), values, index)
                    curves.setdefault((key, f"{name}, {text}{_against(run.beside)}"), []).append(line)
    tables = _beside(
        runs,
        _distance_rows,
        lambda other: f"Distance to {'the dense model' if other == 'dense' else other}, ± one standard error",
        ["text"],
        lambda other: ["divergence, nats per token", "same most likely token", "error of the last hidden state", "tokens"],
    )
    if not tables:
        return []
    panels = [plots.Panel(title, lines, **_UNITS[key]) for (key, title), lines in curves.items()]
    other = "dense" if {run.beside for run in runs if _distances(run)} == {"dense"} else "other"
    text = (
        f"Divergence is the mean over tokens of KL({other} ‖ pruned) between the distributions of the next token; 0 means equal "
        f"distributions. The error of the hidden state after a block is ‖H′ − H‖² / ‖H‖², with H the hidden state of the {other} "
        "model; its rise shows which blocks cause the damage."
    )
    return [
        Section("distance", f"Distance to the {other} model", [text], plots.drawn(panels, "distance", plots.keys(runs)), tables)
    ]


def _distance_rows(run: FinishedRun) -> Iterator[tuple[str, list[str]]]:
    for text, distance in _distances(run).items():
        last = distance.hidden_errors[-1] if distance.hidden_errors else None
        yield (
            run.beside,
            [
                text,
                number(distance.kl) + _error(distance.kl_stderr),
                percent(distance.agreement) + _error(distance.agreement_stderr, 100),
                NONE if last is None else percent(last),
                f"{distance.tokens:,}",
            ],
        )


def _evaluate(run: FinishedRun) -> str:
    """The commands that evaluate a run and then write its page again."""
    directory, settings = str(run.directory), run.report.settings
    evaluate = command("evaluate", directory, "--against", settings.model, "--perplexity", settings.evaluation_source)
    return f"{evaluate}\n{command('report', directory)}"


_BY_BLOCK = {"hidden_errors": "Hidden state error", "kls": "Divergence", "agreements": "Same most likely token"}
_UNITS: Mapping[str, Mapping[str, Any]] = {"hidden_errors": {"log": True}, "kls": {"unit": number, "log": True}, "agreements": {}}


def _headlines(runs: Sequence[FinishedRun]) -> dict[str, list[str]]:
    """The rows of the comparison."""
    columns = [{name: value for fact in tiles(run) for name, value in fact.compared.items()} for run in runs]
    rows = {name: [own.get(name, NONE) for own in columns] for name in dict.fromkeys(name for own in columns for name in own)}
    return {name: values for name, values in rows.items() if set(values) != {NONE}}


def _tasks(run: FinishedRun) -> Iterator[tuple[str, list[str]]]:
    def shown(metric: str, value: float | None, error: float | None) -> str:
        if value is None:
            return NONE
        return percent(value) + _error(error, 100) if metric.startswith("acc") else number(value, 4) + _error(error)

    if run.evaluation is None:
        return
    for task, metric, documents, value, error, against, against_error in run.evaluation.scores:
        yield run.beside, [task, metric, shown(metric, against, against_error), shown(metric, value, error), f"{documents:,}"]
    if run.evaluation.scores and run.evaluation.average is not None:
        yield run.beside, ["mean of the six", "acc", NONE, percent(run.evaluation.average), NONE]


def _against(other: str) -> str:
    """The addition to a caption if the other model is not the dense model."""
    return "" if other == "dense" else f" against {other}"


def _spread(ratios: Iterable[str]) -> str:
    """The note under a table of ratios; empty if no error is known."""
    return _SPREAD if any("(" in ratio for ratio in ratios) else ""


def _error(value: float | None, scale: float = 1) -> str:
    """A standard error to append to its value; empty for None.

    The error is None for a single window or document.
    """
    return "" if value is None else f" ± {number(scale * value, 2)}"


def _distances(run: FinishedRun) -> Mapping[str, Distance]:
    return _by_short_name(run.evaluation.distance if run.evaluation else {})


def _by_short_name(by_text: Mapping[str, T]) -> Mapping[str, T]:
    """The values by text, without folders where texts stay distinct."""
    short = {without_folders(text): value for text, value in by_text.items()}
    return short if len(short) == len(by_text) else by_text


def _elsewhere(run: FinishedRun) -> dict[str, Any]:
    """Facts other than settings that may differ between runs."""
    return {
        "code": run.report.code,
        "model contents": run.report.model.fingerprint[:12],
        "devices used": run.report.environment.words,
    }


def _setting(values: Mapping[str, Any], run: FinishedRun) -> str:
    if run.given_path not in values:
        return NONE
    value = values[run.given_path]
    return (value or NONE) if isinstance(value, str) else json.dumps(value)
