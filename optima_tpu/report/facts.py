"""The facts of a finished run: one table of numbers for all outputs.

The terminal prints facts as lines, the page draws facts as tiles, and a comparison of several runs has them as rows. To show a
new number, add a function to :data:`FACTS`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from optima_tpu.errors import plural
from optima_tpu.report.columns import mean_error
from optima_tpu.report.contents import Report, only_experts, parts_left
from optima_tpu.report.distillation import distilled_line
from optima_tpu.report.layer_means import aimed_at_dense, exchanged, mean, measured, quantized_line
from optima_tpu.report.numbers import became, direction, named_blocks, number, percent, times, unsure
from optima_tpu.report.records import LayerReport
from optima_tpu.report.view import without_folders


class Fact(NamedTuple):
    """One number of a run, or how the number changed.

    Attributes:
      title: its title on the page.
      values: the values as text, in the order of time.
      note: what the values measure, and on what.
      name: its label on the terminal; empty for a fact of the page alone.
      labels: a label for each value; empty for a single value.
      rows: the rows of a comparison of several runs; None for one row with title and values.
    """

    title: str
    values: Sequence[str]
    note: str
    name: str = ""
    labels: Sequence[str] = ()
    rows: Mapping[str, str] | None = None

    @property
    def compared(self) -> Mapping[str, str]:
        """The rows of a comparison of several runs."""
        return {self.title.lower(): self.value} if self.rows is None else self.rows

    @property
    def words(self) -> str:
        """The values with their labels, and the note."""
        if not self.labels:
            return " ".join(filter(None, (*self.values, self.note)))
        return ", ".join([*map(" ".join, zip(self.labels, self.values)), self.note])

    @property
    def line(self) -> str:
        """A line of the terminal."""
        return f"{self.name:<12}{self.words}"

    @property
    def value(self) -> str:
        """The values, as in a tile of the page."""
        return " → ".join(self.values)

    @property
    def below(self) -> str:
        """What stands below the values in a tile of the page."""
        return ", ".join(filter(None, (" → ".join(self.labels), self.note)))


def _perplexity(report: Report) -> Fact:
    models, dense, last = report.perplexities, report.perplexity.dense, report.perplexity.pruned
    ratio = number(report.perplexity.ratio)
    # The result says what the text can show; a word here must not say more.
    same = ratio == number(1.0) or unsure(report.perplexity.ratio, report.log_ratio_stderr)
    word = "" if same else f" {direction(dense, last)},"
    note = f"{ratio} times,{word} on {without_folders(report.evaluation.how)}"
    rows = {
        "perplexity, dense": number(dense, 4),
        "perplexity, pruned": number(last, 4),
        "pruned / dense": times(report.perplexity.ratio, report.log_ratio_stderr),
    }
    return Fact("Perplexity", [number(each, 4) for each in models.values()], note, "perplexity", list(models), rows)


def _error(report: Report) -> Fact | None:
    if not report.layers or not measured(report.layers):
        return None
    judged, unseen = not report.aims_at_dense, "none was held out"
    if report.has_held_out:
        held_out = _Update(report, report.layers, "held_out_before", "held_out_after")
        # The calibration text may show the opposite.
        worse = ", worse" * (judged and held_out.direction == "worse")
        unseen = f"on held-out text {' → '.join(held_out.values)}{worse}"
    aim = "" if judged else "; a dense target lowers the error against dense instead"
    update = _Update(report, report.layers, "error_before", "error_after")
    fact = update.fact("Layer error", "error", f"on the calibration text; {unseen}{aim}", judged)
    solved = ("layer error after", "error_after"), ("on held-out text after", "held_out_after")
    rows = [
        ("layer error before the update", "error_before"),
        ("on held-out text before", "held_out_before"),
        *solved * bool(report.solver),
    ]
    return fact._replace(rows={row: mean_error(report.layers, error) for row, error in rows})


def _against_dense(report: Report) -> Fact | None:
    if not report.aims_at_dense:
        return None
    update = _Update(report, aimed_at_dense(report.layers), "dense_before", "dense_after")
    return update.fact("Layer error against dense", "to dense", "on held-out text")


class _Update(NamedTuple):
    """An error of some layers before and after the update.

    Attributes:
      before: the field of ``LayerReport`` with the error of the selector's weights.
      after: the field with the error of the final weights.
    """

    report: Report
    layers: Sequence[LayerReport]
    before: str
    after: str

    @property
    def values(self) -> list[str]:
        """Both mean errors; without a solver the second alone."""
        return [mean_error(self.layers, error) for error in ((self.before, self.after) if self.report.solver else (self.after,))]

    @property
    def direction(self) -> str:
        """What the update did to the error; empty without a solver."""
        return became(mean(self.layers, self.before), mean(self.layers, self.after), percent) if self.report.solver else ""

    def fact(self, title: str, name: str, text: str, judged: bool = True) -> Fact:
        """The fact of this error. ``text`` is where it was measured."""
        direction = self.direction if judged else ""
        note = ", ".join(filter(None, (direction, f"mean of {plural(len(self.layers), 'matrix')}", text)))
        return Fact(title, self.values, note, name, ("before", "after the update") if self.report.solver else ())


def _sparsity(report: Report) -> Fact:
    rows = {"sparsity": percent(report.sparsity), "matrices": f"{len(report.layers):,}"}
    if not report.layers:
        note = f"of all {report.model.weights:,} weights of the model, which left with what was cut; no layer was pruned"
        return Fact("Sparsity", [percent(report.model_sparsity)], note, "sparsity", rows=rows)
    # What leaves with a cut besides zeros, such as the rows that made a neuron, is in the second share alone.
    others = f"; with the {report.removed:,} other weights that leave with what was cut" if report.removed else ""
    note = (
        f"of the {report.weights:,} weights in {plural(len(report.layers), 'matrix')}{others}, {percent(report.model_sparsity)} "
        f"of all {report.model.weights:,} weights of the model"
    )
    return Fact("Sparsity", [percent(report.sparsity)], note, "sparsity", rows=rows)


def _cuts(report: Report) -> Fact | None:
    if not report.cuts:
        return None
    alike = all(cut.deleted for cut in report.cuts.values())
    note = (
        "the exported model is without the others"
        if alike
        else "where blocks differ, the exported model has zeros for the others"
    )
    if report.left_out.experts and report.model.active:
        left = report.model.weights - report.removed
        note += (
            f"; {left:,} of {report.model.weights:,} weights are left, and a token still passes through about "
            f"{report.model.active:,}"
        )
    return Fact("Kept", [parts_left(report.cuts)], f"({note})", "kept")


def _left_out(report: Report) -> Fact | None:
    chosen = report.left_out
    if not chosen.blocks:
        return None
    order = ", in this order" if len(chosen.blocks) > 1 else ""
    shown = ", ".join(number(divergence) for divergence in chosen.divergences)
    note = f"of the dense model{order}; on held-out windows the predictions diverge by {shown} nats, before the walk"
    return Fact("Blocks left out", [named_blocks(chosen.blocks)], note, "left out")


def _refit(report: Report) -> Fact | None:
    left = report.left_out.experts
    if left is None or not left.solved:
        return None
    before, after = (mean(left.blocks, error) for error in ("error_before", "error_after"))
    note = (
        f"{became(before, after, percent)}, mean squared error of the mixtures' output on the calibration text, of its energy; "
        "each block and its experts: left_out.json"
    )
    return Fact("Experts solved", [percent(before), percent(after)], note, "refit", ("before", "after"))


def _speed(report: Report) -> Fact | None:
    if report.speed is None:
        return None
    if report.speed.cut is None:
        return Fact("Speed", ["not measured"], f"because {report.speed.reason}", "speed")
    first, _, others = report.speed.words.partition(" in ")
    return Fact("Speed", [first], f"in {others}, on this machine: {report.speed.how}", "speed")


def _quantised(report: Report) -> Fact | None:
    errors, quantizer = quantized_line(report.layers), report.settings.quantize
    return Fact("Quantised", [quantizer.name], f"mean error {errors}", "quantised") if errors and quantizer else None


def _masks(report: Report) -> Fact | None:
    share = exchanged(report.layers)
    note = "of the kept weights came in by exchange: the selector had pruned them"
    if share is None:
        return None
    return Fact("Masks", [percent(share)], note, "masks", rows={"weights that came in by exchange": percent(share)})


def _size(report: Report) -> Fact:
    sizes = report.sizes
    values, labels = [size(sizes.dense)], ["dense weights"]
    if sizes.transformers:
        values, labels = [*values, size(sizes.transformers)], [*labels, "pruned in hf/"]
    # Quantised weights are decoded: a model in float32 may take more than the file that it came from.
    smaller = sizes.source is not None and sizes.source < 0.9 * sizes.dense
    stored = f"{size(sizes.source)} in the source's files; " if sizes.source and smaller else ""
    return Fact("File", values, stored + _why_not_smaller(report), "size", labels)


def sizes(report: Report) -> str:
    """The sizes of the dense and the pruned files, and what explains them."""
    return _size(report).words


def _why_not_smaller(report: Report) -> str:
    """Why the pruned files are not smaller, and how to get smaller ones."""
    cut = any(cut.deleted for cut in report.cuts.values())
    if report.settings.quantize:
        how = "smaller by what was cut, not by the integers," if cut else "not smaller"
        return (
            f"{how} because it holds integers times scales in the source's dtype; optima export --format "
            "compressed-tensors stores the integers, and so does --format gguf of a Llama, Qwen 2 or Gemma 3"
        )
    if cut:
        return "what was cut is in no file"
    return (
        "not smaller because zeros are stored like other numbers; optima export --packed writes a smaller one and "
        "prints its size, a smaller share of bfloat16 (--dtype) than of float32"
    )


def size(count: int) -> str:
    """Formats a number of bytes: "538 MB", "16.1 GB"."""
    exponent = min(max((len(str(count)) - 1) // 3, 0), 4)
    return plural(count, "byte") if not exponent else f"{number(count / 1000**exponent)} {('kB', 'MB', 'GB', 'TB')[exponent - 1]}"


def _memory(report: Report) -> Fact:
    host, on_device = report.memory.host_peak, report.memory.device_peak
    device = f", {number(on_device / 2**30)} GiB on a device" if on_device else ""
    peak = f"{number(host / 2**30)} GiB"
    since = " since the last resume; earlier peaks were not recorded" if report.earlier else ""
    return Fact("Memory", [peak], f"on the host{device} at the peak{since}", "memory", rows={"host memory, peak": peak})


def _trained(report: Report) -> Fact | None:
    line = distilled_line(report)
    return Fact("Training", [line], "", "trained", rows={}) if line else None


def running(report: Report) -> str:
    """What the pruned model costs to run, in a sentence."""
    deleted = {called: cut for called, cut in report.cuts.items() if cut.deleted}
    if only_experts(deleted):
        return "It takes less memory, because the experts that left are in no file; a token passes through as many as before."
    if deleted:
        return "It computes less than the dense model in every program, because what was cut is in no file."
    return "It runs as fast as the dense model: zeros save time or space only with a kernel or a compressor that uses them."


FACTS: Sequence[Callable[[Report], Fact | None]] = (
    _perplexity,
    _against_dense,  # before the error that a dense target does not lower
    _error,
    _sparsity,
    _cuts,
    _left_out,
    _refit,
    _speed,
    _quantised,
    _masks,
    _size,
    _memory,
    _trained,
)
"""Every fact of a run, in the order in which they are shown; None where it does not apply."""
_OF_LAYERS = _error, _against_dense, _quantised, _masks
"""The facts that a recovery leaves out: they describe the run that the recovery began from."""


def facts(report: Report) -> list[Fact]:
    """The facts of a run that apply."""
    own = [make for make in FACTS if make not in _OF_LAYERS] if report.settings.recover else FACTS
    return [fact for make in own if (fact := make(report))]
