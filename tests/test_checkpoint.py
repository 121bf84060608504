import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optima_tpu
from optima_tpu import checkpoint
from optima_tpu.checkpoint import CheckpointTensors, code_version, open_journal
from optima_tpu.errors import UserError
from tests import fake_run
from tests.fake_run import (
    ASSETS,
    BLOCKS,
    MANIFEST,
    MemorySource,
    activations_after,
    assert_same,
    pruned_block,
    small_model,
)


def contents(directory: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


def started(directory: Path, blocks: int):
    journal = open_journal(directory, MANIFEST, ASSETS)
    for block in range(blocks):
        journal.save(block, *pruned_block(small_model(), block))
    return journal


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_a_block_comes_back_bit_for_bit(tmp_path, dtype):
    source = small_model(dtype)
    weights, masks, report, activations = pruned_block(source, 0)
    open_journal(tmp_path / "run", MANIFEST, ASSETS).save(0, weights, masks, report, activations.astype(dtype))
    journal = open_journal(tmp_path / "run", MANIFEST, ASSETS)
    assert journal.finished == 1
    assert journal.report(0) == report
    assert_same(journal.activations(), activations.astype(dtype))
    assert set(journal.weights(0)) == set(weights) and set(journal.masks(0)) == set(masks)
    for name in weights:
        assert_same(journal.weights(0)[name], weights[name])
        assert_same(journal.masks(0)[name], masks[name])


def test_arrays_on_a_mesh_and_views_are_saved_like_host_arrays(tmp_path):
    mesh = jax.make_mesh((jax.device_count(),), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    values = np.arange(8 * mesh.size * 4, dtype=np.float32).reshape(-1, 4).astype(ml_dtypes.bfloat16)
    weights = {"rows": jax.device_put(values, NamedSharding(mesh, P("model"))), "view": values.T}
    masks = {"rows": jax.device_put(values > 3, NamedSharding(mesh, P("model")))}
    journal = open_journal(tmp_path, MANIFEST, {})
    journal.save(0, weights, masks, {}, np.asfortranarray(activations_after(0)))
    assert_same(journal.weights(0)["rows"], values)
    assert_same(journal.weights(0)["view"], np.ascontiguousarray(values.T))
    assert_same(journal.masks(0)["rows"], values > 3)
    assert_same(journal.activations(), activations_after(0))


def test_only_the_last_hidden_states_are_kept(tmp_path):
    journal = started(tmp_path, 3)
    assert len(list((tmp_path / "activations").iterdir())) == 1
    assert_same(journal.activations(), activations_after(2))
    next((tmp_path / "activations").iterdir()).unlink()
    with pytest.raises(UserError, match="hidden states .* there are none"):
        open_journal(tmp_path, MANIFEST, ASSETS).activations()


def test_blocks_are_saved_in_order(tmp_path):
    journal = started(tmp_path, 1)
    for index in (0, 2):
        with pytest.raises(ValueError, match=f"block {index} cannot be saved after 1 "):
            journal.save(index, *pruned_block(small_model(), index))
    weights, masks, *rest = pruned_block(small_model(), 1)
    with pytest.raises(ValueError, match="masks without weights"):
        journal.save(1, {}, masks, *rest)
    assert open_journal(tmp_path, MANIFEST, ASSETS).finished == 1


def test_a_resume_that_differs_is_refused_and_says_in_what(tmp_path):
    started(tmp_path, 1)
    before = contents(tmp_path)
    other = MANIFEST | {"recipe": {"pattern": "0.6", "selector": "wanda", "damping": 0.01}, "tokens": "ef" * 32}
    with pytest.raises(UserError) as refusal:
        open_journal(tmp_path, other, ASSETS)
    message = str(refusal.value)
    assert "recipe.pattern: 0.5 there, 0.6 here" in message
    assert "recipe.damping: absent there, 0.01 here" in message
    assert "tokens: cdcdcdcdcdcd there, efefefefefef here" in message
    assert "selector" not in message and "model" not in message and "\n" not in message
    assert contents(tmp_path) == before


def test_the_same_manifest_is_accepted_whatever_the_configuration(tmp_path):
    open_journal(tmp_path, {"shape": (1, 2), "a": {"b": 1}}, {}, {"mesh": "1x1"})
    assert open_journal(tmp_path, {"a": {"b": 1}, "shape": [1, 2]}, {}, {"mesh": "4x2"}).finished == 0


def test_a_directory_with_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="not a run"):
        open_journal(tmp_path, MANIFEST, ASSETS)
    with pytest.raises(UserError, match="thesis.tex.*Not a directory"):
        open_journal(tmp_path / "thesis.tex", MANIFEST, ASSETS)
    assert contents(tmp_path) == before


def test_a_damaged_record_is_refused(tmp_path):
    started(tmp_path, 1)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="run.json is damaged"):
        open_journal(tmp_path, MANIFEST, ASSETS)


def test_assets_are_kept_byte_for_byte_and_completed_by_a_resume(tmp_path):
    started(tmp_path, 0)
    assert checkpoint.read_run(tmp_path)["manifest"] == MANIFEST
    (tmp_path / "assets" / "config.json").unlink()
    started(tmp_path, 0)
    assert {path.name: path.read_bytes() for path in (tmp_path / "assets").iterdir()} == ASSETS


def test_blocks_after_a_gap_do_not_count_and_do_not_come_back(tmp_path):
    started(tmp_path, 3)
    shutil.rmtree(tmp_path / "journal" / "block_0001")
    journal = open_journal(tmp_path, MANIFEST, ASSETS)
    assert journal.finished == 1
    journal.save(1, *pruned_block(small_model(), 1))
    assert journal.finished == open_journal(tmp_path, MANIFEST, ASSETS).finished == 2


def test_what_an_interrupted_save_left_is_ignored_and_replaced(tmp_path):
    started(tmp_path, 1)
    for name in ("block_0001.partial", "block_0001.partial.orbax-checkpoint-tmp"):
        shutil.copytree(tmp_path / "journal" / "block_0000", tmp_path / "journal" / name)
    (tmp_path / "activations" / "block_0001.safetensors.partial").write_bytes(b"half")
    journal = open_journal(tmp_path, MANIFEST, ASSETS)
    assert journal.finished == 1
    assert_same(journal.activations(), activations_after(0))
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
    assert tensors.pruned() == tuple(sorted(pruned))
    for name in source.names():
        assert (tensors.shape(name), tensors.dtype(name)) == (source.shape(name), source.dtype(name))
        assert_same(tensors.read(name), pruned.get(name, source.tensors[name]))
    assert_same(tensors.read("model.norm.weight", (slice(2, 5),)), source.tensors["model.norm.weight"][2:5])
    assert tensors.run == {"manifest": MANIFEST, "configuration": {"mesh": "4x2"},
                           "blocks": [pruned_block(source, block)[2] for block in range(BLOCKS)]}
    before = contents(tmp_path)
    journal.write_checkpoint(source)
    assert contents(tmp_path) == before


def test_blocks_without_masks_and_scalars_are_kept(tmp_path):
    source = MemorySource({"a.weight": np.ones((2, 2), np.float32), "scale": np.full((), 3.0), "ids": np.arange(3)})
    journal = open_journal(tmp_path, MANIFEST, {})
    journal.save(0, {"a.weight": source.tensors["a.weight"] * 2}, {}, {}, activations_after(0))
    journal.save(1, {}, {}, {}, activations_after(1))
    journal.write_checkpoint(source)
    tensors = CheckpointTensors(tmp_path)
    assert tensors.pruned() == () and tensors.names() == ("a.weight", "ids", "scale")
    assert_same(tensors.read("scale"), source.tensors["scale"])
    assert_same(tensors.read("ids"), source.tensors["ids"])
    assert_same(tensors.read("a.weight"), source.tensors["a.weight"] * 2)


def test_a_block_that_is_not_of_the_source_makes_no_checkpoint(tmp_path):
    source = small_model()
    started(tmp_path, 1)
    name = "model.layers.0.self_attn.q_proj.weight"
    source.tensors[name] = source.tensors[name].astype(np.float32)
    with pytest.raises(ValueError, match="the source has no " + name):
        open_journal(tmp_path, MANIFEST, ASSETS).write_checkpoint(source)
    with pytest.raises(UserError, match="1 finished blocks and no checkpoint"):
        CheckpointTensors(tmp_path)
    with pytest.raises(UserError, match="holds no run.json"):
        CheckpointTensors(tmp_path / "elsewhere")


def test_untouched_tensors_pass_through_memory_in_pieces(tmp_path, monkeypatch):
    size, alive, largest = 1 << 16, set(), 0

    class Counting(MemorySource):
        def read(self, name, index=(...,)):
            nonlocal largest
            array = self.tensors[name].copy()
            alive.add(id(array))
            weakref.finalize(array, alive.discard, id(array))
            largest = max(largest, len(alive))
            return array

    monkeypatch.setattr(checkpoint, "_UNTOUCHED_AT_ONCE", 2 * size)
    source = Counting({f"t{i:02d}": np.full(size, i, np.uint8) for i in range(20)})
    open_journal(tmp_path, MANIFEST, {}).write_checkpoint(source)
    assert largest <= 4  # one group of two, while another is being read
    assert_same(CheckpointTensors(tmp_path).read("t13"), source.tensors["t13"])


# A limit on the size of files stands for the full disk: the same calls fail, with another error number.
FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from optima_tpu.checkpoint import open_journal, quiet_orbax
from optima_tpu.errors import UserError
from tests import fake_run

quiet_orbax()
source, big = fake_run.small_model(), np.random.default_rng(0).standard_normal((256, 256))
source.tensors["model.embed_tokens.weight"] = big
weights, masks, report, activations = fake_run.pruned_block(source, 1)
journals = []
for what in ("weights", "activations", "checkpoint"):
    journals.append(open_journal(Path(sys.argv[1]) / what, fake_run.MANIFEST, fake_run.ASSETS))
    journals[-1].save(0, *fake_run.pruned_block(source, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
writes = (lambda: journal.save(1, weights | {"big": big, "bigger": -big}, masks, report, activations),
          lambda: journal.save(1, weights, masks, report, big), lambda: journal.write_checkpoint(source))
for journal, write in zip(journals, writes):
    try:
        write()
    except UserError as error:
        print(error)
    assert journal.finished == 1
"""


def in_its_own_process(code: str, *arguments) -> subprocess.CompletedProcess:
    paths = [str(Path(__file__).parents[1]), str(Path(optima_tpu.__path__[0]).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)], env=environment, text=True,
                          capture_output=True, timeout=300)


def test_a_full_disk_is_one_line_and_costs_no_finished_block(tmp_path):
    result = in_its_own_process(FULL_DISK, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    said = result.stdout.splitlines()
    for line, path in zip(said, ("weights/journal/block_0001", "activations/journal/block_0001", "checkpoint/checkpoint"),
                          strict=True):
        assert line.startswith(f"could not write {tmp_path / path}: File too large; ") and "intact; make room" in line
    for what in ("weights", "activations", "checkpoint"):
        journal = open_journal(tmp_path / what, MANIFEST, ASSETS)
        assert journal.finished == 1
        assert_same(journal.activations(), activations_after(0))
        fake_run.finished_run(tmp_path / what, small_model())
        assert CheckpointTensors(tmp_path / what).names() == small_model().names()


def test_the_code_version_follows_the_source(tmp_path, monkeypatch):
    assert code_version() == code_version()
    (tmp_path / "solvers").mkdir()
    (tmp_path / "solvers" / "cg.py").write_text("a = 1\n")
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "checkpoint.py"))
    first = code_version()
    (tmp_path / "solvers" / "cg.py").write_text("a = 2\n")
    second = code_version()
    (tmp_path / "solvers" / "cg.py").rename(tmp_path / "solvers" / "pcg.py")
    assert len({first, second, code_version()}) == 3


# Run in a process of its own, which imports once and forks a child for every run that is to be killed.
KILLED_RUNS = """
import os, random, signal, sys, time
from pathlib import Path
from optima_tpu.checkpoint import CheckpointTensors, open_journal
from tests import fake_run

SOURCE, BLOCKS = fake_run.small_model(), 2
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}

def in_child(work):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child

def status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def run(directory, kill_at=None, log=None):
    count = 0
    def watch(event, arguments):
        nonlocal count
        if event in EVENTS and str(directory) in str(arguments[0]):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    fake_run.finished_run(directory, SOURCE, blocks=BLOCKS)
    if log:
        log.write_text(str(count))

def resume(directory):
    journal = open_journal(directory, fake_run.MANIFEST, fake_run.ASSETS)
    for block in range(journal.finished):
        weights, masks, report, activations = fake_run.pruned_block(SOURCE, block)
        for saved, expected in ((journal.weights(block), weights), (journal.masks(block), masks)):
            assert set(saved) == set(expected)
            for name in expected:
                fake_run.assert_same(saved[name], expected[name])
        assert journal.report(block) == report
    if journal.finished:
        fake_run.assert_same(journal.activations(), activations)
    fake_run.finished_run(directory, SOURCE, blocks=BLOCKS)
    tensors = CheckpointTensors(directory)
    assert tensors.names() == SOURCE.names() and len(tensors.pruned()) == 2 * BLOCKS
    expected = SOURCE.tensors.copy()
    for block in range(BLOCKS):
        expected |= fake_run.pruned_block(SOURCE, block)[0]
    for name, array in tensors.load(tensors.names()).items():
        fake_run.assert_same(array, expected[name])

root = Path(sys.argv[1])
began = time.monotonic()
assert status(in_child(lambda: run(root / "whole", log=root / "count"))) == 0
duration, events = time.monotonic() - began, int((root / "count").read_text())
assert events > 50
finished = set()
for kill_at in (1 + round(0.95 * events * i / 9) for i in range(10)):  # Orbax's threads make the count vary a little
    directory = root / f"event{kill_at}"
    ended = status(in_child(lambda: run(directory, kill_at)))
    assert ended == -signal.SIGKILL, f"the run to be killed at event {kill_at} of {events} ended with {ended}"
    finished.add(len(list((directory / "journal").glob("block_????"))))
    assert status(in_child(lambda: resume(directory))) == 0, f"after a kill at event {kill_at} of {events}"
assert finished == {0, 1, 2}, finished
for i in range(4):
    directory = root / f"time{i}"
    child = in_child(lambda: run(directory))
    time.sleep(duration * (i + random.Random(i).random()) / 4)
    os.kill(child, signal.SIGKILL)
    status(child)
    assert status(in_child(lambda: resume(directory))) == 0, f"after a kill at {i}/4 of {duration} s"
"""


def test_a_run_that_is_killed_anywhere_goes_on_to_the_same_bits(tmp_path):
    result = in_its_own_process(KILLED_RUNS, tmp_path)
    assert result.returncode == 0, result.stderr
