"""A small model and a run over it, for tests of checkpoints and exports."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from transformers import PretrainedConfig

from optima_tpu.config.run_config import RunConfig, to_dict, weights_settings
from optima_tpu.method.layer_rules import parse_layers, pattern_of, with_patterns
from optima_tpu.method.patterns import Pattern, parse_pattern
from optima_tpu.models.activations import Activations
from optima_tpu.models.checkpoints import orbax
from optima_tpu.models.checkpoints.cuts import placed
from optima_tpu.models.checkpoints.source import Pretrained, TensorSource
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.model import Model, without_blocks
from optima_tpu.pipeline.journal import Journal, open_journal
from optima_tpu.report.contents import LeftOut
from optima_tpu.report.records import BlockReport, LayerReport
from tests.support.fake_reports import layer
from tests.support.meshes import mesh
from tests.support.tiny_models import MemoryTensors

BLOCKS = 3
SMALL = RunConfig("owner/small@v1.0")
MANIFEST = {"model": "ab" * 32, "recipe": weights_settings(SMALL) | {"pattern": "0.5"}, "tokens": "cd" * 32, "code": "0+1"}
ASSETS = {"config.json": b'{"architectures":  ["LlamaForCausalLM"]}\r\n', "tokenizer.json": '{"\u00e9": 1}'.encode()}
LINEARS = ("self_attn.q_proj", "mlp.down_proj")


def small_model(dtype=ml_dtypes.bfloat16) -> MemoryTensors:
    random = np.random.default_rng(0)
    tensors = {
        "model.embed_tokens.weight": random.standard_normal((40, 12)).astype(dtype),
        "model.norm.weight": random.standard_normal(12).astype(np.float32),
    }
    for block in range(BLOCKS):
        for name, shape in zip(LINEARS, ((12, 12), (12, 20)), strict=True):
            tensors[f"model.layers.{block}.{name}.weight"] = random.standard_normal(shape).astype(dtype)
        tensors[f"model.layers.{block}.input_layernorm.weight"] = random.standard_normal(12).astype(dtype)
    return MemoryTensors(tensors)


def write_checkpoint(journal: Journal, source: TensorSource, mesh: Mesh, **options: Any) -> None:
    """Writes the checkpoint of a run whose blocks were not trained."""
    orbax.write_checkpoint(journal.directory, lambda: journal.reports(journal.entry), source, mesh, **options)


def pruned_block(source: MemoryTensors, block: int) -> tuple[dict, dict, BlockReport, tuple[Activations]]:
    """Returns what a run saves of a block, the same at every call.

    Half of every row is pruned, and the other weights are moved.
    """
    random = np.random.default_rng([1, block])
    weights, masks = {}, {}
    for name in (f"model.layers.{block}.{linear}.weight" for linear in LINEARS):
        dense = source.read(name)
        keep = random.permuted(np.tile(np.arange(dense.shape[1]) % 2 == 0, (len(dense), 1)), axis=1)
        moved = dense + random.standard_normal(dense.shape).astype(dense.dtype) / 8
        weights[name], masks[name] = (moved * keep).astype(dense.dtype), keep  # -0.0 at some of the pruned entries
    report = block_report(block, {linear: masks[f"model.layers.{block}.{linear}.weight"] for linear in LINEARS})
    return weights, masks, report, on_host(activations_after(block))


def block_report(block: int, masks: Mapping[str, np.ndarray]) -> BlockReport:
    """Makes the record of a block with these masks, by layer name."""
    return BlockReport(block, 0.0, tuple(_report_on(block, name, keep) for name, keep in masks.items()))


def _report_on(block: int, name: str, keep: np.ndarray) -> LayerReport:
    shape, pruned = keep.shape, int((~keep).sum())
    errors = {"error_before": 0.2, "error_after": 0.1 + block / 100}
    return layer(
        block, name, shape=shape, pruned=pruned, sparsity=pruned / keep.size, rows=shape[0], rows_converged=shape[0], **errors
    )


def pruned_run(
    directory: Path,
    config: PretrainedConfig,
    source: MemoryTensors,
    pattern: str | None = None,
    layers: str = "",
    left_out: tuple[int, ...] = (),
) -> Path:
    """Writes a run over a model with random masks.

    A configuration of transformers describes the model. Without a pattern, half of every row is pruned.

    Args:
      pattern, layers: another pattern, and rules for layers, as they are typed. Weights are pruned by random scores.
      left_out: blocks that the run leaves out.
    """
    settings = config.to_diff_dict() | {"architectures": config.architectures, "dtype": "float32"}
    assets = {"config.json": json.dumps(settings).encode()}
    whole = Model(Pretrained(config, source, assets, "ab", "here"), Decoder.open(config, source, mesh(1, 1)))
    left = LeftOut(left_out, (0.5,) * len(left_out))
    return run_without(directory, whole, without_blocks(whole, left_out), left, pattern, layers)


def run_without(
    directory: Path, whole: Model, cut: Model, left: LeftOut, pattern: str | None = "dense", layers: str = ""
) -> Path:
    """Like :func:`pruned_run`, for a model without what ``left`` names."""
    (config, source), decoder = (cut.pretrained.config, cut.pretrained.tensors), cut.decoder
    manifest = MANIFEST if pattern is None else MANIFEST | {"recipe": MANIFEST["recipe"] | {"pattern": pattern, "layers": layers}}
    journal = open_journal(directory, manifest, whole.pretrained.assets, to_dict(SMALL))
    random = np.random.default_rng(0)

    def mask(name: str, linear: str, shape: tuple[int, ...]) -> np.ndarray | None:
        if pattern is None:
            return random.permuted(np.tile(np.arange(shape[1]) % 2 == 0, (shape[0], 1)), axis=1)
        rules = with_patterns(parse_layers(layers), lambda each: placed(each, config))
        chosen = pattern_of(rules, placed(parse_pattern(pattern), config), name.removesuffix(".weight"), linear)
        return chosen and np.asarray(_kept(chosen, jnp.asarray(random.random(shape), jnp.float32)))

    for block in range(decoder.config.blocks):
        names = {f"{decoder.prefix(block)}{linear}.weight": linear for linear in decoder.at(block).linears}
        masks = {name: keep for name, linear in names.items() if (keep := mask(name, linear, source.shape(name))) is not None}
        weights = {name: np.where(keep, source.read(name), 0).astype(source.dtype(name)) for name, keep in masks.items()}
        report = block_report(block, {names[name]: keep for name, keep in masks.items()})
        journal.save(block, weights, masks, report, on_host(np.zeros((1, 1, 1), np.float32)))
    write_checkpoint(journal, source, mesh(1, 1), left_out=left)
    return directory


@functools.partial(jax.jit, static_argnums=0)
def _kept(pattern: Pattern, scores: jax.Array) -> jax.Array:
    return pattern.keep_mask(scores)


def begun(directory: Path, manifest=MANIFEST, assets=ASSETS) -> Journal:
    """Opens a run that has no block yet."""
    return open_journal(directory, manifest, assets, to_dict(SMALL))


def activations_after(block: int) -> np.ndarray:
    return np.random.default_rng([2, block]).standard_normal((2, 5, 12)).astype(ml_dtypes.bfloat16)


def on_host(states: np.ndarray) -> tuple[Activations]:
    return (Activations.of(mesh(1, 1), states),)


def states_of(journal: Journal) -> np.ndarray:
    """The hidden states after the last finished block."""
    return journal.activations(mesh(1, 1), max(journal.finished), 2).values


def finished_run(
    directory: Path, source: MemoryTensors, manifest=MANIFEST, assets=ASSETS, blocks=BLOCKS, **configuration
) -> Journal:
    journal = open_journal(directory, manifest, assets, to_dict(SMALL) | configuration)
    for block in range(len(journal.finished), blocks):
        journal.save(block, *pruned_block(source, block))
    write_checkpoint(journal, source, mesh(1, 1))
    return journal


def assert_same(got: np.ndarray, expected: np.ndarray) -> None:
    """Asserts equality in dtype, shape and every bit."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert got.tobytes() == expected.tobytes()
