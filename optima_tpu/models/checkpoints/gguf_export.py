"""Writes a model as a GGUF file for llama.cpp: the inverse of ``gguf_file``.

Matrices keep their dtype, as F32, F16 or BF16; norms and biases are F32, as in llama.cpp's converter. Quantised matrices become
blocks of 32 integers with a float16 scale,

    Q8_0   v_j = d q_j    -128 <= q_j <= 127            Q4_0   v_j = d q_j    -8 <= q_j <= 7

with the integers of the run, and its scales rounded to float16; a scale of more inputs is repeated. 0 is a number of all these
formats, so that zeros stay exactly zero.
"""

import dataclasses
import math
import os
import tempfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import msgspec
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Value
from transformers import PretrainedConfig

from optima_tpu.errors import UserError
from optima_tpu.method.quantization import Quantizer
from optima_tpu.models import family_of
from optima_tpu.models.checkpoints.compressed_tensors import integers
from optima_tpu.models.checkpoints.gguf_architectures import ARCHITECTURES, Architecture, renamed
from optima_tpu.models.checkpoints.gguf_file import ROPE_FACTORS, open_gguf, rope_row_order
from optima_tpu.models.checkpoints.gguf_metadata import SIZES, llama3_factors
from optima_tpu.models.checkpoints.gguf_vocabulary import vocabulary
from optima_tpu.models.checkpoints.source import Pretrained, TensorSource
from optima_tpu.report.licence import licence_of

BLOCK = 32
"""Inputs in a block of Q8_0 or Q4_0."""
_PLAIN = {"float32": Kind.F32, "float16": Kind.F16, "bfloat16": Kind.BF16}
_INTEGERS = {8: Kind.Q8_0, 4: Kind.Q4_0}
_FILE_TYPES = {
    Kind.F32: gguf.LlamaFileType.ALL_F32,
    Kind.F16: gguf.LlamaFileType.MOSTLY_F16,
    Kind.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Kind.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    Kind.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
}
_ROUNDED = 2**-10
"""How much a scale may change in float16, as a share of itself: float16 has 11 bits, fewer below 6e-5."""
_INSTEAD = "take --format plain or packed"
_SETTINGS = {
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "blocks": "num_hidden_layers",
    "vocab": "vocab_size",
    "eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
    "rope": "rope_parameters or rope_scaling",
    "windows": "sliding_window and layer_types",
    "activation": "hidden_act or hidden_activation",
    "qkv_bias": "attention_bias",
    "o_bias": "attention_bias",
    "scale": "query_pre_attn_scalar",
    "logit_cap": "final_logit_softcapping",
}
"""Of the values that are compared, the names in config.json where they differ."""


class Stored(NamedTuple):
    """A tensor to write.

    Attributes:
      name: of Hugging Face.
      values: in the dtype of the model.
      scale: [d_out, groups] of a quantised matrix, in that dtype; None for the others.
    """

    name: str
    values: np.ndarray
    scale: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class GGUFModel:
    """A model that can be written as a GGUF file.

    Attributes:
      factors: the divisors of the rotary frequencies, for a Llama 3; None for others.
      kinds: for each tensor that is written, the type of its blocks.
    """

    pretrained: Pretrained
    architecture: Architecture
    fields: Mapping[str, Any]
    factors: np.ndarray | None
    kinds: Mapping[str, Kind]

    @classmethod
    def of(cls, pretrained: Pretrained, quantized: Collection[str] = (), quantizer: Quantizer | None = None) -> "GGUFModel":
        """Makes the metadata of the file.

        Args:
          quantized: the quantised matrices.
          quantizer: made their integers.

        Raises:
          UserError: no such file is written for the architecture, the file could not hold the model's tokenizer, or the groups of
            a quantised matrix do not consist of blocks.
        """
        config, source = pretrained.config, pretrained.tensors
        names = [each.model for each in ARCHITECTURES.values()]
        classes = config.architectures or []
        architecture = next((each for each in ARCHITECTURES.values() if each.model in classes), None)
        if architecture is None:
            raise UserError(
                f"expected a model of architecture {', '.join(names)} for a GGUF file, got {', '.join(classes)}; {_INSTEAD}"
            )
        own, factors = _own(config)
        rows = source.shape("model.embed_tokens.weight")[0]
        fields = {f"{architecture.name}.{name}": value for name, value in own.items()} | {f"{architecture.name}.vocab_size": rows}
        fields |= msgspec.to_builtins(vocabulary(pretrained, architecture, rows))
        # A stored copy of a tied head, and buffers, are not weights.
        skipped = ("lm_head.",) if config.tie_word_embeddings else ()
        written = [name for name in source.names() if not name.startswith(skipped) and not name.endswith(".inv_freq")]
        kinds = {name: _kind(name, source, quantizer if name in quantized else None) for name in written}
        return cls(pretrained, architecture, fields, factors, kinds)

    def write(self, path: Path, tensors: Iterable[Stored]) -> None:
        """Writes the file.

        Args:
          tensors: in the order of ``kinds``; one is in memory at a time.

        Raises:
          UserError: float16 does not hold a scale.
        """
        writer = gguf.GGUFWriter(path, self.architecture.name)
        matrices = {kind for name, kind in self.kinds.items() if len(self.pretrained.tensors.shape(name)) > 1}
        writer.add_file_type(_FILE_TYPES[next((kind for kind in reversed(_FILE_TYPES) if kind in matrices), Kind.F32)])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in zip(("", ".name", ".link"), licence_of(self.pretrained.assets)):
            if value is not None:
                writer.add_string(f"general.license{key}", value)
        for name, value in self.fields.items():
            writer.add_key_value(name, value, Value.UINT32 if type(value) is int else Value.get_type(value))
        if self.factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, self.factors.shape, self.factors.dtype, self.factors.nbytes, Kind.F32)
        for name, kind in self.kinds.items():
            shape = gguf.quant_shape_to_byte_shape(self.pretrained.tensors.shape(name), kind)
            writer.add_tensor_info(self._name(name), shape, np.dtype(np.uint8), int(np.prod(shape)), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if self.factors is not None:
            writer.write_tensor_data(self.factors)
        for stored in tensors:
            writer.write_tensor_data(self._blocks(stored))
        writer.close()

    def refuse_unsaid(self) -> None:
        """Reads the metadata back from a file whose tensors are holes.

        Such a file takes no room and no time.

        Raises:
          UserError: as :meth:`reopened`.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            self.write(path, ())
            # At most 4 bytes a number, and each tensor begins at the next multiple of the alignment.
            sizes = [math.prod(self.pretrained.tensors.shape(name)) for name in self.kinds]
            sizes += [] if self.factors is None else [self.factors.size]
            os.truncate(path, path.stat().st_size + sum(4 * size + gguf.GGUF_DEFAULT_ALIGNMENT for size in sizes))
            self.reopened(path)

    def reopened(self, path: Path) -> TensorSource:
        """Opens the file, and returns its tensors in float32.

        The configuration of the file is compared with the configuration of the model.

        Raises:
          UserError: the model has a setting that the file cannot say.
        """
        describes = f"expected a model that a GGUF file of the architecture {self.architecture.name} describes"
        try:
            again = open_gguf(path, str(path))
        except UserError as error:
            raise UserError(f"{describes}, got one of which the file would say what is not read ({error}); {_INSTEAD}") from error
        expected, reread = (family_of(config).read_config(config) for config in (self.pretrained.config, again.config))
        for field in dataclasses.fields(expected):
            ours, other = getattr(expected, field.name), getattr(reread, field.name)
            if ours != other:
                setting = f" ({_SETTINGS[field.name]} in config.json)" if field.name in _SETTINGS else ""
                raise UserError(f"{describes}, got {field.name} {ours}{setting}, which would be read as {other}; {_INSTEAD}")
        return again.tensors

    def _name(self, name: str) -> str:
        if gguf_name := renamed(name, {ours: theirs for theirs, ours in self.architecture.names.items()}):
            return gguf_name
        raise UserError(f"expected tensors of a {self.architecture.model} for a GGUF file, got {name}; {_INSTEAD}")

    def _blocks(self, stored: Stored) -> np.ndarray:
        """The bytes of a tensor in the file, [rows, bytes]."""
        name, values, scale = stored
        heads = {"q_proj": self.pretrained.config.num_attention_heads, "k_proj": self.pretrained.config.num_key_value_heads}
        projection = name.split(".")[-2]
        if self.architecture.interleaved and projection in heads:
            order = np.argsort(rope_row_order(len(values), heads[projection]))
            values, scale = values[order], None if scale is None else scale[order]
        if scale is not None:
            return _integer_blocks(name, values, scale, self.kinds[name])
        if values.ndim == 1:
            values = values.astype(np.float32)
            if self.architecture.norm_shift and name.endswith("norm.weight"):
                values = values + np.float32(self.architecture.norm_shift)
        return np.ascontiguousarray(values).view(np.uint8)


def _kind(name: str, source: TensorSource, quantizer: Quantizer | None) -> Kind:
    shape = source.shape(name)
    if quantizer is None:
        return _PLAIN[str(source.dtype(name))] if len(shape) > 1 else Kind.F32
    if (group := quantizer.group or shape[1]) % BLOCK:
        raise UserError(
            f"expected a scale for a multiple of {BLOCK} inputs for a GGUF file, got one for {group} in {name}; repeat the run "
            f"with --quantize.group {BLOCK}, or take --format compressed-tensors"
        )
    return _INTEGERS[quantizer.bits]


def _own(config: PretrainedConfig) -> tuple[dict[str, Any], np.ndarray | None]:
    """The architecture's metadata, and any factors of rotary frequencies."""
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    full, window = rope.get("full_attention", rope), rope.get("sliding_attention")
    own = {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    own |= {"attention.head_count_kv": config.num_key_value_heads, "rope.freq_base": float(full["rope_theta"])}
    own |= dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), d_head)
    if window is not None:
        own |= {"attention.sliding_window": config.sliding_window}
        if window["rope_theta"] != 10_000.0:
            own["rope.freq_base_swa"] = float(window["rope_theta"])
    if full["rope_type"] == "linear":
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(full["factor"])}
    if full["rope_type"] == "llama3":
        return own, llama3_factors(full["factor"], full["rope_theta"], d_head).astype(np.float32)
    return own, None


def _integer_blocks(name: str, weight: np.ndarray, scale: np.ndarray, kind: Kind) -> np.ndarray:
    """The blocks of a quantised matrix, [d_out, bytes] uint8.

    Raises:
      UserError: float16 does not hold a scale.
    """
    rows, inputs = weight.shape
    group = inputs // scale.shape[1]
    values = integers(name, weight, scale, 8 if kind is Kind.Q8_0 else 4).reshape(rows, -1, BLOCK)
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    exact = scale.astype(np.float32)
    if not np.all(np.abs(half.astype(np.float32) - exact) <= _ROUNDED * exact):
        raise UserError(
            f"expected scales that float16 holds, as GGUF has them, got {exact.min():.3g} to {exact.max():.3g} in {name}; take "
            "--format compressed-tensors"
        )
    half = np.repeat(half, group // BLOCK, axis=1)[..., None]
    if kind is Kind.Q8_0:
        fields: np.ndarray = values.view(np.uint8)
    else:
        low, high = np.split((values + 8).astype(np.uint8), 2, axis=-1)
        fields = low | high << 4
    return np.concatenate((half.view(np.uint8), fields), axis=-1).reshape(rows, -1)
