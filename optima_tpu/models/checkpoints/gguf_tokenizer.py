"""The tokenizer files of a Hugging Face folder, from GGUF metadata.

The function of transformers, ``AutoTokenizer.from_pretrained(folder, gguf_file=name)``, is not enough. It needs torch, and it
treats every unknown rule for splitting text as GPT-2's. If the file lacks a default special token of its class, such as
<|endoftext|>, it gives this token an id beyond the embedding.
"""

import json
from collections.abc import Mapping

from gguf import TokenType
from msgspec import structs
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers.tokenization_utils_base import generate_merges

from optima_tpu.errors import UserError, refusing
from optima_tpu.models.checkpoints.gguf_architectures import Architecture
from optima_tpu.models.checkpoints.gguf_metadata import INSTEAD, SPECIAL, Vocabulary

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CAPITALISED_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_CAPITALS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_RULES = {
    rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}": (
        *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        *("dbrx", "smaug-bpe"),
    ),
    rf"{_CAPITALISED_WORD}|{_CAPITALS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}": ("tekken",),
    rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}": (
        *("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"),
    ),
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}": (
        "qwen35",
    ),
    rf"{_CAPITALISED_WORD}{_CONTRACTIONS}?|{_CAPITALS}{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}": ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
}
SPLITS = {name: rule for rule, names in _RULES.items() for name in names}
"""llama.cpp's names for the ways to split text before any merge (src/llama-vocab.cpp) -> regular expression of a word."""

WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken")
"""Splits whose models take a whole word that is in the vocabulary before any merge, and start a text with BOS unless
the file says otherwise (same source)."""

DIGITS = ("smollm", "starcoder", "refact", "command-r")
"""Splits that cut out every digit and then split as GPT-2 does (same source)."""

GPT2 = ("gpt-2", "gpt2")

GEMMA = ("gemma3",)
"""Architectures whose SentencePiece text has no space put before it, and whose tokens are in the order of their merges."""


def tokenizer_files(vocabulary: Vocabulary, architecture: Architecture, context: int) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and any chat_template.jinja.

    Args:
      context: the most tokens that the model reads.

    Raises:
      UserError: as :func:`tokenizer_of`.
    """
    tokenizer = tokenizer_of(vocabulary, architecture)
    config = _special(_spelled(vocabulary, architecture)) | {
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "tokenizer_class": "PreTrainedTokenizerFast",  # the name that every version of transformers knows
    }
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, sort_keys=True).encode() + b"\n",
    }
    return files | ({"chat_template.jinja": vocabulary.chat_template.encode()} if vocabulary.chat_template else {})


def tokenizer_of(vocabulary: Vocabulary, architecture: Architecture) -> Tokenizer:
    """The tokenizer that the metadata of a GGUF file describe.

    Raises:
      UserError: the file has no vocabulary, or a way to split text that can't be rebuilt exactly.
    """
    _refuse_unbuildable(vocabulary, architecture)
    vocabulary = _spelled(vocabulary, architecture)
    special = _special(vocabulary)
    # The tokenizers library raises no other class, as for a merge of tokens that do not exist.
    with refusing(Exception, "the GGUF file's tokens and merges do not fit one another", INSTEAD):
        if vocabulary.model == "gpt2":
            tokenizer = _byte_level(vocabulary)
        elif architecture.name in GEMMA:
            tokenizer = _gemma(vocabulary, special.get("unk_token"))
        else:
            tokenizer = _llama(vocabulary)
    _add_tokens(tokenizer, vocabulary, special)
    tokenizer.post_processor = _ends(tokenizer, vocabulary, special)
    return tokenizer


def _spelled(vocabulary: Vocabulary, architecture: Architecture) -> Vocabulary:
    """The tokens as they are spelled in the text that is merged.

    A Gemma's file spells tokens of two or more spaces with spaces, not with ▁.
    """
    if architecture.name not in GEMMA:
        return vocabulary
    return structs.replace(
        vocabulary, tokens=["▁" * len(token) if not token.strip(" ") else token for token in vocabulary.tokens]
    )


def _special(vocabulary: Vocabulary) -> dict[str, str]:
    """The special tokens by their names in tokenizer_config.json."""
    return {f"{short}_token": vocabulary.tokens[index] for short, index in vocabulary.special.items()}


def _refuse_unbuildable(vocabulary: Vocabulary, architecture: Architecture) -> None:
    """Raises UserError if :func:`tokenizer_of` can't rebuild the tokenizer."""
    kind, tokens = vocabulary.model, vocabulary.tokens
    if kind not in ("gpt2", "llama") or not tokens:
        raise UserError(
            f"the GGUF file has the tokenizer {kind!r}; expected gpt2 (byte-level BPE) or llama (SentencePiece): {INSTEAD}"
        )
    if kind == "gpt2" and vocabulary.pre not in (*SPLITS, *DIGITS, *GPT2):
        raise UserError(f"the GGUF file splits text by the rule {vocabulary.pre!r}, which is not known here: {INSTEAD}")
    if kind == "llama" and architecture.name not in GEMMA and vocabulary.add_space_prefix is False:
        raise UserError(
            f"the GGUF file has a SentencePiece tokenizer without a space before the text, which can't be rebuilt here: {INSTEAD}"
        )
    for short, index in vocabulary.special.items():
        if index >= len(tokens):
            raise UserError(
                f"the GGUF file names token {index} as its {SPECIAL[short]} token, but has {len(tokens)} tokens: {INSTEAD}"
            )
    for name, values in (("token_type", vocabulary.token_type), ("scores", vocabulary.scores)):
        if values and len(values) != len(tokens):
            raise UserError(
                f"the GGUF file has {len(values)} entries in tokenizer.ggml.{name} for {len(tokens)} tokens: {INSTEAD}"
            )
    if kind == "llama" and not vocabulary.merges and not vocabulary.scores:
        raise UserError(f"the GGUF file has neither merges nor scores of its tokens: {INSTEAD}")


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    """Byte-level BPE: the vocabulary spells bytes as printable characters."""
    split = vocabulary.pre
    alphabet, spelled, vocab = set(pre_tokenizers.ByteLevel.alphabet()), pre_tokenizers.ByteLevel(False, use_regex=False), {}
    for index, (token, kind) in enumerate(vocabulary.typed):
        # The file spells tokens that are matched whole as they are in the text, and by mistake also a few ordinary tokens.
        if kind not in (TokenType.CONTROL, TokenType.USER_DEFINED) and not set(token) <= alphabet:
            token = "".join(piece for piece, _ in spelled.pre_tokenize_str(token))
        vocab[token] = index
    model = BPE(vocab, vocabulary.pairs, continuing_subword_prefix="", end_of_word_suffix="")
    model.ignore_merges = split in WHOLE_WORDS
    tokenizer = Tokenizer(model)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split not in SPLITS)
    before = SPLITS.get(split, r"\p{N}" if split in DIGITS else None)
    cut = before and pre_tokenizers.Split(Regex(before), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level]) if cut else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # as the published tokenizers do; the file does not say it
    return tokenizer


def _llama(vocabulary: Vocabulary) -> Tokenizer:
    """SentencePiece BPE with a space before the text."""
    merges = vocabulary.pairs or _merges(dict(zip(vocabulary.tokens, vocabulary.scores, strict=True)))
    tokenizer = Tokenizer(BPE(_index(vocabulary.tokens), merges, fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    return tokenizer


def _gemma(vocabulary: Vocabulary, unknown: str | None) -> Tokenizer:
    """SentencePiece BPE without a space before the text.

    The scores in a Gemma's file are not in the order of its merges.
    """
    vocab = _index(vocabulary.tokens)
    merges = vocabulary.pairs or _merges({token: -index for token, index in vocab.items()})
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _index(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Each way to join two tokens to a third, the best score first.

    Of equal scores the longest left part comes first, then the first in the file.
    """
    merges: list[tuple[str, str]] = generate_merges(scores, scores)
    return merges


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary, special: Mapping[str, str]) -> None:
    """Adds the tokens that are matched whole, with the vocabulary's ids."""
    control = dict.fromkeys(
        [token for token, kind in vocabulary.typed if kind in (TokenType.UNKNOWN, TokenType.CONTROL)] + list(special.values())
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    vocab = tokenizer.get_vocab()
    user_defined = [
        token for token, kind in vocabulary.typed if kind == TokenType.USER_DEFINED and token in vocab and token not in control
    ]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user_defined])


def _ends(tokenizer: Tokenizer, vocabulary: Vocabulary, special: Mapping[str, str]) -> processors.TemplateProcessing:
    """Puts BOS before and EOS after a text, if the file asks for them.

    Raises:
      UserError: the file does not name these tokens.
    """
    ends, asks_for_bos = [], vocabulary.add_bos_token
    if asks_for_bos is None:
        asks_for_bos = vocabulary.model == "llama" or vocabulary.pre in WHOLE_WORDS
    for name, asked in (("bos_token", asks_for_bos), ("eos_token", vocabulary.add_eos_token)):
        if asked and name not in special:
            raise UserError(f"the GGUF file puts a {name} around every text but does not name it: {INSTEAD}")
        ends.append([special[name]] if asked else [])
    bos, eos = ends
    first, second = ([f"{piece}:{part}" for piece in (*bos, text, *eos)] for part, text in enumerate(("$A", "$B")))
    ids = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(bos + eos)]
    return processors.TemplateProcessing(single=first, pair=first + second, special_tokens=ids)
