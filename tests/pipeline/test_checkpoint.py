import itertools
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from optima_tpu.config.run_config import to_dict
from optima_tpu.errors import UserError
from optima_tpu.models.activations import Activations
from optima_tpu.models.checkpoints import orbax as checkpoint
from optima_tpu.models.checkpoints.orbax import CheckpointTensors, load_group, read_metadata, save_tree
from optima_tpu.pipeline.journal import open_journal
from optima_tpu.pipeline.repair import mend
from optima_tpu.report.records import BlockReport
from optima_tpu.report.run_record import read_run
from optima_tpu.runtime.files import begin
from optima_tpu.runtime.version import code_version
from tests.support import fake_run
from tests.support.fake_run import (
    ASSETS,
    BLOCKS,
    MANIFEST,
    activations_after,
    assert_same,
    on_host,
    pruned_block,
    small_model,
    states_of,
    write_checkpoint,
)
from tests.support.meshes import mesh
from tests.support.refusals import refusal
from tests.support.tiny_models import MemoryTensors


def contents(directory: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


def started(directory: Path, blocks: int):
    journal = open_journal(directory, MANIFEST, ASSETS)
    for block in range(blocks):
        journal.save(block, *pruned_block(small_model(), block))
    return journal


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, pytest.param(np.float16, marks=pytest.mark.slow), np.float32])
def test_a_block_comes_back_bit_for_bit(tmp_path, dtype):
    source = small_model(dtype)
    weights, masks, report, (activations,) = pruned_block(source, 0)
    open_journal(tmp_path / "run", MANIFEST, ASSETS).save(0, weights, masks, report, on_host(activations.values.astype(dtype)))
    journal = open_journal(tmp_path / "run", MANIFEST, ASSETS)
    assert journal.finished == {0}
    assert journal.report(0) == report
    assert_same(states_of(journal), activations.values.astype(dtype))
    assert set(journal.weights(0)) == set(weights) and set(journal.masks(0)) == set(masks)
    for name in weights:
        assert_same(journal.weights(0)[name], weights[name])
        assert_same(journal.masks(0)[name], masks[name])


def test_the_metadata_of_a_block_are_read_once_and_again_after_a_save(tmp_path, monkeypatch):
    """A training reads the masks at each of its starts."""
    journal, read = started(tmp_path, 2), []
    monkeypatch.setattr("optima_tpu.pipeline.journal.read_metadata", lambda path: read.append(path.name) or read_metadata(path))
    for _ in range(2):
        journal.masks(0)
        journal.tensors()
    assert read == ["block_0000", "block_0001"]
    weights = pruned_block(small_model(), 1)[0]
    journal.save(0, weights, {}, BlockReport(0, 0.0, ()))
    assert journal.weights(0).keys() == weights.keys() and journal.masks(0) == {}


def test_arrays_on_a_mesh_and_views_are_saved_like_host_arrays(tmp_path):
    everything = mesh(1, 8)
    values = np.arange(64 * 4, dtype=np.float32).reshape(-1, 4).astype(ml_dtypes.bfloat16)
    weights = {"rows": jax.device_put(values, NamedSharding(everything, P("model"))), "view": values.T}
    masks = {"rows": jax.device_put(values > 3, NamedSharding(everything, P("model")))}
    journal = open_journal(tmp_path, MANIFEST, {})
    journal.save(0, weights, masks, BlockReport(0, 0.0, ()), on_host(np.asfortranarray(activations_after(0))))
    assert_same(journal.weights(0)["rows"], values)
    assert_same(journal.weights(0)["view"], np.ascontiguousarray(values.T))
    assert_same(journal.masks(0)["rows"], values > 3)
    assert_same(states_of(journal), activations_after(0))


def test_only_the_last_hidden_states_are_kept_and_only_if_they_would_take_long(tmp_path):
    journal = started(tmp_path, 3)
    journal.recompute = 1
    for seconds, last in ((0, 2), (59.5, 2), (0.5, 5), (59.5, 5)):
        journal.repeated += seconds
        index = len(journal.finished)
        journal.save(index, *pruned_block(small_model(), index % BLOCKS))
        assert [path.name for path in (tmp_path / "activations").iterdir()] == [f"block_{last:04d}"]
    for opened in (journal, open_journal(tmp_path, MANIFEST, ASSETS)):
        index, states = opened.last_activations(mesh(1, 1), 7, 2)
        assert index == last and opened.last_activations(mesh(1, 1), last, 2) is None
        assert_same(states.values, activations_after(last % BLOCKS))
        assert opened.activations(mesh(1, 1), 2, 2) is None
    journal.forget_states()
    assert journal.last_activations(mesh(1, 1), 7, 2) is None and not open_journal(tmp_path, MANIFEST, ASSETS).damaged
    assert not (
        tmp_path / "activations"
    ).exists()  # nor does a run that goes on make the folder while it has nothing to put there


@pytest.mark.parametrize("shapes", [((4, 2), (2, 4)), ((1, 1), (8, 1)), ((2, 1), (1, 1))], ids=str)
def test_hidden_states_come_back_on_another_mesh(tmp_path, shapes):
    states = np.random.default_rng(0).standard_normal((7, 3, 4)).astype(np.float32)
    weights, masks, report, _ = pruned_block(small_model(), 0)
    open_journal(tmp_path, MANIFEST, ASSETS).save(0, weights, masks, report, [Activations.of(mesh(*shapes[0]), states)])
    assert_same(open_journal(tmp_path, MANIFEST, ASSETS).activations(mesh(*shapes[1]), 0, 7).values, states)


def test_a_process_without_windows_gets_none_of_the_right_shape(tmp_path, monkeypatch):
    states = np.zeros((2, 3, 4), np.float32)
    weights, masks, report, _ = pruned_block(small_model(), 0)
    open_journal(tmp_path, MANIFEST, ASSETS).save(0, weights, masks, report, [Activations.of(mesh(1, 1), states)])
    monkeypatch.setattr(
        "optima_tpu.pipeline.journal.held_rows", lambda *of: np.zeros(0, np.int64)
    )  # as where the data axis is longer
    assert open_journal(tmp_path, MANIFEST, ASSETS).activations(mesh(1, 1), 0, 2).values.shape == (0, 3, 4)


def test_a_mask_without_its_weight_is_refused(tmp_path):
    journal = started(tmp_path, 1)
    _, masks, *rest = pruned_block(small_model(), 1)
    with pytest.raises(ValueError, match="masks without weights"):
        journal.save(1, {}, masks, *rest)
    assert open_journal(tmp_path, MANIFEST, ASSETS).finished == {0}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [(truncate, "bytes where"), (flip, "has changed since it was written"), (Path.unlink, "is missing")],
    ids=["truncated", "flipped", "gone"],
)
def test_a_damaged_block_counts_as_not_done_and_the_others_stay(tmp_path, harm, reason):
    started(tmp_path, 3)
    files = [path for path in (tmp_path / "journal" / "block_0001").rglob("*") if path.is_file() and "sha256" not in path.name]
    harm(max(files, key=lambda path: path.stat().st_size))
    journal = open_journal(tmp_path, MANIFEST, ASSETS)
    assert journal.finished == {0, 2} and reason in journal.damaged[1]
    journal.save(1, *pruned_block(small_model(), 1))
    again = open_journal(tmp_path, MANIFEST, ASSETS)
    assert again.finished == journal.finished == {0, 1, 2} and not again.damaged
    for name, array in pruned_block(small_model(), 1)[0].items():
        assert_same(again.weights(1)[name], array)


@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink])
def test_damaged_hidden_states_are_not_given(tmp_path, harm):
    started(tmp_path, 2)
    harm(next((tmp_path / "activations").rglob("*.safetensors")))
    journal = open_journal(tmp_path, MANIFEST, ASSETS)
    assert journal.finished == {0, 1}
    assert journal.activations(mesh(1, 1), 1, 2) is None


def test_a_resume_that_differs_is_refused_and_says_in_what(tmp_path):
    started(tmp_path, 1)
    before = contents(tmp_path)
    other = MANIFEST | {"recipe": MANIFEST["recipe"] | {"pattern": "0.6", "damping": 0.01}, "tokens": "ef" * 32}
    message = refusal(open_journal, tmp_path, other, ASSETS)
    assert "recipe.pattern: 0.5 there, 0.6 here" in message
    assert "recipe.damping: absent there, 0.01 here" in message
    assert "tokens: cdcdcdcdcdcd there, efefefefefef here" in message
    assert "selector" not in message and "model" not in message
    assert contents(tmp_path) == before


def test_the_same_manifest_is_accepted_whatever_the_configuration(tmp_path):
    open_journal(tmp_path, {"shape": (1, 2), "a": {"b": 1}}, {}, {"mesh": "1x1"})
    assert open_journal(tmp_path, {"a": {"b": 1}, "shape": [1, 2]}, {}, {"mesh": "4x2"}).finished == set()


def test_a_directory_with_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="not a run"):
        open_journal(tmp_path, MANIFEST, ASSETS)
    with pytest.raises(UserError, match="thesis.tex.*Not a directory"):
        open_journal(tmp_path / "thesis.tex", MANIFEST, ASSETS)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("damage", ["cut", "manifest", "configuration"])
def test_a_damaged_record_is_written_again_by_the_command_that_wrote_it_and_by_no_other(tmp_path, damage):
    open_journal(tmp_path, MANIFEST, ASSETS, {"output": "here"})
    record, before = tmp_path / "run.json", (tmp_path / "run.json").read_text()
    damaged = {"cut": "{", "manifest": before.replace("0+1", "0+3"), "configuration": before.replace("here", "hare")}[damage]
    record.write_text(damaged)
    with pytest.raises(UserError, match=r"run.json has changed since it was written.*repeat the original command"):
        open_journal(tmp_path, MANIFEST | {"code": "0+2"}, ASSETS, {"output": "here"})
    assert record.read_text() == damaged
    open_journal(tmp_path, MANIFEST, ASSETS, {"output": "here"})
    assert record.read_text() == before
    if damage != "cut":  # the settings of a moved run name another directory
        record.write_text(damaged)
        open_journal(tmp_path, MANIFEST, ASSETS, {"output": "there"})
        assert read_run(tmp_path).manifest == MANIFEST


def test_assets_are_kept_byte_for_byte_and_completed_by_a_resume(tmp_path):
    started(tmp_path, 0)
    assert read_run(tmp_path).manifest == MANIFEST
    (tmp_path / "assets" / "config.json").unlink()
    started(tmp_path, 0)
    assert {path.name: path.read_bytes() for path in (tmp_path / "assets").iterdir()} == ASSETS


def test_what_an_interrupted_save_left_is_ignored_and_replaced(tmp_path):
    started(tmp_path, 1)
    for name in ("block_0001", "block_0001.orbax-checkpoint-tmp"):
        shutil.copytree(tmp_path / "journal" / "block_0000", tmp_path / "journal" / "block_0001.a_0b1c2d.partial" / name)
    (states := begin(tmp_path / "activations" / "block_0001")).mkdir()
    (states / "part_0000.safetensors").write_bytes(b"half")
    assert not mend(tmp_path)
    journal = open_journal(tmp_path, MANIFEST, ASSETS)
    assert journal.finished == {0}
    assert_same(states_of(journal), activations_after(0))
    weights = pruned_block(small_model(), 1)[0]
    journal.save(1, *pruned_block(small_model(), 1))
    assert_same(journal.weights(1)[next(iter(weights))], next(iter(weights.values())))
    assert sorted(path.name for path in (tmp_path / "journal").iterdir()) == ["block_0000", "block_0001"]


def test_the_checkpoint_holds_pruned_blocks_and_the_source_otherwise(tmp_path):
    source = small_model()
    journal = fake_run.finished_run(tmp_path, source, mesh="4x2")
    tensors = CheckpointTensors(tmp_path)
    assert tensors.names() == source.names()
    pruned = {}
    for block in range(BLOCKS):
        weights, masks, *_ = pruned_block(source, block)
        pruned |= weights
        for name, keep in masks.items():
            assert_same(tensors.masks([name])[name], keep)
            assert_same(tensors.mask(name), keep)
    assert tensors.pruned() == tuple(sorted(pruned))
    for name in source.names():
        assert (tensors.shape(name), tensors.dtype(name)) == (source.shape(name), source.dtype(name))
        assert_same(tensors.read(name), pruned.get(name, source.arrays[name]))
    assert_same(tensors.read("model.norm.weight", (slice(2, 5),)), source.arrays["model.norm.weight"][2:5])
    blocks = tuple(pruned_block(source, block)[2] for block in range(BLOCKS))
    assert tensors.run == checkpoint.CheckpointedRun(MANIFEST, to_dict(fake_run.SMALL) | {"mesh": "4x2"}, blocks, None)
    before = contents(tmp_path)
    write_checkpoint(journal, source, mesh(1, 1))
    assert contents(tmp_path) == before


def test_the_blocks_are_plain_orbax_checkpoints(tmp_path):
    """Reads them as the page on the run directory shows."""
    source = small_model()
    fake_run.finished_run(tmp_path, source)
    metadata = ocp.metadata(tmp_path / "checkpoint").custom_metadata
    weights = ocp.load(tmp_path / "checkpoint")["weights"]
    for part in metadata["parts"]:
        weights |= ocp.load(tmp_path / part)["weights"]
    expected = CheckpointTensors(tmp_path)
    assert weights.keys() == set(expected.names())
    for name, array in weights.items():
        assert_same(np.asarray(array), expected.read(name))


def test_a_lost_block_is_a_lost_part_of_the_checkpoint(tmp_path):
    journal = fake_run.finished_run(tmp_path, small_model())
    shutil.rmtree(journal.entry(1))
    assert checkpoint.checkpointed_blocks(tmp_path) is None
    with pytest.raises(UserError, match=r"checkpoint is damaged \(journal/block_0001: is missing\): repeat the run's command"):
        checkpoint.refuse_damaged_checkpoint(tmp_path)


def test_the_tensors_of_a_block_are_read_at_once_and_other_blocks_apart(tmp_path, monkeypatch):
    source = small_model()
    fake_run.finished_run(tmp_path, source)
    read, reads = checkpoint.load_group, []

    def noted(path, group, wanted):
        reads.extend([set(wanted)] if wanted else [])
        return read(path, group, wanted)

    monkeypatch.setattr(checkpoint, "load_group", noted)
    tensors = CheckpointTensors(tmp_path)
    for name in (*source.names(), "model.layers.2.mlp.down_proj.weight"):
        tensors.read(name)
        tensors.read(name, (slice(0, 1),))
    # The run's journal has the linear layers alone; a norm is then in the checkpoint itself.
    linears = [{name for name in tensors.pruned() if name.startswith(f"model.layers.{block}.")} for block in range(BLOCKS)]
    blocks = [[{f"model.layers.{block}.input_layernorm.weight"}, linears[block]] for block in range(BLOCKS)]
    assert reads == [{"model.embed_tokens.weight"}, *itertools.chain(*blocks), {"model.norm.weight"}, *blocks[2]]
    reads.clear()
    for name in tensors.pruned():
        tensors.mask(name)
    assert reads == linears


def test_blocks_without_masks_and_scalars_are_kept(tmp_path):
    source = MemoryTensors({"a.weight": np.ones((2, 2), np.float32), "scale": np.full((), 3.0), "ids": np.arange(3)})
    journal = open_journal(tmp_path, MANIFEST, {})
    journal.save(0, {"a.weight": source.arrays["a.weight"] * 2}, {}, BlockReport(0, 0.0, ()), on_host(activations_after(0)))
    journal.save(1, {}, {}, BlockReport(1, 0.0, ()), on_host(activations_after(1)))
    write_checkpoint(journal, source, mesh(2, 2))
    tensors = CheckpointTensors(tmp_path)
    assert tensors.pruned() == () and tensors.names() == ("a.weight", "ids", "scale")
    assert_same(tensors.read("scale"), source.arrays["scale"])
    assert_same(tensors.read("ids"), source.arrays["ids"])
    assert_same(tensors.read("a.weight"), source.arrays["a.weight"] * 2)


def test_a_block_that_is_not_of_the_source_makes_no_checkpoint(tmp_path):
    source = small_model()
    started(tmp_path, 1)
    name = "model.layers.0.self_attn.q_proj.weight"
    source.arrays[name] = source.arrays[name].astype(np.float32)
    with pytest.raises(ValueError, match="the source has no " + name):
        write_checkpoint(open_journal(tmp_path, MANIFEST, ASSETS), source, mesh(1, 1))
    with pytest.raises(UserError, match="no checkpoint yet"):
        CheckpointTensors(tmp_path)
    with pytest.raises(UserError, match="has no run.json"):
        CheckpointTensors(tmp_path / "elsewhere")


def test_the_code_version_follows_the_source(tmp_path, monkeypatch):
    version = code_version.__wrapped__  # a process reads its sources once
    assert version() == version() == code_version()
    (tmp_path / "solvers").mkdir()
    (tmp_path / "solvers" / "cg.py").write_text("a = 1\n")
    monkeypatch.setattr("optima_tpu.runtime.version.__file__", str(tmp_path / "runtime" / "version.py"))
    first = version()
    (tmp_path / "solvers" / "cg.py").write_text("a = 2\n")
    second = version()
    (tmp_path / "solvers" / "cg.py").rename(tmp_path / "solvers" / "pcg.py")
    assert len({first, second, version()}) == 3


def test_a_journal_that_is_removed_under_its_run_is_told_in_one_line(tmp_path):
    source = small_model()
    journal = open_journal(tmp_path / "run", MANIFEST, ASSETS)
    journal.save(0, *pruned_block(source, 0))
    shutil.rmtree(tmp_path / "run/journal")
    lost = r"run/journal was removed, .* with it 1 finished block; repeat the command, which prunes again what is lost"
    with pytest.raises(UserError, match=lost):
        journal.save(1, *pruned_block(source, 1))
    journal = fake_run.finished_run(tmp_path / "other", source)
    shutil.rmtree(tmp_path / "other/journal")
    shutil.rmtree(tmp_path / "other/checkpoint")
    gone = r"block_000\d can't be read \(is missing\): .*; repeat the run's command, which writes it again"
    for read in (lambda: write_checkpoint(journal, source, mesh(1, 1)), lambda: journal.weights(0), lambda: journal.report(1)):
        with pytest.raises(UserError, match=gone):
            read()


def test_one_checkpoint_is_read_while_another_is_saved(tmp_path):
    """A walk reads the next block ahead while it saves one.

    Orbax numbers its operations across the whole process.
    """
    tree = {"weights": {str(index): jnp.ones((4, 4)) for index in range(4)}}
    save_tree(tmp_path / "read", tree, {})
    done = threading.Event()

    def read():
        while not done.is_set():
            load_group(tmp_path / "read", "weights", tree["weights"])

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(6):
            save_tree(tmp_path / str(number), tree, {})
            assert load_group(tmp_path / str(number), "weights", tree["weights"]).keys() == tree["weights"].keys()
    finally:
        done.set()
        reader.join()
