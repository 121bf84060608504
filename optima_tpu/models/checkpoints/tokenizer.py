"""The tokenizer of an opened checkpoint."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from optima_tpu.errors import UserError, one_line, panics_refused
from optima_tpu.models.checkpoints.source import Pretrained
from optima_tpu.runtime.records import Positive, parse_record

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


class _Settings(TypedDict, total=False):
    """Entries of tokenizer_config.json that transformers does not check."""

    model_max_length: Positive | None


def _asks_for_code(assets: Mapping[str, bytes]) -> bool:
    """Whether tokenizer_config.json names code of the tokenizer's own."""
    settings = assets.get("tokenizer_config.json")
    return settings is not None and bool(json.loads(settings).get("auto_map"))


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
    with tempfile.TemporaryDirectory() as folder:
        for name, content in pretrained.assets.items():
            path = Path(folder) / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        try:
            with panics_refused("the tokenizers library fails"):
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            tokenizer.name_or_path = pretrained.origin  # names the files in messages; the folder is gone
            return tokenizer
        except Exception as error:  # the tokenizers library raises plain Exception on a damaged file
            if _asks_for_code(pretrained.assets):
                raise UserError(
                    f"{pretrained.origin}: tokenizer_config.json asks for code of the model's own (auto_map), which is never "
                    "run: expected a tokenizer.json, or a tokenizer class that transformers has; take them from the base model"
                ) from error
            raise UserError(
                f"the tokenizer of {pretrained.origin} can't be read ({one_line(error)}): download its tokenizer files again"
            ) from error
