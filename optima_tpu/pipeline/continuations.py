"""Continues prompts with the dense and the pruned model, to compare them."""

from typing import Any

from optima_tpu.config.run_config import RunConfig
from optima_tpu.data import tokenizing
from optima_tpu.errors import UserError
from optima_tpu.evaluate.token_changes import pieces, readable
from optima_tpu.models.checkpoints import load_tokenizer
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.generate import Prompt, Sampling, generate, plan_generation
from optima_tpu.models.model import Model
from optima_tpu.pipeline.cutting import PrunedModel
from optima_tpu.pipeline.keeping import Stage, StageWork, in_record
from optima_tpu.pipeline.opened import Opened
from optima_tpu.report.contents import Continuation, Continuations
from optima_tpu.report.pace import Step
from optima_tpu.report.progress import Progress
from optima_tpu.runtime.device_memory import device_budget
from optima_tpu.runtime.kept import KeptRecord
from optima_tpu.runtime.processes import together

CONTINUED = KeptRecord("continuations.json", Continuations)

PROMPTS = ("The capital of France is", "Water boils at", "To make a cup of tea, you need", "def add(a, b):\n")
"""A fact, a number, a sentence, a program."""

_NEW = 32
_SHARE = 0.5
"""The share of the devices' budget that the whole model may take: a few sentences must not make a run fail for lack of memory."""


def continuations(model: Model, pruned: Decoder, budget: float, progress: Progress) -> Continuations:
    """Continues :data:`PROMPTS` greedily. Every process calls it.

    Args:
      budget: bytes that a run may use of each device.
      progress: advanced after each model.

    Returns:
      The texts, or the reason why nothing was written.
    """
    tokenizer = together(lambda: load_tokenizer(model.pretrained))
    with tokenizing(tokenizer):
        prompts = [list(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    end = tokenizer.eos_token_id
    prompts = [prompt[:-1] if len(prompt) > 1 and prompt[-1] == end else prompt for prompt in prompts]
    limit = getattr(model.pretrained.config.get_text_config(), "max_position_embeddings", None)
    if not all(prompts) or (limit and max(map(len, prompts)) + _NEW > limit):
        return Continuations(reason="The prompts and their continuations do not fit the model’s context.")
    try:
        plan = plan_generation(
            model.decoder,
            [Prompt(tuple(prompt), _NEW) for prompt in prompts],
            Sampling(min(len(tokenizer), model.decoder.config.vocab)),
            advice="take a --mesh with a larger model axis, or a larger --device_memory",
            budget=_SHARE * budget,
        )
        written = []
        for decoder in (model.decoder, pruned):
            written.append(generate(decoder, plan))
            progress.advance()
    except UserError as error:
        return Continuations(reason=f"The models were not asked to continue prompts: {error}.")

    def decode(ids: Any) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def parted(prompt: list[int], ids: list[int], common: int) -> tuple[str, ...]:
        return tuple(map(readable, pieces(decode, prompt, ids[:common], ids[common : common + 1], ids[common + 1 :])[1:]))

    texts = []
    for text, prompt, *both in zip(PROMPTS, prompts, *written, strict=True):
        first, second = (ids[: ids.index(end)] if end in ids else ids for ids in both)
        common = next((index for index, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
        texts.append(Continuation(readable(text), parted(prompt, first, common), parted(prompt, second, common)))
    return Continuations(tuple(texts))


def continues(config: RunConfig) -> bool:
    """Whether a run continues prompts: if it exports and no text is random.

    Without an export, as in sweeps, nobody uses the model. Random tokens have no meaning.
    """
    return config.export and "random" not in config.texts


def _continue(work: StageWork, pruned: PrunedModel) -> Continuations:
    opened = work.opened
    return continuations(opened.model, pruned.decoder, device_budget(opened.config.device_memory), work.progress)


def _steps(opened: Opened) -> list[Step]:
    return [Step("continuing prompts", 0)] * 2 if opened.model.decoder.config.generates else []


CONTINUING = Stage("continuing prompts with both models", _continue, in_record(CONTINUED), _steps)
