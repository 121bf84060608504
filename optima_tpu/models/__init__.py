"""The decoder families, one file each; a family is a :class:`~optima_tpu.models.family.Family`."""

from optima_tpu.errors import UserError
from optima_tpu.models import gemma, llama, mistral, olmo2, opt, phi3, qwen, qwen_moe
from optima_tpu.models.family import Family

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": llama.FAMILY,
    "MistralForCausalLM": mistral.FAMILY,
    "Qwen2ForCausalLM": qwen.QWEN2,
    "Qwen3ForCausalLM": qwen.QWEN3,
    "Qwen3MoeForCausalLM": qwen_moe.FAMILY,
    "Gemma2ForCausalLM": gemma.GEMMA2,
    "Gemma3ForCausalLM": gemma.GEMMA3,
    "Gemma3ForConditionalGeneration": gemma.GEMMA3_MULTIMODAL,
    "Olmo2ForCausalLM": olmo2.FAMILY,
    "OPTForCausalLM": opt.FAMILY,
    "Phi3ForCausalLM": phi3.FAMILY,
}
"""The architecture that a checkpoint's config.json names, to the family that reads it."""


def family_of(config) -> Family:
    """The family of a ``transformers`` configuration. Raises UserError, listing what is supported, for any other."""
    names = config.architectures or [type(config).__name__]
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    raise UserError(f"expected a model of architecture {', '.join(FAMILIES)}, got {', '.join(names)}: not supported")
