"""Checks which causal models of the installed transformers this program runs.

    python -m benchmarks.general_models --record docs/results/records/decoders.json
    python -m benchmarks.general_models --only MambaForCausalLM,JambaForCausalLM

Each class without a family here gets a tiny random configuration, is run the general way, and is compared with torch: in a
process of its own, which may take a limited time. ``--record`` writes a row of the table after each class. Classes that have a
row are not run again: ``--only`` names those that are, and replaces their rows.
"""

import argparse
import collections
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.records import recorded, write_rows

LAYERS = "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "word_embed_proj_dim", "embedding_size"), 48),
    **dict.fromkeys(LAYERS, 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim"), 12),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_inner", "decoder_ffn_dim", "ffn_hidden_size", "dff"), 80),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 24),
    "moe_shared_expert_intermediate_size": 24,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k_experts", "moe_topk", "num_experts_per_token"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "sliding_window"), 128),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), 1),
    "pad_token_id": 0,
    "is_decoder": True,
    "rotary_dim": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    **dict.fromkeys(("n_group", "num_group", "num_expert_group", "topk_group", "mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(
        ("mamba_n_heads", "mamba_num_heads", "linear_num_heads", "linear_num_key_heads", "linear_num_value_heads"), 4
    ),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 24),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "index_topk"), 8),
    **dict.fromkeys(("index_head_dim", "index_n_heads", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    "first_k_dense_replace": 1,
    "num_kv_shared_layers": 0,
    "unpadded_vocab_size": 64,
}
"""Sizes by the names that configurations have for them."""


LATENT = {"num_key_value_heads": 4, "head_dim": 8}
"""Sizes of attention with latent keys and values."""

ROPE = dict(rope_type="default", rope_theta=10000.0)

OWN: dict[str, dict[str, Any]] = {
    "FalconH1ForCausalLM": dict(mamba_d_ssm=96),
    "GPTNeoForCausalLM": dict(attention_types=[[["global", "local"], 1]]),
    "CohereCompassForCausalLM": dict(rope_parameters={"full_attention": ROPE, "sliding_attention": ROPE}),
    "KimiLinearForCausalLM": dict(layer_types=["linear_attention", "full_attention"]),
    "Lfm2MoeForCausalLM": dict(layer_types=["conv", "full_attention"]),
    "Mamba2ForCausalLM": dict(head_dim=24),
    "XmodForCausalLM": dict(default_language="en_XX"),
    "ZambaForCausalLM": dict(layer_types=["mamba", "hybrid"]),
    "Zamba2ForCausalLM": dict(layer_types=["mamba", "hybrid"]),
    "ZayaForCausalLM": dict(num_experts_per_tok=1),
    "ReformerModelWithLMHead": dict(axial_pos_embds_dim=(16, 32), axial_pos_shape=(4, 8)),
    "DbrxForCausalLM": dict(
        attn_config=dict(rope_theta=10000.0, kv_n_heads=2, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2),
    ),
    "Dots1ForCausalLM": dict(n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1, num_experts_per_tok=2),
}
"""What the configuration of a class needs besides."""

LENGTH = 24


class Outcome(NamedTuple):
    """How a class is run.

    Attributes:
      way: "declared", "general" or "refused"; "failed" where the error is none that a person should see.
      why: the layers that are pruned, or why it is refused.
      apart: the largest difference of a logit from torch, relative to the largest.
    """

    way: str
    why: str = ""
    apart: float | None = None


def classes() -> list[str]:
    """Every causal language model of the installed transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    class_names: set[str] = set()
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        class_names |= {names} if isinstance(names, str) else set(names)
    return sorted(class_names)


def sizes_of(config: Any, layers: int = 2) -> dict[str, Any]:
    """Returns the sizes that a configuration has names for.

    Inner configurations get their sizes too; those of images and sound have one layer.
    """
    fields = config.to_dict()
    sizes = {
        key: value
        for key, value in SIZES.items()
        if key in fields and not (fields[key] is None and key not in ("n_inner", "head_dim"))
    }
    if "kv_lora_rank" in fields:
        sizes |= {key: value for key, value in LATENT.items() if key in fields}
    sizes |= {key: layers for key in sizes if key in LAYERS}
    inner = {key: getattr(config, key, None) for key in config.sub_configs}
    return sizes | {
        key: type(each)(**sizes_of(each, 1 if key.startswith(("vision", "audio")) else layers)).to_dict()
        for key, each in inner.items()
        if each is not None
    }


def tiny_config(name: str, **settings: Any) -> Any:
    """A tiny configuration of a class, with these settings besides."""
    import transformers

    made = getattr(transformers, name).config_class
    config = made(**sizes_of(made()) | OWN.get(name, {}) | settings)
    config.architectures = [name]
    return config


def tiny_model(config: Any) -> Any:
    """Makes a random float32 model in torch, whose biases and norms matter."""
    import torch
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, config.architectures[0])
    model = made._from_config(config, attn_implementation="eager", experts_implementation="eager").eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def outcome(name: str) -> Outcome:
    """Makes a tiny model of a class, and compares it with torch."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    from optima_tpu.errors import UserError, one_line
    from optima_tpu.models import family_named
    from optima_tpu.models.check import check_checkpoint
    from optima_tpu.models.checkpoints.stacks import stacks_of, unstacked
    from optima_tpu.models.decoder import Decoder
    from optima_tpu.models.general.against_torch import logits
    from optima_tpu.models.general.build import NEAR
    from optima_tpu.runtime.mesh import make_mesh
    from tests.support.tiny_models import MemoryTensors

    if family_named([name]):
        return Outcome("declared")
    tokens = np.random.default_rng(0).integers(2, 64, (1, LENGTH))
    try:
        config = tiny_config(name)
        model = tiny_model(config)
        with torch.no_grad():
            expected = model(input_ids=torch.from_numpy(tokens), use_cache=False).logits.numpy()
    except Exception as error:  # the code of any model
        return Outcome("refused", f"no tiny configuration of it runs in torch ({one_line(error)[:120]})")
    try:
        stored = revert_weight_conversion(model, model.state_dict())
        source: Any = MemoryTensors({each: value.float().contiguous().numpy() for each, value in stored.items()})
        stacks = stacks_of([name])
        decoder = Decoder.open(config, unstacked(source, stacks) if stacks else source, make_mesh(None))
        check_checkpoint(decoder)
        apart = float(np.abs(logits(decoder, tokens.astype(np.int32)) - expected).max() / np.abs(expected).max())
    except UserError as error:
        return Outcome("refused", str(error).removeprefix(f"the general way cannot run a {name}: ").partition("; give a")[0])
    if not apart < NEAR:
        return Outcome("refused", f"its logits differ from torch by {apart:.2g} of the largest")
    return Outcome("general", ", ".join(decoder.family.linears), apart)


def outcome_within(name: str, seconds: float) -> Outcome:
    """Calls :func:`outcome` in a process of its own, for so long at most."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        try:
            return pool.apply_async(outcome, (name,)).get(seconds)
        except multiprocessing.TimeoutError:
            return Outcome("refused", f"it took more than {seconds:g} seconds")
        except Exception as error:
            return Outcome("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def outcomes(names: Sequence[str], seconds: float = 600, workers: int = 1) -> Iterator[tuple[str, Outcome]]:
    """Each class with its outcome, as they come."""
    import transformers.models.llama.modeling_llama  # noqa: F401  what classes have in common, once for all processes

    import optima_tpu.models.general.against_torch  # noqa: F401

    with ThreadPoolExecutor(workers) as pool:
        yield from zip(names, pool.map(lambda name: outcome_within(name, seconds), names), strict=True)


def row(name: str, result: Outcome) -> list[str]:
    """The row of a class in the record."""
    reason = result.why.replace("|", "/").replace("<", "&lt;")
    return [f"`{name}`", result.way, f"`{reason}`" if result.way == "general" else reason or "-"]


def write_record(path: Path, name: str, result: Outcome) -> None:
    """Writes the row of a class into the record; the others stay."""
    import torch
    import transformers

    new = row(name, result)
    table = recorded(path) | {new[0]: new}
    counts = collections.Counter(way for _, way, _ in table.values())
    facts = {
        "title": "Decoders of transformers",
        "shows": f"How this program runs each of the {len(table)} causal language models of transformers "
        f"{transformers.__version__}: "
        + ", ".join(f"{counts[way]} {way}" for way in ("declared", "general", "refused", "failed") if counts[way])
        + ".",
        "reading": "A general one gives the logits of torch, within 1e-4 of the largest, with a tiny random configuration in "
        "float32; beside it stand the layers that are pruned. Beside a refused one stands why.",
        "commands": ["python -m benchmarks.general_models --record docs/results/records/decoders.json"],
        "hardware": "CPU cores",
        "model": f"tiny random models, torch {torch.__version__.partition('+')[0]}",
        "calibration": None,
        "evaluation": f"one window of {LENGTH} random tokens",
        "draws": None,
        "source": ["benchmarks/general_models.py"],
        "columns": [{"name": "class"}, {"name": "way"}, {"name": "layers, or why not"}],
        "notes": [],
    }
    write_rows(path, facts, [new])


def main(arguments: list[str] | None = None) -> None:
    """Prints each outcome, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="the record that is written")
    parser.add_argument("--only", help="these classes alone, with commas between them")
    parser.add_argument("--seconds", type=float, default=600, help="the most for one class (default: 600)")
    parser.add_argument("--workers", type=int, default=1, help="classes at the same time (default: 1)")
    chosen = parser.parse_args(arguments)
    # Programs of tiny models run once: to optimise them takes longer.
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )
    recorded_names = {each.strip("`") for each in recorded(chosen.record)}
    named = chosen.only.split(",") if chosen.only else sorted(set(classes()) - recorded_names)
    for name, result in outcomes(named, chosen.seconds, chosen.workers):
        print(name, *result, sep="\t", flush=True)
        if chosen.record:
            write_record(chosen.record, name, result)


if __name__ == "__main__":
    sys.exit(main())
