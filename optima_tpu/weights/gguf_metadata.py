"""The configuration of a Llama from the metadata of a GGUF file."""

import json
import math
from typing import Any

import numpy as np
from gguf import GGUFReader

from optima_tpu.errors import UserError

ARCHITECTURES = ("llama",)
INSTEAD = "give the Hugging Face folder of the model"

SIZES = {
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "max_position_embeddings": "llama.context_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
}
"""config.json key -> the metadata key that must be there."""

OPTIONAL = {
    "llama.attention.head_count_kv", "llama.attention.key_length", "llama.attention.value_length",
    "llama.rope.freq_base", "llama.rope.dimension_count", "llama.vocab_size", "llama.tensor_data_layout",
}
NEUTRAL = {"llama.rope.scaling.type": "none", "llama.expert_count": 0, "llama.expert_used_count": 0}
"""Keys that change what the model computes unless they have this value."""

ROTARY_DEFAULT = 10_000.0  # llama.cpp's, where the file has none


def metadata(reader: GGUFReader) -> dict[str, Any]:
    """All metadata as Python values. Floats are the shortest decimals that round to the stored float32, so that
    0.00001 does not come out as 9.999999747378752e-06."""
    return {name: _shortest(field.contents()) for name, field in reader.fields.items()}


def _shortest(value: Any) -> Any:
    return float(str(np.float32(value))) if isinstance(value, float) else value


def head_counts(fields: dict[str, Any]) -> tuple[int, int]:
    """The numbers of query heads and of key-value heads."""
    heads = fields[SIZES["num_attention_heads"]]
    return heads, fields.get("llama.attention.head_count_kv", heads)


def config_json(fields: dict[str, Any], tensors: set[str], rope_factors: np.ndarray | None, dtype: str) -> bytes:
    """config.json of the Hugging Face Llama that computes what the file describes, in the layout all readers know.

    Args:
      fields: see :func:`metadata`.
      tensors: GGUF names of the tensors in the file.
      rope_factors: float32[d_head / 2], what each rotary frequency is divided by; None without llama3 scaling.
      dtype: of the weights, for ``torch_dtype``.

    Raises:
      UserError: sizes are missing or differ between layers, or the file asks for something Llama does not compute.
    """
    _refuse_unknown(fields)
    sizes = {key: fields[name] for key, name in SIZES.items()}
    heads, kv_heads = head_counts(fields)
    d_head = fields.get("llama.attention.key_length", sizes["hidden_size"] // heads)
    for name in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if fields.get(name, d_head) != d_head:
            raise UserError(f"the GGUF file has {name} {fields[name]} but heads of {d_head}: expected them equal, as "
                            f"in Hugging Face's Llama; {INSTEAD}")
    theta = fields.get("llama.rope.freq_base", ROTARY_DEFAULT)
    tokens = fields.get("tokenizer.ggml.tokens")
    record = sizes | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_key_value_heads": kv_heads,
        "head_dim": d_head,
        "rope_theta": theta,
        "rope_scaling": None if rope_factors is None else _llama3_scaling(rope_factors, theta, d_head),
        "attention_bias": any(".attn_" in name and name.endswith(".bias") for name in tensors),
        "mlp_bias": any(".ffn_" in name and name.endswith(".bias") for name in tensors),
        "tie_word_embeddings": "output.weight" not in tensors,
        "vocab_size": fields.get("llama.vocab_size", len(tokens) if tokens else None),
        "torch_dtype": dtype,
        **special_ids(fields),
    }
    return json.dumps(dict(sorted(record.items())), indent=2).encode() + b"\n"


def special_ids(fields: dict[str, Any]) -> dict[str, int | None]:
    """The ids of the special tokens, under their names in config.json."""
    return {f"{short}_token_id": fields.get(f"tokenizer.ggml.{long}_token_id")
            for short, long in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}


def generation_config_json(fields: dict[str, Any]) -> bytes:
    """generation_config.json with the special tokens, all that a GGUF file knows of it."""
    known = {name: value for name, value in special_ids(fields).items() if value is not None}
    return json.dumps({"_from_model_config": True} | known, indent=2).encode() + b"\n"


def _refuse_unknown(fields: dict[str, Any]) -> None:
    """Raises UserError where a value is missing, or says something that this module would not carry over."""
    missing = [name for name in SIZES.values() if name not in fields]
    if missing:
        raise UserError(f"the GGUF file lacks {', '.join(missing)} in its metadata: convert the model again")
    known = OPTIONAL | set(SIZES.values()) | set(NEUTRAL)
    for name, value in fields.items():
        if not name.startswith("llama."):
            continue
        if name not in known or (name in NEUTRAL and value != NEUTRAL[name]):
            raise UserError(f"the GGUF file sets {name} to {value}, which is not carried over to Hugging Face's dense "
                            f"Llama: {INSTEAD}")
        if isinstance(value, list):
            raise UserError(f"the GGUF file sets {name} per layer; expected one value for all: {INSTEAD}")


def _llama3_scaling(factors: np.ndarray, theta: float, d_head: int) -> dict[str, Any]:
    """The llama3 rope scaling that gives these factors, for the constants that every published Llama 3.x has.

    The file holds only the result, one factor a frequency (1 for short wavelengths, the scaling factor for long ones, a
    blend between), so a guess is computed forward and must agree to float32 rounding.

    Raises:
      UserError: it does not agree.
    """
    scaling = {"rope_type": "llama3", "factor": float(np.max(factors)), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    turns = 8192 * theta ** (-np.arange(0, d_head, 2, dtype=np.float64) / d_head) / (2 * math.pi)
    blend = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    expected = 1 / ((1 - blend) / scaling["factor"] + blend)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-5):
        raise UserError("the GGUF file scales its rotary frequencies (rope_freqs.weight) in another way than Llama 3.x "
                        f"does, and the parameters can't be told from it: {INSTEAD}")
    return scaling
