"""The settings by which tasks are asked."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Asking:
    """How the evaluation harness asks its tasks; each field is a setting.

    Attributes:
      fewshot: examples before every question; None takes the task's own number. A task whose own number is 0 keeps 0.
      limit: number of documents to use, from the start of each task; None takes all.
      chat: whether the tokenizer's chat template makes the prompts.
      multiturn: whether each example is a turn of the chat; otherwise all of them stand in the user's one turn.
      system: the system message, or without a chat template the beginning of every prompt.
      generation: settings of written answers that replace the tasks' own, as "max_gen_toks=512,do_sample=false".
    """

    fewshot: int | None = None
    limit: int | None = None
    chat: bool = False
    multiturn: bool = False
    system: str | None = None
    generation: str | None = None

    @property
    def prompts(self) -> dict[str, Any]:
        """The arguments of the harness that make the prompts."""
        return {"system_instruction": self.system, "apply_chat_template": self.chat, "fewshot_as_multiturn": self.multiturn}
