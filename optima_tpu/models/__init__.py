"""The decoder families, one file each; a family is a :class:`~optima_tpu.models.family.Family`."""

from collections.abc import Mapping
from typing import Any

from optima_tpu.errors import UserError
from optima_tpu.models import gemma, llama, mistral, olmo2, opt, phi3, qwen, qwen_moe
from optima_tpu.models.family import Family

FAMILIES: Mapping[str, Mapping[str, Family]] = {
    "LlamaForCausalLM": {"llama": llama.FAMILY},
    # transformers reads a Mistral's config.json that has layer_types as a Ministral's.
    "MistralForCausalLM": {"mistral": mistral.MISTRAL, "ministral": mistral.MINISTRAL},
    "MinistralForCausalLM": {"ministral": mistral.MINISTRAL},
    "Qwen2ForCausalLM": {"qwen2": qwen.QWEN2},
    "Qwen3ForCausalLM": {"qwen3": qwen.QWEN3},
    "Qwen3MoeForCausalLM": {"qwen3_moe": qwen_moe.FAMILY},
    "Gemma2ForCausalLM": {"gemma2": gemma.GEMMA2},
    "Gemma3ForCausalLM": {"gemma3_text": gemma.GEMMA3},
    "Gemma3ForConditionalGeneration": {"gemma3": gemma.GEMMA3_MULTIMODAL},
    "Olmo2ForCausalLM": {"olmo2": olmo2.FAMILY},
    "OPTForCausalLM": {"opt": opt.FAMILY},
    "Phi3ForCausalLM": {"phi3": phi3.FAMILY},
}
"""The family for the architecture that a checkpoint's config.json names, and the model type that transformers reads from it.

Both keys are needed: the architecture is what was trained, the model type is what transformers' Auto classes open.
"""


def family_of(config: Any) -> Family:
    """The family of a ``transformers`` configuration.

    Raises:
      UserError: the architecture is not supported (the message lists those that are), the model type does not belong to it, or
        the model attends to later tokens.
    """
    names = config.architectures or [type(config).__name__]
    name = next((name for name in names if name in FAMILIES), None)
    if name is None:
        raise UserError(f"expected a model of architecture {', '.join(FAMILIES)}, got {', '.join(names)}: not supported")
    if config.model_type not in FAMILIES[name]:
        raise UserError(
            f"expected the model_type {' or '.join(FAMILIES[name])} of a {name}, got {config.model_type!r}, as which "
            "transformers would open it: correct one of the two in config.json"
        )
    if not getattr(config.get_text_config(), "is_causal", True):
        raise UserError("expected is_causal true, got false: only causal models are supported")
    return FAMILIES[name][config.model_type]
