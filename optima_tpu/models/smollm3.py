"""SmolLM 3: Llama in which some blocks do not rotate queries and keys (NoPE), and may have a window."""

import dataclasses
from typing import Any

from optima_tpu.errors import UserError
from optima_tpu.models import llama
from optima_tpu.models.rope import Rope, RopeByBlock


def read_config(config: Any) -> llama.LlamaConfig:
    """From ``transformers.SmolLM3Config``.

    Raises:
      UserError: ``no_rope_layers`` does not have an entry for every block.
    """
    rotated, blocks = config.no_rope_layers, config.num_hidden_layers
    if len(rotated) < blocks:
        raise UserError(f"expected {blocks} no_rope_layers in config.json, got {len(rotated)}")
    return dataclasses.replace(
        llama.read_config(config),
        rope=RopeByBlock.where(map(bool, rotated[:blocks]), Rope.from_hf(config.rope_parameters)),
        windows=llama.windows_by_type(config),
    )


FAMILY = dataclasses.replace(llama.FAMILY, read_config=read_config)
