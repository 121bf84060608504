"""The contents of report.json and of the smaller files of a run."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from optima_tpu.errors import plural
from optima_tpu.report.numbers import number, percent, trained_on
from optima_tpu.report.records import BlockReport, LayerReport
from optima_tpu.report.settings import ManifestEntries, RunSettings
from optima_tpu.runtime.records import Block, Count, Positive, Record, Share, Size, check_record, within

Parts = Annotated[tuple[str, ...], msgspec.Meta(min_length=3, max_length=3)]
"""A continuation: the part that both models wrote, the first token that differs (empty if none does), and the rest."""


class Continuation(Record, frozen=True):
    """What both models write after a prompt."""

    prompt: str
    dense: Parts
    pruned: Parts


class Continuations(Record, frozen=True):
    """The contents of continuations.json.

    Attributes:
      texts: one for each prompt.
      reason: a sentence that says why there are none; empty if there are.
    """

    texts: tuple[Continuation, ...] = ()
    reason: str = ""


class Check(Record, frozen=True):
    """What a check on held-out windows measured.

    Attributes:
      held_out: mean loss of a held-out token, in nats.
      training: mean loss of a token of the steps since the check before; None before the first step.
      perplexity: on the held-out windows.
    """

    step: Count
    held_out: float
    training: float | None = None
    perplexity: float | None = None


class Outcome(Record, frozen=True):
    """The contents of distillation.json: what became of a distillation.

    Attributes:
      checks: in order, the first one before the first step.
      kept: the step whose state is the result; 0 where the weights stay as they were pruned.
      tokens: how many tokens the steps read.
      perplexity_before: of the model as it was pruned, on the evaluation text; None until it is measured.
      seconds: elapsed in steps and checks, also before the run was stopped.
      learning_rate: the highest learning rate of the kept weights; None in a run of version 0.2.0.
      spans: empty; version 0.2.0 could also train block by block, and had an entry for each.
    """

    checks: Annotated[tuple[Check, ...], msgspec.Meta(min_length=1)]
    kept: Count
    tokens: Count
    perplexity_before: Positive | None = None
    seconds: float = 0.0
    learning_rate: Positive | None = None
    spans: Annotated[tuple[Any, ...], msgspec.Meta(max_length=0)] = ()

    def __post_init__(self) -> None:
        if all(check.step != self.kept for check in self.checks):
            raise ValueError(f"expected a check of the kept step {self.kept}, got none")

    @property
    def before(self) -> float:
        """The held-out loss of the weights as they were pruned."""
        return self.checks[0].held_out

    @property
    def after(self) -> float:
        """The held-out loss of the result."""
        return next(check.held_out for check in self.checks if check.step == self.kept)

    @property
    def amount(self) -> str:
        """How much the training read, and which state is kept, in words."""
        last = self.checks[-1].step
        kept = f", of which the state after step {self.kept} is kept" * (0 < self.kept < last)
        rate = f" at a learning rate of {self.learning_rate:.2g}" if self.learning_rate else ""
        return trained_on(last, self.tokens) + rate + kept


class Allocated(Record, frozen=True):
    """The contents of allocation.json: each block's sparsity and scores.

    Attributes:
      sparsity: for every block, the sparsity of its layers that no rule names; None for a block without such layers.
      scores: for every block, the measured scores, or None likewise; see ``allocation.OWL.wanted`` and
        ``allocation.Measured.wanted``.
    """

    sparsity: tuple[Share | None, ...]
    scores: tuple[tuple[float | None, ...] | None, ...]

    @property
    def in_words(self) -> str:
        """The range of sparsities, in words."""
        given = [sparsity for sparsity in self.sparsity if sparsity is not None]
        return f"the sparsity of the blocks is from {percent(min(given))} to {percent(max(given))}"


class BlockExperts(Record, frozen=True):
    """The experts that stay in a block.

    Attributes:
      stay: their indices in the dense model, ascending; empty for a block without a mixture.
      error_before, error_after: ``|y - yhat|^2 / |y|^2`` of the mixture's output on the calibration text, with the dense weights
        of down and with the solved ones; None where none were solved.
    """

    stay: tuple[Count, ...] = ()
    error_before: float | None = None
    error_after: float | None = None


class ExpertsLeft(Record, frozen=True):
    """The experts that a model keeps, of ``total`` in every mixture.

    While experts are being chosen, ``blocks`` has the first blocks only.
    """

    total: Count
    blocks: tuple[BlockExperts, ...] = ()

    @property
    def kept(self) -> int:
        """The number of experts that every mixture keeps."""
        return max(len(block.stay) for block in self.blocks)

    @property
    def solved(self) -> bool:
        """Whether the weights of the experts that stay were solved."""
        return any(block.error_after is not None for block in self.blocks)


class LeftOut(Record, frozen=True):
    """The contents of left_out.json: the blocks and experts left out.

    Attributes:
      experts: the experts that stay; None if no experts are removed.
      blocks: their indices in the dense model, in the order in which they were chosen.
      divergences: after each choice ``KL(dense || without)`` of a prediction on held-out windows, in nats; nothing was re-fitted.
    """

    blocks: tuple[Block, ...] = ()
    divergences: tuple[float, ...] = ()
    experts: ExpertsLeft | None = None

    def __post_init__(self) -> None:
        if len(self.blocks) != len(self.divergences):
            raise ValueError(f"expected a divergence for each block, got {len(self.divergences)} for {len(self.blocks)}")


class Environment(Record, frozen=True):
    """Versions, devices and mesh; an uninstalled package has no version."""

    python: str
    system: str
    packages: dict[str, str | None]
    platform: str
    device: str
    devices: Count
    processes: Count
    mesh: dict[str, Count]

    @property
    def words(self) -> str:
        """The devices in words: "8 × TPU v5e, mesh 4×2"."""
        return f"{self.devices} × {self.device}, mesh {'×'.join(map(str, self.mesh.values()))}"


class ModelFacts(Record, frozen=True):
    """The model that was pruned.

    Attributes:
      weights: how many it has, in all its tensors.
      active: how many of them a token passes through: of experts, only those that it is sent to. None in reports of earlier
        versions.
    """

    origin: str
    fingerprint: str
    architecture: str | None
    blocks: Count
    weights: Count
    active: Count | None = None


class TextFacts(Record, frozen=True):
    """A text that a run reads.

    Attributes:
      how: how its windows were drawn, in words.
      digest: of the tokens.
      unigram_perplexity: what the frequencies of its tokens give.
    """

    source: str
    how: str
    tokens: Count
    digest: str
    unigram_perplexity: float


class Perplexities(Record, frozen=True):
    """The perplexities of both models on the evaluation text."""

    dense: Positive
    pruned: Positive

    @property
    def ratio(self) -> float:
        """The pruned model's perplexity divided by the dense model's."""
        return self.pruned / self.dense


class ChangedToken(Record, frozen=True):
    """A token that the pruned model predicts worse.

    Attributes:
      window, position: its indices.
      dense, pruned: the token's probability in each model.
    """

    window: Count
    position: Count
    before: str
    token: str
    after: str
    dense: Share
    pruned: Share


class TokenChanges(Record, frozen=True):
    """How the loss of each token changed from the dense to the pruned model.

    Attributes:
      mean, median: of the rise of the loss in nats.
      mean_stderr: standard error of the mean, from the spread of the windows, since tokens of one window go together; None for a
        single window.
      edges: boundaries between the classes of changes, in nats. The middle class counts as unchanged.
      shares: share of the tokens in each class between the edges, from improved to worsened.
      rise_share: share of the total rise that comes from the worst 1% of the tokens; None if the loss did not rise.
      worst: the tokens whose loss rose most.
    """

    tokens: Count
    mean: float
    mean_stderr: float | None
    median: float
    edges: tuple[float, ...]
    shares: tuple[Share, ...]
    rise_share: float | None
    worst: tuple[ChangedToken, ...]

    def __post_init__(self) -> None:
        if not self.edges or len(self.edges) % 2 or len(self.shares) != len(self.edges) + 1:
            raise ValueError(f"expected an even number of edges and one share more, got {len(self.edges)} and {len(self.shares)}")


BLOCKS, EXPERTS = "blocks", "experts"
"""What whole blocks, and whole experts, are called among the parts that were cut."""


class CutCount(Record, frozen=True):
    """The parts of one kind, such as the neurons of an MLP, or the blocks.

    Attributes:
      left: the numbers that blocks have left, ascending; config.json has room for one.
      total: how many there were.
    """

    left: Annotated[tuple[Count, ...], msgspec.Meta(min_length=1)]
    total: Count

    @property
    def words(self) -> str:
        """ "768 to 1,152 of 1,536"."""
        return f"{' to '.join(f'{count:,}' for count in sorted({self.left[0], self.left[-1]}))} of {self.total:,}"

    @property
    def deleted(self) -> bool:
        """Whether the export deletes the pruned parts instead of zeroing."""
        return len(self.left) == 1


class Rates(Record, frozen=True):
    """Tokens a second over all windows: reading a prompt, and writing."""

    reading: Positive
    writing: Positive


class Speed(Record, frozen=True):
    """The contents of speed.json: the speed of this program's forward pass.

    Attributes:
      how: the devices, the dtype and the tokens, in words; empty where nothing was measured.
      dense, cut: the fastest reading and the fastest token of a few turns, which the models took one after the other; None where
        they were not measured.
      reason: why they were not; empty if they were.
    """

    how: str
    dense: Rates | None = None
    cut: Rates | None = None
    reason: str = ""

    @property
    def words(self) -> str:
        """The speeds in words, or why they were not measured."""
        if self.dense is None or self.cut is None:
            return f"not measured: {self.reason}"
        pairs = ((self.dense.reading, self.cut.reading), (self.dense.writing, self.cut.writing))
        (read, reading), (write, writing) = ((f"{b / a:.2f} times", f"{number(a)} → {number(b)}") for a, b in pairs)
        return f"{read} dense in reading ({reading} tokens/s), {write} in writing ({writing})"


class MemoryPeaks(Record, frozen=True):
    """Peak memory in bytes, of the process and of the device that used most.

    Attributes:
      host_peak: the largest resident set of a process; it includes mapped pages of checkpoint files.
      device_peak: what the device's allocator counts; None on a CPU, which has no separate device memory.
    """

    host_peak: Count
    device_peak: Count | None


class FileSizes(Record, frozen=True):
    """Bytes of the files of a run.

    Attributes:
      source: of the source's weight files.
      dense: of the source's tensors.
      transformers: of the exported weights on disk; None without an export.
      left: by the name of each file and folder in the run directory.
    """

    source: Count | None
    dense: Count
    transformers: Count | None
    left: dict[str, Count]


class RunFacts(Record, frozen=True, kw_only=True):
    """The entries of report.json that an exported model's card has, too.

    Attributes:
      recipe: one line on the method, with only those settings that have an effect on the model's family.
      calibration: the text that the weights were fitted to.
      distillation: None if the pruned model was not trained.
      speed: of the dense and the cut model; None if nothing was cut.
    """

    recipe: str
    calibration: TextFacts
    evaluation: TextFacts
    perplexity: Perplexities
    distillation: Outcome | None
    speed: Speed | None

    @property
    def training(self) -> Outcome | None:
        """The training that moved the weights; None if none did."""
        return self.distillation if self.distillation and self.distillation.kept else None

    @property
    def perplexities(self) -> dict[str, float]:
        """ "dense", "pruned" and, after training, "trained" -> perplexity."""
        dense, last = self.perplexity.dense, self.perplexity.pruned
        if self.training is None or self.training.perplexity_before is None:
            return {"dense": dense, "pruned": last}
        return {"dense": dense, "pruned": self.training.perplexity_before, "trained": last}


class Report(RunFacts, frozen=True, kw_only=True):
    """The contents of report.json.

    Attributes:
      manifest: everything that determines the result, see ``inputs.manifest_of``.
      sparsity: share of the weights of the pruned matrices that are zero by the masks.
      model_sparsity: share of all weights of the model that are zero by the masks or leave the exported model.
      weights, pruned: of the pruned matrices, how many there are, and how many are zero by the masks.
      allocation: None if every block has the pattern's sparsity.
      left_out: the blocks that the model is without.
      cuts: of each kind of parts that were pruned as a whole, by what they are called.
      removed: how many weights the exported model is without, beside those that masks prune.
      weighed_layers: names, inside a block, of the layers for which the target weighs tokens.
      unusual: what needs a look, by layer.
      layer_kinds: empty; version 0.2.0 had means over each kind of layer, which follow from the blocks.
      seconds: of each stage, over the starts of the run that finished it.
      memory: of the last start.
      tokens: the tokens of the evaluation text that the pruned model predicts worse; None if the losses were not saved.
      continuations: the texts that both models write after a few prompts; None if nobody would read them.
      files: label -> path of each file that the run wrote.
    """

    manifest: Mapping[str, Any]
    configuration: Mapping[str, Any]
    environment: Environment
    model: ModelFacts
    sparsity: Share
    model_sparsity: Share
    weights: Count
    pruned: Count
    allocation: Allocated | None
    left_out: LeftOut = LeftOut()
    cuts: dict[str, CutCount]
    removed: Count
    weighed_layers: tuple[str, ...]
    unusual: dict[str, dict[str, Any]]
    layer_kinds: tuple[Any, ...] = ()
    seconds: dict[str, float]
    memory: MemoryPeaks
    sizes: FileSizes
    tokens: TokenChanges | None
    continuations: Continuations | None
    files: dict[str, str]
    blocks: tuple[BlockReport, ...]

    def __post_init__(self) -> None:
        within("configuration", self.configuration, RunSettings)
        within("manifest", self.manifest, ManifestEntries)

    @property
    def settings(self) -> RunSettings:
        """The settings that are read on their own."""
        return within("configuration", self.configuration, RunSettings)

    @property
    def code(self) -> str:
        """The version of the program."""
        return within("manifest", self.manifest, ManifestEntries).code

    @property
    def log_ratio_stderr(self) -> float | None:
        """Standard error of the log perplexity ratio, paired by window."""
        return self.tokens.mean_stderr if self.tokens else None

    @property
    def solver(self) -> str | None:
        """Name of the solver; None if the weights are the selector's own."""
        solver = self.settings.solver
        return solver.name if solver else None

    @property
    def earlier(self) -> float:
        """The least seconds of stopped starts on blocks that they finished."""
        return max(0.0, sum(block.seconds for block in self.blocks) - self.seconds.get("pruning", 0.0))

    @property
    def layers(self) -> list[LayerReport]:
        """The layers of all blocks, in the order of the walk."""
        return [layer for block in self.blocks for layer in block.layers]

    @property
    def has_held_out(self) -> bool:
        """Whether errors were measured on held-out text."""
        return any(layer.held_out_after is not None for layer in self.layers)

    @property
    def aims_at_dense(self) -> bool:
        """Whether errors against the dense model were measured."""
        return any(layer.dense_after is not None for layer in self.layers)


class ExportedLayer(LayerReport, frozen=True, kw_only=True):
    """The record of an exported matrix, by the full name of its weight.

    ``pruned`` and ``sparsity`` count the zeros of the file.

    Attributes:
      cut_from: the shape of the dense matrix, of one that lost columns and has no mask; None of the others.
    """

    cut_from: tuple[Size, Size] | None = None

    def named(self, name: str) -> LayerReport:
        """The record under the layer's name inside its block."""
        return LayerReport(**{field: getattr(self, field) for field in LayerReport.__struct_fields__} | {"name": name})


def parts_left(cuts: Mapping[str, CutCount]) -> str:
    """ "26 of 30 blocks, 48 of 64 neurons in every block": what is left."""
    model = [f"{cuts[BLOCKS].words} {BLOCKS}"] if BLOCKS in cuts else []
    inner = ", ".join(f"{count.words} {called}" for called, count in cuts.items() if called != BLOCKS)
    return ", ".join([*model, *([f"{inner} in every block"] if inner else [])])


def only_experts(cuts: Mapping[str, CutCount]) -> bool:
    """Whether a model lost experts and no other parts."""
    return cuts.keys() == {EXPERTS}


class ExportForm(Record, frozen=True):
    """How an export was written, see ``forms``."""

    name: str
    max_shard_size: Count
    scan_layers: bool


class Sidecar(Record, frozen=True):
    """The contents of optima_tpu.json, in an exported folder.

    Attributes:
      model: the model that was pruned: its id on the hub, or the name of a folder or file.
      cuts: of each kind of parts that the folder is without, by what they are called.
      layers: of each pruned matrix.
      form: how the folder was written.
      left_out: the blocks that the model is without.
    """

    model: str
    manifest: Mapping[str, Any]
    cuts: dict[str, CutCount]
    layers: tuple[ExportedLayer, ...]
    form: ExportForm
    files: tuple[str, ...]
    left_out: LeftOut = LeftOut()

    @property
    def decided(self) -> ManifestEntries:
        """The entries of the manifest that are read on their own."""
        return check_record(self.manifest, ManifestEntries, "optima_tpu.json", inside="manifest")

    @property
    def masked(self) -> list[ExportedLayer]:
        """The matrices that have zeros by a mask."""
        return [layer for layer in self.layers if layer.cut_from is None]


class CellName(Record, frozen=True):
    """A cell of a sweep: its methods' labels, windows, and the draw's seed."""

    mask: str
    update: str
    pattern: str
    windows: Count
    seed: int

    def __str__(self) -> str:
        return f"{self.mask} + {self.update}, {self.pattern}, {plural(self.windows, 'window')}, seed {self.seed}"


class CellResult(CellName, frozen=True):
    """An entry of results.json: the result of one cell of a sweep.

    A number is None if the cell is not finished, or if its run has no such number.

    Attributes:
      state: "missing" if the cell was not run yet.
      perplexity, dense: of the pruned and of the dense model on the same text.
      log_ratio_stderr: standard error of the logarithm of their ratio, paired by window.
      error_before, error_after, held_out_before, held_out_after: means over layers, see :class:`LayerReport`.
      seconds: spent on the blocks: calibration, mask, update, and the pass through the pruned block.
      rows_not_converged, rows_refused: of all layers together.
      sparsity: share of the weights of the pruned matrices that are zero.
      reason: why the cell failed.
      report: path of its report.json, from the directory of the tables.
    """

    state: Literal["finished", "failed", "missing"] = "missing"
    perplexity: Positive | None = None
    dense: Positive | None = None
    log_ratio_stderr: float | None = None
    error_before: float | None = None
    error_after: float | None = None
    held_out_before: float | None = None
    held_out_after: float | None = None
    seconds: float | None = None
    rows_not_converged: Count | None = None
    rows_refused: Count | None = None
    sparsity: float | None = None
    reason: str | None = None
    report: str | None = None

    def __post_init__(self) -> None:
        if self.state == "finished" and None in (self.perplexity, self.dense, self.report):
            raise ValueError("expected perplexity, dense and report in a finished cell, got null")
