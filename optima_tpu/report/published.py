"""What a result cost in perplexity, beside the cost of published methods.

``published.csv`` holds the published results, with the source of each. For every model and pattern it has the smallest and the
largest ratio of pruned to dense perplexity that the sources name; masks by magnitude are left out. Papers hardly have models of
fewer than 0.3 billion weights: for SmolLM2-135M published methods were run with this program, as they were published. No row is a
result of this program's own methods, which the rows are compared with. Where a source names several papers, nobody recorded which
of them has the number.
"""

import csv
import functools
from collections.abc import Sequence
from pathlib import Path

import msgspec

from optima_tpu.report.contents import Perplexities, Report
from optima_tpu.report.numbers import direction, interval, number, unsure

_SIZES = 2.5
"""A model is compared with models of at most so many times, and at least one part in so many, of its weights."""

_NEAR = 0.02
"""Results at a share of pruned weights are compared with runs whose sparsity is within this distance of it."""

TEXTS = {"c4": "C4", "wikitext2": "WikiText-2"}
"""The texts of the published results, by their names in the settings."""


class Published(Perplexities, frozen=True):
    """A published result.

    Attributes:
      pattern: "50%", "60%" or "70%" of the weights of every matrix, unstructured; or "2:4", "4:8".
      billions: the model's number of weights.
      text: the text of both perplexities.
      method: the mask, and the update if there is one.
      source: the publication, or the file of this repository that has the measurement.
    """

    pattern: str
    model: str
    billions: float
    text: str
    method: str
    source: str


@functools.cache
def published() -> tuple[Published, ...]:
    """All rows of published.csv."""
    text = Path(__file__).with_suffix(".csv").read_text(encoding="utf-8")
    rows = ({name: row[name] for name in Published.__struct_fields__} for row in csv.DictReader(text.splitlines()))
    return msgspec.convert(list(rows), tuple[Published, ...], strict=False)


def comparable(report: Report) -> list[Published]:
    """Published results with a run's pattern and models of about its size.

    The smallest ratio comes first. Empty for a model that was also trained or quantised, or whose layers have settings of their
    own: no published row is like such a model.
    """
    if _beyond_pruning(report) or report.settings.layers:
        return []
    billions = report.model.weights / 1e9
    rows = [
        row
        for row in published()
        if _same_pattern(row.pattern, report.settings.pattern, report.sparsity)
        and billions / _SIZES <= row.billions <= billions * _SIZES
    ]
    return sorted(rows, key=lambda row: row.ratio)


def result(report: Report) -> str:
    """The cost in perplexity, how sure it is, and published results."""
    return f"{change(report)} {published_range(report)}".rstrip()


def published_range(report: Report) -> str:
    """The range of published results, and where a run is in the range.

    If no result is comparable, the text says why, or is empty. Nothing is called good or poor: published results are of other
    models and texts, and an evaluation has few windows. What is said of the range, "above all of them", holds by two standard
    errors of the loss, paired by window, and only on the same texts.
    """
    rows = comparable(report)
    if not rows:
        return _beyond_pruning(report) or ""
    best, worst, ends = rows[0], rows[-1], interval(report.perplexity.ratio, report.log_ratio_stderr)
    text = report.settings.evaluation_source
    comparison = ""
    if text in TEXTS and ends:
        comparison = (
            " This run is below all of them."
            if ends[1] < best.ratio
            else " This run is above all of them."
            if ends[0] > worst.ratio
            else ""
        )
    elif text not in TEXTS:
        comparison = " This run was measured on another text, so compare with care."
    ranges = "; ".join(_range([row for row in rows if row.model == model]) for model in sorted({row.model for row in rows}))
    return f"Published methods at {best.pattern} with models of about this size: {ranges}.{comparison}"


def _range(rows: Sequence[Published]) -> str:
    """The range of one model's rows in words, the smallest ratio first.

    The words are such as "OPT-125M 1.21 times (FISTAPruner) to 1.43 times (Wanda), on WikiText-2".
    """
    ends = " to ".join(f"{number(row.ratio)} times ({row.method})" for row in dict.fromkeys((rows[0], rows[-1])))
    texts = " and ".join(sorted({row.text for row in rows}, reverse=True))
    return f"{rows[0].model} {ends}, on {texts}"


def change(report: Report) -> str:
    """The change of perplexity in a sentence.

    "Perplexity 14.8 → 19.7: 1.33 times the dense model’s, worse (1.31 to 1.35 with two standard errors over its windows)."
    """
    perplexity, ends = report.perplexity, interval(report.perplexity.ratio, report.log_ratio_stderr)
    dense, pruned = perplexity.dense, perplexity.pruned
    first = f"Perplexity {number(dense, 4)} → {number(pruned, 4)}: {number(perplexity.ratio)} times the dense model’s"
    if ends is None:
        return f"{first}, {direction(dense, pruned)}; how sure that is was not measured."
    low, high = ends
    unclear = unsure(perplexity.ratio, report.log_ratio_stderr)
    sure = "no difference that this text can show" if unclear else direction(dense, pruned)
    return f"{first}, {sure} ({number(low)} to {number(high)} with two standard errors over its windows)."


def _same_pattern(row: str, pattern: str, sparsity: float) -> bool:
    """Whether a run has a row's pattern; a user's own pattern never has."""
    if ":" in row:
        return pattern == row
    share = pattern.partition("/")[0].replace(".", "", 1)
    return share.isdigit() and abs(sparsity - float(row.rstrip("%")) / 100) <= _NEAR + 1e-9


def _beyond_pruning(report: Report) -> str | None:
    """What else was done with the weights, in a sentence; None if nothing."""
    if report.training:
        what = "was trained after it was pruned"
    elif recovered := report.settings.recover:
        return f"The weights are those of {recovered.model}: training lowered no loss on held-out text."
    elif report.settings.quantize:
        what = "was quantised as well as pruned" if report.sparsity else "was quantised and not pruned"
    else:
        return None
    return f"The model {what}, so published results of pruning are no measure for it."
