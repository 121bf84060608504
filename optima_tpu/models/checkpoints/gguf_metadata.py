"""The configuration of a model from the metadata of a GGUF file."""

import json
from typing import Annotated, Any, TypedDict

import msgspec
import numpy as np
from gguf import GGUFReader, TokenType

from optima_tpu.errors import UserError
from optima_tpu.models.checkpoints.gguf_architectures import Architecture
from optima_tpu.models.rope import Llama3Scaling, geometric
from optima_tpu.runtime.records import Count, Positive, Size, Undeclared, check_record

INSTEAD = "give the Hugging Face folder of the model"

SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
"""Key of config.json -> the required metadata key, without the architecture's name in front."""

OPTIONAL = {
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.freq_base",
    "rope.dimension_count",
    "vocab_size",
    "tensor_data_layout",
}
NEUTRAL = {"rope.scaling.type": "none", "expert_count": 0, "expert_used_count": 0}
"""Keys that change what the model computes unless they have this value."""

_IDS = "bos", "eos", "pad"
"""The special tokens whose ids config.json and generation_config.json name."""
ROTARY_DEFAULT = 10_000.0  # llama.cpp's default if the file has none


class General(
    Undeclared, frozen=True, rename=lambda name: "split.count" if name == "split_count" else f"general.{name.replace('_', '.')}"
):
    """The metadata that are read to learn which model a file holds."""

    architecture: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    split_count: int = 1


SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Name of a special token in transformers -> its name in GGUF."""


class Vocabulary(
    Undeclared,
    frozen=True,
    omit_defaults=True,
    rename=lambda name: "tokenizer.chat_template" if name == "chat_template" else f"tokenizer.ggml.{name}",
):
    """The metadata of a tokenizer.

    They are read with ``msgspec.convert``, and made again with ``msgspec.to_builtins``.

    Attributes:
      token_type: of each token, see ``gguf.TokenType``; empty if all are normal.
      scores: of each token, for SentencePiece.
      merges: two tokens with a space between them, the best first.
      model: ``gpt2`` for byte-level BPE, ``llama`` for SentencePiece.
      pre: llama.cpp's name of the rule that splits text before any merge.
    """

    tokens: Annotated[list[str], msgspec.Meta(min_length=1)] = msgspec.field(default_factory=list)
    token_type: list[int] = msgspec.field(default_factory=list)
    scores: list[float] = msgspec.field(default_factory=list)
    merges: list[Annotated[str, msgspec.Meta(pattern="(?s)^[^ ]+ [^ ]+$")]] = msgspec.field(default_factory=list)
    chat_template: str = ""
    bos_token_id: Count | None = None
    eos_token_id: Count | None = None
    unknown_token_id: Count | None = None
    padding_token_id: Count | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    model: str = ""
    pre: str = ""
    add_space_prefix: bool | None = None

    @property
    def special(self) -> dict[str, int]:
        """Special tokens, by the names of transformers -> their ids."""
        ids = {short: getattr(self, f"{long}_token_id") for short, long in SPECIAL.items()}
        return {short: index for short, index in ids.items() if index is not None}

    @property
    def typed(self) -> list[tuple[str, int]]:
        """Every token with its type."""
        return list(zip(self.tokens, self.token_type or [int(TokenType.NORMAL)] * len(self.tokens), strict=True))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The merges, taken apart."""
        return [(left, right) for left, _, right in (merge.partition(" ") for merge in self.merges)]


Sizes = TypedDict(
    "Sizes",
    {
        "embedding_length": Size,
        "feed_forward_length": Size | list[Any],
        "block_count": Annotated[int, msgspec.Meta(ge=1, le=1 << 11)],
        "context_length": Size,
        "attention.head_count": Annotated[int, msgspec.Meta(ge=1, le=1 << 16)] | list[Any],
        "attention.head_count_kv": Annotated[int, msgspec.Meta(ge=1, le=1 << 16)] | list[Any],
        "attention.key_length": Size,
        "attention.value_length": Size,
        "attention.layer_norm_rms_epsilon": Annotated[float, msgspec.Meta(ge=0, lt=1)],
        "attention.sliding_window": Count,
        "rope.freq_base": Positive,
        "rope.freq_base_swa": Positive,
        "rope.dimension_count": Size,
        "rope.scaling.type": str,
        "rope.scaling.factor": Annotated[float, msgspec.Meta(ge=0)],
        "vocab_size": Size,
    },
    total=False,
)
"""What is read of an architecture's own metadata, with the bounds of this program. Lists are refused with a message of their
own."""


def metadata(reader: GGUFReader) -> dict[str, Any]:
    """All metadata as Python values, with floats as short decimals.

    A float is the shortest decimal that rounds to the stored float32: 0.00001, and not 9.999999747378752e-06.
    """
    return {name: _shortest(field.contents()) for name, field in reader.fields.items()}


def _shortest(value: Any) -> Any:
    return float(str(np.float32(value))) if isinstance(value, float) else value


def head_counts(own: dict[str, Any]) -> tuple[int, int]:
    """The numbers of query heads and of key-value heads."""
    heads = own[SIZES["num_attention_heads"]]
    return heads, own.get("attention.head_count_kv", heads)


def config_json(
    own: dict[str, Any],
    vocabulary: Vocabulary,
    architecture: Architecture,
    tensors: set[str],
    rope_factors: np.ndarray | None,
    dtype: str,
) -> bytes:
    """config.json of the Hugging Face model that the file describes.

    The layout is one that all readers know.

    Args:
      own: the metadata of the architecture, without its name at the start of the keys.
      tensors: GGUF names of the tensors in the file.
      rope_factors: float32[d_head / 2], the divisor of each rotary frequency; None without llama3 scaling.
      dtype: the dtype of the weights, for ``torch_dtype``.

    Raises:
      UserError: sizes are missing or differ between layers, or the file asks for something the model does not compute.
    """
    check_record(own, Sizes, "the GGUF file", INSTEAD, inside=architecture.name)
    _refuse_unknown(own, architecture)
    sizes = {key: own[name] for key, name in SIZES.items()}
    heads, kv_heads = head_counts(own)
    d_head = own.get("attention.key_length", sizes["hidden_size"] // heads)
    if d_head < 1:
        raise UserError(
            f"expected heads of at least one dimension, got {heads} heads in a width of {sizes['hidden_size']}; {INSTEAD}"
        )
    for name in ("attention.value_length", "rope.dimension_count"):
        if own.get(name, d_head) != d_head:
            raise UserError(
                f"the GGUF file has {architecture.name}.{name} {own[name]} but heads of {d_head}: expected them "
                f"equal, as in Hugging Face's {architecture.model}; {INSTEAD}"
            )
    theta = own.get("rope.freq_base", ROTARY_DEFAULT)
    record = sizes | {
        "architectures": [architecture.model],
        "model_type": architecture.model_type,
        "num_key_value_heads": kv_heads,
        "head_dim": d_head,
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(own, rope_factors, theta, d_head),
        "tie_word_embeddings": "output.weight" not in tensors,
        "vocab_size": own.get("vocab_size", len(vocabulary.tokens) or None),
        "torch_dtype": dtype,
        **{f"{short}_token_id": vocabulary.special.get(short) for short in _IDS},
        **architecture.settings(own, tensors),
    }
    return json.dumps(dict(sorted(record.items())), indent=2).encode() + b"\n"


def generation_config_json(vocabulary: Vocabulary) -> bytes:
    """generation_config.json; a GGUF file has its special tokens alone."""
    ids = {f"{short}_token_id": vocabulary.special[short] for short in _IDS if short in vocabulary.special}
    return json.dumps({"_from_model_config": True} | ids, indent=2).encode() + b"\n"


def _refuse_unknown(own: dict[str, Any], architecture: Architecture) -> None:
    """Raises UserError if a value is missing, or lost in config.json."""
    name_of = f"{architecture.name}.{{}}".format
    missing = [name_of(name) for name in (*SIZES.values(), *sorted(architecture.required)) if name not in own]
    if missing:
        raise UserError(f"the GGUF file lacks {', '.join(missing)} in its metadata: convert the model again")
    known = OPTIONAL | architecture.required | architecture.optional | set(SIZES.values()) | set(NEUTRAL)
    linear = "rope.scaling.factor" in architecture.optional and own.get("rope.scaling.type") == "linear"
    for name, value in own.items():
        neutral = name not in NEUTRAL or value == NEUTRAL[name] or (name == "rope.scaling.type" and linear)
        if name not in known or not neutral:
            raise UserError(
                f"the GGUF file sets {name_of(name)} to {value}, which is not carried over to Hugging Face's "
                f"{architecture.model}: {INSTEAD}"
            )
        if isinstance(value, list):
            raise UserError(f"the GGUF file sets {name_of(name)} per layer; expected one value for all: {INSTEAD}")


def _rope_scaling(own: dict[str, Any], factors: np.ndarray | None, theta: float, d_head: int) -> dict[str, Any] | None:
    if factors is not None:
        return _llama3_scaling(factors, theta, d_head)
    # As llama.cpp (src/llama-model.cpp): a factor without a type is linear; a type without a factor, or with 0, has no effect.
    factor = own.get("rope.scaling.factor")
    if factor and own.get("rope.scaling.type", "linear") == "linear":
        return {"rope_type": "linear", "factor": factor}
    return None


def llama3_factors(factor: float, theta: float, d_head: int) -> np.ndarray:
    """The divisor of each rotary frequency, float64[d_head / 2].

    The other constants are those of every published Llama 3.x.
    """
    divisors: np.ndarray = 1 / Llama3Scaling(factor, 1.0, 4.0, 8192).shares(geometric(theta, d_head))
    return divisors


def _llama3_scaling(factors: np.ndarray, theta: float, d_head: int) -> dict[str, Any]:
    """The llama3 rope scaling that gives the factors of a file.

    The file holds only the result, one factor per frequency (1 for short wavelengths, the scaling factor for long ones, a blend
    between). So this computes the factors for the constants that every published Llama 3.x has, and compares them with the
    file, up to float32 rounding.

    Raises:
      UserError: the factors differ from the file's.
    """
    factor = float(np.max(factors))
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = llama3_factors(factor, theta, d_head)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-5):
        raise UserError(
            "the GGUF file scales its rotary frequencies (rope_freqs.weight) in another way than Llama 3.x "
            f"does, and its parameters can't be recovered from the file: {INSTEAD}"
        )
    return scaling
