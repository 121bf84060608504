"""llama.cpp's architectures, and their differences from Hugging Face's."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LLAMA_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_BLOCK = _LLAMA_BLOCK | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

Settings = Callable[[Mapping[str, Any], set[str]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp.

    Attributes:
      name: the value of general.architecture; the architecture's own metadata keys begin with it.
      model: the class of transformers, for config.json.
      block: llama.cpp's names for the parts of a block -> Hugging Face's; "blk.3." becomes "model.layers.3.".
      settings: (its own metadata, names of the tensors in the file) -> the entries of config.json that only this architecture
        has.
      required: its own metadata keys that must exist, in addition to those that all architectures share.
      optional: its own metadata keys that may exist, in addition to those that all architectures share.
      interleaved: whether the rows of q and k are in llama.cpp's order, in which neighbouring rows are rotated.
      norm_shift: the amount by which the norm weights in the file are larger.
    """

    name: str
    model: str
    model_type: str
    block: Mapping[str, str]
    settings: Settings
    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    interleaved: bool = False
    norm_shift: float = 0.0

    @property
    def names(self) -> dict[str, str]:
        """Names of layers in a file -> Hugging Face's, ``*`` for the block."""
        return _TOP | {f"blk.*.{theirs}": f"model.layers.*.{ours}" for theirs, ours in self.block.items()}


def renamed(name: str, names: Mapping[str, str]) -> str | None:
    """The other name of a tensor; None if ``names`` lacks its layer.

    Args:
      names: layers as in ``Architecture.names``, or the other way round.
    """
    layer, _, kind = name.rpartition(".")
    number = re.search(r"\d+", layer)
    other = names.get(re.sub(r"\d+", "*", layer, count=1))
    return other and f"{other.replace('*', number[0] if number else '*')}.{kind}"


def _llama(own: Mapping[str, Any], tensors: set[str]) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "attention_bias": any(".attn_" in name and name.endswith(".bias") for name in tensors),
        "mlp_bias": any(".ffn_" in name and name.endswith(".bias") for name in tensors),
    }


def _qwen2(own: Mapping[str, Any], tensors: set[str]) -> dict[str, Any]:
    return {"hidden_act": "silu", "use_sliding_window": False}


def _gemma3(own: Mapping[str, Any], tensors: set[str]) -> dict[str, Any]:
    d_head = own["attention.key_length"]
    # The file does not have it. As in llama.cpp (src/models/gemma3.cpp), the 27B model, recognised by its 62 blocks, has its own
    # scale.
    scalar = own["embedding_length"] // own["attention.head_count"] if own["block_count"] == 62 else d_head
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": own["attention.sliding_window"],
        "sliding_window_pattern": 6,
        "rope_local_base_freq": own.get("rope.freq_base_swa", 10_000.0),
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        architecture.name: architecture
        for architecture in (
            Architecture("llama", "LlamaForCausalLM", "llama", _LLAMA_BLOCK, _llama, interleaved=True),
            Architecture("qwen2", "Qwen2ForCausalLM", "qwen2", _LLAMA_BLOCK, _qwen2),
            Architecture(
                "gemma3",
                "Gemma3ForCausalLM",
                "gemma3_text",
                _GEMMA_BLOCK,
                _gemma3,
                norm_shift=1.0,
                required=frozenset(("attention.key_length", "attention.sliding_window")),
                optional=frozenset(("rope.freq_base_swa", "rope.scaling.factor")),
            ),
        )
    }
)
