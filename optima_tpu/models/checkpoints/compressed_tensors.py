"""Quantised weights in the format of the library compressed-tensors.

``transformers`` and vLLM load this format. A quantised weight ``NAME.weight`` becomes three tensors, as in the library's
``pack-quantized`` (0.20.1, vllm-project/compressed-tensors ``compressors/pack_quantized``):

    NAME.weight_packed   [d_out, ceil(d_in bits / 32)] int32: the integers plus 2^(bits - 1), the first input in the lowest bits
    NAME.weight_scale    [d_out, groups] in the dtype of the weight
    NAME.weight_shape    [2] int64

``config.json`` says so under ``quantization_config``. Weights of 8 bits are packed too. What the library calls ``int-quantized``
(``compressors/naive_quantized``) is for models whose activations are quantised as well, and vLLM refuses it for others. There the
weight is ``NAME.weight`` int8, with ``NAME.weight_scale``, and whoever loads the model rounds the inputs of a layer to 8 bits,
with a scale for each token.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec
import numpy as np

from optima_tpu.errors import UserError
from optima_tpu.method.quantization import Quantizer
from optima_tpu.models.checkpoints.source import ComputedTensors, LazyTensor, TensorSource
from optima_tpu.runtime.records import check_record

PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"


_READ = "this program reads integers of weights alone: give the run, its hf/, or the unquantised model"


class _Weights(TypedDict):
    num_bits: Literal[4, 8]
    type: Literal["int"]
    strategy: Literal["channel", "group"]
    symmetric: NotRequired[bool]
    actorder: NotRequired[None]


class _Group(TypedDict):
    weights: _Weights
    input_activations: NotRequired[None]


class _Scheme(TypedDict):
    """The entries of a quantization_config that are read."""

    config_groups: Annotated[dict[str, _Group], msgspec.Meta(min_length=1, max_length=1)]


def scale_of_inputs(scale: np.ndarray, d_in: int) -> np.ndarray:
    """Repeats group scales [d_out, groups] to [d_out, d_in] float32."""
    return np.repeat(scale.astype(np.float32), d_in // scale.shape[1], axis=1)


def integers(name: str, weight: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """The integers ``round(weight / scale)`` of a weight, [d_out, d_in] int8.

    A weight is ``scale * integer`` rounded once to its dtype, so the quotient differs from the integer by a share of at most
    ``2^-9`` in bfloat16, less in other dtypes, and by at most 1/4 for 8 bits. The rounding therefore returns the exact integer.

    Args:
      weight: [d_out, d_in].
      scale: [d_out, groups] in the dtype of the weight.

    Raises:
      RuntimeError: the integers and scales do not give the weight back, bit for bit.
    """
    factors = scale_of_inputs(scale, weight.shape[1])
    rounded = np.round(weight.astype(np.float32) / factors)
    back = (rounded * factors).astype(weight.dtype)
    half = 2 ** (bits - 1)
    if np.any(rounded < -half) or np.any(rounded >= half) or not np.array_equal(back, weight):
        raise RuntimeError(f"{name}: the checkpoint's weights are not integers of {bits} bits times its scales")
    return rounded.astype(np.int8)


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


def unpack(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The inverse of :func:`pack`: [d_out, columns] int8 from int32 words."""
    fields = words.view(np.uint32)[..., None] >> np.arange(0, 32, bits, dtype=np.uint32) & np.uint32(2**bits - 1)
    return (fields.reshape(len(words), -1)[:, :columns].astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)


def compressed(name: str, weight: np.ndarray, scale: np.ndarray, bits: int, activations: bool = False) -> dict[str, np.ndarray]:
    """The stored tensors of a quantised weight ``NAME.weight``, by name.

    Args:
      activations: see :func:`quantization_config`.
    """
    module = name.removesuffix("weight")
    if activations:
        return {name: integers(name, weight, scale, bits), module + SCALE: np.ascontiguousarray(scale)}
    return {
        module + PACKED: pack(integers(name, weight, scale, bits), bits),
        module + SCALE: np.ascontiguousarray(scale),
        module + SHAPE: np.asarray(weight.shape, np.int64),
    }


def quantization_config(quantizer: Quantizer, others: Iterable[str], activations: bool = False) -> Mapping[str, Any]:
    """The entry ``quantization_config`` of config.json.

    Args:
      others: the names of the modules that are not quantised, as far as they may be linear layers.
      activations: whether the inputs of quantised layers are rounded to 8 bits, token by token, when the model runs.
    """
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True} if activations else None
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
        "format": "int-quantized" if activations else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
        },
        "ignore": sorted({*others, "lm_head"}),
        "kv_cache_scheme": None,
    }


def reader(quantization: Mapping[str, Any], where: str) -> Callable[[TensorSource], TensorSource]:
    """Returns the function that dequantises the tensors of a folder.

    Args:
      quantization: the folder's quantization_config.
      where: the name of the model in messages.

    Raises:
      UserError: the weights are stored in another way than a weight-only, symmetric ``pack-quantized``.
    """
    if quantization.get("format") != "pack-quantized":
        raise UserError(f"{where}: expected integers in the format pack-quantized, got {quantization.get('format')!r}; {_READ}")
    check_record(quantization, _Scheme, f"{where}: config.json", _READ, inside="quantization_config.")
    (weights,) = (group["weights"] for group in quantization["config_groups"].values())
    if not weights.get("symmetric", True):
        raise UserError(f"{where}: expected symmetric integers, with zero among them, got others; {_READ}")
    return functools.partial(dequantized, bits=weights["num_bits"])


def dequantized(stored: TensorSource, bits: int) -> ComputedTensors:
    """The tensors of a folder of integers and scales, dequantised on reading.

    Args:
      bits: of the integers. A weight has the dtype of its scales.

    Raises:
      UserError: the tensors of a weight do not fit one another.
    """
    computed, hidden, names = dict[str, LazyTensor](), set[str](), set(stored.names())
    for module in sorted(name.removesuffix(PACKED) for name in names if name.endswith("." + PACKED)):
        if missing := {module + SCALE, module + SHAPE} - names:
            raise UserError(f"expected {min(missing)} beside {module + PACKED}, got none: export the model again")
        shape = tuple(map(int, stored.read(module + SHAPE)))
        words, scales = stored.shape(module + PACKED), stored.shape(module + SCALE)
        if len(shape) != 2 or words != (shape[0], -(-shape[1] * bits // 32)) or scales[0] != shape[0] or shape[1] % scales[1]:
            raise UserError(
                f"{module}weight: expected integers and scales of {shape}, got {words} and {scales}: export the model again"
            )
        read = functools.partial(_read, stored, module, bits, shape[1])
        computed[module + "weight"] = LazyTensor(shape, stored.dtype(module + SCALE), read)
        hidden |= {module + PACKED, module + SCALE, module + SHAPE}
    return ComputedTensors(stored, computed, hidden)


def _read(stored: TensorSource, module: str, bits: int, d_in: int, index: tuple[slice, ...]) -> np.ndarray:
    rows, columns = index
    scale = stored.read(module + SCALE, (rows,))
    weights = unpack(stored.read(module + PACKED, (rows,)), bits, d_in) * scale_of_inputs(scale, d_in)
    return weights[:, columns].astype(scale.dtype)
