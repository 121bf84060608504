"""Quantised weights in the format of the library compressed-tensors, which ``transformers`` and vLLM load.

A quantised weight ``NAME.weight`` becomes three tensors, as the library's ``pack-quantized`` has them (0.20.1,
vllm-project/compressed-tensors ``compressors/pack_quantized``):

    NAME.weight_packed   [d_out, ceil(d_in bits / 32)] int32: the integers plus 2^(bits - 1), the first input in the lowest bits
    NAME.weight_scale    [d_out, groups] in the dtype of the weight
    NAME.weight_shape    [2] int64

``config.json`` says so under ``quantization_config``. Weights of 8 bits are packed too: what the library calls ``int-quantized``
is for models whose activations are quantised as well, and vLLM refuses it for others.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from optima_tpu.method.quantization import Quantizer

PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"


def integers(name: str, weight: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """The integers of a quantised weight, [d_out, d_in] int8: ``round(weight / scale)``.

    A weight is ``scale * integer`` rounded once to its dtype, so the quotient differs from the integer by a share of at most
    ``2^-9`` in bfloat16, less in other dtypes, and by at most 1/4 for 8 bits. The rounding therefore returns the exact integer.

    Args:
      weight: [d_out, d_in].
      scale: [d_out, groups] in the dtype of the weight.

    Raises:
      RuntimeError: the integers and scales do not give the weight back, bit for bit.
    """
    factors = np.repeat(scale.astype(np.float32), weight.shape[1] // scale.shape[1], axis=1)
    found = np.round(weight.astype(np.float32) / factors)
    back = (found * factors).astype(weight.dtype)
    half = 2 ** (bits - 1)
    if np.any(found < -half) or np.any(found >= half) or not np.array_equal(back, weight):
        raise RuntimeError(f"{name}: the checkpoint's weights are not integers of {bits} bits times its scales")
    return found.astype(np.int8)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Integers [d_out, d_in] int8 as [d_out, ceil(d_in * bits / 32)] int32.

    Args:
      bits: 4 or 8.
    """
    each = 32 // bits
    fields = (values.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint32)
    fields = np.pad(fields, ((0, 0), (0, -fields.shape[1] % each))).reshape(len(fields), -1, each)
    words = np.bitwise_or.reduce(fields << np.arange(0, 32, bits, dtype=np.uint32), axis=2)
    return words.astype("<u4").view("<i4")


def compressed(name: str, weight: np.ndarray, scale: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    """The tensors that stand for a quantised weight ``NAME.weight``, by name."""
    module = name.removesuffix("weight")
    return {
        module + PACKED: pack(integers(name, weight, scale, bits), bits),
        module + SCALE: np.ascontiguousarray(scale),
        module + SHAPE: np.asarray(weight.shape, np.int64),
    }


def quantization_config(quantizer: Quantizer, others: Iterable[str]) -> Mapping[str, Any]:
    """What ``config.json`` says under ``quantization_config``.

    Args:
      quantizer: bits and group of the integers.
      others: the names of the modules that are not quantised, as far as they may be linear layers.
    """
    weights = {
        "num_bits": quantizer.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if quantizer.group is None else "group",
        "group_size": quantizer.group,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        },
        "ignore": sorted({*others, "lm_head"}),
        "kv_cache_scheme": None,
    }
