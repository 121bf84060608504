"""The tokenizer metadata of a GGUF file: the inverse of ``gguf_tokenizer``.

llama.cpp knows a tokenizer by the name of its rule to split text. The names of the rules that the tokenizer may have are tried: a
tokenizer is made of the metadata again, and must turn every text of ``_PROBE`` into the same tokens.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from gguf import TokenType
from msgspec import structs
from tokenizers import Tokenizer

from optima_tpu.errors import UserError, panics_refused
from optima_tpu.models.checkpoints.gguf_architectures import Architecture
from optima_tpu.models.checkpoints.gguf_metadata import SPECIAL, Vocabulary
from optima_tpu.models.checkpoints.gguf_tokenizer import DIGITS, GEMMA, GPT2, SPLITS, tokenizer_of
from optima_tpu.models.checkpoints.source import Pretrained
from optima_tpu.models.checkpoints.tokenizer import load_tokenizer

_PROBE = (
    "The quick brown fox didn't jump; I'LL say it's THEY'RE 12345678 times 3.14159 (that's all).",
    "  two spaces, a\ttab,\n\n\nthree lines\r\n and the end  \n   ",
    "def camelCase(someHTTPServer):\n    return a[i]/b // path/to\n\t# \u00dcbergr\u00f6\u00dfe na\u00efve caf\u00e9 cafe\u0301",
    "\u4e16\u754c\u4f60\u597d\u3001\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3067\u3059\u3002 \ud55c\uad6d\uc5b4 ",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0645\u0631\u062d\u0628\u0627 ",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22",
    "\U0001f469\u200d\U0001f52c \u00bd x\u00b2 \u2192 \u221e $5 50% e-mail: a.b@c.de https://x.y/z?q=1&r=2 ___ --- ...!!!",
    "",
    " ",
    "a",
)
_INSTEAD = "take --format plain or packed"


def vocabulary(pretrained: Pretrained, architecture: Architecture, rows: int) -> Vocabulary:
    """The metadata of the tokenizer, see :func:`_vocabulary`.

    Raises:
      UserError: as :func:`_vocabulary`, or a rule of the tokenizer fails on a text of ``_PROBE``.
    """
    with panics_refused(f"the tokenizer.json of {pretrained.origin} has a rule that fails on some text; {_INSTEAD}"):
        return _vocabulary(pretrained, architecture, rows)


def _vocabulary(pretrained: Pretrained, architecture: Architecture, rows: int) -> Vocabulary:
    """The metadata of the tokenizer.

    Args:
      rows: of the embedding; ids without a token get a name of their own.

    Raises:
      UserError: the tokenizer is no BPE, or no rule of llama.cpp gives the same tokens.
    """
    tokenizer = load_tokenizer(pretrained)
    core = getattr(tokenizer, "backend_tokenizer", None)
    tokenizer_json = json.loads(core.to_str()) if core is not None else {"model": {}}
    if core is None or tokenizer_json["model"].get("type") != "BPE":
        raise UserError(f"expected a BPE tokenizer for a GGUF file, got {type(tokenizer).__name__}; {_INSTEAD}")
    # transformers adds the default tokens of a class beyond the vocabulary of a model that has none of them.
    tokenizer_json["added_tokens"] = [token for token in tokenizer_json["added_tokens"] if token["id"] < rows]
    ids = {f"{long}_token_id": getattr(tokenizer, f"{short}_token_id") for short, long in SPECIAL.items()}
    ends, chat = core.encode("a").ids, tokenizer.chat_template
    unnamed = Vocabulary(
        **_tokens(tokenizer_json, rows),
        **{name: number for name, number in ids.items() if number is not None and number < rows},
        chat_template=chat if isinstance(chat, str) else "",
        add_bos_token=ends[:1] == [tokenizer.bos_token_id],
        add_eos_token=ends[-1:] == [tokenizer.eos_token_id],
    )
    for rule in _rules(tokenizer_json, architecture):
        named = structs.replace(unnamed, **rule)
        if _same(core, tokenizer_of(named, architecture), [token["content"] for token in tokenizer_json["added_tokens"]]):
            return named
    raise UserError(f"expected a tokenizer that GGUF can name, got one that splits or merges text otherwise; {_INSTEAD}")


def _tokens(tokenizer_json: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Tokens, their types, and merges or, for SentencePiece, scores."""
    vocab = tokenizer_json["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer_json["added_tokens"]}
    if (last := max(vocab.values())) >= rows:
        raise UserError(f"expected tokens below {rows}, the rows of the embedding, got the token {last}; {_INSTEAD}")
    tokens, kinds = [f"[PAD{index}]" for index in range(rows)], [int(TokenType.UNUSED)] * rows
    for token, index in vocab.items():
        tokens[index], kinds[index] = token, int(TokenType.NORMAL)
    pieces = tokenizer_json["model"].get("byte_fallback", False)
    if pieces:
        for byte in range(256):
            kinds[vocab[f"<0x{byte:02X}>"]] = int(TokenType.BYTE)
    for token in tokenizer_json["added_tokens"]:
        kinds[token["id"]] = int(TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
        if pieces and not token["special"]:
            tokens[token["id"]] = token["content"].replace("\u2581", " ")  # as llama.cpp's converter spells them
    if (unknown := tokenizer_json["model"].get("unk_token")) in vocab:
        kinds[vocab[unknown]] = int(TokenType.UNKNOWN)
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in tokenizer_json["model"]["merges"]]
    if not pieces:
        return {"tokens": tokens, "token_type": kinds, "merges": [" ".join(merge) for merge in merges]}
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        first.setdefault("".join(merge), rank)
    # The merge with the best score comes first; of float32's integers none is rounded.
    return {"tokens": tokens, "token_type": kinds, "scores": [-float(first.get(token, len(merges))) for token in tokens]}


def _rules(tokenizer_json: Mapping[str, Any], architecture: Architecture) -> Iterator[dict[str, Any]]:
    """Yields the names that the rule to split text may have."""
    if tokenizer_json["model"].get("byte_fallback"):
        yield {"model": "llama", "pre": "default", "add_space_prefix": architecture.name not in GEMMA}
        return
    steps = tokenizer_json.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    split = next((step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"), None)
    digits = any(step.get("type") == "Digits" for step in steps) or split == r"\p{N}"
    names = [name for name, rule in SPLITS.items() if rule == split] or (DIGITS if digits else GPT2)
    yield from ({"model": "gpt2", "pre": name} for name in names)


def _same(core: Tokenizer, again: Tokenizer, added: list[str]) -> bool:
    """Whether two tokenizers agree on ``_PROBE`` and on the added tokens."""
    texts = [*_PROBE, *(f"a {token} b{token}" for token in added[:64])]
    return all(core.encode(text).ids == again.encode(text).ids for text in texts)
