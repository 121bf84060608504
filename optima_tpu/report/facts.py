"""The numbers of a finished run that are shown: one table, which the terminal prints as lines and the page draws as tiles.

A new power of a run shows its number by a row of :data:`FACTS`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from optima_tpu.report.distillation import distilled_line, perplexities
from optima_tpu.report.numbers import became, direction, number, percent
from optima_tpu.report.records import LayerReport
from optima_tpu.report.summary import exchanged, fitted_errors, held_out_errors, means, measured, quantized_line, sparsity
from optima_tpu.report.view import NONE, Tile, without_folders


class Finished(NamedTuple):
    """What the facts of a run are read from.

    Attributes:
      report: contents of report.json.
      layers: of all blocks.
    """

    report: Mapping[str, Any]
    layers: Sequence[LayerReport]

    @property
    def solved(self) -> bool:
        """Whether a solver moved weights, so that an error has a value before and after it."""
        return bool(self.report["configuration"]["solver"])


class Fact(NamedTuple):
    """One number of a run, or what it became.

    Attributes:
      name: as the terminal prints it.
      title: as the page has it.
      values: as text, in the order in which they came to be.
      labels: what each value is of; empty for a single one.
      note: what the values are, and are of.
    """

    name: str
    title: str
    values: Sequence[str]
    note: str
    labels: Sequence[str] = ()

    @property
    def words(self) -> str:
        """The values with their labels, and what they are of."""
        if not self.labels:
            return " ".join(filter(None, (*self.values, self.note)))
        return ", ".join([*map(" ".join, zip(self.labels, self.values)), self.note])

    @property
    def line(self) -> str:
        """A line of the terminal."""
        return f"{self.name:<12}{self.words}"

    @property
    def tile(self) -> Tile:
        """A tile of the page."""
        return Tile(self.title, " → ".join(self.values), ", ".join(filter(None, (" → ".join(self.labels), self.note))))


def _perplexity(run: Finished) -> Fact:
    models, report = perplexities(run.report), run.report
    dense, last = report["perplexity"]["dense"], report["perplexity"]["pruned"]
    ratio = number(last / dense)
    # The result says what the text can show; a word here must not say more.
    word = "" if ratio == number(1.0) else f" {direction(dense, last)},"
    note = f"{ratio} times,{word} on {without_folders(report['evaluation']['how'])}"
    return Fact("perplexity", "Perplexity", [number(each, 4) for each in models.values()], note, list(models))


def _error(run: Finished) -> Fact | None:
    if not measured(run.layers):
        return None
    (before, after), (held_before, held_after) = fitted_errors(run.layers), held_out_errors(run.layers)
    unseen = "none was held out" if held_after is None else f"on held-out text {' → '.join(_both(held_before, held_after, run))}"
    aim = ""
    if any(layer.dense_after is not None for layer in run.layers):
        aim = "; a dense target lowers the error against dense instead"
    return _change("error", "Layer error", (before, after), f"on the calibration text; {unseen}{aim}", run)


def _against_dense(run: Finished) -> Fact | None:
    before, after = means(run.layers, ("dense_before", "dense_after"))
    if before is None or after is None:
        return None
    return _change("to dense", "Layer error against dense", (before, after), "on held-out text", run)


def _change(name: str, title: str, errors: tuple[float | None, float | None], text: str, run: Finished) -> Fact:
    before, after = errors
    better = f"{became(before, after, percent)}, " if run.solved and before is not None and after is not None else ""
    labels = ("before", "after the update") if run.solved else ()
    return Fact(name, title, _both(*errors, run), f"{better}mean of {_matrices(run)}, {text}", labels)


def _matrices(run: Finished) -> str:
    return f"{len(run.layers):,} {'matrix' if len(run.layers) == 1 else 'matrices'}"


def _both(before: float | None, after: float | None, run: Finished) -> list[str]:
    """The two errors of an update; without a solver the second alone."""
    both = [NONE if error is None else percent(error) for error in (before, after)]
    return both if run.solved else both[1:]


def _sparsity(run: Finished) -> Fact:
    pruned, weights = sum(layer.pruned for layer in run.layers), sum(math.prod(layer.shape) for layer in run.layers)
    whole = (run.report.get("model") or {}).get("weights")
    of_all = f", {percent(pruned / whole)} of all {whole:,} weights of the model" if whole else ""
    note = f"of the {weights:,} weights in {_matrices(run)}{of_all}"
    return Fact("sparsity", "Sparsity", [percent(sparsity(run.layers))], note)


def _neurons(run: Finished) -> Fact | None:
    cut = run.report.get("neurons")
    if not cut:
        return None
    *fewer, most = (f"{count:,}" for count in cut["left"])
    left = f"{fewer[0]} to {most}" if fewer else most
    note = (
        "; blocks differ, so the exported model has zeros where others were"
        if fewer
        else "; the exported model is without the others"
    )
    return Fact("neurons", "Neurons", [left], f"of {cut['total']:,} left in {'an' if fewer else 'every'} MLP{note}")


def _quantised(run: Finished) -> Fact | None:
    errors = quantized_line(run.layers)
    name = errors and run.report["configuration"]["quantize"]["name"]
    return Fact("quantised", "Quantised", [name], f"mean error {errors}") if errors else None


def _masks(run: Finished) -> Fact | None:
    share = exchanged(run.layers)
    note = "of the kept weights came in by exchange: the selector had pruned them"
    return None if share is None else Fact("masks", "Masks", [percent(share)], note)


def _size(run: Finished) -> Fact | None:
    sizes = run.report.get("sizes") or {}
    if not sizes.get("dense"):
        return None
    values, labels, source = [size(sizes["dense"])], ["dense weights"], sizes.get("source")
    if sizes.get("transformers"):
        values, labels = [*values, size(sizes["transformers"])], [*labels, "pruned in hf/"]
    # Quantised weights are decoded: a model in float32 may take more than the file that it came from.
    stored = f"{size(source)} in the source's files; " if source and source < 0.9 * sizes["dense"] else ""
    return Fact("size", "File", values, stored + _why_not_smaller(run.report), labels)


def sizes(report: Mapping[str, Any]) -> str:
    """The sizes of the dense and the pruned files, and why they are equal; empty if they were not recorded."""
    fact = _size(Finished(report, ()))
    return fact.words if fact else ""


def _why_not_smaller(report: Mapping[str, Any]) -> str:
    """Why the pruned files are as large as the dense ones, and which command writes smaller ones."""
    if report["configuration"].get("quantize"):
        return (
            "not smaller because it holds integers times scales in the source's dtype; optima export --format "
            "compressed-tensors stores the integers, and so does --format gguf of a Llama, Qwen 2 or Gemma 3"
        )
    if len((report.get("neurons") or {}).get("left", ())) == 1:
        return "the neurons that were cut are in no file"
    return (
        "not smaller because zeros are stored like other numbers; optima export --packed writes a smaller one and "
        "prints its size, a smaller share of bfloat16 (--dtype) than of float32"
    )


def size(count: int) -> str:
    """Formats a number of bytes: "538 MB", "16.1 GB"."""
    exponent = min(max((len(str(count)) - 1) // 3, 0), 4)
    return f"{count} bytes" if not exponent else f"{number(count / 1000**exponent)} {('kB', 'MB', 'GB', 'TB')[exponent - 1]}"


def _memory(run: Finished) -> Fact | None:
    memory = run.report.get("memory") or {}
    if not memory.get("host_peak"):
        return None
    on_device = memory.get("device_peak")
    device = f", {number(on_device / 2**30)} GiB on a device" if on_device else ""
    return Fact("memory", "Memory", [f"{number(memory['host_peak'] / 2**30)} GiB"], f"on the host{device} at the peak")


def _trained(run: Finished) -> Fact | None:
    line = distilled_line(run.report)
    return Fact("trained", "Training", [line], "") if line else None


FACTS: Sequence[Callable[[Finished], Fact | None]] = (
    *(_perplexity, _error, _against_dense, _sparsity, _neurons, _quantised, _masks, _size, _memory, _trained),
)
"""Every fact of a run, in the order in which they are shown; None where it does not apply."""
_OF_LAYERS = _error, _against_dense, _quantised, _masks
"""Those that a recovery does not repeat: they are of the run that it began from."""


def facts(report: Mapping[str, Any], layers: Sequence[LayerReport]) -> list[Fact]:
    """The facts of a run that apply."""
    run = Finished(report, layers)
    own = [make for make in FACTS if make not in _OF_LAYERS] if report["configuration"].get("recover") else FACTS
    return [fact for make in own if (fact := make(run))]
