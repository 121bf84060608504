"""The decoder families, by the architecture in config.json.

Those with Llama's blocks are rows of ``relatives``; others have files of their own. See
:class:`~optima_tpu.models.family.Family`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from optima_tpu.errors import UserError
from optima_tpu.models import deepseek, gemma, gemma4, gpt_oss, llama, llama4, mixtures, opt, phi3, qwen_next, relatives
from optima_tpu.models.family import Family
from optima_tpu.models.general import family as general_family

FAMILIES: Mapping[tuple[str, str], Family] = {
    **relatives.FAMILIES,
    ("LlamaForCausalLM", "llama"): llama.FAMILY,
    ("Llama4ForCausalLM", "llama4_text"): llama4.FAMILY,
    ("Llama4ForConditionalGeneration", "llama4"): llama4.MULTIMODAL,
    ("MixtralForCausalLM", "mixtral"): mixtures.MIXTRAL,
    ("Qwen2MoeForCausalLM", "qwen2_moe"): mixtures.QWEN2,
    ("Qwen3MoeForCausalLM", "qwen3_moe"): mixtures.QWEN3,
    ("Qwen3NextForCausalLM", "qwen3_next"): qwen_next.NEXT,
    ("Qwen3_5ForCausalLM", "qwen3_5_text"): qwen_next.DENSE,
    ("Qwen3_5ForConditionalGeneration", "qwen3_5"): qwen_next.DENSE_MULTIMODAL,
    ("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text"): qwen_next.MIXTURE,
    ("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe"): qwen_next.MIXTURE_MULTIMODAL,
    ("GemmaForCausalLM", "gemma"): gemma.GEMMA,
    ("Gemma2ForCausalLM", "gemma2"): gemma.GEMMA2,
    ("Gemma3ForCausalLM", "gemma3_text"): gemma.GEMMA3,
    ("Gemma3ForConditionalGeneration", "gemma3"): gemma.GEMMA3_MULTIMODAL,
    ("Gemma4ForCausalLM", "gemma4_text"): gemma4.FAMILY,
    ("Gemma4ForConditionalGeneration", "gemma4"): gemma4.MULTIMODAL,
    ("Gemma4UnifiedForCausalLM", "gemma4_unified_text"): gemma4.FAMILY,
    ("Gemma4UnifiedForConditionalGeneration", "gemma4_unified"): gemma4.MULTIMODAL,
    ("OlmoeForCausalLM", "olmoe"): mixtures.OLMOE,
    ("OPTForCausalLM", "opt"): opt.FAMILY,
    ("Phi3ForCausalLM", "phi3"): phi3.FAMILY,
    ("Glm4MoeForCausalLM", "glm4_moe"): deepseek.GLM4_MOE,
    ("Glm4MoeLiteForCausalLM", "glm4_moe_lite"): deepseek.GLM4_MOE_LITE,
    ("DeepseekV2ForCausalLM", "deepseek_v2"): deepseek.V2,
    ("DeepseekV3ForCausalLM", "deepseek_v3"): deepseek.V3,
    ("GptOssForCausalLM", "gpt_oss"): gpt_oss.FAMILY,
}
"""The family for the architecture that a checkpoint's config.json names, and the model type that transformers reads from it.

Both keys are needed: the architecture is what was trained, the model type is what transformers' Auto classes open.
"""

REFUSED: Mapping[str, str] = dict.fromkeys(
    ("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration"),
    "later blocks read keys and values of earlier ones, and each block an embedding of its own, beside four residual streams",
)
"""What does not fit in an architecture."""


def refuse_architecture(names: Iterable[str], model_type: str | None) -> None:
    """Raises UserError, with the reason, for names in ``REFUSED``."""
    if name := next((name for name in names if name in REFUSED), None):
        raise UserError(
            "expected a model in which every block reads one residual stream and nothing else, got "
            f"{name} (model_type {model_type}), where {REFUSED[name]}: not supported"
        )


def family_named(architectures: Iterable[str] | None) -> Family | None:
    """A family of the first known name in ``architectures``, or None."""
    return next((family for name in architectures or () for family in _types(name).values()), None)


def _types(architecture: str) -> dict[str, Family]:
    """The families of an architecture, by the model type."""
    return {kind: family for (name, kind), family in FAMILIES.items() if name == architecture}


def family_of(config: Any, by_torch: bool = False) -> Family:
    """The family of a configuration: declared, or made from the torch class.

    Args:
      config: of ``transformers``.
      by_torch: whether to make the family from the class in torch even if one is declared.

    Raises:
      UserError: the architecture is not supported, the model type does not belong to it, or the model attends to later tokens.
    """
    names = config.architectures or [type(config).__name__]
    name = next(filter(_types, names), None)
    if name is None or by_torch:
        refuse_architecture(names, config.model_type)
        return _causal(general_family(config), config)
    if config.model_type not in (types := _types(name)):
        raise UserError(
            f"expected the model_type {' or '.join(types)} of a {name}, got {config.model_type!r}, as which "
            "transformers would open it: correct one of the two in config.json"
        )
    family, text = _causal(types[config.model_type], config), config.get_text_config()
    if strange := sorted(set(getattr(text, "per_layer_attributes", None) or ()) - family.by_block):
        expected = f"{', '.join(sorted(family.by_block))} alone" if family.by_block else "nothing"
        raise UserError(f"expected {expected} in the per_layer_config of a {name}, got {', '.join(strange)}: not supported")
    return family


def _causal(family: Family, config: Any) -> Family:
    """The family; raises UserError if tokens see later ones."""
    if not getattr(config.get_text_config(), "is_causal", True):
        raise UserError("expected is_causal true, got false: only causal models are supported")
    return family
