"""What a recovery starts from: a pruned model, its record, the dense model."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from optima_tpu.config.parse import recorded_run
from optima_tpu.config.run_config import RunConfig
from optima_tpu.errors import UserError
from optima_tpu.evaluate.model import Evaluated, check_pair, open_evaluated
from optima_tpu.method.patterns import Pattern, parse_pattern
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.selectors import Imported
from optima_tpu.models.check import same_values
from optima_tpu.models.checkpoints.export import SIDECAR
from optima_tpu.models.checkpoints.fewer_experts import expert_cut
from optima_tpu.models.checkpoints.orbax import CHECKPOINT, CheckpointTensors
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.masks import MaskSource, open_masks
from optima_tpu.models.model import Model, without_blocks, without_experts
from optima_tpu.pipeline.recover.config import RecoverConfig
from optima_tpu.report.contents import BLOCKS, EXPERTS, LeftOut, Sidecar
from optima_tpu.report.records import BlockReport, LayerReport
from optima_tpu.report.run_record import RUN, RunRecord
from optima_tpu.report.settings import ManifestEntries, RunSettings
from optima_tpu.runtime.buckets import as_path
from optima_tpu.runtime.processes import check_signals, from_first, together
from optima_tpu.runtime.records import known_record

LEAST = 0.1
"""A matrix with a smaller share of zeros was not pruned. Quantised weights are zero now and then."""
_PATTERNS = "2:4", "4:8"
"""The patterns that are recognised in masks from elsewhere."""


class _Record(NamedTuple):
    """The record of a pruned model; empty for a model of another program.

    Attributes:
      manifest: of the run that pruned it.
      settings: of that run; None where only the exported folder is left.
      dense: the model that was pruned, as it was typed.
      layers: name of each pruned weight -> the report of its layer.
      left_out: the blocks and the experts of the dense model that it is without.
    """

    manifest: Mapping[str, Any] | None = None
    settings: RunSettings | None = None
    dense: str | None = None
    layers: Mapping[str, LayerReport] = {}
    left_out: LeftOut = LeftOut()

    @property
    def decided(self) -> ManifestEntries | None:
        """What is read of the manifest on its own."""
        return None if self.manifest is None else RunRecord(self.manifest, {}).decided


class Start(NamedTuple):
    """An opened pruned model from which training can begin.

    Attributes:
      pruned: the model.
      dense: the dense model, on the same mesh and in the same dtype.
      record: how it was pruned.
      masks: of its pruned weights.
      names: the weights that ``masks`` has a mask for, by the name in the pruned checkpoint.
      pattern: of the masks, where no record says it.
    """

    pruned: Evaluated
    dense: Model
    record: _Record
    masks: MaskSource
    names: frozenset[str]
    pattern: Pattern | None

    @property
    def decoder(self) -> Decoder:
        """The decoder of the pruned model."""
        return self.pruned.model.decoder

    @property
    def window_length(self) -> int | None:
        """Tokens in a calibration window; None if no record says it."""
        return self.record.settings.calibration.length if self.record.settings else None

    def base(self, dense: str, spec: str) -> RunConfig:
        """The run that would have made the pruned model."""
        if self.pattern is not None:
            return RunConfig(dense, recipe=Recipe(self.pattern, Imported(spec, weights=True), None))
        assert self.record.manifest is not None, "a model without a record has a pattern"
        return recorded_run({**self.record.manifest["recipe"], "model": dense, "distill": None})

    def mask(self, index: int, name: str) -> np.ndarray | None:
        """The mask of a block's parameter; None if it was not pruned."""
        full_name = self.decoder.prefix(index) + name
        rows, columns = self.decoder.at(index).block_shapes[name] if full_name in self.names else (0, 0)
        return self.masks.read(full_name, (rows, columns)) if rows else None

    def report(self, index: int, masks: Mapping[str, np.ndarray]) -> BlockReport:
        """The report of a block. Errors that nobody measured are infinite."""
        layers = []
        for name, keep in masks.items():
            rows, pruned = len(keep), int(keep.size - np.count_nonzero(keep))
            inner, recorded = name.removesuffix(".weight"), self.record.layers.get(self.decoder.prefix(index) + name)
            unknown = LayerReport(
                index,
                inner,
                (rows, keep.shape[1]),
                pruned,
                pruned / keep.size,
                math.inf,
                math.inf,
                0.0,
                0.0,
                0,
                0,
                rows,
                rows,
                0,
                0,
            )
            layers.append(recorded or unknown)
        return BlockReport(index, 0.0, tuple(layers))


def open_start(config: RecoverConfig, mesh: Mesh, opening: Callable[[str], None]) -> Start:
    """Opens the pruned and the dense model, and checks that they match.

    Every process calls it.

    Args:
      opening: called with the name of each model before it is opened, which may take minutes.

    Raises:
      UserError: a model cannot be opened, the pruned model has no masks, or the models do not belong together.
    """
    opening(config.model)
    pruned = open_evaluated(config.model, mesh, config.dtype, config.batch)
    check_signals()
    decoder = pruned.model.decoder
    record = from_first(lambda: _record(config.model, decoder))
    decided = record.decided
    if decided and decided.recipe.quantize:
        raise UserError(
            f"expected a model whose weights were not quantised, got one of {decided.recipe.quantize.name} in {config.model}: "
            "training moves weights off their integers; prune again without --quantize"
        )
    spec = config.against or record.dense
    if spec is None:
        text = "" if config.source else " and --source with a text to train on"  # no record names that either
        raise UserError(
            f"expected --against with the dense model{text}, got none, and {config.model} has no record of the model that was "
            "pruned"
        )
    # As it was opened to be pruned; without a record, in the dtype of the pruned model.
    stored = decoder.tensors.dtype(decoder.root + decoder.family.embedding).name
    dtype = config.dtype or (decided.recipe.dtype if decided else stored)
    opening(spec)
    dense = _open_dense(spec, mesh, dtype, config)
    check_signals()
    masks = together(lambda: open_masks(str(_of_run(config.model))))
    # Both read in every process: Orbax counts the reads of each, and saves wait for a process that counts others.
    names, pattern = together(lambda: _pruned(decoder, masks, record))
    expected = None if config.dtype or decided is None else decided.model
    together(lambda: _check(pruned, dense, expected, record.left_out))
    return Start(pruned, dense.model, record, masks, names, pattern)


def _open_dense(spec: str, mesh: Mesh, dtype: str | None, config: RecoverConfig) -> Evaluated:
    try:
        return open_evaluated(spec, mesh, dtype, config.batch)
    except UserError as error:
        if config.against:
            raise
        raise UserError(
            f"{config.model} names {spec} as its dense model, which cannot be opened ({error}); give its place as --against"
        ) from error


def _of_run(spec: str) -> Path:
    """The run directory of its ``checkpoint``; anything else as it is."""
    path = as_path(spec)
    return path.parent if path.name == CHECKPOINT and (path.parent / RUN).is_file() else path


def _record(spec: str, decoder: Decoder) -> _Record:
    path = _of_run(spec)
    if (path / RUN).is_file():
        run = CheckpointTensors(path).run
        layers = {f"{decoder.prefix(block.index)}{layer.name}.weight": layer for block in run.blocks for layer in block.layers}
        return _Record(run.manifest, run.settings, run.settings.model, layers, run.left_out)
    exported = known_record(path / SIDECAR, Sidecar) if path.is_dir() else None
    if exported is None:
        return _Record()
    if inner := ", ".join(called for called in exported.cuts if called not in (BLOCKS, EXPERTS)):
        folder = path.resolve().parent
        named = f", {folder}" if (folder / RUN).is_file() else ""
        raise UserError(
            f"expected blocks of the dense model's size, got {spec}, an export whose blocks have fewer {inner}; give the "
            f"directory of its run{named}"
        )
    beside = known_record(path.resolve().parent / RUN, RunRecord)
    settings = beside.settings if beside and beside.manifest == exported.manifest else None
    layers = {
        layer.name: layer.named(layer.name.removeprefix(decoder.prefix(layer.block)).removesuffix(".weight"))
        for layer in exported.layers
    }
    return _Record(exported.manifest, settings, settings.model if settings else exported.model, layers, exported.left_out)


def _pruned(decoder: Decoder, masks: MaskSource, record: _Record) -> tuple[frozenset[str], Pattern | None]:
    """The names of the pruned weights, and the pattern of their masks.

    The pattern is None if the pruned model has a record.
    """
    matrices = {
        decoder.prefix(index) + name + ".weight": decoder.at(index).block_shapes[name + ".weight"]
        for index in range(decoder.config.blocks)
        for name in decoder.at(index).linears
    }
    anything = record.layers or not record.manifest
    shapes = {name: (rows, columns) for name, (rows, columns) in matrices.items() if anything and name in masks.keys}
    if record.manifest and not (shapes and masks.from_zeros):
        return frozenset(shapes), None
    names, patterns = set(), [parse_pattern(text) for text in _PATTERNS]
    zeros = size = 0
    for name, shape in shapes.items():
        keep = masks.read(name, shape)
        pruned = keep.size - int(np.count_nonzero(keep))
        if pruned >= LEAST * keep.size:
            names.add(name)
            zeros, size = zeros + pruned, size + keep.size
            patterns = [
                each for each in patterns if shape[1] % int(str(each).partition(":")[2]) == 0 and not each.violation(keep, True)
            ]
    if not names:
        raise UserError(
            f"expected a pruned model, got {masks.origin}, in which no matrix has a share of zeros of at least {LEAST:g}: "
            "prune it first"
        )
    if record.manifest:
        return frozenset(names), None
    share = zeros / size
    regular = next((each for each in patterns if abs(share - 0.5) < 0.02), None)
    return frozenset(names), regular or parse_pattern(f"{min(max(share, 0.001), 0.999):.3f}/layer")


def _without(dense: Model, left_out: LeftOut) -> Model:
    model = without_blocks(dense, left_out.blocks)
    if left_out.experts is None:
        return model
    cut = expert_cut(left_out.experts.total - left_out.experts.kept, model.pretrained.config)
    return without_experts(model, cut, [block.stay for block in left_out.experts.blocks])


def _check(pruned: Evaluated, dense: Evaluated, expected: str | None, left_out: LeftOut) -> None:
    """Raises UserError if the dense model is not the one that was pruned.

    Args:
      expected: its fingerprint, if the record of the pruned model has it.
      left_out: the blocks and the experts that the pruned model is without.
    """
    check_pair(pruned, dense)
    who, whose = pruned.model.pretrained.origin, dense.model.pretrained.origin
    if expected is not None and expected != dense.model.pretrained.fingerprint:
        raise UserError(f"expected the model that {who} was pruned from, got another one in {whose}: give its place as --against")
    pruned_decoder, dense_decoder = pruned.model.decoder, _without(dense.model, left_out).decoder
    if pruned_decoder.sizes != dense_decoder.sizes:
        raise UserError(f"expected --against with the model that {who} was pruned from, got one of another size in {whose}")
    for kind in pruned_decoder.config.kinds:
        for name in pruned_decoder.at(kind).block_shapes:
            ours, other = (each.tensors.dtype(each.prefix(kind) + name) for each in (pruned_decoder, dense_decoder))
            if ours != other:
                raise UserError(
                    f"expected {who} and {whose} in one dtype, got {name} as {ours} and as {other}: give --dtype {ours}"
                )
    for name in pruned_decoder.end_shapes:
        its_name = dense_decoder.root + name.removeprefix(pruned_decoder.root) if name.startswith(pruned_decoder.root) else name
        if its_name not in dense_decoder.end_shapes or not same_values(
            pruned_decoder.tensors, name, dense_decoder.tensors, its_name
        ):
            raise UserError(
                f"expected a pruned model with {name} of the dense model {whose}, got other values in {who}: only the blocks are "
                "trained here, so both models need the same embedding, last norm and head"
            )
