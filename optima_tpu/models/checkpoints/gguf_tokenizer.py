"""The tokenizer files of a Hugging Face folder from the metadata of a GGUF file, without torch."""

import json
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# transformers reaches this module only through a file reader that imports torch; the module itself needs none.
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    GGUF_PRE_TOKENIZER_SPLITS,
    GGUF_TOKENIZER_MAPPING,
    convert_gguf_tokenizer,
)

from optima_tpu.errors import UserError
from optima_tpu.models.checkpoints.gguf_architectures import Architecture
from optima_tpu.models.checkpoints.gguf_metadata import INSTEAD

LLAMA3 = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken")
"""Splits whose models take a whole word that is in the vocabulary before any merge, and start a text with BOS unless
the file says otherwise (llama.cpp, src/llama-vocab.cpp)."""

DIGITS = ("smollm", "starcoder", "refact", "command-r")
"""Splits that cut out every digit and then split as GPT-2 does (same source). transformers does not know them."""

GPT2 = ("gpt-2", "gpt2")

GEMMA = ("gemma3",)
"""Architectures whose SentencePiece text has no space put before it, and for which transformers has a tokenizer of its own."""

SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_files(fields: dict[str, Any], architecture: Architecture) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and, if there is a chat template, chat_template.jinja.

    Args:
      fields: all metadata of the file.
      architecture: what the file says it holds.

    Raises:
      UserError: the file has no vocabulary, or a way to split text that can't be rebuilt exactly.
    """
    kind, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind not in ("gpt2", "llama") or "tokenizer.ggml.tokens" not in fields:
        raise UserError(
            f"the GGUF file has the tokenizer {kind!r}; expected gpt2 (byte-level BPE) or llama (SentencePiece): {INSTEAD}"
        )
    # A split that transformers does not know it treats as GPT-2's without a word, which gives other token ids.
    if kind == "gpt2" and split not in (*GGUF_PRE_TOKENIZER_SPLITS, *DIGITS, *GPT2):
        raise UserError(f"the GGUF file splits text by the rule {split!r}, which is not known here: {INSTEAD}")
    if kind == "llama" and architecture.name not in GEMMA and not fields.get("tokenizer.ggml.add_space_prefix", True):
        raise UserError(
            f"the GGUF file has a SentencePiece tokenizer without a space before the text, which can't be rebuilt here: {INSTEAD}"
        )
    stated = {
        name: fields[f"tokenizer.{key}"]
        for key, name in GGUF_TOKENIZER_MAPPING["tokenizer"].items()
        if f"tokenizer.{key}" in fields
    }
    backend, _ = convert_gguf_tokenizer(architecture.name, stated)
    if split == "qwen2":
        backend.normalizer = normalizers.NFC()  # as the published tokenizers do; the file does not say it
    if split in DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if split in LLAMA3:
        backend.model.ignore_merges = True
    return _saved(backend, fields, architecture, default_bos=kind == "llama" or split in LLAMA3)


def _saved(backend: Tokenizer, fields: dict[str, Any], architecture: Architecture, default_bos: bool) -> dict[str, bytes]:
    """What ``save_pretrained`` writes for a tokenizer with the special tokens that the metadata names."""
    tokens = fields["tokenizer.ggml.tokens"]
    special = {
        name: tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in SPECIAL.items()
        if f"tokenizer.ggml.{key}_token_id" in fields
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **special,
        model_max_length=fields[f"{architecture.name}.context_length"],
        add_bos_token=fields.get("tokenizer.ggml.add_bos_token", default_bos),
        add_eos_token=fields.get("tokenizer.ggml.add_eos_token", False),
        clean_up_tokenization_spaces=False,
        chat_template=fields.get("tokenizer.chat_template"),
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    config = json.loads(files["tokenizer_config.json"])
    # The name that every version of transformers knows, and nothing about where these files were made.
    config = {key: value for key, value in config.items() if key not in ("backend", "is_local", "local_files_only")}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    files["tokenizer_config.json"] = json.dumps(config, indent=2).encode() + b"\n"
    return files
