"""The settings of one recovery, parsed from the command line."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from optima_tpu.config.choices import method_name, options_of
from optima_tpu.config.flat import field_names
from optima_tpu.config.parse import parse_command
from optima_tpu.config.run_config import MOST_TOKENS, Dtype, OutputDirectory, RunConfig, WindowLength, few_tokens
from optima_tpu.errors import UserError
from optima_tpu.method.distillation import KL, Distillation
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.selectors import Imported
from optima_tpu.report.run_record import default_folder
from optima_tpu.runtime.bounds import Bound, Filled, Seed
from optima_tpu.runtime.buckets import as_path
from optima_tpu.runtime.devices import Devices
from optima_tpu.runtime.program import program

_PROGRAM = program("recover")
_DESCRIPTION = f"""\
Trains a pruned model on more text, with its masks held, and measures what that wins back. This is training, not one-shot pruning.

MODEL is a run directory, an exported folder, or any pruned checkpoint: a Hugging Face folder or a hub id whose zeros are the
mask. The result is a run directory of its own, with report.html and hf/.

examples:
  {_PROGRAM} runs/llama --tokens 50M --mesh 4x2
      on the text that the run was calibrated on, toward the model that it pruned
  {_PROGRAM} ./pruned-model --tokens 200k --against meta-llama/Llama-3.2-1B --source c4 --distill.train norms
      a pruned checkpoint of another program"""

_MOVED = {
    "distill.windows": "--tokens, the number of tokens in all windows",
    "distill.written": "--source npy:FILE, with windows that the model wrote before",
    "lr": "--distill.learning_rate",
    "epochs": "--distill.passes, how often training reads each window",
    "loss": "--distill kl or cross_entropy",
    "step": "--distill.batch, windows in a step of Adam",
    "window": "--length, tokens in each window, or --windows, how many are measured",
}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


@dataclasses.dataclass(frozen=True)
class RecoverConfig(Devices):
    """One recovery.

    Attributes:
      model: a run directory, an exported folder, or any pruned checkpoint whose zeros are the mask.
      tokens: how many tokens training reads: 200k, 50M, or a plain number. Must be given. More tokens help most.
      against: the dense model; null takes the model that the record of MODEL names. The record must match the model.
      source: the text to train on, named as in calibration.source of a run; null takes the text that MODEL was calibrated on.
      length: tokens in each window; null takes as many as the windows had that MODEL was calibrated on, and without a record
        2048, or the model's context if that is shorter.
      seed: which windows are drawn; the same seed gives the same windows.
      held_out: number of windows that nothing is trained on; they decide which step is kept.
      distill: how the model is trained: kl or cross_entropy, with the options that they have in a run, without windows.
      evaluation: the text on which perplexity is measured before and after, named as source; null takes the evaluation text that
        belongs to source.
      windows: number of windows of that text, counted from the first; null takes all.
      dtype: compute and store in this type; null keeps the checkpoint's own.
      output: directory of the result; null takes runs/recover-MODEL-TOKENS. What was stopped goes on from this directory.
      token_cache: store the tokens of texts in ~/.cache/optima-tpu, or in the folder OPTIMA_TPU_CACHE, and reuse them.
      batch: windows in one forward and backward pass, on each device; fewer need less memory.
    """

    model: Annotated[str, Filled("a pruned model: a run directory, a folder or a hub id")]
    tokens: str | None = None
    against: str | None = None
    source: str | None = None
    length: WindowLength = None
    seed: Seed = 0
    held_out: Annotated[int, Bound(1)] = 8
    distill: Distillation = KL()
    evaluation: str | None = None
    windows: Annotated[int | None, Bound(1)] = None
    dtype: Dtype | None = None
    output: OutputDirectory = None
    token_cache: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        few_tokens("--evaluation", self.windows, self.length)
        few_tokens("--source", self.held_out, self.length)
        Bound(1, MOST_TOKENS * self.distill.passes).refuse("tokens", self.token_count)

    @property
    def token_count(self) -> int:
        """``tokens`` as a number."""
        return count_tokens("--tokens", self.tokens)

    def training_windows(self, length: int) -> int:
        """The number of windows of ``length`` tokens that fill the steps."""
        return max(1, self.distill.filled(self.token_count // (self.distill.passes * length)))

    def to_dict(self) -> dict[str, Any]:
        """The settings in JSON types, ``distill`` as in the YAML files."""
        method = {"name": method_name("distill", self.distill)} | options_of(self.distill)
        return {name: getattr(self, name) for name in field_names(type(self))} | {
            "distill": {name: value for name, value in method.items() if f"distill.{name}" not in _MOVED}
        }

    @property
    def texts(self) -> tuple[str | None, str | None]:
        """The texts to train and to measure on, as they are named."""
        return self.source, self.evaluation

    @property
    def run_directory(self) -> Path:
        """Where the result goes."""
        if self.output is not None:
            return as_path(self.output)
        folder = default_folder("recover", self.model)
        return folder.with_name(re.sub(r"[\[\]\\]", "_", f"{folder.name}-{self.tokens}"))  # see ``files.refuse_unreachable``


def count_tokens(name: str, text: str | None) -> int:
    """Reads a number such as 200k, 50M, 1_000_000 or 1,000,000.

    A number above 1e18 counts as 1e18.

    Raises:
      UserError: the text of the option ``name`` is no such number.
    """
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", (text or "").strip().replace("_", "").lower())  # 1,000,000 as it is printed
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb]?)", plain)
    if not match:
        raise UserError(f"expected {name} as a number such as 200k, 50M or 1000000, got {text or 'none'}")
    return round(min(float(match[1]) * _UNITS[match[2]], 1e18))


def as_run(config: RunConfig, tokens: str) -> RunConfig:
    """The run by which a recovery with ``tokens`` is planned.

    Args:
      config: model, text, devices, and with ``distill`` how to train; None trains by the defaults of ``optima recover``.
    """
    recovery, text = RecoverConfig(config.model, tokens, distill=config.distill or RecoverConfig.distill), config.calibration
    windows = recovery.training_windows(text.window_length)
    run = RunConfig(
        config.model,
        dtype=config.dtype,
        recipe=Recipe(selector=Imported(config.model, weights=True), solver=None),
        distill=dataclasses.replace(recovery.distill, windows=windows),
        calibration=dataclasses.replace(text, windows=windows),
        evaluation=config.evaluation,
        export=config.export,
    )
    return run.on(config)


def parse(argv: Sequence[str]) -> RecoverConfig:
    """The recovery that a command line asks for.

    ``--help`` prints and raises SystemExit(0).

    Raises:
      UserError: a setting does not exist, or its value is not allowed.
    """
    return parse_command(RecoverConfig, argv, _PROGRAM, _DESCRIPTION, _MOVED)
