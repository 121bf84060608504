"""The decoder families: one file each. A family module holds ``Config.from_hf``, ``Block``, its names and its sharding."""

from types import ModuleType

from optima_tpu.errors import UserError
from optima_tpu.models import llama

FAMILIES: dict[str, ModuleType] = {"LlamaForCausalLM": llama}
"""The architecture that a checkpoint's config.json names, to the family that reads it."""


def family_of(config) -> ModuleType:
    """The family of a ``transformers`` configuration. Raises UserError, listing what is supported, for any other."""
    names = config.architectures or [type(config).__name__]
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    raise UserError(f"expected a model of architecture {', '.join(FAMILIES)}, got {', '.join(names)}: not supported")
