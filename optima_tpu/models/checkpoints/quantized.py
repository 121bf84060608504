"""Folders with quantised weights, read as the dequantised model."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from optima_tpu.models.checkpoints import compressed_tensors
from optima_tpu.models.checkpoints.declared import DeclaredStorage
from optima_tpu.models.checkpoints.mxfp4 import without_mxfp4
from optima_tpu.models.checkpoints.source import TensorSource
from optima_tpu.runtime.records import parse_record

Reader = Callable[[TensorSource], TensorSource]
"""Makes the tensors of the model from the tensors in a folder."""

_READERS: Mapping[str, Callable[[Mapping[str, Any], str], Reader]] = {
    "compressed-tensors": compressed_tensors.reader,
    "mxfp4": lambda quantization, where: without_mxfp4,
}
"""``quant_method`` -> (quantization_config, the name of the model in messages) -> Reader."""


def without_quantization(config: bytes, where: str) -> tuple[bytes, Reader]:
    """config.json of the dequantised model, and the reader of its tensors.

    Where ``_READERS`` has no reader, config.json stays as it is, for ``read_config`` to refuse.

    Raises:
      UserError: the file is damaged, or the weights are stored in a way of compressed-tensors that is not read.
    """
    remedy = "check the file, or download it again"
    record: dict[str, Any] = dict(parse_record(config, DeclaredStorage, f"{where}: config.json", remedy))
    quantization = record.get("quantization_config") or {}
    if (method := str(quantization.get("quant_method"))) not in _READERS:
        return config, lambda stored: stored
    reader = _READERS[method](quantization, where)
    del record["quantization_config"]
    if method == "mxfp4" and not (record.get("dtype") or record.get("torch_dtype")):
        record["dtype"] = "bfloat16"  # the published files name none
    return json.dumps(record, indent=2).encode() + b"\n", reader
