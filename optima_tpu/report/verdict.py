"""Judges whether a result is good, by comparison with results of published methods: a rule of thumb.

What the bands rest on: the perplexities of methods as their authors published them. For models of 0.3 billion weights and more
the numbers are the papers' own. For smaller ones, which papers hardly have, Wanda, SparseGPT and OPTIMA (``--preset paper``, also
from other published masks) were run with this program on SmolLM2-135M as these methods were published. No band rests on a run of
the methods of this program (``cg``, exchanges, dense targets, measured allocation): a band must not contain what it judges. For
Python's documentation there are no such results, so no band, though the first run of most people is measured on it.
"""

import math
import shlex
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from optima_tpu.config.choices import CHOICES
from optima_tpu.config.parse import flags
from optima_tpu.config.presets import PRESETS
from optima_tpu.errors import UserError
from optima_tpu.report.numbers import number, percent, plural
from optima_tpu.report.run_record import recorded_run
from optima_tpu.runtime.program import program


class Band(NamedTuple):
    """The known range of perplexity ratios for one-shot layer-wise pruning, for one pattern and model size.

    Attributes:
      pattern: "50%", "60%" or "70%" of the weights of every matrix, unstructured; or "2:4", "4:8".
      size: model sizes in billions of weights, [from, to).
      best: smallest ratio of the pruned model's perplexity to the dense model's.
      worst: largest ratio; results with masks by magnitude are left out.
      models: the models that the ratios were measured with, on WikiText-2 or C4.
    """

    pattern: str
    size: tuple[float, float]
    best: float
    worst: float
    models: str


_TINY, _SMALL, _MIDDLE, _LARGE = (0.05, 0.3), (0.3, 2.0), (2.0, 5.0), (5.0, 20.0)

# The comment above each row gives the results with the smallest and the largest ratio, pruned / dense. Sources:
#   SmolLM2-135M: C4 dense 31.26, WikiText-2 dense 29.19: configs/tables/levers.md and docs/results/index.md; WikiText-2,
#   calibrated on its own validation set, dense 25.62: configs/tables/smollm2.md.
#   OPT, Llama 3.1 and 3.2, Gemma 3 and Qwen 2.5 under 50% and 60%: the published numbers in configs/tables/unstructured.yaml and
#   adam.yaml (arXiv:2512.13886), WikiText-2. Left out: gemma-2-2b, because its dense perplexity is not meaningful.
#   OPT-125M with FISTAPruner: from the FISTAPruner paper.
#   Llama 2 7B (dense 5.47), Llama 3 8B (dense 6.14), and under 2:4 and 4:8 Llama 3.2 1B and Qwen 2.5 7B: WikiText-2 in windows
#   of 2048 tokens, from the papers of ALPS, DSnoT and DenoiseRotator.
_AT_ONE, _AT_THREE = "Qwen2.5-0.5B and 1.5B, Llama-3.2-1B and Gemma-3-1B", "Qwen2.5-3B and Llama-3.2-3B"
_AT_EIGHT = "Qwen2.5-7B and 14B, Llama-2-7B, Llama-3-8B and 3.1-8B"

BANDS = (
    # OPT-125M with FISTAPruner 33.54 / 27.67; SmolLM2-135M with Wanda 66.21 / 29.19
    Band("50%", _TINY, 1.21, 2.27, "SmolLM2-135M and OPT-125M"),
    # Qwen2.5-1.5B 12.76 / 9.28; Llama-3.2-1B with Wanda 23.51 / 9.75
    Band("50%", _SMALL, 1.37, 2.42, _AT_ONE),
    # Qwen2.5-3B 10.52 / 8.03; Llama-3.2-3B with Wanda 12.92 / 7.81
    Band("50%", _MIDDLE, 1.31, 1.66, _AT_THREE),
    # Qwen2.5-7B 8.33 / 6.85; Llama-3.1-8B with Wanda 9.64 / 5.84
    Band("50%", _LARGE, 1.21, 1.66, _AT_EIGHT),
    # SmolLM2-135M with OPTIMA from SparseGPT's masks 55.87 / 25.62; with Wanda 163.8 / 29.19
    Band("60%", _TINY, 2.18, 5.61, "SmolLM2-135M"),
    # Qwen2.5-1.5B 19.35 / 9.28; Llama-3.2-1B with Wanda 71.53 / 9.75
    Band("60%", _SMALL, 2.08, 7.34, _AT_ONE),
    # Qwen2.5-3B 14.42 / 8.03; Llama-3.2-3B with Wanda 31.13 / 7.81
    Band("60%", _MIDDLE, 1.79, 3.99, _AT_THREE),
    # Qwen2.5-7B 10.53 / 6.85; Llama-3-8B with Wanda 23.55 / 6.14
    Band("60%", _LARGE, 1.53, 3.84, _AT_EIGHT),
    # SmolLM2-135M with OPTIMA from SparseGPT's masks 275.3 / 31.26; with SparseGPT 416.0 / 29.19
    Band("70%", _TINY, 8.81, 14.3, "SmolLM2-135M"),
    # Llama-2-7B with ALPS 19.31 / 5.47; Llama-3-8B with Wanda 116.8 / 6.14
    Band("70%", _LARGE, 3.53, 19.1, "Llama-2-7B and Llama-3-8B"),
    # SmolLM2-135M with OPTIMA from SparseGPT's masks 53.70 / 25.62; with Wanda 187.9 / 29.19
    Band("2:4", _TINY, 2.10, 6.44, "SmolLM2-135M"),
    # Llama-3.2-1B with SparseGPT 36.23 / 9.75; with Wanda 90.66 / 9.75
    Band("2:4", _SMALL, 3.71, 9.30, "Llama-3.2-1B"),
    # Qwen2.5-7B with SparseGPT 11.35 / 6.85; Llama-3-8B with Wanda 24.36 / 6.14
    Band("2:4", _LARGE, 1.65, 3.97, "Qwen2.5-7B, Llama-2-7B and Llama-3-8B"),
    # SmolLM2-135M with OPTIMA from SparseGPT's masks 73.97 / 31.26; with SparseGPT 87.68 / 29.19
    Band("4:8", _TINY, 2.37, 3.00, "SmolLM2-135M"),
    # Llama-3.2-1B with SparseGPT 25.46 / 9.75; with Wanda 48.23 / 9.75
    Band("4:8", _SMALL, 2.61, 4.95, "Llama-3.2-1B"),
    # Qwen2.5-7B with SparseGPT 9.61 / 6.85; Llama-3-8B with DSnoT 14.76 / 6.14
    Band("4:8", _LARGE, 1.40, 2.41, "Qwen2.5-7B, Llama-2-7B and Llama-3-8B"),
)

_SHARES = {"50%": 0.5, "60%": 0.6, "70%": 0.7}
_NEAR = 0.02
"""A band is used for sparsities within this distance of its share of pruned weights."""

_DENSE = 100.0
"""Above this perplexity the dense model hardly predicts the text, so the ratio means little. The bands have 5.3 to 31."""

_SPREAD = 3.4
"""The standard error of the mean rise of the loss, in nats, times the root of the number of tokens.

For reports without the standard error itself. SmolLM2-135M at 50% on WikiText-2, docs/results/records/distance.json: 0.017 for
the divergence over 20 windows of 2048 tokens, so 3.4 / sqrt(40,960). Tokens of one window go together, which makes it so large.
"""

Word = Literal["good", "usual", "poor", "unknown"]


class Verdict(NamedTuple):
    """The judgement of a result.

    Attributes:
      word: "good" in the better half of the known range on a logarithmic scale, "usual" in the worse half, "poor" beyond the
        range, "unknown" if no results are known for such a run, or if the evaluation is too small to tell.
      text: the judgement in a few sentences, with the numbers.
    """

    word: Word
    text: str


class Measured(NamedTuple):
    """Two perplexities and how sure their ratio is.

    Attributes:
      dense, pruned: the perplexities.
      text: source of the text that both were measured on: "c4", "file:PATH".
      tokens: number of tokens; None if it was not recorded.
      error: standard error of the logarithm of their ratio; None if it was not recorded.
    """

    dense: float
    pruned: float
    text: str
    tokens: int | None = None
    error: float | None = None

    @property
    def uncertain(self) -> float | None:
        """Two standard errors of the logarithm of the ratio, at most 100; None if nothing is known of it."""
        if self.error is not None:
            return min(2 * self.error, 100.0)
        return 2 * _SPREAD / math.sqrt(self.tokens) if self.tokens else None


_NONE: Mapping[str, Any] = MappingProxyType({})


def verdict(
    measured: Measured, *, pattern: str, sparsity: float, weights: int, rules: str = "", methods: Mapping[str, Any] = _NONE
) -> Verdict:
    """Judges the ratio of two perplexities by :data:`BANDS`.

    An evaluation is too small to tell if two standard errors of the log-ratio are more than half a band's width: then even a
    result in the middle of "good" could be "poor".

    Args:
      pattern: as in the settings: "0.5", "0.6/row", "2:4".
      sparsity: share of zeros among the weights of the pruned matrices.
      weights: number of weights of the whole model.
      rules: settings for single layers, ``--layers``.
      methods: the settings of the run. The advice leaves out what they have, and a command that compares has the rest of them.
    """
    dense, text = measured.dense, measured.text
    ratio, kind, size = measured.pruned / dense, _kind(pattern, sparsity), weights / 1e9
    told = f"the pruned model’s perplexity is {number(ratio)} times the dense model’s"
    band = next((each for each in BANDS if each.pattern == kind and each.size[0] <= size < each.size[1]), None)
    known = band and (
        f"Known results at {band.pattern} and this size ({band.models}): {number(band.best)} to {number(band.worst)} on "
        "WikiText-2 and C4"
    )
    unknown = None
    if dense > _DENSE:
        unknown = f"the dense model itself hardly predicts this text (perplexity {number(dense, 4)}), so the ratio means little"
    elif text == "random":
        unknown = "random tokens cannot be predicted"
    elif rules:
        unknown = "no results are known for runs in which some layers have their own settings"
    elif known and text == "pydoc":
        unknown = (
            f"no published results are known on Python’s documentation. {known}. To compare on "
            f"this text, run a published method on it: `{_published(methods)}`"
        )
    elif known is None:
        unknown = f"no results are known for {_whom(pattern, sparsity, weights)}, measured on {_short(text)}"
    if unknown or band is None:
        said = f"It is not known whether this is good: {told}, and {unknown}."
        return Verdict("unknown", said[:-1] if said.endswith("`.") else said)  # the full stop would be pasted with the command
    if (uncertain := measured.uncertain) and uncertain > (half := math.log(band.worst / band.best) / 2):
        least, most = (number(ratio * math.exp(sign * uncertain)) for sign in (-1, 1))
        needed = f", about {_round(measured.tokens * (uncertain / half) ** 2):,} tokens" if measured.tokens else ""
        on = plural(measured.tokens, "token") if measured.tokens else "this text"
        return Verdict(
            "unknown",
            f"The evaluation is too small to tell: {told}, on {on}, which leaves it between {least} and {most}. {known}. "
            f"Measure on more text{needed}.",
        )
    word: Word = "good" if ratio <= math.sqrt(band.best * band.worst) else "usual" if ratio <= band.worst else "poor"
    opening = {"good": "Good", "usual": "Usual", "poor": "Poor"}[word]
    best = "" if _has(methods, PRESETS["best"].settings) else "the preset `best`, "
    advice = f" Try {best}more calibration samples, or fewer pruned weights." if word == "poor" else ""
    return Verdict(word, f"{opening}, by a rule of thumb: {told}. {known}. Models and texts differ.{advice}")


def verdict_of(report: Mapping[str, Any]) -> Verdict:
    """The verdict on a run from its report.json. For a report without the model's size, the pruned matrices give the size."""
    settings, perplexity, changes = report["configuration"], report["perplexity"], report.get("tokens") or {}
    calibration = settings.get("calibration", {}).get("source", "")
    if more := _beyond_pruning(report):
        ratio = perplexity["pruned"] / perplexity["dense"]
        return Verdict(
            "unknown",
            f"The model’s perplexity is {number(ratio)} times the dense model’s. It {more}, so it is not compared with the known "
            "results of one-shot pruning.",
        )
    measured = Measured(
        perplexity["dense"],
        perplexity["pruned"],
        (settings.get("evaluation") or {}).get("source") or calibration,
        (report.get("evaluation") or {}).get("tokens"),
        changes.get("mean_stderr"),
    )
    return verdict(
        measured,
        pattern=str(settings.get("pattern", "")),
        sparsity=report.get("sparsity", 0.0),
        weights=(report.get("model") or {}).get("weights") or report.get("weights", 0),
        rules=settings.get("layers") or "",
        methods=settings,
    )


def _published(settings: Mapping[str, Any]) -> str:
    """The command that runs another method, as published, on the model and the texts of a run."""
    wanda = {"selector": {"name": "wanda"}, "solver": None}
    kept = {name: value for name, value in settings.items() if name not in (*CHOICES, "recapture", "borrow", "output")}
    try:
        words = flags(recorded_run(kept | wanda))
    except UserError:  # a report of another version
        words = ["--model", str(settings.get("model")), "--solver", "null"]
    return f"{program('prune')} {shlex.join(words)} --selector {'sparsegpt' if _has(settings, wanda) else 'wanda'}"


def _has(methods: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a run has all these settings, of a method at least these options."""
    return all(
        value.items() <= (methods.get(name) or {}).items() if isinstance(value, Mapping) else methods.get(name, ...) == value
        for name, value in wanted.items()
    )


def _beyond_pruning(report: Mapping[str, Any]) -> str | None:
    """What was done with the weights behind the pruning, in words; None if nothing was."""
    settings, trained = report["configuration"], report.get("distillation") or {}
    if trained.get("kept"):
        return f"was trained on {trained['tokens']:,} tokens after it was pruned"
    if settings.get("recover"):
        return "comes from another run and was left as it was, because training lowered no loss on held-out text"
    if settings.get("quantize"):
        return "was quantised as well as pruned" if report.get("sparsity") else "was quantised and not pruned"
    return None


def _round(count: float) -> int:
    """A number of tokens rounded up to one digit."""
    power = 10 ** math.floor(math.log10(count))
    return math.ceil(count / power) * power


def _kind(pattern: str, sparsity: float) -> str | None:
    """The band pattern that fits these settings; None if there is none."""
    if ":" in pattern:
        return pattern if any(band.pattern == pattern for band in BANDS) else None
    if not pattern.partition("/")[0].replace(".", "", 1).isdigit():  # a user-defined pattern
        return None
    return next((name for name, share in _SHARES.items() if abs(sparsity - share) <= _NEAR + 1e-9), None)


def _whom(pattern: str, sparsity: float, weights: int) -> str:
    what = f"the pattern {pattern}" if ":" in pattern else f"{percent(sparsity)} pruned weights"
    millions = weights / 1e6
    size = f"{number(millions / 1000)} billion weights" if millions >= 1000 else f"{number(millions)} million weights"
    return f"{what} in a model of {size if millions >= 1 else plural(weights, 'weight')}"


def _short(text: str) -> str:
    """A source without the folders of a path."""
    kind, colon, rest = text.partition(":")
    return f"{kind}:{rest.rpartition('/')[2]}" if colon and kind in ("file", "npy") else text or "this text"
