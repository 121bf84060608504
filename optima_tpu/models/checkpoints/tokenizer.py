"""The tokenizer of an opened checkpoint."""

from typing import TypedDict

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from optima_tpu.errors import UserError
from optima_tpu.models.checkpoints.source import Pretrained, read_by_transformers
from optima_tpu.runtime.records import Positive, parse_record

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


class _Settings(TypedDict, total=False):
    """Entries of tokenizer_config.json that transformers does not check."""

    model_max_length: Positive | None


def load_tokenizer(pretrained: Pretrained) -> PreTrainedTokenizerBase:
    """The tokenizer as ``transformers.AutoTokenizer`` reads its files.

    Raises:
      UserError: the files hold no vocabulary, or transformers can't read them.
    """
    # Without this test transformers would build a tokenizer with an empty vocabulary.
    if not any(name in pretrained.assets for name in VOCABULARIES):
        raise UserError(
            f"{pretrained.origin} has no tokenizer: expected one of {', '.join(VOCABULARIES)} beside the "
            "weights; copy the tokenizer files of the base model there"
        )
    if (settings := pretrained.assets.get("tokenizer_config.json")) is not None:
        parse_record(settings, _Settings, f"{pretrained.origin}: tokenizer_config.json", "download it again")
    tokenizer: PreTrainedTokenizerBase = read_by_transformers(
        AutoTokenizer,
        pretrained.assets,
        "tokenizer_config.json",
        pretrained.origin,
        f"the tokenizer of {pretrained.origin} can't be read",
        "expected a tokenizer.json, or a tokenizer class that transformers has; take them from the base model",
    )
    tokenizer.name_or_path = pretrained.origin  # names the files in messages; the folder is gone
    return tokenizer
