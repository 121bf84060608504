"""StableLM 2 and 3B-4E1T: Llama with LayerNorm and a part of each head still; some have attention and MLP side by side."""

import dataclasses
from typing import Any

from optima_tpu.errors import UserError
from optima_tpu.models import llama
from optima_tpu.models.cohere import ParallelBlock
from optima_tpu.models.layers import LayerNorm
from optima_tpu.models.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class StableLMConfig(llama.LlamaConfig):
    """The settings of a Llama, and whether attention and MLP read one norm."""

    parallel: bool


def read_config(config: Any) -> StableLMConfig:
    """From ``transformers.StableLmConfig``. Raises UserError for norms over queries and keys."""
    if config.qk_layernorm:
        raise UserError("expected qk_layernorm false, got true: a norm for each head of queries and keys is not supported")
    return StableLMConfig(
        **llama.read_sizes(config, eps="layer_norm_eps"),
        rope=Rope.from_hf(config.rope_parameters, partial=True),
        qkv_bias=config.use_qkv_bias,
        norm=LayerNorm,
        parallel=config.use_parallel_residual,
    )


def block(config: StableLMConfig) -> llama.PreNormBlock | ParallelBlock:
    """One decoder block."""
    return ParallelBlock(config) if config.parallel else llama.block(config)


FAMILY = dataclasses.replace(
    llama.FAMILY,
    read_config=read_config,
    block=block,
    cuts={**llama.FAMILY.cuts, "head": "have the width of the model divided by their number"},
)
