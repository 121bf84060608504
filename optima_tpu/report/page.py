"""Writes report.html: one page about one run or several.

The page has no scripts and needs no network. Its layout is defined in report.html.j2 and report.css in this folder.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optima_tpu.errors import plural
from optima_tpu.report.distillation import distillation
from optima_tpu.report.layer_means import measured
from optima_tpu.report.layers import layer_errors, maps, solver, strange
from optima_tpu.report.origin import cost, origin
from optima_tpu.report.plots import MARKERS, SERIES
from optima_tpu.report.published import result
from optima_tpu.report.results import comparison, distance, outcome, tiles
from optima_tpu.report.run_files import run_files
from optima_tpu.report.runs import FinishedRun, read_runs
from optima_tpu.report.view import template, without_folders
from optima_tpu.report.writing import continuations, tokens
from optima_tpu.runtime.files import write_bytes, writing

PAGE = "report.html"
"""File name of the page in a run directory."""


def is_page(data: bytes) -> bool:
    """Whether a file is a page of this program."""
    return b"Created from report.json by OPTIMA-TPU" in data  # in the footer


def write_page(given_paths: Sequence[str | Path], path: Path) -> list[FinishedRun]:
    """Writes the page about finished runs and returns the runs.

    A file with the same content is not written again.

    Raises:
      UserError: a run is not finished or not readable, or the page cannot be written.
    """
    title, runs = read_runs(given_paths)
    data = render(title, runs).encode()
    with writing(path, "choose another --output"):
        if not path.exists() or path.read_bytes() != data:
            write_bytes(path, data)
    return runs


def render(title: str, runs: Sequence[FinishedRun]) -> str:
    """The page as HTML. ``title`` lists what the runs have in common."""
    of_layers = [layer_errors, maps, solver] if any(run.report.layers for run in runs) else []
    sections = [
        outcome(runs),
        *distillation(runs),
        *distance(runs),
        *tokens(runs),
        *continuations(runs),
        *(make(runs) for make in (*of_layers, strange) if all(measured(run.report.layers) for run in runs)),
        cost(runs),
        *(run_files(run) for run in runs if len(runs) == 1),
        origin(runs),
    ]
    page: dict[str, Any] = {
        "code": ", ".join(dict.fromkeys(run.report.code for run in runs)),
        "colours": SERIES,
        "markers": tuple(MARKERS.values()),
    }
    if len(runs) == 1:
        settings = runs[0].report.settings
        done = f"{settings.method}, {title.removeprefix(settings.model_name).lstrip(', ')}"
        page |= {"title": settings.model_name, "subtitle": without_folders(done), "sections": sections}
        page |= {"tiles": tiles(runs[0]), "result": result(runs[0].report)}
    else:
        page |= {
            "title": f"{plural(len(runs), 'run')} side by side",
            "subtitle": without_folders(title),
            "tiles": (),
            "result": "",
        }
        page |= {"sections": [comparison(runs), *sections]}
    return template("report.html.j2").render(page=page)
