"""Runs in their own processes that are killed, or find the disk full."""

import pytest

from optima_tpu.models.checkpoints.orbax import CheckpointTensors
from optima_tpu.pipeline.journal import open_journal
from tests.support.fake_run import ASSETS, MANIFEST, activations_after, assert_same, finished_run, small_model, states_of
from tests.support.processes import python

# A limit on the size of files stands for the full disk: the same calls fail, with another error number.
FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from optima_tpu.models.checkpoints.orbax import quiet_orbax
from optima_tpu.pipeline.journal import open_journal
from optima_tpu.errors import UserError
from tests.support import fake_run

quiet_orbax()
source, big = fake_run.small_model(), np.random.default_rng(0).standard_normal((256, 256))
source.arrays["model.embed_tokens.weight"] = big
weights, masks, report, activations = fake_run.pruned_block(source, 1)
journals = []
for what in ("weights", "activations", "checkpoint"):
    journals.append(open_journal(Path(sys.argv[1]) / what, fake_run.MANIFEST, fake_run.ASSETS))
    journals[-1].save(0, *fake_run.pruned_block(source, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
writes = (lambda: journal.save(1, weights | {"big": big, "bigger": -big}, masks, report, activations),
          lambda: journal.save(1, weights, masks, report, fake_run.on_host(big[None])),
          lambda: fake_run.write_checkpoint(journal, source, fake_run.mesh(1, 1)))
for journal, write in zip(journals, writes):
    try:
        write()
    except UserError as error:
        print(error)
    assert journal.finished == {0}
"""


def test_a_full_disk_is_one_line_and_costs_no_finished_block(tmp_path):
    result = python("-W", "ignore", "-c", FULL_DISK, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    paths = ("weights/journal/block_0001", "activations/activations/block_0001", "checkpoint/checkpoint")
    for line, path in zip(result.stdout.splitlines(), paths, strict=True):
        assert line.startswith(f"could not write {tmp_path / path}: File too large; ") and "intact; make room" in line
    for what in ("weights", "activations", "checkpoint"):
        journal = open_journal(tmp_path / what, MANIFEST, ASSETS)
        assert journal.finished == {0}
        assert_same(states_of(journal), activations_after(0))
        finished_run(tmp_path / what, small_model())
        assert CheckpointTensors(tmp_path / what).names() == small_model().names()


# Run in a process of its own, which imports once and forks a child for every run that is to be killed.
KILLED_RUNS = """
import os, random, signal, sys, time
from pathlib import Path
from optima_tpu.models.checkpoints.orbax import CheckpointTensors
from optima_tpu.pipeline.journal import open_journal
from tests.support import fake_run

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
    for block in sorted(journal.finished):
        weights, masks, report, (activations,) = fake_run.pruned_block(SOURCE, block)
        for saved, expected in ((journal.weights(block), weights), (journal.masks(block), masks)):
            assert set(saved) == set(expected)
            for name in expected:
                fake_run.assert_same(saved[name], expected[name])
        assert journal.report(block) == report
    if journal.finished:
        fake_run.assert_same(fake_run.states_of(journal), activations.values)
    fake_run.finished_run(directory, SOURCE, blocks=BLOCKS)
    tensors = CheckpointTensors(directory)
    assert tensors.names() == SOURCE.names() and len(tensors.pruned()) == 2 * BLOCKS
    expected = SOURCE.arrays.copy()
    for block in range(BLOCKS):
        expected |= fake_run.pruned_block(SOURCE, block)[0]
    for name, array in tensors.load(tensors.names()).items():
        fake_run.assert_same(array, expected[name])

root, kills, moments = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
began = time.monotonic()
assert status(in_child(lambda: run(root / "whole", log=root / "count"))) == 0
duration, events = time.monotonic() - began, int((root / "count").read_text())
assert events > 50
finished = set()
for kill_at in (1 + round(0.95 * events * i / (kills - 1)) for i in range(kills)):  # Orbax's threads make the count vary a little
    directory = root / f"event{kill_at}"
    ended = status(in_child(lambda: run(directory, kill_at)))
    assert ended == -signal.SIGKILL, f"the run to be killed at event {kill_at} of {events} ended with {ended}"
    finished.add(len(list((directory / "journal").glob("block_????"))))
    assert status(in_child(lambda: resume(directory))) == 0, f"after a kill at event {kill_at} of {events}"
assert finished == {0, 1, 2}, finished
for i in range(moments):
    directory = root / f"time{i}"
    child = in_child(lambda: run(directory))
    time.sleep(duration * (i + random.Random(i).random()) / moments)
    os.kill(child, signal.SIGKILL)
    status(child)
    assert status(in_child(lambda: resume(directory))) == 0, f"after a kill at {i}/{moments} of {duration} s"
"""


@pytest.mark.parametrize(("kills", "moments"), [(5, 1), pytest.param(8, 3, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_anywhere_goes_on_to_the_same_bits(tmp_path, kills, moments):
    """Kills at ``kills`` accesses to files, and at ``moments`` moments."""
    result = python("-W", "ignore", "-c", KILLED_RUNS, tmp_path, kills, moments)
    assert result.returncode == 0, result.stderr
