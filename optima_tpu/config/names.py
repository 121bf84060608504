"""Aliases of settings, and other programs' names that refusals translate."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from optima_tpu.errors import UserError

ALIASES: Mapping[str, str] = MappingProxyType(
    {"calibration.samples": "calibration.windows", "evaluation.samples": "evaluation.windows"}
)
"""What may be typed for a setting -> its name. Other programs call windows of tokens samples."""

ELSEWHERE: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(("sparsity", "sparsity_ratio", "ratio", "amount"), ("pattern", "0.5")),
        **dict.fromkeys(("sparsity_type", "prunen", "prunem", "nm", "mask_structure"), ("pattern", "2:4")),
        **dict.fromkeys(("nsamples", "n_samples", "num_samples", "samples"), ("calibration.windows", "128")),
        **dict.fromkeys(("num_calibration_samples", "calibration_samples"), ("calibration.windows", "128")),
        **dict.fromkeys(("seqlen", "seq_len", "seq_length", "sequence_length", "max_seq_length"), ("calibration.length", "2048")),
        **dict.fromkeys(("dataset", "data", "calibration_dataset", "calib_data", "calib_dataset"), ("calibration.source", "c4")),
        **dict.fromkeys(("eval_dataset", "evaluation_dataset"), ("evaluation.source", "wikitext2")),
        **dict.fromkeys(("method", "prune_method", "pruner", "algorithm"), ("selector", "wanda")),
        **dict.fromkeys(("percdamp", "dampening_frac"), ("selector.damping", "0.01")),
        **dict.fromkeys(("true_sequential", "sequential"), ("recapture", "true")),
        **dict.fromkeys(("output_dir", "save", "save_model", "save_dir", "out"), ("output", "DIR")),
        **dict.fromkeys(("model_name_or_path", "model_name", "model_path", "model_id", "pretrained"), ("model", "MODEL")),
        **dict.fromkeys(("batch_size", "batchsize"), ("batch", "4")),
        **dict.fromkeys(("wbits", "bits"), ("quantize", "int4")),
        **dict.fromkeys(("groupsize", "group_size"), ("quantize.group", "128")),
        **dict.fromkeys(("lr", "learning_rate"), ("distill.learning_rate", "1e-4")),
        **dict.fromkeys(("epochs", "num_train_epochs"), ("distill.passes", "1")),
        **dict.fromkeys(("cut", "pruning_ratio"), ("pattern", "0.25/neuron")),
        **dict.fromkeys(("drop_layers", "remove_layers", "num_layers_to_drop"), ("cut.blocks", "4")),
        **dict.fromkeys(("drop_experts", "expert_pruning_ratio", "num_experts_to_prune"), ("cut.experts", "0.5")),
        "ignore": ("layers", "PATH=dense"),
    }
)
"""A setting's name in the codes of papers and in other libraries -> its name here, and a value."""

GONE: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {"target.weigh_by_loss": (0.0,), "tuning": ("fixed", {"name": "fixed"}), "distill.span": ()}
)
"""A setting that a released version had -> its values that did nothing, with which files and records of that version still
open."""

REPLACED: Mapping[str, Mapping[str, str]] = MappingProxyType({"accept": {"held_out": "per_row"}, "distill": {"blocks": "kl"}})
"""A setting -> each of its methods that a released version had, with the one to take."""


def without_gone(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the ones of :data:`GONE` that had no effect."""

    def left(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if value not in GONE.get(prefix + name, ())}

    return {name: left(f"{name}.", value) if isinstance(value, dict) else value for name, value in left("", settings).items()}


def by_own_names(part: str, settings: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The settings of a part such as ``calibration``, with aliases resolved.

    Raises:
      UserError: one setting comes by two names.
    """
    own = {key: ALIASES.get(f"{part}.{key}", "").partition(".")[2] or key for key in settings}
    for key, name in own.items():
        if key != name and name in settings:
            raise UserError(f"{origin}: expected {part}.{key} or {part}.{name}, which are one setting, got both")
    return {own[key]: value for key, value in settings.items()}
