"""Written answers: what the harness asks for, and where an answer ends.

The rules are those of the harness's own model for transformers with one request at a time (``lm_eval/models/huggingface.py``,
version 0.4.13).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from transformers import PreTrainedTokenizerBase

from optima_tpu.errors import UserError, refusing
from optima_tpu.models.checkpoints import Pretrained
from optima_tpu.runtime.bounds import Bound
from optima_tpu.runtime.records import parse_record

_NEW = 256
"""The most tokens of an answer where the task names no number, as in the harness."""

# The last ones act on sampled tokens alone.
_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p"}


class Rules(NamedTuple):
    """The most tokens of an answer, and the texts that end it."""

    new: int
    until: tuple[str, ...]


class Question(NamedTuple):
    """The token ids of a prompt, and the rules of its answer."""

    prompt: tuple[int, ...]
    rules: Rules


class _Generation(TypedDict, total=False):
    """What is read of generation_config.json."""

    eos_token_id: int | list[int] | None
    repetition_penalty: float | None


def read_rules(settings: Mapping[str, Any]) -> Rules:
    """Reads a request's settings, ``generation_kwargs`` in a task file.

    Raises:
      UserError: they ask for something else than the most likely tokens.
    """
    what = f"expected settings of written answers, got {dict(settings)}"
    with refusing((TypeError, ValueError, OverflowError), what, "correct them by --gen_kwargs"):
        normalized = dict(normalize_gen_kwargs(dict(settings), _NEW))
        until = [text for text in handle_stop_sequences(normalized["until"], None) if text]
        "".join(until)
    if normalized["do_sample"]:
        raise UserError(
            f"expected answers of the most likely tokens, got do_sample {settings.get('do_sample')} and temperature "
            f"{settings.get('temperature')}, which ask for sampled tokens: give --gen_kwargs do_sample=false,temperature=0, or "
            "run lm-eval on the exported folder"
        )
    if unknown := sorted(normalized.keys() - _KNOWN):
        raise UserError(
            f"expected settings of written answers out of {', '.join(sorted(_KNOWN))}, got {', '.join(unknown)}: run lm-eval on "
            "the exported folder"
        )
    Bound(1).refuse("max_gen_toks", normalized["max_gen_toks"])
    return Rules(normalized["max_gen_toks"], tuple(until))


@dataclasses.dataclass(frozen=True)
class Ends:
    """Where an answer ends: at an EOS token, or at a text of its rules.

    Attributes:
      eos: the ids that end a text by generation_config.json, or by config.json if it names none.
      penalty: generation_config.json's ``repetition_penalty``, which transformers would apply, and this program does not.
    """

    tokenizer: PreTrainedTokenizerBase
    eos: frozenset[int]
    penalty: float

    @classmethod
    def of(cls, pretrained: Pretrained, tokenizer: PreTrainedTokenizerBase) -> "Ends":
        """Raises UserError if generation_config.json can't be read."""
        where = f"{pretrained.origin}: generation_config.json"
        generation = parse_record(pretrained.assets.get("generation_config.json", b"{}"), _Generation, where, "download it again")
        named = generation.get("eos_token_id")
        named = getattr(pretrained.config.get_text_config(), "eos_token_id", None) if named is None else named
        ids = [] if named is None else [named] if isinstance(named, int) else named
        return cls(tokenizer, frozenset(ids), generation.get("repetition_penalty") or 1.0)

    def answer(self, tokens: Sequence[int], until: Sequence[str]) -> tuple[str, bool]:
        """The answer in the tokens so far, and whether it has ended."""
        eos = self.tokenizer.eos_token
        until = [*until, *([] if eos is None else [eos])]
        # Decoding leaves special tokens out, so their texts are looked for among the ids.
        special = {
            number
            for number, token in self.tokenizer.added_tokens_decoder.items()
            if token.special and any(text in token.content for text in until)
        }
        end = next((index for index, token in enumerate(tokens) if token in self.eos | special), None)
        decoded = self.tokenizer.decode(tokens if end is None else tokens[: end + 1], skip_special_tokens=True)
        text = postprocess_generated_text(decoded, until, None)
        return text, end is not None or len(text) < len(decoded)
